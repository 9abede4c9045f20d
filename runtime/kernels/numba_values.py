"""Sums of values: a block's vectors, weighted, are added to what a unit's rows have summed so far.

Values that stay codes are summed in integers: weights times scales are rounded to 14 bits of the largest that a row
has in a group, and split in two bytes; or to 7 bits (base.weight_bits). Codes of four tokens lie together, a column to
a lane.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from . import words as w
from .compiling import BARE
from .numba_blocks import BLOCKS_AHEAD, ask_for, decoded, find, is_direct, spread_scales
from .numba_codes import Q4
from .numba_math import word
from .numba_queries import rows_of
from .numba_tiles import add_scaled, weigh, weigh_f16
from .numba_weights import sees_all, sight_of, state_of
from .simd import dot4, fma, load_f32, load_u8, read_f32, splat_f32, splat_i32, splat_quad, store_f32, to_f32, write_f32
from .simd_tiles import keep_lanes
from .words import CACHED

PLANES = 2 * CACHED  # bytes of a row's weights: high ones, then low ones; or one for each


@njit(forceinline=True)
def _largest(scales, start, stop):
    """The largest scale of a group of those of tokens start .. stop - 1."""
    largest = splat_f32(np.float32(0.0))
    for i in range(0, CACHED, 16):
        seen = keep_lanes(load_f32(scales, i * 4), start - i, stop - i, np.float32(0.0))
        largest = simd.larger_magnitude(largest, seen)
    return simd.largest_magnitude(largest)


@njit(forceinline=True)
def _lift(top, largest):
    """What scales are multiplied with so that the largest is `top`."""
    return top / largest if largest > np.float32(0.0) else np.float32(0.0)


@njit(forceinline=True)
def _round(weights, scales, factor, two, planes):
    """Round weights times scales times a factor, and write their bytes, or their high and their low ones."""
    for i in range(0, CACHED, 16):
        # At 1.5 * 2^23 a float's last bit counts ones.
        lifted = load_f32(weights, i * 4) * splat_f32(factor)
        bits = simd.f32_bits(fma(lifted, load_f32(scales, i * 4), splat_f32(np.float32(12582912.0))))
        if two:
            simd.store_i32_as_i8(planes, i, bits >> 7)
            simd.store_i32_as_i8(planes, CACHED + i, bits & 127)
        else:
            simd.store_i32_as_i8(planes, i, bits)


@njit(forceinline=True)
def _columns(codes, is_q4):
    """32 columns of four tokens; q4 codes less 8, so that errors of weights mostly cancel."""
    a = load_u8(codes, 0)
    return ((a & 15) - 8, ((a >> 4) & 15) - 8) if is_q4 else (a, load_u8(codes, 64))


@njit(forceinline=True)
def _four_dots(sums, weights, two, a, b):
    """Four tokens' products with two vectors of columns: (high bytes' a, b, low bytes' a, b)"""
    high = splat_quad(weights, 0)
    if not two:
        return dot4(sums[0], high, a), dot4(sums[1], high, b), sums[2], sums[3]
    low = splat_quad(weights, CACHED)
    return dot4(sums[0], high, a), dot4(sums[1], high, b), dot4(sums[2], low, a), dot4(sums[3], low, b)


