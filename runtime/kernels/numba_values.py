"""Sums of values: a block's vectors, weighted, are added to what a unit's rows have summed so far.

Values that stay codes are summed in integers: weights times scales are rounded to 14 bits of the largest that a row
has in a group, and split in two bytes; or to one byte, of 8 bits or 7 (base.weight_bits). Codes of four tokens lie
together, a column to a lane.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from . import words as w
from .compiling import BARE
from .numba_blocks import (
    ask_for,
    asked_with_values,
    decoded,
    find,
    is_direct,
    tiles_of,
)
from .numba_codes import Q4, Q8
from .numba_math import word
from .numba_queries import rows_of
from .numba_ring import bytes_of_32
from .numba_tiles import add_scaled, weigh, weigh_f16
from .numba_weights import sees_all, sight_of, state_of
from .simd import (
    dot4,
    dot4_u8,
    fma,
    load_f32,
    load_u8,
    read_f32,
    splat_f32,
    splat_i32,
    splat_quad,
    store_f32,
    to_f32,
    write_f32,
)
from .simd_tiles import keep_lanes
from .words import CACHED

HALF = CACHED // 2  # tokens whose scales are held in registers at once
PLANES = 2 * CACHED  # bytes of a row's weights: high ones, then low ones; or one for each
_ZERO = np.float32(0.0)


# ==== Weights are rounded ====


@njit(forceinline=True)
def _per_token(scales, number, half, whole, start, stop):
    """What the tokens of half a block have as number `number`: four vectors, zero but for tokens start .. stop - 1."""
    at = scales + (number * CACHED + half * HALF) * 2
    a, b = simd.load_f16_as_f32(at, 0), simd.load_f16_as_f32(at, 32)
    c, d = simd.load_f16_as_f32(at, 64), simd.load_f16_as_f32(at, 96)
    return (a, b, c, d) if whole else _kept((a, b, c, d), half, start, stop)


@njit(forceinline=True)
def _kept(x, half, start, stop):
    """What tokens start .. stop - 1 of a block have, and zeros."""
    start, stop = start - half * HALF, stop - half * HALF
    a, b = keep_lanes(x[0], start, stop, _ZERO), keep_lanes(x[1], start - 16, stop - 16, _ZERO)
    return a, b, keep_lanes(x[2], start - 32, stop - 32, _ZERO), keep_lanes(x[3], start - 48, stop - 48, _ZERO)


@njit(forceinline=True)
def _bases(own, scales, g, half, whole, start, stop):
    """What is added to products with q4 codes of a group: these are taken less 8. own: its scales"""
    bases = _per_token(scales, 2 * g + 1, half, whole, start, stop)
    eight = splat_f32(np.float32(8.0))
    a, b = fma(own[0], eight, bases[0]), fma(own[1], eight, bases[1])
    return a, b, fma(own[2], eight, bases[2]), fma(own[3], eight, bases[3])


@njit(forceinline=True)
def _top(top, scales):
    """The larger of each lane's numbers."""
    larger = simd.larger_magnitude
    return larger(larger(larger(larger(top, scales[0]), scales[1]), scales[2]), scales[3])


@njit(forceinline=True)
def _find_lift(side, low, high):
    """For the largest scale to become the largest number that weights are rounded to: what scales are multiplied with
    before weights times scales are rounded, and what a unit of a rounded one is worth. low, high: of both halves"""
    # From zero on: bits are compared, and those of a NaN with a sign are less than all others.
    largest = simd.largest_magnitude(_top(_top(splat_f32(_ZERO), low), high))
    most = np.float32(255.0) if word(side, w.SD_CODEC) == Q4 else np.float32(127.0)
    if word(side, w.SD_BYTES) == 2:
        most = np.float32(16383.0)
    return most / largest if largest > _ZERO else _ZERO, largest / most


