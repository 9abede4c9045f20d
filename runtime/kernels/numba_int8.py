"""Products of q8 and nf4 matrices with int8 activations, compiled by Numba.

Sixteen rows are taken together, 32 bytes of each at a time: a tile, transposed so that a row is a 32-bit lane. It is
decoded once and used for all tokens, two groups of 16 inputs at a time, in exact integer sums. NF4 levels are
integers of 14 bits, split in two bytes. Every output adds its groups in their order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .base import GROUP
from .numba_dense import NESTED_SHIFT, NF4, NF4_NESTED, Q8
from .numba_jobs import emit, emit_rows, groups_of, matrix_of, rows_of
from .numba_math import word
from .simd import fma, load_f32, read_f32, read_i32, splat_f32, splat_i32, splat_quad, store_f32, to_f32
from .simd_tiles import keep_lanes, prefetch, transpose
from .words import (
    AUX,
    AUX2,
    AUX3,
    DATA,
    LEVEL_BITS,
    LEVEL_MIDDLE,
    OUTPUTS,
    QUANTS,
    SCALES,
    SUMS,
    TABLE,
    TABLE_HIGH,
    TABLE_LOW,
    TABLE_UNIT,
    WIDTH,
    N,
)

ROWS = 16
TOKENS = 256  # tokens that share one decoding of the weights
TILES = 16  # tiles whose scales are decoded at a time
# Byte offsets in the scratch memory, after the sums of TOKENS tokens
ADDRESSES = TOKENS * 64
ROW_SCALES = ADDRESSES + ROWS * 8


@njit(forceinline=True)
def _dot(q0, q1, q2, q3, x0, x1, x2, x3, total):
    return simd.dot4(simd.dot4(simd.dot4(simd.dot4(total, q0, x0), q1, x1), q2, x2), q3, x3)


@njit(forceinline=True)
def _q8_group(q, x, sums):
    """The exact integer product of 16 inputs x 16 rows. sums: the address of the inputs' sum"""
    total = splat_i32(read_i32(sums, 0) * simd.i8_offset())
    total = simd.dot4_i8(simd.dot4_i8(total, q[0], splat_quad(x, 0)), q[1], splat_quad(x, 4))
    return to_f32(simd.dot4_i8(simd.dot4_i8(total, q[2], splat_quad(x, 8)), q[3], splat_quad(x, 12)))


@njit(forceinline=True)
def _nf4_group(q, x, sums):
    """The same, of weights that are split in high and low bytes."""
    x0, x1, x2, x3 = splat_quad(x, 0), splat_quad(x, 4), splat_quad(x, 8), splat_quad(x, 12)
    high = splat_i32(read_i32(sums, 0) * np.int32(-LEVEL_MIDDLE))
    high = _dot(q[0], q[1], q[4], q[5], x0, x1, x2, x3, high)
    low = _dot(q[2], q[3], q[6], q[7], x0, x1, x2, x3, splat_i32(np.int32(0)))
    return to_f32((high << LEVEL_BITS) + low)


@njit(forceinline=True)
def _two_groups(group, a, b, quants, sums, scales, at, step, factor, total):
    """total + 32 inputs times 16 rows.

    group: one of the functions above; a, b: the weights of the two groups
    at: number of the first group of activations; step: to the next"""
    other = at + step
    p = group(a, quants + at * GROUP, sums + at * 4) * splat_f32(read_f32(scales, at * 4))
    q = group(b, quants + other * GROUP, sums + other * 4)
    return fma(fma(q, splat_f32(read_f32(scales, other * 4)), p), factor, total)


@njit(forceinline=True)
def _half(group, plane, single, job, a, b, at, first, count, factor, total, scratch):
    """Use two groups of weights for a single token, whose sums are `total`, or for `count` whose sums are in scratch.

    plane: 0 if weights are in the order of the inputs, 1 if as nibbles are"""
    n, sums, scales = word(job, N), word(job, SUMS), word(job, SCALES)
    quants = word(job, QUANTS) + plane * groups_of(job) * n * GROUP
    if single:
        return _two_groups(group, a, b, quants, sums, scales, at, 1, factor, total)
    for i in range(count):
        before = load_f32(scratch, i * 64)
        after = _two_groups(group, a, b, quants, sums, scales, at * n + first + i, n, factor, before)
        store_f32(scratch, i * 64, after)
    return total


@njit(forceinline=True)
def _levels(codes, others, table):
    """High and low bytes of the levels of sixteen inputs; of each eight, those of even number first."""
    p, q, r, s = (codes >> 4) & 15, codes & 15, (others >> 4) & 15, others & 15
    high, low = table + TABLE_HIGH, table + TABLE_LOW
    return (
        simd.lookup_u8(high, p),
        simd.lookup_u8(high, q),
        simd.lookup_u8(low, p),
        simd.lookup_u8(low, q),
        simd.lookup_u8(high, r),
        simd.lookup_u8(high, s),
        simd.lookup_u8(low, r),
        simd.lookup_u8(low, s),
    )


@njit(forceinline=True)
def _signed(q0, q1, q2, q3):
    return simd.factor_i8(q0), simd.factor_i8(q1), simd.factor_i8(q2), simd.factor_i8(q3)


