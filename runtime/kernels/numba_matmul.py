"""Products of packed weights with activations, compiled by Numba.

Trit matrices are read strip by strip (16 rows, one lane each; SPEC.md gives the bytes): a superblock is decoded once
and used for all tokens, with int8 activations in exact integer sums, or with float32 ones. The other codecs are read
row by row with float32 activations. A result never depends on the number of tokens or threads: every output is one
sum over the inputs in one fixed order.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .compiling import task
from .numba_math import word
from .simd import (
    fma,
    load_f32,
    read_f32,
    read_i32,
    read_i64,
    splat_f32,
    splat_i32,
    splat_quad,
    store_f32,
    to_f32,
)

BLOCK = 80  # inputs in a trit superblock, and in a block of int8 activations with one scale
ROWS = 16
UNIT_ROWS = 64  # rows that a pool unit computes
TOKENS = 256  # tokens that share one decoding of the weights
SCRATCH_WEIGHTS = TOKENS * 64  # byte offset, in the scratch memory, of a superblock expanded to float32

# A job is a list of int64 words: these, then MATRIX words for each matrix.
N, WIDTH, X, X_STRIDE, PADDED, PADDED_STRIDE, QUANTS, SUMS, SCALES, INT8, ADD, MATRICES, HEAD = range(13)
FIRST, OUT, OUT_STRIDE, OUTPUTS, DATA, TABLE, AUX, AUX2, AUX3, BLOCK_SIZE, BIAS, ROUND, MATRIX = range(13)
F32, F16, BF16, Q8, NF4, NF4_NESTED = range(6)


# ==== Activations ====


@task
def pack_activations(job, token):
    """Copy one token's inputs to a zero-padded row and, if int8 is wanted, quantise it in blocks of 80.

    quants: (blocks, n, 80) int8; scales: (blocks, n) float32; sums: (blocks, n, 5) int32 of the groups of 16."""
    n, width = word(job, N), word(job, WIDTH)
    source = word(job, X) + token * word(job, X_STRIDE)
    padded = word(job, PADDED) + token * word(job, PADDED_STRIDE)
    whole = width // 16 * 16
    for i in range(0, whole, 16):
        store_f32(padded, i * 4, load_f32(source, i * 4))
    for i in range(whole, width):
        simd.write_f32(padded, i * 4, read_f32(source, i * 4))
    for i in range(width, word(job, PADDED_STRIDE) // 4):
        simd.write_f32(padded, i * 4, np.float32(0.0))
    if word(job, INT8) == 0:
        return
    quants, sums, scales = word(job, QUANTS), word(job, SUMS), word(job, SCALES)
    for block in range((width + BLOCK - 1) // BLOCK):
        at = block * n + token
        x = padded + block * BLOCK * 4
        top = simd.absolute(load_f32(x, 0))
        for g in range(1, 5):
            top = simd.maximum(top, simd.absolute(load_f32(x, g * 64)))
        largest = simd.max_lanes(top)
        inverse = np.float32(127.0) / largest if largest > np.float32(0.0) else np.float32(0.0)
        simd.write_f32(scales, at * 4, largest / np.float32(127.0))
        for g in range(5):
            q = simd.round_to_i32(load_f32(x, g * 64) * inverse)
            simd.store_i32_as_i8(quants, at * BLOCK + g * 16, q)
            simd.write_i32(sums, (at * 5 + g) * 4, simd.sum_lanes_i32(q))


# ==== Which rows a unit computes ====


@njit(forceinline=True)
def _matrix_of(job, unit):
    """The matrix that a unit belongs to: units count through all matrices of the job, 64 rows each."""
    matrix = job + HEAD * 8
    for _ in range(1, word(job, MATRICES)):
        if unit < word(matrix + MATRIX * 8, FIRST):
            break
        matrix += MATRIX * 8
    return matrix


@njit(forceinline=True)
def _rows_of(matrix, unit):
    start = (unit - word(matrix, FIRST)) * UNIT_ROWS
    return start, min(start + UNIT_ROWS, word(matrix, OUTPUTS))


# ==== Trits ====


@njit(forceinline=True)
def _digits(v, weight):
    """(digit of that weight, the rest below it)."""
    t = simd.trit(v, weight)
    return t, v - t * weight


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
def _group_int8(acc, q0, q1, q2, q3, unit, x, at, offset):
    """acc + unit * (exact integer product of 16 inputs x 16 rows)."""
    total = simd.dot4(splat_i32(offset), q0, splat_quad(x, at))
    total = simd.dot4(total, q1, splat_quad(x, at + 4))
    total = simd.dot4(total, q2, splat_quad(x, at + 8))
    total = simd.dot4(total, q3, splat_quad(x, at + 12))
    return fma(to_f32(total), unit, acc)


@njit(forceinline=True)
def _strip_int8(depth, data, blocks, table, job, first, count, scratch):
    """scratch[token] = 16 rows times the int8 activations of tokens first .. first + count - 1."""
    n, quants, sums, scales = word(job, N), word(job, QUANTS), word(job, SUMS), word(job, SCALES)
    offset = np.int32(-((3**depth - 1) // 2))  # levels are stored unsigned: take L * (sum of the inputs) away again
    for block in range(blocks):
        here = data + block * (256 * depth + 48)
        a0, b0, c0, d0, e0 = _decode(depth, here, 0)
        a1, b1, c1, d1, e1 = _decode(depth, here, 64 * depth)
        a2, b2, c2, d2, e2 = _decode(depth, here, 128 * depth)
        a3, b3, c3, d3, e3 = _decode(depth, here, 192 * depth)
        ua, ub, uc, ud, ue = _units(here, 256 * depth, table)
        for i in range(count):
            at = block * n + first + i
            x, s = quants + at * BLOCK, sums + at * 20
            acc = splat_f32(np.float32(0.0))
            acc = _group_int8(acc, a0, a1, a2, a3, ua, x, 0, read_i32(s, 0) * offset)
            acc = _group_int8(acc, b0, b1, b2, b3, ub, x, 16, read_i32(s, 4) * offset)
            acc = _group_int8(acc, c0, c1, c2, c3, uc, x, 32, read_i32(s, 8) * offset)
            acc = _group_int8(acc, d0, d1, d2, d3, ud, x, 48, read_i32(s, 12) * offset)
            acc = _group_int8(acc, e0, e1, e2, e3, ue, x, 64, read_i32(s, 16) * offset)
            total = load_f32(scratch, i * 64) if block else splat_f32(np.float32(0.0))
            store_f32(scratch, i * 64, fma(acc, splat_f32(read_f32(scales, at * 4)), total))


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
def _emit(job, matrix, token, row, value):
    """Write or add one output, with the bias if there is one."""
    bias = word(matrix, BIAS)
    if bias:
        value += read_f32(bias, row * 4)
    out = word(matrix, OUT) + token * word(matrix, OUT_STRIDE)
    if word(job, ADD):
        value += read_f32(out, row * 4)
    simd.write_f32(out, row * 4, value)


@njit(forceinline=True)
def _trit_unit(depth, int8, job, unit):
    """One pool unit of trit matrices. Inlined into its task, so that depth and int8 are constants there."""
    matrix = _matrix_of(job, unit)
    start, stop = _rows_of(matrix, unit)
    table, data, rounding = word(matrix, TABLE), word(matrix, DATA), word(matrix, ROUND)
    blocks = (word(job, WIDTH) + BLOCK - 1) // BLOCK
    scratch = simd.scratch_32k()
    for row in range(start, stop, ROWS):
        strip = data + row // ROWS * blocks * (256 * depth + 48)
        for first in range(0, word(job, N), TOKENS):
            count = min(TOKENS, word(job, N) - first)
            if int8:
                _strip_int8(depth, strip, blocks, table, job, first, count, scratch)
            else:
                _strip_f32(depth, strip, blocks, table, rounding, job, first, count, scratch)
            for i in range(count):
                for r in range(min(ROWS, stop - row)):
                    _emit(job, matrix, first + i, row + r, read_f32(scratch, i * 64 + r * 4))


# ==== The other codecs, row by row ====


@njit(forceinline=True)
def _absmax(codec, matrix, flat):
    """The scale of the NF4 block that holds the weight number `flat`, in bitsandbytes' order of rounding."""
    block = flat // word(matrix, BLOCK_SIZE)
    if codec == NF4:
        return read_f32(word(matrix, AUX), block * 4)
    code = np.intp(simd.read_u8(word(matrix, AUX), block))
    nested = read_f32(word(matrix, AUX2), block // read_i64(word(matrix, AUX3), 0) * 4)
    product = read_f32(word(matrix, AUX3), 16 + code * 4) * nested
    return product + read_f32(word(matrix, AUX3), 8)


@njit(forceinline=True)
def _rounded(value, rounding):
    if rounding == 1:
        return simd.round_f16(value)
    if rounding == 2:
        return simd.round_bf16(value)
    return value


@njit(forceinline=True)
def _weights(codec, matrix, data, row, width, column):
    """Sixteen weights of a row from `column` on (a multiple of 16), as float32."""
    flat = row * width + column
    if codec == F32:
        return load_f32(data, flat * 4)
    if codec == F16:
        return simd.load_f16_as_f32(data, flat * 2)
    if codec == BF16:
        return simd.load_bf16_as_f32(data, flat * 2)
    if codec == Q8:
        return simd.load_i8_as_f32(data, flat) * simd.read_f16(word(matrix, AUX), flat // 32 * 2)
    levels = simd.lookup(word(matrix, TABLE), simd.load_nibbles(data, flat // 2))
    return _rounded(levels * _absmax(codec, matrix, flat), word(matrix, ROUND))


@njit(forceinline=True)
def _weight(codec, matrix, data, flat):
    """One weight, for the columns that fill no vector."""
    if codec == F32:
        return read_f32(data, flat * 4)
    if codec == F16:
        return simd.read_f16(data, flat * 2)
    if codec == BF16:
        return simd.read_bf16(data, flat * 2)
    if codec == Q8:  # rows are padded to whole vectors
        return np.float32(0.0)
    nibble = (simd.read_u8(data, flat // 2) >> (4 if flat % 2 == 0 else 0)) & 15
    value = read_f32(word(matrix, TABLE), np.intp(nibble) * 4) * _absmax(codec, matrix, flat)
    return simd.first_lane(_rounded(splat_f32(value), word(matrix, ROUND)))


@njit(forceinline=True)
def _tail(codec, matrix, data, row, width, column, x):
    total = np.float32(0.0)
    for k in range(column, width):
        total += _weight(codec, matrix, data, row * width + k) * read_f32(x, k * 4)
    return total


@njit(forceinline=True)
def _dense_tile(codec, job, matrix, row, last):
    """Four rows (the last one repeated if fewer are left) for all tokens, four tokens at a time."""
    n, data = word(job, N), word(matrix, DATA)
    width = (word(job, WIDTH) + 31) // 32 * 32 if codec == Q8 else word(job, WIDTH)
    whole = 0 if codec >= NF4 and width % 16 else width // 16 * 16
    r1, r2, r3 = min(row + 1, last), min(row + 2, last), min(row + 3, last)
    stride = word(job, PADDED_STRIDE)
    token = 0
    while token < n:
        x0 = word(job, PADDED) + token * stride
        zero = splat_f32(np.float32(0.0))
        a0, a1, a2, a3 = zero, zero, zero, zero
        if token + 4 <= n:
            x1, x2, x3 = x0 + stride, x0 + 2 * stride, x0 + 3 * stride
            b0, b1, b2, b3, c0, c1, c2, c3 = zero, zero, zero, zero, zero, zero, zero, zero
            d0, d1, d2, d3 = zero, zero, zero, zero
            for k in range(0, whole, 16):
                w0, w1 = _weights(codec, matrix, data, row, width, k), _weights(codec, matrix, data, r1, width, k)
                w2, w3 = _weights(codec, matrix, data, r2, width, k), _weights(codec, matrix, data, r3, width, k)
                x = load_f32(x0, k * 4)
                a0, a1, a2, a3 = fma(w0, x, a0), fma(w1, x, a1), fma(w2, x, a2), fma(w3, x, a3)
                x = load_f32(x1, k * 4)
                b0, b1, b2, b3 = fma(w0, x, b0), fma(w1, x, b1), fma(w2, x, b2), fma(w3, x, b3)
                x = load_f32(x2, k * 4)
                c0, c1, c2, c3 = fma(w0, x, c0), fma(w1, x, c1), fma(w2, x, c2), fma(w3, x, c3)
                x = load_f32(x3, k * 4)
                d0, d1, d2, d3 = fma(w0, x, d0), fma(w1, x, d1), fma(w2, x, d2), fma(w3, x, d3)
            _finish(codec, job, matrix, token, row, last, whole, width, a0, a1, a2, a3)
            _finish(codec, job, matrix, token + 1, row, last, whole, width, b0, b1, b2, b3)
            _finish(codec, job, matrix, token + 2, row, last, whole, width, c0, c1, c2, c3)
            _finish(codec, job, matrix, token + 3, row, last, whole, width, d0, d1, d2, d3)
            token += 4
        else:
            for k in range(0, whole, 16):
                x = load_f32(x0, k * 4)
                a0 = fma(_weights(codec, matrix, data, row, width, k), x, a0)
                a1 = fma(_weights(codec, matrix, data, r1, width, k), x, a1)
                a2 = fma(_weights(codec, matrix, data, r2, width, k), x, a2)
                a3 = fma(_weights(codec, matrix, data, r3, width, k), x, a3)
            _finish(codec, job, matrix, token, row, last, whole, width, a0, a1, a2, a3)
            token += 1


@njit
def _finish(codec, job, matrix, token, row, last, whole, width, a0, a1, a2, a3):
    """Sum the lanes of four rows, add what filled no vector, and write the outputs."""
    data, x = word(matrix, DATA), word(job, PADDED) + token * word(job, PADDED_STRIDE)
    _emit(job, matrix, token, row, simd.sum_lanes(a0) + _tail(codec, matrix, data, row, width, whole, x))
    if row + 1 <= last:
        _emit(job, matrix, token, row + 1, simd.sum_lanes(a1) + _tail(codec, matrix, data, row + 1, width, whole, x))
    if row + 2 <= last:
        _emit(job, matrix, token, row + 2, simd.sum_lanes(a2) + _tail(codec, matrix, data, row + 2, width, whole, x))
    if row + 3 <= last:
        _emit(job, matrix, token, row + 3, simd.sum_lanes(a3) + _tail(codec, matrix, data, row + 3, width, whole, x))


@njit(forceinline=True)
def _dense_unit(codec, job, unit):
    """One pool unit of matrices of the other codecs."""
    matrix = _matrix_of(job, unit)
    start, stop = _rows_of(matrix, unit)
    for row in range(start, stop, 4):
        _dense_tile(codec, job, matrix, row, stop - 1)


# ==== Tasks: one for each codec, so that only what a model needs is compiled ====


@task
def trit1_int8(job, unit):
    _trit_unit(1, True, job, unit)


@task
def trit2_int8(job, unit):
    _trit_unit(2, True, job, unit)


@task
def trit3_int8(job, unit):
    _trit_unit(3, True, job, unit)


@task
def trit4_int8(job, unit):
    _trit_unit(4, True, job, unit)


@task
def trit1_f32(job, unit):
    _trit_unit(1, False, job, unit)


@task
def trit2_f32(job, unit):
    _trit_unit(2, False, job, unit)


@task
def trit3_f32(job, unit):
    _trit_unit(3, False, job, unit)


@task
def trit4_f32(job, unit):
    _trit_unit(4, False, job, unit)


@task
def f32(job, unit):
    _dense_unit(F32, job, unit)


@task
def f16(job, unit):
    _dense_unit(F16, job, unit)


@task
def bf16(job, unit):
    _dense_unit(BF16, job, unit)


@task
def q8(job, unit):
    _dense_unit(Q8, job, unit)


@task
def nf4(job, unit):
    _dense_unit(NF4, job, unit)


@task
def nf4_nested(job, unit):
    _dense_unit(NF4_NESTED, job, unit)


TRIT_TASKS = {
    True: (trit1_int8, trit2_int8, trit3_int8, trit4_int8),
    False: (trit1_f32, trit2_f32, trit3_f32, trit4_f32),
}
DENSE_TASKS = {"f32": f32, "f16": f16, "bf16": bf16, "q8": q8, "nf4": nf4, "nf4_nested": nf4_nested}
