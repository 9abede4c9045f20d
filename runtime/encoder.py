"""The quantisers that converters use: compiled, on all cores; the slow references where Numba is not to be had."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from formats.codecs.base import Rows
from formats.codecs.best_units import encode_best_reference
from formats.codecs.trit_codec import Encode, Encoded, encode_reference

ENCODERS: dict[str, Encode] = {"v2": encode_reference, "best": encode_best_reference}


@contextmanager
def fast_encoder(n_threads: int | None = None, name: str = "v2") -> Iterator[Encode]:
    """Give the quantiser to pass to `convert`; the threads end with the block.

    n_threads: default is every core that this process may use. The result does not depend on it.
    name: "v2" quantises as tritllm v2 does, byte for byte; "best" fits the units to each matrix
    """
    try:
        from .kernels.cores import usable_cores
        from .kernels.numba_best import encode_best
        from .kernels.numba_encode import encode
    except ImportError:
        yield ENCODERS[name]
        return
    compiled = {"v2": encode, "best": encode_best}[name]
    with ThreadPoolExecutor(n_threads or usable_cores(), "trit-encode") as pool:

        def run(w: np.ndarray | Rows, depths: Sequence[int], dtype: str = "float32") -> Encoded:
            return compiled(w, depths, dtype, pool.map)

        try:
            yield run
        finally:
            pool.shutdown(cancel_futures=True)
