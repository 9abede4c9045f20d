"""What a layer does between its matrix products, compiled by Numba: norm, SwiGLU, RoPE, attention over the ring."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from . import simd
from .compiling import task
from .simd import fma, load_f32, read_f32, read_i64, splat_f32, store_f32

SLOTS = 64  # cached tokens in one attention block
MAX_HEAD_DIM = 512
MAX_GROUP = 64  # query heads that share a key-value head


@njit(forceinline=True)
def _word(base, index):
    return read_i64(base, index * 8)


@njit(forceinline=True)
def _exp(x):
    """e^x for x <= 88, relative error below 2e-7: x = n ln 2 + r, a polynomial in r (Cephes expf), times 2^n."""
    x = simd.maximum(x, splat_f32(np.float32(-87.0)))
    whole = simd.round_to_i32(x * np.float32(1.44269504))
    n = simd.to_f32(whole)
    r = fma(n, splat_f32(np.float32(-0.693359375)), x)
    r = fma(n, splat_f32(np.float32(2.12194440e-4)), r)
    p = splat_f32(np.float32(1.9875691500e-4))
    p = fma(p, r, splat_f32(np.float32(1.3981999507e-3)))
    p = fma(p, r, splat_f32(np.float32(8.3334519073e-3)))
    p = fma(p, r, splat_f32(np.float32(4.1665795894e-2)))
    p = fma(p, r, splat_f32(np.float32(1.6666665459e-1)))
    p = fma(p, r, splat_f32(np.float32(5.0000001201e-1)))
    p = fma(p, r * r, r) + np.float32(1.0)
    return p * simd.bits_to_f32((whole + 127) << 23)


# ==== RMSNorm (Zhang and Sennrich, 2019) and SwiGLU (Shazeer, 2020) ====

NORM_X, NORM_GAIN, NORM_OUT, NORM_DIM, NORM_EPS = range(5)


@task
def rmsnorm(job, token):
    """out = x / sqrt(mean(x^2) + eps) * gain for one token."""
    dim = _word(job, NORM_DIM)
    x, out = _word(job, NORM_X) + token * dim * 4, _word(job, NORM_OUT) + token * dim * 4
    whole = dim // 16 * 16
    squares = splat_f32(np.float32(0.0))
    for i in range(0, whole, 16):
        v = load_f32(x, i * 4)
        squares = fma(v, v, squares)
    total = simd.sum_lanes(squares)
    for i in range(whole, dim):
        total += read_f32(x, i * 4) * read_f32(x, i * 4)
    scale = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(dim) + read_f32(job, NORM_EPS * 8)))
    gain = _word(job, NORM_GAIN)
    for i in range(0, whole, 16):
        store_f32(out, i * 4, load_f32(x, i * 4) * splat_f32(scale) * load_f32(gain, i * 4))
    for i in range(whole, dim):
        simd.write_f32(out, i * 4, read_f32(x, i * 4) * scale * read_f32(gain, i * 4))


GLU_GATE, GLU_UP, GLU_DIM = range(3)


@njit(forceinline=True)
def _silu_times(gate, up):
    negative = simd.minimum(gate * np.float32(-1.0), splat_f32(np.float32(88.0)))
    return gate / (_exp(negative) + np.float32(1.0)) * up


@task
def swiglu(job, token):
    """gate = silu(gate) * up for one token, in place."""
    dim = _word(job, GLU_DIM)
    gate, up = _word(job, GLU_GATE) + token * dim * 4, _word(job, GLU_UP) + token * dim * 4
    whole = dim // 16 * 16
    for i in range(0, whole, 16):
        store_f32(gate, i * 4, _silu_times(load_f32(gate, i * 4), load_f32(up, i * 4)))
    for i in range(whole, dim):
        one = _silu_times(splat_f32(read_f32(gate, i * 4)), splat_f32(read_f32(up, i * 4)))
        simd.write_f32(gate, i * 4, simd.first_lane(one))


# ==== RoPE (Su et al., 2021) and the append to the ring ====

(AT_N, AT_HEADS, AT_KV_HEADS, AT_HEAD_DIM, AT_PADDED, AT_SLOTS, AT_SINKS, AT_WINDOW, AT_START) = range(9)
(AT_Q, AT_Q_SINK, AT_K, AT_V, AT_COS, AT_SIN, AT_COS_SINK, AT_SIN_SINK) = range(9, 17)
(AT_KEYS, AT_VALUES, AT_OUT, AT_SCALE, AT_WORDS) = range(17, 22)


@njit(forceinline=True)
def _slot(job, position):
    """The ring slot of a position: sinks keep theirs, the others go round."""
    sinks = _word(job, AT_SINKS)
    return position if position < sinks else sinks + (position - sinks) % (_word(job, AT_SLOTS) - sinks)


@njit(forceinline=True)
def _rotate(source, target, cos, sin, head_dim):
    """Half-split rotation, as Hugging Face orders the rows: (a, b) -> (a cos - b sin, b cos + a sin)."""
    half = head_dim // 2
    for i in range(half):
        a, b = read_f32(source, i * 4), read_f32(source, (half + i) * 4)
        c, s = read_f32(cos, i * 4), read_f32(sin, i * 4)
        simd.write_f32(target, i * 4, a * c - b * s)
        simd.write_f32(target, (half + i) * 4, b * c + a * s)


@njit(forceinline=True)
def _append(wide, target, slot, source, head_dim, padded, scratch):
    """Store one head's vector as float16 (wide: float32), padded with zeros to whole vectors."""
    for i in range(head_dim):
        simd.write_f32(scratch, i * 4, read_f32(source, i * 4))
    for i in range(head_dim, padded):
        simd.write_f32(scratch, i * 4, np.float32(0.0))
    for i in range(0, padded, 16):
        if wide:
            store_f32(target, (slot * padded + i) * 4, load_f32(scratch, i * 4))
        else:
            simd.store_f32_as_f16(target, (slot * padded + i) * 2, load_f32(scratch, i * 4))


