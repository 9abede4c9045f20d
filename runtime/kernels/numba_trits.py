"""Products of trit matrices with activations, compiled by Numba.

A matrix is read strip by strip (16 rows, one 32-bit lane each; SPEC.md gives the bytes): a superblock is decoded once
and used for all tokens, with int8 activations in exact integer sums, or with float32 ones.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .numba_jobs import BLOCK, matrix_of, rows_of
from .numba_math import word
from .numba_panel import AT_ONCE, PANELS, add_group, add_panel, clear, emit_panel, inputs_of, store_column
from .simd import fma, load_f32, read_f32, splat_f32, store_f32, to_f32
from .simd_tiles import prefetch_far
from .words import DATA, PADDED, PADDED_STRIDE, QUANTS, ROUND, TABLE, UNIT_ROWS, WIDTH, N

ROWS = 16  # of a strip
AHEAD = 8192  # bytes between what is read and what is asked for: the hardware alone does not look far enough


@njit(forceinline=True)
def _digits(v, weight):
    """(ternary digit of that weight, the rest below it), for values below three times the weight.

    Taking the weight away where that does not wrap leaves the rest. What was taken is the digit times the weight, and
    81 and 9 are 1 modulo 4, 27 and 3 are -1: its two low bits are the digit, or its negative."""
    rest = simd.minimum_u8(v, v - weight)
    rest = simd.minimum_u8(rest, rest - weight)
    return ((v - rest) if weight % 4 == 1 else (rest - v)) & 3, rest


@njit(forceinline=True)
def _decode(depth, data, at):
    """The `depth` byte vectors at that offset as levels of the five groups, unsigned 0 .. 3^depth - 1."""
    v0 = simd.load_u8(data, at)
    if depth == 1:
        q0, rest = _digits(v0, 81)
        q1, rest = _digits(rest, 27)
        q2, rest = _digits(rest, 9)
        q3, q4 = _digits(rest, 3)
        return q0, q1, q2, q3, q4
    v1 = simd.load_u8(data, at + 64)
    t0, r0 = _digits(v0, 81)
    t1, r1 = _digits(v1, 81)
    if depth == 2:
        a, r0 = _digits(r0, 27)
        b, q0 = _digits(r0, 9)
        c, r1 = _digits(r1, 27)
        d, q2 = _digits(r1, 9)
        return q0, a * 3 + b, q2, c * 3 + d, t0 * 3 + t1
    v2 = simd.load_u8(data, at + 128)
    t2, r2 = _digits(v2, 81)
    if depth == 3:
        u0, q0 = _digits(r0, 27)
        u1, q1 = _digits(r1, 27)
        u2, q2 = _digits(r2, 27)
        return q0, q1, q2, t0 * 3 + u0 + t2 * 9, t1 * 3 + u1 + u2 * 9
    t3, r3 = _digits(simd.load_u8(data, at + 192), 81)
    return r0, r1, r2, r3, ((t0 * 3 + t1) * 3 + t2) * 3 + t3


@njit(forceinline=True)
def _units(data, at, table):
    """The units (16 rows) of the five groups, from the 48 bytes of scale codes."""
    s0, s1, s2 = (
        simd.load_u8_as_i32(data, at),
        simd.load_u8_as_i32(data, at + 16),
        simd.load_u8_as_i32(data, at + 32),
    )
    h0, h1, h2 = (s0 * 2428) >> 16, (s1 * 2428) >> 16, (s2 * 2428) >> 16  # / 27 for 0 .. 255
    third = (h2 * 21846) >> 16  # / 3
    return (
        simd.lookup(table, s0 - h0 * 27),
        simd.lookup(table, s1 - h1 * 27),
        simd.lookup(table, s2 - h2 * 27),
        simd.lookup(table, h0 + (h2 - third * 3) * 9),
        simd.lookup(table, h1 + third * 9),
    )


@njit(forceinline=True)
def _superblock(depth, here, table):
    """A superblock as four vectors of levels and one of units for each of its groups."""
    a0, b0, c0, d0, e0 = _decode(depth, here, 0)
    a1, b1, c1, d1, e1 = _decode(depth, here, 64 * depth)
    a2, b2, c2, d2, e2 = _decode(depth, here, 128 * depth)
    a3, b3, c3, d3, e3 = _decode(depth, here, 192 * depth)
    q = (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3), (e0, e1, e2, e3)
    return q, _units(here, 256 * depth, table)


@njit(forceinline=True)
def _offset(depth):
    """Levels are stored unsigned: this times the sum of the inputs is added again."""
    return np.int32(-((3**depth - 1) // 2))


@njit(forceinline=True)
def _one_group(job, q, unit, group, offset, total):
    start, x, scale = inputs_of(job, word(job, QUANTS), group, offset)
    return add_group(True, q, unit, start, x, scale, total)


@njit(forceinline=True)
def _strip_int8(depth, data, blocks, table, job, out):
    """out = 16 rows times the int8 activations of a single token."""
    total, offset = splat_f32(np.float32(0.0)), _offset(depth)
    for block in range(blocks):
        here = data + block * (256 * depth + 48)
        for line in range(0, 256 * depth + 48, 64):
            prefetch_far(here + line, AHEAD)
        q, units = _superblock(depth, here, table)
        total = _one_group(job, q[0], units[0], block * 5, offset, total)
        total = _one_group(job, q[1], units[1], block * 5 + 1, offset, total)
        total = _one_group(job, q[2], units[2], block * 5 + 2, offset, total)
        total = _one_group(job, q[3], units[3], block * 5 + 3, offset, total)
        total = _one_group(job, q[4], units[4], block * 5 + 4, offset, total)
    store_f32(out, 0, total)


@njit(forceinline=True)
def _panels_int8(depth, data, blocks, strips, table, job, first, count, scratch):
    """The sums of a unit's strips times the int8 activations of tokens first .. first + count - 1."""
    clear(scratch, count)
    for block in range(blocks):
        for strip in range(strips):
            q, units = _superblock(depth, data + (strip * blocks + block) * (256 * depth + 48), table)
            store_column(scratch, 0, strip, q[0], units[0])
            store_column(scratch, 1, strip, q[1], units[1])
            store_column(scratch, 2, strip, q[2], units[2])
            store_column(scratch, 3, strip, q[3], units[3])
            store_column(scratch, 4, strip, q[4], units[4])
        for g in range(5):
            add_panel(True, job, word(job, QUANTS), block * 5 + g, _offset(depth), first, count, scratch, g)


