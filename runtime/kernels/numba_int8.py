"""Products of q8 and nf4 matrices with int8 activations, compiled by Numba.

Sixteen rows are taken together, 32 bytes of each at a time: a tile, transposed so that a row is a 32-bit lane. NF4
levels are 8-bit integers. Every output adds its groups of 16 inputs in their order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .numba_dense import NESTED_SHIFT, NF4, NF4_NESTED, Q8
from .numba_jobs import matrix_of, rows_of
from .numba_math import word
from .numba_panel import (
    AT_ONCE,
    COLUMNS,
    SPARE,
    add_group,
    add_panel,
    clear,
    emit_panel,
    inputs_of,
    quants_of,
    store_column,
)
from .simd import load_f32, read_f32, splat_f32, store_f32
from .simd_tiles import keep_lanes, prefetch_far, transpose
from .words import AUX, AUX2, AUX3, DATA, OUTPUTS, TABLE, TABLE_LEVELS, TABLE_STEP, WIDTH, N

ROWS = 16
TILES = 16  # tiles whose scales are decoded at a time
# Byte offsets in the scratch memory, after the panels: the factors of the levels, then for each column of sixteen rows
# their addresses and, for TILES tiles, their units, and 64 bytes that are used while these are made.
LEVELS = SPARE
LINES = LEVELS + 64
UNITS = ROWS * 8
LINE_BYTES = UNITS + TILES * ROWS * 4 + 64


@njit(forceinline=True)
def _lookup(levels, a, b):
    """The factors of sixteen inputs, whose nibbles are in two vectors; of each eight those of even number first."""
    return (
        simd.lookup_u8(levels, (a >> 4) & 15),
        simd.lookup_u8(levels, a & 15),
        simd.lookup_u8(levels, (b >> 4) & 15),
        simd.lookup_u8(levels, b & 15),
    )


@njit(forceinline=True)
def _signed(q0, q1, q2, q3):
    return simd.factor_i8(q0), simd.factor_i8(q1), simd.factor_i8(q2), simd.factor_i8(q3)


@njit(forceinline=True)
def _tile(codec, scratch, lines, tile):
    """The factors of a tile: four vectors for each of four groups of 16 inputs; q8 has two, and they come twice."""
    v = simd.load_tile(lines, tile * simd.TILE_BYTES)
    if codec == Q8:
        a, b = _signed(v[0], v[1], v[2], v[3]), _signed(v[4], v[5], v[6], v[7])
        return a, b, a, b
    levels = scratch + LEVELS
    a, b = _lookup(levels, v[0], v[1]), _lookup(levels, v[2], v[3])
    return a, b, _lookup(levels, v[4], v[5]), _lookup(levels, v[6], v[7])


@njit(forceinline=True)
def _one_group(job, quants, q, unit, group, total):
    start, x, scale = inputs_of(job, quants, group, simd.i8_offset())
    return add_group(False, q, unit, start, x, scale, total)


@njit(forceinline=True)
def _strip(codec, job, matrix, row, last, tiles, step, scratch, lines, out):
    """out = rows row .. row + 15 (the last one repeated) times the activations of a single token."""
    quants, total = quants_of(job, 0 if codec == Q8 else 1), splat_f32(np.float32(0.0))
    ahead = word(matrix, DATA) + (row + ROWS) * tiles * simd.TILE_BYTES
    for tile in range(tiles):
        if tile % TILES == 0:
            _units(codec, matrix, row, last, tiles, tile, step, lines + UNITS)
        # The hardware cannot follow as many rows: ask for the next strip, in the order of its bytes.
        for line in range(0, ROWS * simd.TILE_BYTES, 64):
            prefetch_far(ahead + tile * ROWS * simd.TILE_BYTES, line)
        a, b, c, d = _tile(codec, scratch, lines, tile)
        unit, group = load_f32(lines, UNITS + tile % TILES * 64), tile * (2 if codec == Q8 else 4)
        total = _one_group(job, quants, a, unit, group, total)
        total = _one_group(job, quants, b, unit, group + 1, total)
        if codec != Q8:
            total = _one_group(job, quants, c, unit, group + 2, total)
            total = _one_group(job, quants, d, unit, group + 3, total)
    store_f32(out, 0, total)


@njit(forceinline=True)
def _panels(codec, job, matrix, start, stop, tiles, step, first, count, scratch):
    """The sums of rows start .. stop - 1 times the activations of tokens first .. first + count - 1."""
    quants, groups = quants_of(job, 0 if codec == Q8 else 1), 2 if codec == Q8 else 4
    clear(scratch, count)
    for tile in range(tiles):
        for column in range((stop - start + ROWS - 1) // ROWS):
            lines = scratch + LINES + column * LINE_BYTES
            if tile % TILES == 0:
                _units(codec, matrix, start + column * ROWS, stop - 1, tiles, tile, step, lines + UNITS)
            a, b, c, d = _tile(codec, scratch, lines, tile)
            unit = load_f32(lines, UNITS + tile % TILES * 64)
            store_column(scratch, 0, column, a, unit)
            store_column(scratch, 1, column, b, unit)
            if codec != Q8:
                store_column(scratch, 2, column, c, unit)
                store_column(scratch, 3, column, d, unit)
        for g in range(groups):
            add_panel(False, job, quants, tile * groups + g, simd.i8_offset(), first, count, scratch, g)


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
def _units(codec, matrix, row, last, tiles, start, step, out):
    """out[i, r] = what a factor is worth in tile start + i of row + r, for sixteen tiles; 64 bytes more are used."""
    blocks = word(matrix, OUTPUTS) * tiles
    for r in range(ROWS):
        first = min(row + r, last) * tiles + start
        store_f32(out, r * 64, _row_scales(codec, matrix, blocks, first, out + ROWS * 64) * splat_f32(step))
    transpose(out)


@njit(forceinline=True)
def _prepare(codec, matrix, start, stop, tiles, scratch):
    """Put rows' addresses, and of NF4 the levels' factors, into the scratch memory; gives what a factor is worth."""
    for column in range(COLUMNS):
        for r in range(ROWS):
            row = min(start + column * ROWS + r, stop - 1)
            address = word(matrix, DATA) + row * tiles * simd.TILE_BYTES
            simd.write_i64(scratch, LINES + column * LINE_BYTES + r * 8, address)
    if codec == Q8:
        return np.float32(1.0)
    simd.store_u8(scratch, LEVELS, simd.factor_i8(simd.load_u8(word(matrix, TABLE), TABLE_LEVELS)))
    return read_f32(word(matrix, TABLE), TABLE_STEP)


@njit(forceinline=True)
def _int8_unit(codec, job, unit):
    """One pool unit. Inlined into its task, so that the codec is a constant there."""
    matrix, n = matrix_of(job, unit), word(job, N)
    start, stop = rows_of(matrix, unit)
    inputs = 32 if codec == Q8 else 64
    tiles = (word(job, WIDTH) + inputs - 1) // inputs
    scratch = simd.scratch_160k()
    step = _prepare(codec, matrix, start, stop, tiles, scratch)
    for first in range(0, n, AT_ONCE):
        count = min(AT_ONCE, n - first)
        if n > 1:
            _panels(codec, job, matrix, start, stop, tiles, step, first, count, scratch)
        else:
            for row in range(start, stop, ROWS):
                lines = LINE_BYTES * ((row - start) // ROWS)
                out = scratch + (row - start) * 4
                _strip(codec, job, matrix, row, stop - 1, tiles, step, scratch, scratch + LINES + lines, out)
        emit_panel(job, matrix, start, stop, first, count, scratch)


def q8_int8(job, unit):
    _int8_unit(Q8, job, unit)


def nf4_int8(job, unit):
    _int8_unit(NF4, job, unit)


def nf4_nested_int8(job, unit):
    _int8_unit(NF4_NESTED, job, unit)
