"""The reference backend: plain NumPy, slow and obvious. Weights are expanded for each product and thrown away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from formats import Tensor, dequantize

from ..cache import KVRing
from .base import ACT_BLOCK, GROUPED


def quantize_activations(x: np.ndarray) -> np.ndarray:
    """Round to int8 in blocks of 80 with one scale each (largest magnitude / 127), and back.

    x: (n, in) float32
    returns: (n, in) float32
    """
    n, width = x.shape
    blocks = np.zeros((n, -(-width // ACT_BLOCK), ACT_BLOCK), np.float32)
    blocks.reshape(n, -1)[:, :width] = x
    top = np.abs(blocks).max(axis=2, keepdims=True)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    levels = np.rint(blocks * inverse)
    return (levels * (top / np.float32(127))).reshape(n, -1)[:, :width]


class NumpyLinear:
    def __init__(self, tensors: Sequence[Tensor], biases: Sequence[np.ndarray | None], int8: bool) -> None:
        self.tensors, self.biases, self.int8 = list(tensors), list(biases), int8
        self.nbytes = sum(t.nbytes for t in tensors)

    def __call__(self, x: np.ndarray, outs: Sequence[np.ndarray], add: bool = False) -> None:
        rounded = quantize_activations(x) if self.int8 else x
        for tensor, bias, out in zip(self.tensors, self.biases, outs, strict=True):
            product = (rounded if tensor.codec in GROUPED else x) @ dequantize(tensor).T
            if bias is not None:
                product += bias
            out[...] = out + product if add else product


class NumpyKernels:
    """See `Kernels` for the contracts."""

    name = "numpy"

    def __init__(self, n_threads: int | None = None, int8: bool = True) -> None:
        self.int8 = int8

    def describe(self) -> str:
        return f"numpy {np.__version__}, the reference backend: exact and slow"

    def linear(self, tensors: Sequence[Tensor], biases: Sequence[np.ndarray | None]) -> NumpyLinear:
        return NumpyLinear(tensors, biases, self.int8)

    def rmsnorm(self, x: np.ndarray, gain: np.ndarray, eps: float, out: np.ndarray) -> None:
        mean = np.mean(np.square(x), axis=1, keepdims=True, dtype=np.float32)
        np.multiply(x / np.sqrt(mean + np.float32(eps)), gain, out=out)

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> None:
        gate *= up / (1 + np.exp(np.minimum(-gate, 88)))

    def rope_append(
        self,
        q: np.ndarray,
        q_sink: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        turns: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
        ring: KVRing,
        layer: int,
    ) -> None:
        cos, sin, cos_sink, sin_sink = turns
        q_sink[...] = _rotate(q, cos_sink, sin_sink)
        q[...] = _rotate(q, cos, sin)
        k[...] = _rotate(k, cos, sin)
        slots = ring.slot(np.arange(ring.length, ring.length + len(k)))
        head_dim = ring.config.head_dim
        for plane, new in ((ring.layers[layer].keys, k), (ring.layers[layer].values, v)):
            plane[:, slots, :head_dim] = new.reshape(len(new), -1, head_dim).transpose(1, 0, 2)

    def attention(self, q: np.ndarray, q_sink: np.ndarray, ring: KVRing, layer: int, out: np.ndarray) -> None:
        config = ring.config
        group = config.n_heads // config.n_kv_heads
        shape = (len(q), config.n_kv_heads, group, config.head_dim)
        scale = np.float32(1 / np.sqrt(config.head_dim))
        for i, (window, near, target) in enumerate(
            zip(q.reshape(shape), q_sink.reshape(shape), out.reshape(shape), strict=True)
        ):
            positions = ring.visible(ring.length + i)
            slots, n_sinks = ring.slot(positions), int((positions < ring.sinks).sum())
            keys = ring.layers[layer].keys[:, slots, : config.head_dim].astype(np.float32)
            values = ring.layers[layer].values[:, slots, : config.head_dim].astype(np.float32)
            scores = window @ keys.transpose(0, 2, 1)
            scores[:, :, :n_sinks] = near @ keys[:, :n_sinks].transpose(0, 2, 1)
            scores = np.exp(scale * (scores - scores.max(axis=2, keepdims=True)))
            target[...] = scores / scores.sum(axis=2, keepdims=True) @ values

    def close(self) -> None:
        pass


def _rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """x: (n, heads * head_dim); cos, sin: (n, head_dim / 2). Half-split pairs, as Hugging Face orders them."""
    n, half = cos.shape
    low, high = x.reshape(n, -1, 2, half).transpose(2, 0, 1, 3)
    c, s = cos[:, None], sin[:, None]
    return np.stack((low * c - high * s, high * c + low * s), axis=2).reshape(n, -1)
