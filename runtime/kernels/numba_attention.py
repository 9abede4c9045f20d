"""RoPE, the append to the ring, and attention over it, compiled by Numba."""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .numba_math import exp, word
from .simd import fma, load_f32, read_f32, splat_f32, store_f32
from .words import (
    AT_COS,
    AT_COS_SINK,
    AT_HEAD_DIM,
    AT_HEADS,
    AT_K,
    AT_KEYS,
    AT_KV_HEADS,
    AT_OUT,
    AT_PADDED,
    AT_Q,
    AT_Q_SINK,
    AT_SCALE,
    AT_SIN,
    AT_SIN_SINK,
    AT_SINKS,
    AT_SLOTS,
    AT_START,
    AT_V,
    AT_VALUES,
    AT_WINDOW,
)

SLOTS = 64  # cached tokens in one attention block

# ==== RoPE (Su et al., 2021) and the append to the ring ====


@njit(forceinline=True)
def _slot(job, position):
    """The ring slot of a position: sinks keep theirs, the others go round."""
    sinks = word(job, AT_SINKS)
    return position if position < sinks else sinks + (position - sinks) % (word(job, AT_SLOTS) - sinks)


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
    heads, kv_heads, head_dim = word(job, AT_HEADS), word(job, AT_KV_HEADS), word(job, AT_HEAD_DIM)
    slots, padded, half = word(job, AT_SLOTS), word(job, AT_PADDED), head_dim * 2
    position = word(job, AT_START) + token
    slot = _slot(job, position)
    cos, sin = word(job, AT_COS) + token * half, word(job, AT_SIN) + token * half
    scratch = simd.scratch_32k()
    for head in range(heads):
        q = word(job, AT_Q) + (token * heads + head) * head_dim * 4
        if position >= word(job, AT_WINDOW):
            near = word(job, AT_Q_SINK) + (token * heads + head) * head_dim * 4
            cos_sink, sin_sink = word(job, AT_COS_SINK) + token * half, word(job, AT_SIN_SINK) + token * half
            _rotate(q, near, cos_sink, sin_sink, head_dim)
        _rotate(q, q, cos, sin, head_dim)
    for head in range(kv_heads):
        at = (token * kv_heads + head) * head_dim * 4
        plane = head * slots * padded * (4 if wide else 2)
        _rotate(word(job, AT_K) + at, word(job, AT_K) + at, cos, sin, head_dim)
        _append(wide, word(job, AT_KEYS) + plane, slot, word(job, AT_K) + at, head_dim, padded, scratch)
        _append(wide, word(job, AT_VALUES) + plane, slot, word(job, AT_V) + at, head_dim, padded, scratch)


# ==== Attention over the ring, block by block with a running maximum and sum (Milakov and Gimelshein, 2018) ====

# Scratch of one query head, in bytes: the padded query, the weighted values, then maximum and sum.
_QUERY, _VALUES, _MAXIMUM, _SUM, _HEAD_BYTES = 0, 2048, 4096, 4100, 4160


@njit(forceinline=True)
def _attend_block(wide, job, keys, values, first, count, head, scores):
    """Add `count` cached tokens from position `first` on to one head's running result."""
    padded, sinks, slots = word(job, AT_PADDED), word(job, AT_SINKS), word(job, AT_SLOTS)
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
    keep = simd.first_lane(exp(before)) if read_f32(head, _MAXIMUM) > np.float32(-np.inf) else np.float32(0.0)
    weights = splat_f32(np.float32(0.0))
    for i in range(0, count, 16):
        weight = exp(load_f32(scores, i * 4) - splat_f32(largest))
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
    padded, head_dim, sinks = word(job, AT_PADDED), word(job, AT_HEAD_DIM), word(job, AT_SINKS)
    plane = kv_head * word(job, AT_SLOTS) * padded * (4 if wide else 2)
    keys, values = word(job, AT_KEYS) + plane, word(job, AT_VALUES) + plane
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
    oldest = max(sinks, position + 1 - (word(job, AT_WINDOW) - sinks))
    for first in range(oldest, position + 1, SLOTS):
        _attend_block(wide, job, keys, values, first, min(SLOTS, position + 1 - first), scratch, scores)
    share = np.float32(1.0) / read_f32(scratch, _SUM)
    for i in range(head_dim):
        simd.write_f32(out, i * 4, read_f32(scratch, _VALUES + i * 4) * share)


@njit(forceinline=True)
def _attention(wide, job, unit):
    """All query heads of one key-value head for one token; units count key-value heads fastest."""
    heads, kv_heads, head_dim = word(job, AT_HEADS), word(job, AT_KV_HEADS), word(job, AT_HEAD_DIM)
    token, kv_head = unit // kv_heads, unit % kv_heads
    position = word(job, AT_START) + token
    scratch = simd.scratch_32k()
    group = heads // kv_heads
    for head in range(kv_head * group, (kv_head + 1) * group):
        at = (token * heads + head) * head_dim * 4
        query = word(job, AT_Q) + at
        near = word(job, AT_Q_SINK) + at if position >= word(job, AT_WINDOW) else query
        _attend(wide, job, head, kv_head, position, query, near, word(job, AT_OUT) + at, scratch)


# ==== Tasks: one for each codec of the ring ====


def rope_append_f16(job, token):
    _rope_append(False, job, token)


def rope_append_f32(job, token):
    _rope_append(True, job, token)


def attention_f16(job, unit):
    _attention(False, job, unit)


def attention_f32(job, unit):
    _attention(True, job, unit)
