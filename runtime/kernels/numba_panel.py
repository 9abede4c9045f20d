"""Products of decoded 8-bit weights with the int8 activations of many tokens, in exact integer sums.

The 64 rows of a unit are taken abreast, one to a 32-bit lane: a panel, 16 inputs of them all, is decoded once and used
for every token. A unit's scratch memory holds the sums of a span of tokens, then the panels of a piece of the matrix.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .base import GROUP
from .numba_jobs import emit, emit_rows, groups_of
from .numba_math import word
from .simd import fma, load_f32, read_f32, read_i32, splat_f32, splat_i32, splat_quad, store_f32, to_f32
from .words import QUANTS, SCALES, SUMS, UNIT_ROWS, N

AT_ONCE = 512  # tokens that share one decoding of the weights
LANES = 16
COLUMNS = UNIT_ROWS // LANES  # vectors that hold a number of each row
# Byte offsets in the scratch memory: a panel has four vectors of weights, then one of units, for each column.
PANELS = AT_ONCE * UNIT_ROWS * 4
PANEL_BYTES = COLUMNS * 5 * 64
MOST_PANELS = 5  # that are decoded at a time: a superblock of trits
SPARE = PANELS + MOST_PANELS * PANEL_BYTES


@njit(forceinline=True)
def quants_of(job, plane):
    """Where the int8 activations are. plane: 0 in the order of the inputs, 1 in that of nibbles"""
    return word(job, QUANTS) + plane * groups_of(job) * word(job, N) * GROUP


@njit(forceinline=True)
def add_group(plain, q, unit, start, x, scale, total):
    """total + 16 inputs of one token times 16 rows.

    plain: q is unsigned and at most 127, else it is of factor_i8; start: what the integer sum begins with;
    x: four vectors of four inputs each, in all lanes"""
    if plain:
        exact = simd.dot4(simd.dot4(start, q[0], x[0]), q[1], x[1])
        exact = simd.dot4(simd.dot4(exact, q[2], x[2]), q[3], x[3])
    else:
        exact = simd.dot4_i8(simd.dot4_i8(start, q[0], x[0]), q[1], x[1])
        exact = simd.dot4_i8(simd.dot4_i8(exact, q[2], x[2]), q[3], x[3])
    return fma(to_f32(exact) * scale, unit, total)


@njit(forceinline=True)
def inputs_of(job, quants, group, offset):
    """Group number `group` of the activations as add_group wants it: start, x, scale."""
    x = quants + group * GROUP
    start = splat_i32(read_i32(word(job, SUMS), group * 4) * offset)
    scale = splat_f32(read_f32(word(job, SCALES), group * 4))
    return start, (splat_quad(x, 0), splat_quad(x, 4), splat_quad(x, 8), splat_quad(x, 12)), scale


@njit(forceinline=True)
def store_column(scratch, panel, column, q, unit):
    """Put four vectors of weights and one of units into a panel."""
    at = PANELS + panel * PANEL_BYTES + column * 5 * 64
    simd.store_u8(scratch, at, q[0])
    simd.store_u8(scratch, at + 64, q[1])
    simd.store_u8(scratch, at + 128, q[2])
    simd.store_u8(scratch, at + 192, q[3])
    store_f32(scratch, at + 256, unit)


@njit(forceinline=True)
def _column(scratch, panel, column):
    at = PANELS + panel * PANEL_BYTES + column * 5 * 64
    q = simd.load_u8(scratch, at), simd.load_u8(scratch, at + 64), simd.load_u8(scratch, at + 128)
    return (*q, simd.load_u8(scratch, at + 192)), load_f32(scratch, at + 256)


@njit(forceinline=True)
def add_panel(plain, job, quants, group, offset, first, count, scratch, panel):
    """Add the products of a panel and tokens first .. first + count - 1, whose activations are group `group`."""
    (a, a_unit), (b, b_unit) = _column(scratch, panel, 0), _column(scratch, panel, 1)
    (c, c_unit), (d, d_unit) = _column(scratch, panel, 2), _column(scratch, panel, 3)
    at = group * word(job, N) + first
    for i in range(count):
        start, x, scale = inputs_of(job, quants, at + i, offset)
        total = scratch + i * UNIT_ROWS * 4
        store_f32(total, 0, add_group(plain, a, a_unit, start, x, scale, load_f32(total, 0)))
        store_f32(total, 64, add_group(plain, b, b_unit, start, x, scale, load_f32(total, 64)))
        store_f32(total, 128, add_group(plain, c, c_unit, start, x, scale, load_f32(total, 128)))
        store_f32(total, 192, add_group(plain, d, d_unit, start, x, scale, load_f32(total, 192)))


@njit(forceinline=True)
def clear(scratch, count):
    """No sums yet, and nothing in the columns of rows that the matrix does not have."""
    for i in range(0, count * UNIT_ROWS * 4, 64):
        store_f32(scratch, i, splat_f32(np.float32(0.0)))
    for i in range(0, MOST_PANELS * PANEL_BYTES, 64):
        store_f32(scratch, PANELS + i, splat_f32(np.float32(0.0)))


@njit(forceinline=True)
def emit_panel(job, matrix, start, stop, first, count, scratch):
    """Write the outputs of rows start .. stop - 1, at most 64, of tokens first .. first + count - 1."""
    for i in range(count):
        total = scratch + i * UNIT_ROWS * 4
        for row in range(start, stop, LANES):
            at = (row - start) * 4
            if row + LANES <= stop:
                emit_rows(job, matrix, first + i, row, load_f32(total, at))
            else:
                for r in range(stop - row):
                    emit(job, matrix, first + i, row + r, read_f32(total, at + r * 4))