@njit(forceinline=True)
def _strip(codec, single, job, matrix, row, last, first, count, scratch):
    """scratch[token] = rows row .. row + 15 (the last one repeated) times tokens first .. first + count - 1."""
    table, inputs = word(matrix, TABLE), 32 if codec == Q8 else 64
    tiles = (word(job, WIDTH) + inputs - 1) // inputs
    for r in range(ROWS):
        start = word(matrix, DATA) + min(row + r, last) * tiles * simd.TILE_BYTES
        simd.write_i64(scratch + ADDRESSES, r * 8, start)
    total = splat_f32(np.float32(0.0))
    for i in range(count):
        store_f32(scratch, i * 64, total)
    ahead = word(matrix, DATA) + (row + ROWS) * tiles * simd.TILE_BYTES
    for tile in range(tiles):
        if tile % TILES == 0:
            _scales(codec, matrix, row, last, tiles, tile, scratch + ROW_SCALES)
        factor = load_f32(scratch + ROW_SCALES, tile % TILES * 64)
        v = simd.load_tile(scratch + ADDRESSES, tile * simd.TILE_BYTES)
        if single:  # the hardware cannot follow as many rows: ask for the next strip, in the order of its bytes
            for line in range(0, ROWS * simd.TILE_BYTES, 64):
                prefetch(ahead + tile * ROWS * simd.TILE_BYTES, line)
        if codec == Q8:
            p, q = _signed(v[0], v[1], v[2], v[3]), _signed(v[4], v[5], v[6], v[7])
            total = _half(_q8_group, 0, single, job, p, q, tile * 2, first, count, factor, total, scratch)
        else:
            a, b = _levels(v[0], v[1], table), _levels(v[2], v[3], table)
            total = _half(_nf4_group, 1, single, job, a, b, tile * 4, first, count, factor, total, scratch)
            c, d = _levels(v[4], v[5], table), _levels(v[6], v[7], table)
            total = _half(_nf4_group, 1, single, job, c, d, tile * 4 + 2, first, count, factor, total, scratch)
    if single:
        store_f32(scratch, 0, total)


@njit(forceinline=True)
def _row_scales(codec, matrix, blocks, first, spare):
    """The scales of sixteen blocks from `first` on; those that the matrix, with its `blocks`, does not have are junk.

    spare: the address of 64 bytes"""
    scales, size = word(matrix, AUX), 2 if codec == Q8 else 4 if codec == NF4 else 1
    at = first * size
    if first + TILES > blocks:
        for k in range((blocks - first) * size):
            simd.write_u8(spare, k, simd.read_u8(scales, at + k))
        scales, at = spare, 0
    if codec == Q8:
        return simd.load_f16_as_f32(scales, at)
    if codec == NF4:
        return load_f32(scales, at)
    nested, levels = word(matrix, AUX2), word(matrix, AUX3)
    here, end = first >> NESTED_SHIFT, min(first + TILES, blocks) - 1 >> NESTED_SHIFT
    change = (end << NESTED_SHIFT) - first if end > here else TILES
    outer = keep_lanes(splat_f32(read_f32(nested, here * 4)), 0, change, read_f32(nested, end * 4))
    return simd.lookup256(levels + 4, simd.load_u8_as_i32(scales, at)) * outer + splat_f32(read_f32(levels, 0))


@njit(forceinline=True)
def _scales(codec, matrix, row, last, tiles, start, out):
    """out[i, r] = the scale of tile start + i of row + r, for sixteen tiles."""
    blocks = word(matrix, OUTPUTS) * tiles
    for r in range(ROWS):
        first = min(row + r, last) * tiles + start
        store_f32(out, r * 64, _row_scales(codec, matrix, blocks, first, out + ROWS * 64))
    transpose(out)


@njit(forceinline=True)
def _int8_unit(codec, job, unit):
    """One pool unit. Inlined into its task, so that the codec is a constant there."""
    matrix = matrix_of(job, unit)
    start, stop = rows_of(matrix, unit)
    unit = np.float32(1.0) if codec == Q8 else read_f32(word(matrix, TABLE), TABLE_UNIT)
    scratch = simd.scratch_32k()
    for row in range(start, stop, ROWS):
        for first in range(0, word(job, N), TOKENS):
            count = min(TOKENS, word(job, N) - first)
            if word(job, N) == 1:
                _strip(codec, True, job, matrix, row, stop - 1, 0, 1, scratch)
            else:
                _strip(codec, False, job, matrix, row, stop - 1, first, count, scratch)
            for i in range(count):
                store_f32(scratch, i * 64, load_f32(scratch, i * 64) * unit)
                if row + ROWS <= stop:
                    emit_rows(job, matrix, first + i, row, load_f32(scratch, i * 64))
                else:
                    for r in range(stop - row):
                        emit(job, matrix, first + i, row + r, read_f32(scratch, i * 64 + r * 4))


def q8_int8(job, unit):
    _int8_unit(Q8, job, unit)


def nf4_int8(job, unit):
    _int8_unit(NF4, job, unit)


def nf4_nested_int8(job, unit):
    _int8_unit(NF4_NESTED, job, unit)
