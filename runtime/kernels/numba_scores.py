"""Scores of a block of cached tokens: the products of a unit's rows with keys.

Keys that stay codes are multiplied with rounded rows in exact integer sums, 32 tokens at a time, a token to a
lane; groups are added in their order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from . import words as w
from .compiling import BARE
from .numba_blocks import asked_with_scores, decoded, find, is_direct, tiles_of
from .numba_codes import Q4, Q8
from .numba_math import word
from .numba_queries import STEP_BYTES, rounded
from .numba_ring import bytes_of_32
from .numba_tiles import dots, dots_f16
from .simd import dot4_i8, fma, load_u8, read_f32, read_i32, splat_f32, splat_i32, splat_quad, to_f32
from .simd_tiles import prefetch, prefetch_far
from .words import CACHED, TILE


@njit(forceinline=True)
def _add_dots(exact, a, b, x, seen):
    """Add the products of four numbers of each of 32 tokens with those of four rows."""
    p, q = splat_quad(x, 0), splat_quad(x, seen)
    r, s = splat_quad(x, 2 * seen), splat_quad(x, 3 * seen)
    return (
        (dot4_i8(exact[0][0], a, p), dot4_i8(exact[0][1], b, p)),
        (dot4_i8(exact[1][0], a, q), dot4_i8(exact[1][1], b, q)),
        (dot4_i8(exact[2][0], a, r), dot4_i8(exact[2][1], b, r)),
        (dot4_i8(exact[3][0], a, s), dot4_i8(exact[3][1], b, s)),
    )


@njit(forceinline=True)
def _products(codec, size, codes, asked, x, seen, step, stride):
    """One group's exact products of a tile's 32 tokens and four rows.

    asked: see asked_with_scores, 0 bytes for nothing; stride: from a row's step to the next"""
    a, b = splat_i32(read_i32(step, 0)), splat_i32(read_i32(step, stride))
    c, d = splat_i32(read_i32(step, 2 * stride)), splat_i32(read_i32(step, 3 * stride))
    exact, lines, run = ((a, a), (b, b), (c, c), (d, d)), asked[0], bytes_of_32(codec)
    for i in range(0, size * run // 32, 4):
        at = codes + i * TILE
        if asked[1]:
            for k in range(2):
                prefetch_far(lines, k * asked[1])
                prefetch(at + asked[2], k * 64)
            lines += 2 * asked[1]
        low, high = load_u8(at, 0), load_u8(at, 64)
        if codec == Q4:
            number = x + i // run * 32 + i % run  # the low halves of bytes are the first sixteen of 32
            exact = _add_dots(exact, low & 15, high & 15, number, seen)
            exact = _add_dots(exact, (low >> 4) & 15, (high >> 4) & 15, number + 16, seen)
        else:
            exact = _add_dots(exact, simd.factor_i8(low), simd.factor_i8(high), x + i, seen)
    return exact


@njit(forceinline=True)
def _add(before, exact, scales, step):
    """Add a group's exact products, times the scales of keys and of the row."""
    scale = splat_f32(read_f32(step, 4))
    a, b = fma(to_f32(exact[0]), scales[0] * scale, before[0]), fma(to_f32(exact[1]), scales[1] * scale, before[1])
    return a, b


@njit(forceinline=True)
def _add_base(before, bases, step):
    total = splat_f32(read_f32(step, 8))
    return fma(bases[0], total, before[0]), fma(bases[1], total, before[1])


@njit(forceinline=True)
def _of_tile(numbers, row):
    """Row `row` of a block's half floats, for a tile."""
    at = row * CACHED * 2
    return simd.load_f16_as_f32(numbers, at), simd.load_f16_as_f32(numbers, at + 32)


@njit(forceinline=True)
def _score_four(codec, size, groups, codes, group_bytes, scales, asked, quants, seen, steps, scores):
    """Scores of a tile's 32 tokens and four rows. size: numbers of a group; group_bytes: of a tile's codes"""
    stride, per_group, zero = groups * STEP_BYTES, 2 if codec == Q4 else 1, splat_f32(np.float32(0.0))
    a, b, c, d = (zero, zero), (zero, zero), (zero, zero), (zero, zero)
    for g in range(groups):
        step, before = steps + g * STEP_BYTES, g * group_bytes
        wanted = asked[0] + before // 64 * asked[1], asked[1], asked[2]
        exact = _products(codec, size, codes + before, wanted, quants + g * size, seen, step, stride)
        scale = _of_tile(scales, per_group * g)
        a, b = _add(a, exact[0], scale, step), _add(b, exact[1], scale, step + stride)
        c, d = _add(c, exact[2], scale, step + 2 * stride), _add(d, exact[3], scale, step + 3 * stride)
        if codec == Q4:
            base = _of_tile(scales, 2 * g + 1)
            a, b = _add_base(a, base, step), _add_base(b, base, step + stride)
            c, d = _add_base(c, base, step + 2 * stride), _add_base(d, base, step + 3 * stride)
    for half in range(2):
        simd.store_f32(scores, half * 64, a[half])
        simd.store_f32(scores, CACHED * 4 + half * 64, b[half])
        simd.store_f32(scores, CACHED * 8 + half * 64, c[half])
        simd.store_f32(scores, CACHED * 12 + half * 64, d[half])


@njit(**BARE)
def _exact_scores(side, codes, scales, asked, n, quants, steps, start, stop, scores):
    """scores[r, j] = rounded row r times token j of a block, for tokens start .. stop - 1, which are whole tiles; those
    of tokens that are not there may be no numbers. asked: see asked_with_scores; n: rows, in fours"""
    seen, size, row_bytes = word(side, w.SD_SEEN), word(side, w.SD_GROUP), word(side, w.SD_CODE_BYTES)
    groups, q4 = seen // size, word(side, w.SD_CODEC) == Q4
    group_bytes = row_bytes * TILE // groups
    for j in range(start, stop, TILE):
        tile, units = codes + j * row_bytes, scales + j * 2
        for r in range(0, n, 4):
            wanted = asked[0] + j * row_bytes // 64 * asked[1], 0 if r else asked[1], asked[2]
            x, step, out = quants + r * seen, steps + r * groups * STEP_BYTES, scores + (r * CACHED + j) * 4
            if q4:
                _score_four(Q4, 32, groups, tile, group_bytes, units, wanted, x, seen, step, out)
            else:
                _score_four(Q8, size, groups, tile, group_bytes, units, wanted, x, seen, step, out)


@njit(**BARE)
def score(job, area, queries, near, all_rows, at, n, kv_head, kv_heads, sight):
    """Scores of rows at .. at + n - 1, all of one key-value head if heads have keys of their own.

    queries: the area where rows are packed; near: whether those for the sinks are meant"""
    keys = job + w.AT_KEYS * 8
    width, (_, _, _, block, low, high) = word(keys, w.SD_SEEN), sight
    scores = area + word(job, w.AT_SCORES) + at * CACHED * 4
    if word(keys, w.SD_INT8):
        codes, scales, _ = find(job, keys, kv_head, kv_heads, block)
        asked = asked_with_scores(job, kv_head, kv_heads, block, all_rows)
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
