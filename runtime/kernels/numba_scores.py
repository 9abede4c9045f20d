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
from .numba_blocks import ask_for_rows, decoded, find, is_direct, spread_scales
from .numba_math import word
from .numba_queries import STEP_BYTES, rounded
from .numba_ring import Q4
from .numba_tiles import dots, dots_f16
from .simd import dot4_i8, fma, load_f32, read_f32, read_i32, splat_f32, splat_i32, splat_quad, store_f32, to_f32
from .simd_tiles import strided_tile
from .words import CACHED


@njit(forceinline=True)
def _dot32(total, v, x):
    """total + 32 codes of sixteen tokens times 32 numbers of a row; two sums, which the CPU makes at the same time."""
    other = dot4_i8(dot4_i8(splat_i32(np.int32(0)), v[0], splat_quad(x, 0)), v[1], splat_quad(x, 4))
    total = dot4_i8(dot4_i8(total, v[2], splat_quad(x, 8)), v[3], splat_quad(x, 12))
    other = dot4_i8(dot4_i8(other, v[4], splat_quad(x, 16)), v[5], splat_quad(x, 20))
    return other + dot4_i8(dot4_i8(total, v[6], splat_quad(x, 24)), v[7], splat_quad(x, 28))


@njit(forceinline=True)
def _signed(v):
    a, b, c, d = simd.factor_i8(v[0]), simd.factor_i8(v[1]), simd.factor_i8(v[2]), simd.factor_i8(v[3])
    return a, b, c, d, simd.factor_i8(v[4]), simd.factor_i8(v[5]), simd.factor_i8(v[6]), simd.factor_i8(v[7])


@njit(forceinline=True)
def _nibbles(a, b, c, d):
    """The low halves of sixteen bytes, then the high ones."""
    high = (a >> 4) & 15, (b >> 4) & 15, (c >> 4) & 15, (d >> 4) & 15
    return a & 15, b & 15, c & 15, d & 15, high[0], high[1], high[2], high[3]


@njit(forceinline=True)
def _add(exact, group, step, scale, scores):
    """Add a group's exact product to sixteen scores."""
    before = load_f32(scores, 0) if group else splat_f32(np.float32(0.0))
    return fma(to_f32(exact), scale * splat_f32(read_f32(step, 4)), before)


@njit(forceinline=True)
def _q8_64(codes, stride, n, group, seen, groups, quants, steps, units, scores):
    """Sixteen tokens' group of 64 codes: scores[r, lane] for n rows."""
    p, q = _signed(strided_tile(codes, stride)), _signed(strided_tile(codes + 32, stride))
    scale = load_f32(units, group * CACHED * 4)
    for r in range(n):
        x, step, out = quants + r * seen, steps + r * groups * STEP_BYTES, scores + r * CACHED * 4
        exact = _dot32(splat_i32(read_i32(step, 0)), p, x) + _dot32(splat_i32(np.int32(0)), q, x + 32)
        store_f32(out, 0, _add(exact, group, step, scale, out))


@njit(forceinline=True)
def _q8_32(codes, stride, n, group, seen, groups, quants, steps, units, scores):
    p = _signed(strided_tile(codes, stride))
    scale = load_f32(units, group * CACHED * 4)
    for r in range(n):
        x, step, out = quants + r * seen, steps + r * groups * STEP_BYTES, scores + r * CACHED * 4
        exact = _dot32(splat_i32(read_i32(step, 0)), p, x)
        store_f32(out, 0, _add(exact, group, step, scale, out))


@njit(forceinline=True)
def _q4_32(v, n, group, seen, groups, quants, steps, units, scores):
    scale, base = load_f32(units, 2 * group * CACHED * 4), load_f32(units, (2 * group + 1) * CACHED * 4)
    for r in range(n):
        x, step, out = quants + r * seen, steps + r * groups * STEP_BYTES, scores + r * CACHED * 4
        value = _add(_dot32(splat_i32(np.int32(0)), v, x), group, step, scale, out)
        store_f32(out, 0, fma(base, splat_f32(read_f32(step, 8)), value))


@njit(**BARE)
def _exact_scores(job, side, codes, units, n, quants, steps, scores):
    """scores[r, j] = rounded row r times token j of a block, for all tokens."""
    seen, size, stride = word(side, w.SD_SEEN), word(side, w.SD_GROUP), word(side, w.SD_CODE_BYTES)
    groups, codec = seen // size, word(side, w.SD_CODEC)
    for j in range(0, CACHED, 16):
        line, unit, out = codes + j * stride, units + j * 4, scores + j * 4
        if codec == Q4:
            for g in range(0, groups, 2):
                ask_for_rows(line + g * 16, stride, 16)
                v = strided_tile(line + g * 16, stride)
                x, step = quants + g * size, steps + g * STEP_BYTES
                _q4_32(_nibbles(v[0], v[1], v[2], v[3]), n, g, seen, groups, x, step, unit, out)
                if g + 1 < groups:
                    x, step = x + size, step + STEP_BYTES
                    _q4_32(_nibbles(v[4], v[5], v[6], v[7]), n, g + 1, seen, groups, x, step, unit, out)
            continue
        for g in range(groups):
            ask_for_rows(line + g * size, stride, 16)
            x, step = quants + g * size, steps + g * STEP_BYTES
            if size == 64:
                _q8_64(line + g * 64, stride, n, g, seen, groups, x, step, unit, out)
            else:
                _q8_32(line + g * 32, stride, n, g, seen, groups, x, step, unit, out)


@njit(**BARE)
def score(job, area, queries, near, all_rows, at, n, kv_head, block, low, high):
    """Scores of rows at .. at + n - 1, all of one key-value head if heads have keys of their own.

    queries: the area where rows are packed; near: whether those for the sinks are meant"""
    keys = job + w.AT_KEYS * 8
    width = word(keys, w.SD_SEEN)
    scores = area + word(job, w.AT_SCORES) + at * CACHED * 4
    head = kv_head if word(keys, w.SD_HEADS) > 1 else 0
    if word(keys, w.SD_INT8):
        codes, scales = find(job, keys, area, head, block, low, high)
        units = area + word(job, w.AT_UNITS)
        spread_scales(keys, scales, units)
        quants, steps = rounded(job, queries, (all_rows if near else 0) + at)
        _exact_scores(job, keys, codes, units, n, quants, steps, scores)
        return
    rows = queries + word(job, w.AT_NEAR if near else w.AT_QUERY) + at * width * 4
    start = (low - block) // 4 * 4
    if is_direct(keys, n):
        x, _ = find(job, keys, area, head, block, low, high)
        dots_f16(rows, width * 4, n, x, width * 2, start, high - block, width, scores, CACHED * 4)
    else:
        x = decoded(job, keys, area, kv_head, low, high - low) - (low - block) * width * 4
        dots(rows, width * 4, n, x, width * 4, start, high - block, width, scores, CACHED * 4)
