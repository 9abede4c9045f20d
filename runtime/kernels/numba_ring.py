"""RoPE, and numbers put into the ring and read back. runtime/ring/codecs.py is the definition of how they lie."""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from . import words as w
from .compiling import BARE
from .numba_codes import F16, KEY, Q4, Q8, encode, turn
from .numba_math import word
from .simd import fma, load_f32, read_f32, splat_f32, store_f32
from .simd_tiles import byte_of_lanes
from .words import CACHED, TILE

CHUNK = 512  # numbers that are encoded at a time: whole groups, and whole blocks of the Hadamard rotation


@njit(forceinline=True)
def clock(job, which):
    """How far the job's ring has come."""
    return word(word(job, w.AT_CLOCK), which)


@njit(forceinline=True)
def is_sliding(job):
    """Whether tokens have slid out of what the job's last token sees."""
    return clock(job, w.LENGTH) + word(job, w.AT_N) > word(job, w.AT_WINDOW)


# ==== RoPE (Su et al., 2021) ====


@njit(**BARE)
def rotate(source, target, cos, sin, head_dim):
    """Half-split rotation, as Hugging Face orders the rows: (a, b) -> (a cos - b sin, b cos + a sin)."""
    half = head_dim // 2
    whole = half // 16 * 16
    far = half * 4
    for i in range(0, whole * 4, 64):
        a, b, c, s = load_f32(source, i), load_f32(source, far + i), load_f32(cos, i), load_f32(sin, i)
        store_f32(target, i, a * c - b * s)
        store_f32(target, far + i, b * c + a * s)
    for i in range(whole * 4, half * 4, 4):
        x, y, c1, s1 = read_f32(source, i), read_f32(source, far + i), read_f32(cos, i), read_f32(sin, i)
        simd.write_f32(target, i, x * c1 - y * s1)
        simd.write_f32(target, far + i, y * c1 + x * s1)


@njit(forceinline=True)
def _tokens_of(job, unit):
    """The new tokens of one tile of the ring: what two threads write hardly shares cache lines."""
    before = clock(job, w.LENGTH) % TILE
    return max(unit * TILE - before, 0), min((unit + 1) * TILE - before, word(job, w.AT_N))


@njit(**BARE)
def _rope_token(job, token):
    heads, kv_heads, head_dim = word(job, w.AT_HEADS), word(job, w.AT_KV_HEADS), word(job, w.AT_HEAD_DIM)
    row, turn = head_dim * 4, head_dim * 2 * token
    cos, sin = word(job, w.AT_COS) + turn, word(job, w.AT_SIN) + turn
    near_cos, near_sin = word(job, w.AT_COS_SINK) + turn, word(job, w.AT_SIN_SINK) + turn
    sliding = is_sliding(job)
    for head in range(token * heads, (token + 1) * heads):
        q = word(job, w.AT_Q) + head * row
        if sliding:
            rotate(q, word(job, w.AT_Q_SINK) + head * row, near_cos, near_sin, head_dim)
        rotate(q, q, cos, sin, head_dim)
    for head in range(token * kv_heads, (token + 1) * kv_heads):
        k = word(job, w.AT_K) + head * row
        rotate(k, k, cos, sin, head_dim)


def rope(job, unit):
    """Rotate the queries and keys of one tile's new tokens in place.

    Once tokens have slid out, the queries are also rotated for a position that is nearer by as many tokens: with
    these the sinks are read, so that they stay as close as they would be in a context without the lost tokens."""
    first, stop = _tokens_of(job, unit)
    for token in range(first, stop):
        _rope_token(job, token)


# ==== Where a token lies ====


@njit(forceinline=True)
def slot_of(job, position):
    """The ring slot of a position: blocks with sinks stay as they are, the others go round."""
    base = (clock(job, w.SINKS) + CACHED - 1) // CACHED * CACHED
    return position if position < base else base + (position - base) % (word(job, w.AT_SLOTS) - base)


@njit(forceinline=True)
def scales_at(side, head, slot):
    """Where the scales of a slot's block begin. Codes follow (see codecs.py)."""
    start = word(side, w.SD_DATA) + head * word(side, w.SD_HEAD_STRIDE)
    return start + slot // CACHED * word(side, w.SD_BLOCK_STRIDE)


@njit(forceinline=True)
def codes_at(side, head, slot):
    """Where the codes of a slot's block begin."""
    return scales_at(side, head, slot) + CACHED * word(side, w.SD_SCALE_BYTES)


@njit(forceinline=True)
def bytes_of_32(codec):
    """Bytes of 32 codes, which lie together for all values of a block."""
    return 16 if codec == Q4 else 32


@njit(forceinline=True)
def _place_of(side, slot, i):
    """Where byte i of a slot's codes lies among those of its block."""
    token, row, run = slot % CACHED, word(side, w.SD_CODE_BYTES), bytes_of_32(word(side, w.SD_CODEC))
    if word(side, w.SD_SCALE_BYTES) == 0:
        return token * row + i
    if word(side, w.SD_VALUES):
        return i // run * run * CACHED + token // 4 * 4 * run + i % run * 4 + token % 4
    return token // TILE * TILE * row + i // 4 * 4 * TILE + token % TILE * 4 + i % 4