@njit(forceinline=True)
def _load(wide, plane, index):
    """Sixteen cached numbers."""
    if wide:
        return load_f32(plane, index * 4)
    return simd.load_f16_as_f32(plane, index * 2)


@njit(forceinline=True)
def _rope_append(wide, job, token):
    """Rotate one token's queries and keys in place and put its keys and values into the ring.

    Once tokens have slid out, the queries are also rotated for a position that is nearer by as many tokens: with
    these the sinks are read, so that they stay as close as they would be in a context without the lost tokens."""
    heads, kv_heads, head_dim = _word(job, AT_HEADS), _word(job, AT_KV_HEADS), _word(job, AT_HEAD_DIM)
    slots, padded, half = _word(job, AT_SLOTS), _word(job, AT_PADDED), head_dim * 2
    position = _word(job, AT_START) + token
    slot = _slot(job, position)
    cos, sin = _word(job, AT_COS) + token * half, _word(job, AT_SIN) + token * half
    scratch = simd.scratch_32k()
    for head in range(heads):
        q = _word(job, AT_Q) + (token * heads + head) * head_dim * 4
        if position >= _word(job, AT_WINDOW):
            near = _word(job, AT_Q_SINK) + (token * heads + head) * head_dim * 4
            cos_sink, sin_sink = _word(job, AT_COS_SINK) + token * half, _word(job, AT_SIN_SINK) + token * half
            _rotate(q, near, cos_sink, sin_sink, head_dim)
        _rotate(q, q, cos, sin, head_dim)
    for head in range(kv_heads):
        at = (token * kv_heads + head) * head_dim * 4
        plane = head * slots * padded * (4 if wide else 2)
        _rotate(_word(job, AT_K) + at, _word(job, AT_K) + at, cos, sin, head_dim)
        _append(wide, _word(job, AT_KEYS) + plane, slot, _word(job, AT_K) + at, head_dim, padded, scratch)
        _append(wide, _word(job, AT_VALUES) + plane, slot, _word(job, AT_V) + at, head_dim, padded, scratch)


# ==== Attention over the ring, block by block with a running maximum and sum (Milakov and Gimelshein, 2018) ====

# Scratch of one query head, in bytes: the padded query, the weighted values, then maximum and sum.
_QUERY, _VALUES, _MAXIMUM, _SUM, _HEAD_BYTES = 0, 2048, 4096, 4100, 4160


