"""Activations of the calibration tokens in files, and the steps of a layer that work on them batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..config import ModelConfig
from ..kernels import Kernels
from ..ring.cache import KVRing
from ..rope import angles, frequencies

BATCH = 2048  # tokens that are worked on at a time, or one window if that is longer
ITEM = np.dtype("<f4")


class Stream:
    """A (tokens, width) float32 array in a file: it is read and written in parts and need not fit into memory."""

    def __init__(self, path: Path, width: int) -> None:
        self.path, self.width = path, width

    def read(self, start: int, stop: int) -> np.ndarray:
        """Give the tokens start..stop: (stop - start, width) float32."""
        offset, count = start * self.width * ITEM.itemsize, (stop - start) * self.width
        return np.fromfile(self.path, ITEM, count, offset=offset).reshape(stop - start, self.width)

    def write(self, start: int, values: np.ndarray) -> None:
        """values: (n, width) float32"""
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            file.seek(start * self.width * ITEM.itemsize)
            values.astype(ITEM, copy=False).tofile(file)


class Forward:
    """The steps between the matrices, exact, for batches of whole windows."""

    def __init__(self, config: ModelConfig, kernels: Kernels, ctx: int) -> None:
        self.config, self.ctx, self._kernels = config, ctx, kernels
        self._ring = KVRing(replace(config, n_layers=1), ctx, ctx, 0, "f32")
        window = angles(frequencies(config), np.arange(ctx))
        self._turns = (*window, *window)

    def batches(self, tokens: int) -> Iterator[tuple[int, int]]:
        """Split the tokens into (start, stop) of whole windows."""
        step = max(BATCH // self.ctx, 1) * self.ctx
        for start in range(0, tokens, step):
            yield start, min(start + step, tokens)

    def normalized(self, x: np.ndarray, gain: np.ndarray) -> np.ndarray:
        """x, returned: (n, dim) float32"""
        out = np.empty_like(x)
        self._kernels.rmsnorm(x, gain, self.config.norm_eps, out)
        return out

    def attended(
        self, x: np.ndarray, matrices: Sequence[np.ndarray], biases: Sequence[np.ndarray | None]
    ) -> np.ndarray:
        """Attend within each window.

        x: (n, dim) float32, whole windows; matrices, biases: of queries, keys and values
        returns: (n, n_heads * head_dim) float32
        """
        q, k, v = (product(x, w, bias) for w, bias in zip(matrices, biases, strict=True))
        out, q_sink = np.empty_like(q), np.empty_like(q[: self.ctx])
        for start in range(0, len(x), self.ctx):
            rows = slice(start, start + self.ctx)
            self._ring.reset()
            self._ring.note_turns(*self._turns[:2])
            self._kernels.rope_append(q[rows], q_sink, k[rows], v[rows], self._turns, self._ring, 0)
            self._kernels.attention(q[rows], q_sink, self._ring, 0, out[rows])
        return out

    def gated(self, x: np.ndarray, matrices: Sequence[np.ndarray], biases: Sequence[np.ndarray | None]) -> np.ndarray:
        """x: (n, dim) float32; matrices, biases: w1 and w3; returns: (n, hidden_dim) float32"""
        gate, up = (product(x, w, bias) for w, bias in zip(matrices, biases, strict=True))
        self._kernels.swiglu(gate, up)
        return gate


def product(x: np.ndarray, w: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """x: (n, in) float32; w: (out, in) float32; returns: (n, out) float32"""
    y = x @ w.T
    if bias is not None:
        y += bias
    return y
