"""The groups of a packed matrix that are no trits: a sparse product beside the packed one, whose levels are 0 there."""

from __future__ import annotations

import numpy as np

from formats import Tensor, TensorError
from formats.codecs.trit_extras import exception_weights

_AT_ONCE = 1 << 20  # products held in memory


class Exceptions:
    """The exceptions of one trit matrix.

    Raises TensorError if their places do not lie in the matrix.
    """

    def __init__(self, tensor: Tensor) -> None:
        try:
            rows, starts, self._values = exception_weights(tensor.parts, tensor.shape)
        except ValueError as error:
            raise TensorError(tensor.path, f"{error}; convert the model again", tensor.name) from error
        self._rows, self._firsts = np.unique(rows, return_index=True)
        self._columns = np.minimum(starts[:, None] + np.arange(16), tensor.shape[1] - 1)

    def add_product(self, x: np.ndarray, out: np.ndarray) -> None:
        """Add what the exceptions contribute. x: (n, in) float32; out: (n, out) float32"""
        step = max(1, _AT_ONCE // self._values.size)
        for start in range(0, len(x), step):
            tokens = x[start : start + step].T
            sums = tokens[self._columns[:, 0]] * self._values[:, :1]
            for j in range(1, self._values.shape[1]):  # in this order, so that no sum depends on the number of tokens
                sums += tokens[self._columns[:, j]] * self._values[:, j : j + 1]
            out[start : start + step, self._rows] += np.add.reduceat(sums, self._firsts, axis=0).T
