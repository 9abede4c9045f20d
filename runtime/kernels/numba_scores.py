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
from .numba_blocks import (
    ask_for,
    ask_for_scales,
    ask_near,
    asked_with_scores,
    asks_early,
    decoded,
    find,
    is_direct,
    tiles_of,
)
from .numba_codes import Q4
from .numba_math import word
from .numba_queries import STEP_BYTES, rounded
from .numba_ring import bytes_of_32
from .numba_tiles import dots, dots_f16
from .simd import dot4_i8, fma, load_u8, read_f32, read_i32, splat_f32, splat_i32, splat_quad, to_f32
from .words import CACHED, TILE


@njit(forceinline=True)
def _dot32(totals, v, x):
    """Add 32 codes of sixteen tokens times 32 numbers of a row, to two sums, so that none waits for another."""
    even, odd = totals
    even, odd = dot4_i8(even, v[0], splat_quad(x, 0)), dot4_i8(odd, v[1], splat_quad(x, 4))
    even, odd = dot4_i8(even, v[2], splat_quad(x, 8)), dot4_i8(odd, v[3], splat_quad(x, 12))
    even, odd = dot4_i8(even, v[4], splat_quad(x, 16)), dot4_i8(odd, v[5], splat_quad(x, 20))
    return dot4_i8(even, v[6], splat_quad(x, 24)), dot4_i8(odd, v[7], splat_quad(x, 28))


@njit(forceinline=True)
def _four_dots(totals, v, x, seen):
    """The same for four rows."""
    a, b = _dot32(totals[0], v, x), _dot32(totals[1], v, x + seen)
    return a, b, _dot32(totals[2], v, x + 2 * seen), _dot32(totals[3], v, x + 3 * seen)


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
def _products(codec, size, codes, asked, x, seen, step, stride):
    """One group's exact products of sixteen tokens and four rows.

    asked: see asked_with_scores, 0 bytes for nothing; stride: from a row's step to the next"""
    zero = splat_i32(np.int32(0))
    totals = (
        (splat_i32(read_i32(step, 0)), zero),
        (splat_i32(read_i32(step, stride)), zero),
        (splat_i32(read_i32(step, 2 * stride)), zero),
        (splat_i32(read_i32(step, 3 * stride)), zero),
    )
    for i in range(0, size, 32):
        if asked[1]:
            ask_for(asked[0] + i // 32 * asked[1], asked[1])
            ask_near(codes + i * TILE + asked[2], bytes_of_32(codec) * TILE)
        v = _nibbles(codes) if codec == Q4 else _signed(codes + i * TILE)
        totals = _four_dots(totals, v, x + i, seen)
    return totals


@njit(forceinline=True)
def _add(before, exact, scale, step):
    return fma(to_f32(exact[0] + exact[1]), scale * splat_f32(read_f32(step, 4)), before)


@njit(forceinline=True)
def _add_base(before, base, step):
    return fma(base, splat_f32(read_f32(step, 8)), before)


@njit(**BARE)
def _exact_scores(side, codes, scales, asked, n, quants, steps, start, stop, scores):
    """scores[r, j] = rounded row r times token j of a block, for tokens start .. stop - 1, which are whole tiles; those
    of tokens that are not there may be no numbers. asked: see asked_with_scores; n: rows, in fours"""
    seen, size, codec = word(side, w.SD_SEEN), word(side, w.SD_GROUP), word(side, w.SD_CODEC)
    groups, per_group = seen // size, 2 if codec == Q4 else 1
    stride, step_bytes = groups * STEP_BYTES, word(side, w.SD_CODE_BYTES) * TILE // groups  # of a group of a tile
    zero = splat_f32(np.float32(0.0))
    codes, scales = codes + start * word(side, w.SD_CODE_BYTES), scales + start * 2
    for j in range(start * 4, stop * 4, TILE * 4):
        for r in range(0, n, 4):
            a, b, c, d = zero, zero, zero, zero
            for g in range(groups):
                x, step, at = quants + r * seen + g * size, steps + r * stride + g * STEP_BYTES, codes + g * step_bytes
                wanted = asked[0] + (j // (TILE * 4) * seen + g * size) // 32 * asked[1], 0 if r else asked[1], asked[2]
                exact = _products(codec, size, at, wanted, x, seen, step, stride)
                scale = simd.load_f16_as_f32(scales, per_group * g * CACHED * 2)
                a, b = _add(a, exact[0], scale, step), _add(b, exact[1], scale, step + stride)
                c, d = _add(c, exact[2], scale, step + 2 * stride), _add(d, exact[3], scale, step + 3 * stride)
                if codec == Q4:
                    base = simd.load_f16_as_f32(scales, (2 * g + 1) * CACHED * 2)
                    a, b = _add_base(a, base, step), _add_base(b, base, step + stride)
                    c, d = _add_base(c, base, step + 2 * stride), _add_base(d, base, step + 3 * stride)
            out = scores + r * CACHED * 4 + j
            simd.store_f32(out, 0, a)
            simd.store_f32(out, CACHED * 4, b)
            simd.store_f32(out, CACHED * 8, c)
            simd.store_f32(out, CACHED * 12, d)
        codes, scales = codes + groups * step_bytes, scales + TILE * 2


@njit(**BARE)
def score(job, area, queries, near, all_rows, at, n, kv_head, kv_heads, sight):
    """Scores of rows at .. at + n - 1, all of one key-value head if heads have keys of their own.

    queries: the area where rows are packed; near: whether those for the sinks are meant"""
    keys = job + w.AT_KEYS * 8
    width, (_, _, _, block, low, high) = word(keys, w.SD_SEEN), sight
    scores = area + word(job, w.AT_SCORES) + at * CACHED * 4
    if word(keys, w.SD_INT8):
        codes, scales, ahead = find(job, keys, kv_head, kv_heads, block)
        number, early = kv_head - kv_heads[0], asks_early(job, kv_heads, all_rows)
        asked = asked_with_scores(job, codes, scales, ahead, number, early)
        if not early:
            ask_for_scales(keys, scales + ahead)
        quants, steps = rounded(job, queries, (all_rows if near else 0) + at)
        start, stop = tiles_of(sight)
        _exact_scores(keys, codes, scales, asked, n, quants, steps, start, stop, scores)
        return
    rows = queries + word(job, w.AT_NEAR if near else w.AT_QUERY) + at * width * 4
    start = (low - block) // 4 * 4
    if is_direct(keys, n):
        x, _, ahead = find(job, keys, kv_head, kv_heads, block)
        dots_f16(rows, width * 4, n, x, ahead, width * 2, start, high - block, width, scores, CACHED * 4)
    else:
        x = decoded(job, keys, area, kv_head, low, high - low) - (low - block) * width * 4
        dots(rows, width * 4, n, x, width * 4, start, high - block, width, scores, CACHED * 4)
