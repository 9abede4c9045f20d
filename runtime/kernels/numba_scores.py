"""Scores of a block of cached tokens: the products of a unit's rows with keys.

Keys that stay codes are multiplied with rounded rows in exact integer sums, sixteen tokens at a time, a token to a
lane; groups are added in their order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from . import words as w
from .compiling import BARE
from .numba_blocks import ask_for, decoded, find, is_direct, spread_scales
from .numba_math import word
from .numba_queries import STEP_BYTES, rounded
from .numba_ring import Q4
from .numba_tiles import dots, dots_f16
from .simd import dot4_i8, fma, load_f32, load_u8, read_f32, read_i32, splat_f32, splat_i32, splat_quad, to_f32
from .words import CACHED, TILE


@njit(forceinline=True)
def _dot32(total, v, x):
    """total + 32 codes of sixteen tokens times 32 numbers of a row; two sums, which the CPU makes at the same time."""
    other = dot4_i8(dot4_i8(splat_i32(np.int32(0)), v[0], splat_quad(x, 0)), v[1], splat_quad(x, 4))
    total = dot4_i8(dot4_i8(total, v[2], splat_quad(x, 8)), v[3], splat_quad(x, 12))
    other = dot4_i8(dot4_i8(other, v[4], splat_quad(x, 16)), v[5], splat_quad(x, 20))
    return other + dot4_i8(dot4_i8(total, v[6], splat_quad(x, 24)), v[7], splat_quad(x, 28))


@njit(forceinline=True)
def _signed(codes):
    """32 q8 codes of sixteen tokens."""
    a, b = simd.factor_i8(load_u8(codes, 0)), simd.factor_i8(load_u8(codes, 64))
    c, d = simd.factor_i8(load_u8(codes, 128)), simd.factor_i8(load_u8(codes, 192))
    e, f = simd.factor_i8(load_u8(codes, 256)), simd.factor_i8(load_u8(codes, 320))
    return a, b, c, d, e, f, simd.factor_i8(load_u8(codes, 384)), simd.factor_i8(load_u8(codes, 448))


@njit(forceinline=True)
def _nibbles(codes):
    """32 q4 codes of sixteen tokens: the low halves of their bytes, then the high ones."""
    a, b, c, d = load_u8(codes, 0), load_u8(codes, 64), load_u8(codes, 128), load_u8(codes, 192)
    high = (a >> 4) & 15, (b >> 4) & 15, (c >> 4) & 15, (d >> 4) & 15
    return a & 15, b & 15, c & 15, d & 15, high[0], high[1], high[2], high[3]


@njit(forceinline=True)
def _add(exact, group, step, scale, scores):
    """Add a group's exact product to sixteen scores."""
    before = load_f32(scores, 0) if group else splat_f32(np.float32(0.0))
    return fma(to_f32(exact), scale * splat_f32(read_f32(step, 4)), before)


@njit(forceinline=True)
def _q8_64(codes, n, group, seen, groups, quants, steps, units, scores):
    """Sixteen tokens' group of 64 codes: scores[r, lane] for n rows."""
    p, q = _signed(codes), _signed(codes + 512)
    scale = load_f32(units, group * CACHED * 4)
    for r in range(n):
        x, step, out = quants + r * seen, steps + r * groups * STEP_BYTES, scores + r * CACHED * 4
        exact = _dot32(splat_i32(read_i32(step, 0)), p, x) + _dot32(splat_i32(np.int32(0)), q, x + 32)
        simd.store_f32(out, 0, _add(exact, group, step, scale, out))


@njit(forceinline=True)
def _q8_32(codes, n, group, seen, groups, quants, steps, units, scores):
    p = _signed(codes)
    scale = load_f32(units, group * CACHED * 4)
    for r in range(n):
        x, step, out = quants + r * seen, steps + r * groups * STEP_BYTES, scores + r * CACHED * 4
        exact = _dot32(splat_i32(read_i32(step, 0)), p, x)
        simd.store_f32(out, 0, _add(exact, group, step, scale, out))


@njit(forceinline=True)
def _q4_32(codes, n, group, seen, groups, quants, steps, units, scores):
    v = _nibbles(codes)
    scale, base = load_f32(units, 2 * group * CACHED * 4), load_f32(units, (2 * group + 1) * CACHED * 4)
    for r in range(n):
        x, step, out = quants + r * seen, steps + r * groups * STEP_BYTES, scores + r * CACHED * 4
        value = _add(_dot32(splat_i32(np.int32(0)), v, x), group, step, scale, out)
        simd.store_f32(out, 0, fma(base, splat_f32(read_f32(step, 8)), value))


@njit(**BARE)
def _exact_scores(side, codes, units, n, quants, steps, scores):
    """scores[r, j] = rounded row r times token j of a block, for all tokens."""
    seen, size, codec = word(side, w.SD_SEEN), word(side, w.SD_GROUP), word(side, w.SD_CODEC)
    groups, block = seen // size, word(side, w.SD_CODE_BYTES) * CACHED
    step_bytes = block // (CACHED // TILE * groups)  # of a group of sixteen tokens
    for j in range(0, CACHED * 4, TILE * 4):
        for g in range(groups):
            ask_for(codes + block, step_bytes)
            x, step = quants + g * size, steps + g * STEP_BYTES
            if codec == Q4:
                _q4_32(codes, n, g, seen, groups, x, step, units + j, scores + j)
            elif size == 64:
                _q8_64(codes, n, g, seen, groups, x, step, units + j, scores + j)
            else:
                _q8_32(codes, n, g, seen, groups, x, step, units + j, scores + j)
            codes += step_bytes


@njit(**BARE)
def score(job, area, queries, near, all_rows, at, n, kv_head, block, low, high):
    """Scores of rows at .. at + n - 1, all of one key-value head if heads have keys of their own.

    queries: the area where rows are packed; near: whether those for the sinks are meant"""
    keys = job + w.AT_KEYS * 8
    width = word(keys, w.SD_SEEN)
    scores = area + word(job, w.AT_SCORES) + at * CACHED * 4
    head = kv_head if word(keys, w.SD_HEADS) > 1 else 0
    if word(keys, w.SD_INT8):
        codes, scales = find(job, keys, head, block)
        units = area + word(job, w.AT_UNITS)
        spread_scales(keys, scales, low - block, high - block, units)
        quants, steps = rounded(job, queries, (all_rows if near else 0) + at)
        _exact_scores(keys, codes, units, n, quants, steps, scores)
        return
    rows = queries + word(job, w.AT_NEAR if near else w.AT_QUERY) + at * width * 4
    start = (low - block) // 4 * 4
    if is_direct(keys, n):
        x, _ = find(job, keys, head, block)
        dots_f16(rows, width * 4, n, x, width * 2, start, high - block, width, scores, CACHED * 4)
    else:
        x = decoded(job, keys, area, kv_head, low, high - low) - (low - block) * width * 4
        dots(rows, width * 4, n, x, width * 4, start, high - block, width, scores, CACHED * 4)