@njit(forceinline=True)
def _expand(q, top, unit, rounding, out):
    """Four inputs of 16 rows as float32 weights, one vector for each input."""
    lanes = simd.as_i32(q)
    for k in range(4):
        weight = to_f32(((lanes >> (8 * k)) & 255) - top) * unit
        if rounding == 1:
            weight = simd.round_f16(weight)
        elif rounding == 2:
            weight = simd.round_bf16(weight)
        store_f32(out, k * 64, weight)


@njit(forceinline=True)
def _strip_f32(depth, data, blocks, table, rounding, job, first, count, weights, out):
    """out[token] = 16 rows times the float32 activations of tokens first .. first + count - 1.

    weights: the address of memory for a superblock expanded to float32; out: rows of UNIT_ROWS numbers"""
    padded, stride = word(job, PADDED), word(job, PADDED_STRIDE)
    top = (3**depth - 1) // 2
    for block in range(blocks):
        here = data + block * (256 * depth + 48)
        ua, ub, uc, ud, ue = _units(here, 256 * depth, table)
        for quad in range(4):
            a, b, c, d, e = _decode(depth, here, quad * 64 * depth)
            _expand(a, top, ua, rounding, weights + quad * 256)
            _expand(b, top, ub, rounding, weights + quad * 256 + 1024)
            _expand(c, top, uc, rounding, weights + quad * 256 + 2048)
            _expand(d, top, ud, rounding, weights + quad * 256 + 3072)
            _expand(e, top, ue, rounding, weights + quad * 256 + 4096)
        for i in range(count):
            x = padded + (first + i) * stride + block * BLOCK * 4
            acc = load_f32(out, i * UNIT_ROWS * 4) if block else splat_f32(np.float32(0.0))
            for k in range(BLOCK):
                acc = fma(load_f32(weights, k * 64), splat_f32(read_f32(x, k * 4)), acc)
            store_f32(out, i * UNIT_ROWS * 4, acc)


@njit(forceinline=True)
def _trit_unit(depth, int8, job, unit):
    """One pool unit of trit matrices. Inlined into its task, so that depth and int8 are constants there."""
    matrix = matrix_of(job, unit)
    start, stop = rows_of(matrix, unit)
    table, rounding, n = word(matrix, TABLE), word(matrix, ROUND), word(job, N)
    blocks, strips = (word(job, WIDTH) + BLOCK - 1) // BLOCK, (stop - start + ROWS - 1) // ROWS
    data, strip_bytes = word(matrix, DATA) + start // ROWS * blocks * (256 * depth + 48), blocks * (256 * depth + 48)
    scratch = simd.scratch_160k()
    for first in range(0, n, AT_ONCE):
        count = min(AT_ONCE, n - first)
        if int8 and n > 1:
            _panels_int8(depth, data, blocks, strips, table, job, first, count, scratch)
        else:
            for s in range(strips):
                here, out = data + s * strip_bytes, scratch + s * ROWS * 4
                if int8:
                    _strip_int8(depth, here, blocks, table, job, out)
                else:
                    _strip_f32(depth, here, blocks, table, rounding, job, first, count, scratch + PANELS, out)
        emit_panel(job, matrix, start, stop, first, count, scratch)


# ==== Tasks: one for each depth, so that only what a model needs is compiled ====


def trit1_int8(job, unit):
    _trit_unit(1, True, job, unit)


def trit2_int8(job, unit):
    _trit_unit(2, True, job, unit)


def trit3_int8(job, unit):
    _trit_unit(3, True, job, unit)


def trit4_int8(job, unit):
    _trit_unit(4, True, job, unit)


def trit1_f32(job, unit):
    _trit_unit(1, False, job, unit)


def trit2_f32(job, unit):
    _trit_unit(2, False, job, unit)


def trit3_f32(job, unit):
    _trit_unit(3, False, job, unit)


def trit4_f32(job, unit):
    _trit_unit(4, False, job, unit)
