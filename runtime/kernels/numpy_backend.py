"""The reference backend: plain NumPy, slow and obvious. Weights are expanded for each product and thrown away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from formats import Tensor, dequantize

from ..ring.cache import KVRing
from ..ring.codecs import Plane
from .base import GROUP, Decoders, Turns, stays_codes, takes_int8


def quantize_activations(x: np.ndarray, size: int = GROUP) -> np.ndarray:
    """Round to int8 in groups of `size` with one scale each (largest magnitude / 127), and back.

    x: (n, in) float32
    returns: (n, in) float32
    """
    n, width = x.shape
    groups = np.zeros((n, -(-width // size), size), np.float32)
    groups.reshape(n, -1)[:, :width] = x
    top = np.abs(groups).max(axis=2, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    levels = np.rint(groups * inverse)
    return (levels * (top / np.float32(127))).reshape(n, -1)[:, :width]


def round_queries(x: np.ndarray, keys: Plane) -> np.ndarray:
    """Round queries to int8 as `quantize_activations` does, in the groups that keys are stored in, rotated like them.

    x: (n_kv_heads, ..., head_dim) float32; returns: as x
    """
    rows = keys.turn(x.reshape(len(x), -1, keys.width), queries=True)
    rounded = quantize_activations(rows.reshape(-1, keys.width), keys.group).reshape(rows.shape)
    return keys.turn_back(rounded, queries=True).reshape(x.shape)


def level_codes(levels: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """NF4 levels as the 8-bit integers that products with int8 activations use: levels = codes * step, nearly.

    Of 512 steps the one with the least error is taken: 0.2 % of the largest level, in the mean of all.
    levels: (16,) float32
    returns: codes (16,) int8, step
    """
    top = np.abs(levels).max()
    if not 0 < top < np.inf:
        return np.zeros(len(levels), np.int8), top
    parts = np.linspace(96, 127, 512, dtype=np.float32)[:, None]  # of the largest level
    codes = np.rint(levels / top * parts)
    best = np.square(codes / parts - levels / top).sum(axis=1).argmin()
    return codes[best].astype(np.int8), top / parts[best, 0]


def int8_weights(tensor: Tensor) -> np.ndarray:
    """The weights that a product with int8 activations uses: the file's, NF4 with its levels rounded to 8 bits.

    returns: (out, in) float32
    """
    if tensor.codec == "nf4":
        codes, step = level_codes(tensor.parts["levels"])
        tensor = replace(tensor, parts={**tensor.parts, "levels": codes * step})
    return dequantize(tensor)


class NumpyLinear:
    def __init__(self, tensors: Sequence[Tensor], biases: Sequence[np.ndarray | None], int8: bool) -> None:
        self.tensors, self.biases, self.int8 = list(tensors), list(biases), int8
        self.nbytes = sum(t.nbytes for t in tensors)

    def __call__(self, x: np.ndarray, outs: Sequence[np.ndarray], add: bool = False) -> None:
        rounded = quantize_activations(x) if self.int8 else x
        for tensor, bias, out in zip(self.tensors, self.biases, outs, strict=True):
            product = rounded @ int8_weights(tensor).T if self.int8 and takes_int8(tensor) else x @ dequantize(tensor).T
            if bias is not None:
                product += bias
            out[...] = out + product if add else product


class NumpyKernels:
    """See `Kernels` for the contracts."""

    name = "numpy"

    def __init__(self, n_threads: int | None = None, int8: bool = True) -> None:
        self.int8, self.n_threads = int8, 1

    def describe(self) -> str:
        return f"numpy {np.__version__}, the reference backend: exact and slow"

    def use_threads(self, n_threads: int) -> None:
        pass  # NumPy's own BLAS has as many as it likes

    def linear(self, tensors: Sequence[Tensor], biases: Sequence[np.ndarray | None]) -> NumpyLinear:
        return NumpyLinear(tensors, biases, self.int8)

    def repeat(self, work: Callable[[], object], ring: KVRing) -> None:
        work()

    def rmsnorm(self, x: np.ndarray, gain: np.ndarray, eps: float, out: np.ndarray) -> None:
        mean = np.mean(np.square(x), axis=1, keepdims=True, dtype=np.float32)
        np.multiply(x / np.sqrt(mean + np.float32(eps)), gain, out=out)

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> None:
        gate *= up / (1 + np.exp(np.minimum(-gate, 88)))

    def rope(self, q: np.ndarray, q_sink: np.ndarray, k: np.ndarray, turns: Turns, ring: KVRing) -> None:
        cos, sin, cos_sink, sin_sink = turns
        q_sink[...] = rotate(q, cos_sink, sin_sink)
        q[...] = rotate(q, cos, sin)
        k[...] = rotate(k, cos, sin)

    def append(self, k: np.ndarray, v: np.ndarray, ring: KVRing, layer: int) -> None:
        slots = ring.slot(np.arange(ring.length, ring.length + len(k)))
        ring.layers[layer].keys.write(slots, k)
        ring.layers[layer].values.write(slots, v)

    def rope_append(
        self, q: np.ndarray, q_sink: np.ndarray, k: np.ndarray, v: np.ndarray, turns: Turns, ring: KVRing, layer: int
    ) -> None:
        self.rope(q, q_sink, k, turns, ring)
        self.append(k, v, ring, layer)

    def attention(
        self,
        q: np.ndarray,
        q_sink: np.ndarray,
        ring: KVRing,
        layer: int,
        out: np.ndarray,
        decoders: Decoders = (None, None),
    ) -> None:
        config, n = ring.config, len(q)
        shape = (n, config.n_kv_heads, -1, config.head_dim)
        scale = 1 / np.sqrt(np.float32(config.head_dim))
        window, near = (scale * x.reshape(shape).transpose(1, 2, 0, 3) for x in (q, q_sink))
        plane = ring.layers[layer].keys
        if self.int8 and stays_codes(plane, decoders[0], is_keys=True):
            window, near = round_queries(window, plane), round_queries(near, plane)
        # A running maximum, sum and mean of values (Milakov and Gimelshein, 2018); axes: kv head, head, token, number
        top = np.full((*window.shape[:3], 1), -np.inf, np.float32)
        total, mean = np.zeros_like(top), np.zeros_like(window)
        for positions, seen in ring.blocks(n):
            keys, values = self._block(ring, layer, positions, decoders)
            scores = (near if positions[0] < ring.sinks else window) @ keys[:, None].swapaxes(2, 3)
            scores = np.where(seen, scores, -np.inf)
            before, top = top, np.maximum(top, scores.max(axis=3, keepdims=True))
            finite = np.maximum(top, np.finfo(np.float32).min)  # a token may see nothing of a block
            keep, weights = np.exp(before - finite), np.exp(scores - finite)
            total = total * keep + weights.sum(axis=3, keepdims=True)
            mean = mean * keep + weights @ values[:, None]
        out[...] = (mean / total).transpose(2, 0, 1, 3).reshape(n, -1)

    def _block(
        self, ring: KVRing, layer: int, positions: np.ndarray, decoders: Decoders
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keys and values of some tokens, decoded. returns: two (n_kv_heads, n, head_dim) float32"""
        slots = ring.slot(positions)
        keys, values = ring.layers[layer].keys.read(slots), ring.layers[layer].values.read(slots)
        of_keys, of_values = decoders
        if of_keys:
            keys = of_keys(keys[0])
            if of_keys.rotated:
                cos, sin = ring.turns[:, slots]
                keys = rotate(keys.swapaxes(0, 1), cos, sin).reshape(len(slots), *keys[:, 0].shape).swapaxes(0, 1)
        return keys, of_values(values[0]) if of_values else values

    def close(self) -> None:
        pass


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x: (n, heads * head_dim); cos, sin: (n, head_dim / 2). Half-split pairs, as Hugging Face orders them."""
    n, half = cos.shape
    low, high = x.reshape(n, -1, 2, half).transpose(2, 0, 1, 3)
    c, s = cos[:, None], sin[:, None]
    return np.stack((low * c - high * s, high * c + low * s), axis=2).reshape(n, -1)