@njit(forceinline=True)
def _round(weights, scales, two, planes, at):
    """Round sixteen weights times scales, and write their bytes, or their high and their low ones."""
    # At 1.5 * 2^23 a float's last bit counts ones.
    bits = simd.f32_bits(fma(weights, scales, splat_f32(np.float32(12582912.0))))
    if two:
        simd.store_i32_as_i8(planes, at, bits >> 7)
        simd.store_i32_as_i8(planes, CACHED + at, bits & 127)
    else:
        simd.store_i32_as_i8(planes, at, bits)


@njit(forceinline=True)
def _round_rows(weights, n, scales, factor, two, planes):
    """Round n rows' weights of half a block times scales times a factor."""
    lift = splat_f32(factor)
    a, b, c, d = scales[0] * lift, scales[1] * lift, scales[2] * lift, scales[3] * lift
    for r in range(n):
        x, to = weights + r * CACHED * 4, planes + r * PLANES
        _round(load_f32(x, 0), a, two, to, 0)
        _round(load_f32(x, 64), b, two, to, 16)
        _round(load_f32(x, 128), c, two, to, 32)
        _round(load_f32(x, 192), d, two, to, 48)


@njit(forceinline=True)
def _products(total, x, bases):
    """Add the products of half a block's weights with bases, in sixteen lanes."""
    total = fma(load_f32(x, 64), bases[1], fma(load_f32(x, 0), bases[0], total))
    return fma(load_f32(x, 192), bases[3], fma(load_f32(x, 128), bases[2], total))


@njit(forceinline=True)
def _add_bases(weights, n, low, high, keep, share, sums):
    """sums = sums * keep + share * the products of n rows' weights with both halves' bases, in sixteen lanes."""
    for r in range(n):
        x = weights + r * CACHED * 4
        total = _products(_products(splat_f32(_ZERO), x, low), x + HALF * 4, high)
        past = load_f32(sums, r * 64) * splat_f32(read_f32(keep, r * 4))
        store_f32(sums, r * 64, fma(total, splat_f32(read_f32(share, r * 4)), past))


@njit(**BARE)
def _round_group(job, area, scales, g, lift, at, n, all_rows, planes, worth, sight):
    """Round the weights of rows at .. at + n - 1 for group g: planes (n, PLANES), and what a unit of them is worth.

    lift: for rows that see all of the block"""
    side = job + w.AT_VALUES * 8
    weights, rows = area + word(job, w.AT_SCORES) + at * CACHED * 4, rows_of(job, sight[1])
    keep, share = state_of(job, area, all_rows, 2) + at * 4, state_of(job, area, all_rows, 3) + at * 4
    two, is_q4, whole = word(side, w.SD_BYTES) == 2, word(side, w.SD_CODEC) == Q4, sees_all(job, sight)
    per_group, start, stop = 2 if is_q4 else 1, sight[4] - sight[3], sight[5] - sight[3]
    low = _per_token(scales, per_group * g, 0, whole, start, stop)
    high = _per_token(scales, per_group * g, 1, whole, start, stop)
    some, (factor, unit) = n if whole else 1, lift
    for r in range(0, n, some):
        if not whole:  # what others see must not matter
            first, end = sight_of(job, at + r, rows, sight)
            factor, unit = _find_lift(side, _kept(low, 0, first, end), _kept(high, 1, first, end))
        for k in range(r, r + some):
            write_f32(worth, k * 4, unit * read_f32(share, k * 4))
        x, to = weights + r * CACHED * 4, planes + r * PLANES
        _round_rows(x, some, low, factor, two, to)
        _round_rows(x + HALF * 4, some, high, factor, two, to + HALF)
    if is_q4:
        low, high = _bases(low, scales, g, 0, whole, start, stop), _bases(high, scales, g, 1, whole, start, stop)
        _add_bases(weights, n, low, high, keep, share, area + word(job, w.AT_BASES) + (g * all_rows + at) * 64)


# ==== Products ====


@njit(forceinline=True)
def _columns(codes, is_q4):
    """32 columns of four tokens; q4 codes less 8, so that errors of weights mostly cancel."""
    a = load_u8(codes, 0)
    return ((a & 15) - 8, ((a >> 4) & 15) - 8) if is_q4 else (a, load_u8(codes, 64))