# ==== Encoding ====


@njit(forceinline=True)
def _put(side, head, slot, at, codes, n_codes, scales, n_scales):
    """Store bytes at .. at + n_codes - 1 of a slot's codes, and the scales that belong to them."""
    target = codes_at(side, head, slot)
    if n_scales and word(side, w.SD_VALUES):
        for i in range(0, n_codes, 16):
            to = target + _place_of(side, slot, at + i)
            for k in range(16):
                simd.write_u8(to, k * 4, simd.read_u8(codes, i + k))
    else:
        to, apart = target + _place_of(side, slot, at), TILE if n_scales else 1
        for i in range(0, n_codes, 4):
            simd.write_i32(to, i * apart, simd.read_i32(codes, i))
    target = scales_at(side, head, slot) + at * n_scales // n_codes * CACHED + slot % CACHED * 2
    for i in range(0, n_scales, 2):
        simd.write_u8(target, i * CACHED, simd.read_u8(scales, i))
        simd.write_u8(target, i * CACHED + 1, simd.read_u8(scales, i + 1))


@njit(**BARE)
def _store(side, head, slot, source, scratch):
    """Turn and encode one vector, its last group filled with zeros, and store it. What has a mirror is one chunk."""
    codec, width = word(side, w.SD_CODEC), word(side, w.SD_WIDTH)
    padded, size = word(side, w.SD_PADDED), word(side, w.SD_GROUP)
    codes, scales = scratch + CHUNK * 4, scratch + CHUNK * 8
    for start in range(0, padded, CHUNK):
        count = min(CHUNK, padded - start)
        for i in range(count):
            x = read_f32(source, (start + i) * 4) if start + i < width else np.float32(0.0)
            simd.write_f32(scratch, i * 4, x)
        turn(side, head, scratch, min(count, width - start), KEY)
        encode(codec, scratch, count, size, codes, scales)
        n_codes = word(side, w.SD_CODE_BYTES) * count // padded
        n_scales = word(side, w.SD_SCALE_BYTES) * count // padded
        _put(side, head, slot, start * n_codes // count, codes, n_codes, scales, n_scales)


def append(job, unit):
    """Put one tile's new tokens, keys and values or their codes, into the ring."""
    scratch = simd.scratch_32k()
    first, stop = _tokens_of(job, unit)
    for token in range(first, stop):
        slot = slot_of(job, clock(job, w.LENGTH) + token)
        for which in range(2):
            side = job + (w.AT_VALUES if which else w.AT_KEYS) * 8
            heads, row = word(side, w.SD_HEADS), word(side, w.SD_WIDTH) * 4
            source = word(job, w.AT_V if which else w.AT_K) + token * heads * row
            for head in range(heads):
                _store(side, head, slot, source + head * row, scratch)


_rope, _append = njit(**BARE)(rope), njit(**BARE)(append)


def rope_append(job, unit):
    """Do both for one tile's new tokens."""
    _rope(job, unit)
    _append(job, unit)


# ==== Decoding ====


@njit(forceinline=True)
def _sixteen(side, codes, i, slot, scratch):
    """Bytes i .. i + 15 of a slot's codes, unsigned."""
    if word(side, w.SD_VALUES):
        return byte_of_lanes(codes, _place_of(side, slot - slot % 4, i), slot % 4)
    for k in range(0, 16, 4):
        simd.write_i32(scratch, k, simd.read_i32(codes, _place_of(side, slot, i + k)))
    return simd.load_u8_as_i32(scratch, 0)


@njit(**BARE)
def expand(job, side, head, position, count, target):
    """Read the vectors of `count` tokens of one block from a position on: rows of SD_PADDED float32."""
    codec, padded, size = word(side, w.SD_CODEC), word(side, w.SD_PADDED), word(side, w.SD_GROUP)
    first, scratch = slot_of(job, position), simd.scratch_64()
    for slot in range(first, first + count):
        codes, row = codes_at(side, head, slot), target + (slot - first) * padded * 4
        vector, scales = codes + _place_of(side, slot, 0), scales_at(side, head, slot) + slot % CACHED * 2
        for at in range(0, padded, 32 if codec == Q4 else 16):
            if codec == F16:
                store_f32(row, at * 4, simd.load_f16_as_f32(vector, at * 2))
            elif codec == Q8:
                q = _sixteen(side, codes, at, slot, scratch)
                scale = simd.read_f16(scales, at // size * CACHED * 2)
                store_f32(row, at * 4, simd.to_f32(q - ((q & 128) << 1)) * splat_f32(scale))
            elif codec == Q4:
                of_group = scales + at // 32 * CACHED * 4
                scale, base = simd.read_f16(of_group, 0), simd.read_f16(of_group, CACHED * 2)
                q = _sixteen(side, codes, at // 2, slot, scratch)
                store_f32(row, at * 4, fma(simd.to_f32(q & 15), splat_f32(scale), splat_f32(base)))
                store_f32(row, at * 4 + 64, fma(simd.to_f32(q >> 4), splat_f32(scale), splat_f32(base)))
            else:
                store_f32(row, at * 4, load_f32(vector, at * 4))
