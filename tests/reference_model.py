"""The Llama forward pass in float64 NumPy: no cache, no kernels, every position at once. Slow and obvious.

It shares no code with runtime/, so that it can judge it. Names and shapes are those of the .trit tensor
table: weights (out, in), rows of wq and wk in half-split order. `config` is the header's "config" dictionary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Stored = Callable[[Array], Array]


def frequencies(config: Mapping[str, Any]) -> Array:
    """Return the rotation per position of each pair. out: (head_dim / 2,)"""
    freq = config["rope_theta"] ** (-np.arange(0, config["head_dim"], 2) / config["head_dim"])
    scaling = config["rope_scaling"]
    if scaling is None:
        return freq
    if scaling["type"] == "linear":
        return freq / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_seq_len"] * freq / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return kept * freq + (1 - kept) * freq / scaling["factor"]


def rotate(x: Array, positions: Array, freq: Array) -> Array:
    """Rotate each half-split pair. x: (n, heads, head_dim), positions: (n,), out: as x"""
    angle = positions[:, None, None] * freq
    first, second = np.split(x, 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def softmax(x: Array) -> Array:
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def linear(weights: Mapping[str, Array], name: str, x: Array) -> Array:
    """weight: (out, in), x: (n, in), out: (n, out)"""
    bias = weights.get(f"{name}.bias")
    out = x @ weights[name].T
    return out if bias is None else out + bias


def exact(x: Array) -> Array:
    """Store a number as it is."""
    return x


def half(x: Array) -> Array:
    """Round as a cache in float16 does."""
    return x.astype(np.float16).astype(np.float64)


def gelu(x: Array, kind: str) -> Array:
    """Apply "gelu" (with erf) or "gelu_tanh"."""
    if kind == "gelu_tanh":
        return x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2
    assert kind == "gelu"
    return x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2


def cached(weights: Mapping[str, Array], module: Mapping[str, Any] | None, x: Array, stored: Stored) -> Array:
    """Give what attention sees of keys or values: decoded codes where there is a module. x: (n, heads, head_dim)"""
    if module is None:
        return stored(x)
    name = f"layers.{module['layer']}.kv.{module['side']}."
    seen = linear(weights, name + "decoder", stored(linear(weights, name + "encoder", x.reshape(len(x), -1))))
    if module["hidden"] is not None:
        seen = linear(weights, name + "decoder2", gelu(seen, module["activation"]))
    return seen.reshape(x.shape)


def attention(q: Array, keys: Array, values: Array, freq: Array, capacity: int | None, sinks: int) -> Array:
    """Attend causally; with a capacity, to the sinks and the newest tokens only, as StreamingLLM does.

    q: (n, n_heads, head_dim) not yet rotated; keys, values: (n, n_kv_heads, head_dim), the keys rotated
    out: (n, n_heads * head_dim)
    The query at p sees the positions below `sinks` and the newest `capacity - sinks` up to p. Where tokens
    have been dropped, distances to the sinks are counted as if they had never been there.
    """
    n, n_heads, head_dim = q.shape
    position = np.arange(n)
    group = n_heads // keys.shape[1]
    keys, values = np.repeat(keys, group, axis=1), np.repeat(values, group, axis=1)
    dropped = np.zeros(n) if capacity is None else np.maximum(position + 1 - capacity, 0)
    scores = np.einsum("qhd,khd->hqk", rotate(q, position, freq), keys)
    scores[:, :, :sinks] = np.einsum("qhd,khd->hqk", rotate(q, position - dropped, freq), keys[:sinks])
    visible = position[None, :] <= position[:, None]
    visible &= (position < sinks) | (position[None, :] >= sinks + dropped[:, None])
    probability = softmax(np.where(visible, scores / math.sqrt(head_dim), -np.inf))
    return np.einsum("hqk,khd->qhd", probability, values).reshape(n, n_heads * head_dim)


def forward(
    weights: Mapping[str, Array],
    config: Mapping[str, Any],
    ids: Sequence[int],
    capacity: int | None = None,
    sinks: int = 4,
    stored: Stored = exact,
    kv_modules: Sequence[Mapping[str, Any]] = (),
) -> Array:
    """Return the logits of every position, from a fresh context. out: (n, vocab_size)

    stored: what a cache does to rotated keys and to values: `exact` or `half`
    kv_modules: learned projections, as in the header; their tensors are in `weights`"""
    n, eps, freq = len(ids), config["norm_eps"], frequencies(config)
    modules = {(module["layer"], module["side"]): module for module in kv_modules}
    position = np.arange(n)
    x = weights["tok_embeddings"][np.asarray(ids)]
    for i in range(config["n_layers"]):
        layer = f"layers.{i}."
        h = rms_norm(x, weights[layer + "attention_norm"], eps)
        q = linear(weights, layer + "wq", h).reshape(n, config["n_heads"], -1)
        k = linear(weights, layer + "wk", h).reshape(n, config["n_kv_heads"], -1)
        v = linear(weights, layer + "wv", h).reshape(n, config["n_kv_heads"], -1)
        of_keys = modules.get((i, "k"))
        if of_keys is not None and of_keys["rope"] == "before":
            keys = rotate(cached(weights, of_keys, k, stored), position, freq)
        else:
            keys = cached(weights, of_keys, rotate(k, position, freq), stored)
        values = cached(weights, modules.get((i, "v")), v, stored)
        x = x + linear(weights, layer + "wo", attention(q, keys, values, freq, capacity, sinks))
        h = rms_norm(x, weights[layer + "ffn_norm"], eps)
        gate, up = linear(weights, layer + "w1", h), linear(weights, layer + "w3", h)
        x = x + linear(weights, layer + "w2", gate / (1 + np.exp(-gate)) * up)
    head = "tok_embeddings" if config["tied_embeddings"] else "output"
    return linear(weights, head, rms_norm(x, weights["norm"], eps))