@njit(forceinline=True)
def _four_dots(sums, weights, is_q4, two, a, b):
    """Four tokens' products with two vectors of columns: (high bytes' a, b, low bytes' a, b)"""
    high = splat_quad(weights, 0)
    if is_q4:
        return dot4_u8(sums[0], high, a), dot4_u8(sums[1], high, b), sums[2], sums[3]
    if not two:
        return dot4(sums[0], high, a), dot4(sums[1], high, b), sums[2], sums[3]
    low = splat_quad(weights, CACHED)
    return dot4(sums[0], high, a), dot4(sums[1], high, b), dot4(sums[2], low, a), dot4(sums[3], low, b)


@njit(forceinline=True)
def _multiply(codec, two, codes, ahead, asked, planes, start, stop, keep, factors, out, out_stride):
    """Add 32 columns' sums over tokens start .. stop - 1 to four rows of the result.

    ahead: from codes to those that are asked for meanwhile, or 0; many lines at once would be waited for; asked: what
    else is, with every four tokens: from where on, and how many bytes apart, or 0"""
    zero = splat_i32(np.int32(0))
    s0 = s1 = s2 = s3 = (zero, zero, zero, zero)
    for j in range(start, stop, 4):
        is_q4, at = codec == Q4, codes + j * bytes_of_32(codec)
        if ahead:
            ask_for(at + ahead, 4 * bytes_of_32(codec))
        if asked[1]:
            ask_for(asked[0] + j // 4 * asked[1], 64)
        a, b = _columns(at, is_q4)
        x = planes + j
        s0, s1 = _four_dots(s0, x, is_q4, two, a, b), _four_dots(s1, x + PLANES, is_q4, two, a, b)
        s2 = _four_dots(s2, x + 2 * PLANES, is_q4, two, a, b)
        s3 = _four_dots(s3, x + 3 * PLANES, is_q4, two, a, b)
    _add_pair(out, keep, factors, two, s0)
    _add_pair(out + out_stride, keep + 4, factors + 4, two, s1)
    _add_pair(out + 2 * out_stride, keep + 8, factors + 8, two, s2)
    _add_pair(out + 3 * out_stride, keep + 12, factors + 12, two, s3)


@njit(forceinline=True)
def _add_pair(out, keep, factor, two, s):
    add_scaled(out, keep, factor, to_f32((s[0] << 7) + s[2] if two else s[0]))
    add_scaled(out + 64, keep, factor, to_f32((s[1] << 7) + s[3] if two else s[1]))


@njit(**BARE)
def _multiply_four(side, codes, ahead, asked, planes, start, stop, keep, factors, out):
    """Add 32 columns' sums over tokens start .. stop - 1 to four rows of the result."""
    width = word(side, w.SD_SEEN) * 4
    if word(side, w.SD_CODEC) == Q4:
        _multiply(Q4, False, codes, ahead, asked, planes, start, stop, keep, factors, out, width)
    elif word(side, w.SD_BYTES) == 2:
        _multiply(Q8, True, codes, ahead, asked, planes, start, stop, keep, factors, out, width)
    else:
        _multiply(Q8, False, codes, ahead, asked, planes, start, stop, keep, factors, out, width)


@njit(**BARE)
def _add_codes(job, area, result, codes, scales, ahead, asked, first, n, all_rows, sight):
    """Add a block's values, which are codes, to rows first .. first + n - 1. The weights of as many rows and groups as
    ROUNDED are rounded before any is multiplied, so that no product waits for its weights, and no weight for its
    group's lift. asked: see asked_with_values"""
    side = job + w.AT_VALUES * 8
    width, size, row = word(side, w.SD_SEEN), word(side, w.SD_GROUP), word(side, w.SD_CODE_BYTES)
    per_group = 2 if word(side, w.SD_CODEC) == Q4 else 1
    planes, worth = area + word(job, w.AT_PLANES), area + word(job, w.AT_WORTH)
    lifts = area + word(job, w.AT_LIFTS)
    keep, groups, together = state_of(job, area, all_rows, 2) + first * 4, width // size, max(1, w.ROUNDED // n)
    start, stop = tiles_of(sight)
    for begin in range(0, groups, together):
        end = min(begin + together, groups)
        for g in range(begin, end):
            low = _per_token(scales, per_group * g, 0, True, 0, CACHED)
            factor, unit = _find_lift(side, low, _per_token(scales, per_group * g, 1, True, 0, CACHED))
            write_f32(lifts, (g - begin) * 8, factor)
            write_f32(lifts, (g - begin) * 8 + 4, unit)
        for g in range(begin, end):
            ask_for(scales + g * per_group * CACHED * 2 + ahead, per_group * CACHED * 2)
            at, lift = (g - begin) * n, (read_f32(lifts, (g - begin) * 8), read_f32(lifts, (g - begin) * 8 + 4))
            to, unit = planes + at * PLANES, worth + at * 4
            _round_group(job, area, scales, g, lift, first, n, all_rows, to, unit, sight)
        for d in range(begin * size, end * size, 32):
            at, column = (d // size - begin) * n, d * row // width * CACHED
            for r in range(0, n, 4):
                rounded, out = planes + (at + r) * PLANES, result + ((first + r) * width + d) * 4
                factors, later = worth + (at + r) * 4, 0 if r else ahead
                wanted = asked[0] + (d // 32 * n + r) // 4 * (CACHED // 4) * asked[1], asked[1]
                _multiply_four(side, codes + column, later, wanted, rounded, start, stop, keep + r * 4, factors, out)


@njit(**BARE)
def add_values(job, area, result, at, n, all_rows, kv_head, kv_heads, sight):
    """Add a block's values to rows at .. at + n - 1, all of one key-value head if heads have values of their own."""
    side = job + w.AT_VALUES * 8
    width = word(side, w.SD_SEEN)
    _, _, _, block, low, high = sight
    if word(side, w.SD_INT8):
        codes, scales, ahead = find(job, side, kv_head, kv_heads, block)
        asked = asked_with_values(job, kv_heads, block, all_rows)
        _add_codes(job, area, result, codes, scales, ahead, asked, at, n, all_rows, sight)
        return
    weights, out = area + word(job, w.AT_SCORES) + at * CACHED * 4, result + at * width * 4
    keep, share = state_of(job, area, all_rows, 2) + at * 4, state_of(job, area, all_rows, 3) + at * 4
    start, stop = low - block, high - block
    if is_direct(side, n):
        x, _, ahead = find(job, side, kv_head, kv_heads, block)
        weigh_f16(weights, CACHED * 4, n, keep, share, x, ahead, width * 2, start, stop, width, out, width * 4)
    else:
        x = decoded(job, side, area, kv_head, low, high - low) - start * width * 4
        weigh(weights, CACHED * 4, n, keep, share, x, width * 4, start, stop, width, out, width * 4)


@njit(**BARE)
def clear_values(job, area, result, all_rows):
    """Nothing is summed yet."""
    side = job + w.AT_VALUES * 8
    width = word(side, w.SD_SEEN)
    for i in range(0, all_rows * width * 4, 64):
        store_f32(result, i, splat_f32(np.float32(0.0)))
    if word(side, w.SD_INT8) and word(side, w.SD_CODEC) == Q4:
        for i in range(0, width // 32 * all_rows * 64, 64):
            store_f32(area + word(job, w.AT_BASES), i, splat_f32(np.float32(0.0)))


@njit(**BARE)
def finish_values(job, area, result, all_rows):
    """Add what bases came to."""
    side = job + w.AT_VALUES * 8
    width = word(side, w.SD_SEEN)
    if word(side, w.SD_INT8) and word(side, w.SD_CODEC) == Q4:
        for g in range(width // 32):
            for r in range(all_rows):
                base = splat_f32(simd.sum_lanes(load_f32(area + word(job, w.AT_BASES), (g * all_rows + r) * 64)))
                for i in range(0, 128, 64):
                    at = (r * width + g * 32) * 4 + i
                    store_f32(result, at, load_f32(result, at) + base)
