"""Products of trit matrices with activations, compiled by Numba.

A matrix is read strip by strip (16 rows, one 32-bit lane each; SPEC.md gives the bytes): a superblock is decoded once
and used for all tokens, with int8 activations in exact integer sums, or with float32 ones.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .base import GROUP
from .numba_jobs import BLOCK, emit, emit_rows, matrix_of, rows_of
from .numba_math import word
from .simd import fma, load_f32, read_f32, read_i32, splat_f32, splat_i32, splat_quad, store_f32, to_f32
from .simd_tiles import prefetch
from .words import DATA, PADDED, PADDED_STRIDE, QUANTS, ROUND, SCALES, SUMS, TABLE, WIDTH, N

ROWS = 16
TOKENS = 256  # tokens that share one decoding of the weights
AHEAD = 8192  # bytes between what is read and what is asked for: the hardware alone does not look far enough
SCRATCH_WEIGHTS = TOKENS * 64  # byte offset, in the scratch memory, of a superblock expanded to float32


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
def _group_int8(q, quants, sums, scales, at, offset):
    """The exact integer product of 16 inputs x 16 rows, times the scale of the inputs.

    at: number of the activations' group; offset: what to multiply the sum of the inputs with and add"""
    x = quants + at * GROUP
    total = simd.dot4(splat_i32(read_i32(sums, at * 4) * offset), q[0], splat_quad(x, 0))
    total = simd.dot4(total, q[1], splat_quad(x, 4))
    total = simd.dot4(total, q[2], splat_quad(x, 8))
    total = simd.dot4(total, q[3], splat_quad(x, 12))
    return to_f32(total) * splat_f32(read_f32(scales, at * 4))


@njit(forceinline=True)
def _add_int8(q, units, quants, sums, scales, at, step, offset, total):
    """total + a decoded superblock times one token's activations.

    q: four vectors for each of five groups; at: number of the first group of activations; step: to the next"""
    a, b, c, d, e = q
    b_at, c_at, d_at, e_at = at + step, at + 2 * step, at + 3 * step, at + 4 * step
    acc = _group_int8(a, quants, sums, scales, at, offset) * units[0]
    acc = fma(_group_int8(b, quants, sums, scales, b_at, offset), units[1], acc)
    acc = fma(_group_int8(c, quants, sums, scales, c_at, offset), units[2], acc)
    acc = fma(_group_int8(d, quants, sums, scales, d_at, offset), units[3], acc)
    return total + fma(_group_int8(e, quants, sums, scales, e_at, offset), units[4], acc)


@njit(forceinline=True)
def _strip_int8(depth, single, data, blocks, table, job, first, count, scratch):
    """scratch[token] = 16 rows times the int8 activations of tokens first .. first + count - 1.

    single: there is one token, whose sums stay in registers"""
    n, quants, sums, scales = word(job, N), word(job, QUANTS), word(job, SUMS), word(job, SCALES)
    offset = np.int32(-((3**depth - 1) // 2))  # levels are stored unsigned: take L * (sum of the inputs) away again
    total = splat_f32(np.float32(0.0))
    for i in range(count):
        store_f32(scratch, i * 64, total)
    for block in range(blocks):
        here = data + block * (256 * depth + 48)
        if single:
            for line in range(0, 256 * depth + 48, 64):
                prefetch(here + line, AHEAD)
        a0, b0, c0, d0, e0 = _decode(depth, here, 0)
        a1, b1, c1, d1, e1 = _decode(depth, here, 64 * depth)
        a2, b2, c2, d2, e2 = _decode(depth, here, 128 * depth)
        a3, b3, c3, d3, e3 = _decode(depth, here, 192 * depth)
        q = (a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3), (e0, e1, e2, e3)
        units = _units(here, 256 * depth, table)
        if single:
            total = _add_int8(q, units, quants, sums, scales, block * 5, 1, offset, total)
        else:
            for i in range(count):
                at, before = block * 5 * n + first + i, load_f32(scratch, i * 64)
                store_f32(scratch, i * 64, _add_int8(q, units, quants, sums, scales, at, n, offset, before))
    if single:
        store_f32(scratch, 0, total)


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
def _strip_f32(depth, data, blocks, table, rounding, job, first, count, scratch):
    """scratch[token] = 16 rows times the float32 activations of tokens first .. first + count - 1."""
    padded, stride = word(job, PADDED), word(job, PADDED_STRIDE)
    weights = scratch + SCRATCH_WEIGHTS
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
            acc = load_f32(scratch, i * 64) if block else splat_f32(np.float32(0.0))
            for k in range(BLOCK):
                acc = fma(load_f32(weights, k * 64), splat_f32(read_f32(x, k * 4)), acc)
            store_f32(scratch, i * 64, acc)


@njit(forceinline=True)
def _trit_unit(depth, int8, job, unit):
    """One pool unit of trit matrices. Inlined into its task, so that depth and int8 are constants there."""
    matrix = matrix_of(job, unit)
    start, stop = rows_of(matrix, unit)
    table, data, rounding = word(matrix, TABLE), word(matrix, DATA), word(matrix, ROUND)
    blocks = (word(job, WIDTH) + BLOCK - 1) // BLOCK
    scratch = simd.scratch_32k()
    for row in range(start, stop, ROWS):
        strip = data + row // ROWS * blocks * (256 * depth + 48)
        for first in range(0, word(job, N), TOKENS):
            count = min(TOKENS, word(job, N) - first)
            if int8 and word(job, N) == 1:
                _strip_int8(depth, True, strip, blocks, table, job, 0, 1, scratch)
            elif int8:
                _strip_int8(depth, False, strip, blocks, table, job, first, count, scratch)
            else:
                _strip_f32(depth, strip, blocks, table, rounding, job, first, count, scratch)
            for i in range(count):
                if row + ROWS <= stop:
                    emit_rows(job, matrix, first + i, row, load_f32(scratch, i * 64))
                else:
                    for r in range(stop - row):
                        emit(job, matrix, first + i, row + r, read_f32(scratch, i * 64 + r * 4))


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