@njit(forceinline=True)
def _attend_block(wide, job, keys, values, first, count, head, scores):
    """Add `count` cached tokens from position `first` on to one head's running result."""
    padded, sinks, slots = _word(job, AT_PADDED), _word(job, AT_SINKS), _word(job, AT_SLOTS)
    scale = read_f32(job, AT_SCALE * 8)
    start = _slot(job, first)
    slot = start
    for i in range(count):
        dot = splat_f32(np.float32(0.0))
        for d in range(0, padded, 16):
            key = _load(wide, keys, slot * padded + d)
            dot = fma(key, load_f32(head, _QUERY + d * 4), dot)
        simd.write_f32(scores, i * 4, simd.sum_lanes(dot) * scale)
        slot = slot + 1 if slot + 1 < slots else sinks
    for i in range(count, (count + 15) // 16 * 16):
        simd.write_f32(scores, i * 4, np.float32(-np.inf))
    top = splat_f32(read_f32(head, _MAXIMUM))
    for i in range(0, count, 16):
        top = simd.maximum(top, load_f32(scores, i * 4))
    largest = simd.max_lanes(top)
    # Nothing is there before the first block: its maximum is -inf and its share is nil.
    before = splat_f32(read_f32(head, _MAXIMUM) - largest)
    keep = simd.first_lane(_exp(before)) if read_f32(head, _MAXIMUM) > np.float32(-np.inf) else np.float32(0.0)
    weights = splat_f32(np.float32(0.0))
    for i in range(0, count, 16):
        weight = _exp(load_f32(scores, i * 4) - splat_f32(largest))
        store_f32(scores, i * 4, weight)
    for i in range(count, (count + 15) // 16 * 16):
        simd.write_f32(scores, i * 4, np.float32(0.0))
    for i in range(0, count, 16):
        weights = weights + load_f32(scores, i * 4)
    simd.write_f32(head, _MAXIMUM, largest)
    simd.write_f32(head, _SUM, read_f32(head, _SUM) * keep + simd.sum_lanes(weights))
    for d in range(0, padded, 16):
        total = load_f32(head, _VALUES + d * 4) * splat_f32(keep)
        slot = start
        for i in range(count):
            value = _load(wide, values, slot * padded + d)
            total = fma(splat_f32(read_f32(scores, i * 4)), value, total)
            slot = slot + 1 if slot + 1 < slots else sinks
        store_f32(head, _VALUES + d * 4, total)


@njit(forceinline=True)
def _attend(wide, job, head, kv_head, position, query, near, out, scratch):
    """One query head at one position over all that it may see: the sinks, then the window."""
    padded, head_dim, sinks = _word(job, AT_PADDED), _word(job, AT_HEAD_DIM), _word(job, AT_SINKS)
    plane = kv_head * _word(job, AT_SLOTS) * padded * (4 if wide else 2)
    keys, values = _word(job, AT_KEYS) + plane, _word(job, AT_VALUES) + plane
    zero = splat_f32(np.float32(0.0))
    for d in range(0, padded, 16):
        store_f32(scratch, _QUERY + d * 4, zero)
        store_f32(scratch, _VALUES + d * 4, zero)
    simd.write_f32(scratch, _MAXIMUM, np.float32(-np.inf))
    simd.write_f32(scratch, _SUM, np.float32(0.0))
    for i in range(head_dim):
        simd.write_f32(scratch, _QUERY + i * 4, read_f32(near, i * 4))
    scores = scratch + _HEAD_BYTES
    visible = min(sinks, position + 1)
    for first in range(0, visible, SLOTS):
        _attend_block(wide, job, keys, values, first, min(SLOTS, visible - first), scratch, scores)
    if query != near:
        for i in range(head_dim):
            simd.write_f32(scratch, _QUERY + i * 4, read_f32(query, i * 4))
    oldest = max(sinks, position + 1 - (_word(job, AT_WINDOW) - sinks))
    for first in range(oldest, position + 1, SLOTS):
        _attend_block(wide, job, keys, values, first, min(SLOTS, position + 1 - first), scratch, scores)
    share = np.float32(1.0) / read_f32(scratch, _SUM)
    for i in range(head_dim):
        simd.write_f32(out, i * 4, read_f32(scratch, _VALUES + i * 4) * share)


@njit(forceinline=True)
def _attention(wide, job, unit):
    """All query heads of one key-value head for one token; units count key-value heads fastest."""
    heads, kv_heads, head_dim = _word(job, AT_HEADS), _word(job, AT_KV_HEADS), _word(job, AT_HEAD_DIM)
    token, kv_head = unit // kv_heads, unit % kv_heads
    position = _word(job, AT_START) + token
    scratch = simd.scratch_32k()
    group = heads // kv_heads
    for head in range(kv_head * group, (kv_head + 1) * group):
        at = (token * heads + head) * head_dim * 4
        query = _word(job, AT_Q) + at
        near = _word(job, AT_Q_SINK) + at if position >= _word(job, AT_WINDOW) else query
        _attend(wide, job, head, kv_head, position, query, near, _word(job, AT_OUT) + at, scratch)


# ==== Tasks: one for each codec of the ring ====


@task
def rope_append_f16(job, token):
    _rope_append(False, job, token)


@task
def rope_append_f32(job, token):
    _rope_append(True, job, token)


@task
def attention_f16(job, unit):
    _attention(False, job, unit)


@task
def attention_f32(job, unit):
    _attention(True, job, unit)


RING_TASKS = {"f16": (rope_append_f16, attention_f16), "f32": (rope_append_f32, attention_f32)}