@njit(forceinline=True)
def _multiply(is_q4, two, codes, stride, planes, keep, factors, out, out_stride):
    """Add 32 columns' sums to four rows of the result. stride: from four tokens to the next"""
    zero = splat_i32(np.int32(0))
    s0 = s1 = s2 = s3 = (zero, zero, zero, zero)
    for j in range(0, CACHED, 4):
        a, b = _columns(codes + j // 4 * stride, is_q4)
        s0, s1 = _four_dots(s0, planes + j, two, a, b), _four_dots(s1, planes + PLANES + j, two, a, b)
        s2 = _four_dots(s2, planes + 2 * PLANES + j, two, a, b)
        s3 = _four_dots(s3, planes + 3 * PLANES + j, two, a, b)
    _add_pair(out, keep, factors, two, s0)
    _add_pair(out + out_stride, keep + 4, factors + 4, two, s1)
    _add_pair(out + 2 * out_stride, keep + 8, factors + 8, two, s2)
    _add_pair(out + 3 * out_stride, keep + 12, factors + 12, two, s3)


@njit(forceinline=True)
def _add_pair(out, keep, factor, two, s):
    add_scaled(out, keep, factor, to_f32((s[0] << 7) + s[2] if two else s[0]))
    add_scaled(out + 64, keep, factor, to_f32((s[1] << 7) + s[3] if two else s[1]))


@njit(forceinline=True)
def _add_bases(weights, base, keep, share, sums):
    """sums = sums * keep + share * the products of a row's weights with bases, in sixteen lanes."""
    total = splat_f32(np.float32(0.0))
    for i in range(0, CACHED, 16):
        total = fma(load_f32(weights, i * 4), load_f32(base, i * 4), total)
    past = load_f32(sums, 0) * splat_f32(read_f32(keep, 0))
    store_f32(sums, 0, fma(total, splat_f32(read_f32(share, 0)), past))


@njit(**BARE)
def _multiply_four(side, codes, planes, keep, factors, out):
    """Add 32 columns' sums to four rows of the result."""
    stride, width = word(side, w.SD_CODE_BYTES) * 4, word(side, w.SD_SEEN) * 4
    if word(side, w.SD_CODEC) == Q4:
        _multiply(True, False, codes, stride, planes, keep, factors, out, width)
    elif word(side, w.SD_BYTES) == 2:
        _multiply(False, True, codes, stride, planes, keep, factors, out, width)
    else:
        _multiply(False, False, codes, stride, planes, keep, factors, out, width)


@njit(**BARE)
def _round_group(job, area, scales, largest, all_rows, at, n, planes, worth, sight):
    """Round the weights of rows at .. at + n - 1 for one group: planes (n, PLANES), and what a unit of them is worth.

    largest: the largest of the group's scales in the block"""
    side = job + w.AT_VALUES * 8
    weights, share = area + word(job, w.AT_SCORES) + at * CACHED * 4, state_of(job, area, all_rows, 3) + at * 4
    two, whole, rows = word(side, w.SD_BYTES) == 2, sees_all(job, sight), rows_of(job, sight[1])
    top = np.float32(16383.0) if two else np.float32(127.0)
    factor, unit = _lift(top, largest), largest / top
    for r in range(n):
        if not whole:  # what others see must not matter
            start, stop = sight_of(job, at + r, rows, sight)
            largest = _largest(scales, start, stop)
            factor, unit = _lift(top, largest), largest / top
        _round(weights + r * CACHED * 4, scales, factor, two, planes + r * PLANES)
        write_f32(worth, r * 4, unit * read_f32(share, r * 4))


@njit(**BARE)
def _add_codes(job, area, result, codes, scales, first, n, all_rows, sight):
    """Add a block's values, which are codes, to rows first .. first + n - 1. The weights of as many rows and groups as
    ROUNDED are rounded before any is multiplied, so that no product waits for its weights."""
    side = job + w.AT_VALUES * 8
    width, size, is_q4 = word(side, w.SD_SEEN), word(side, w.SD_GROUP), word(side, w.SD_CODEC) == Q4
    row, step = word(side, w.SD_CODE_BYTES), (2 if is_q4 else 1) * CACHED * 4
    planes, worth = area + word(job, w.AT_PLANES), area + word(job, w.AT_WORTH)
    weights = area + word(job, w.AT_SCORES) + first * CACHED * 4
    keep, share = state_of(job, area, all_rows, 2) + first * 4, state_of(job, area, all_rows, 3) + first * 4
    groups, together = width // size, max(1, w.ROUNDED // n)
    for begin in range(0, groups, together):
        end = min(begin + together, groups)
        for g in range(begin, end):
            scale, at = scales + g * step, (g - begin) * n
            largest = _largest(scale, 0, CACHED)
            _round_group(job, area, scale, largest, all_rows, first, n, planes + at * PLANES, worth + at * 4, sight)
            if is_q4:
                bases, base = area + word(job, w.AT_BASES) + (g * all_rows + first) * 64, scale + CACHED * 4
                for i in range(0, CACHED * 4, 64):
                    store_f32(base, i, fma(load_f32(scale, i), splat_f32(np.float32(8.0)), load_f32(base, i)))
                for r in range(n):
                    _add_bases(weights + r * CACHED * 4, base, keep + r * 4, share + r * 4, bases + r * 64)
        for d in range(begin * size, end * size, 32):
            at, column = (d // size - begin) * n, d * row // width
            ask_for(codes + (BLOCKS_AHEAD * row + column) * CACHED, 32 * row // width * CACHED)
            for r in range(0, n, 4):
                rounded, out = planes + (at + r) * PLANES, result + ((first + r) * width + d) * 4
                _multiply_four(side, codes + column * 4, rounded, keep + r * 4, worth + (at + r) * 4, out)


@njit(**BARE)
def add_values(job, area, result, at, n, all_rows, kv_head, sight):
    """Add a block's values to rows at .. at + n - 1, all of one key-value head if heads have values of their own."""
    side = job + w.AT_VALUES * 8
    width = word(side, w.SD_SEEN)
    head = kv_head if word(side, w.SD_HEADS) > 1 else 0
    _, _, _, block, low, high = sight
    if word(side, w.SD_INT8):
        codes, scales = find(job, side, head, block)
        units = area + word(job, w.AT_UNITS)
        spread_scales(side, scales, low - block, high - block, units)
        _add_codes(job, area, result, codes, units, at, n, all_rows, sight)
        return
    weights, out = area + word(job, w.AT_SCORES) + at * CACHED * 4, result + at * width * 4
    keep, share = state_of(job, area, all_rows, 2) + at * 4, state_of(job, area, all_rows, 3) + at * 4
    start, stop = low - block, high - block
    if is_direct(side, n):
        x, _ = find(job, side, head, block)
        weigh_f16(weights, CACHED * 4, n, keep, share, x, width * 2, start, stop, width, out, width * 4)
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
