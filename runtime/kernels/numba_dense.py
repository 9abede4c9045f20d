"""Products of f32, f16, bf16, q8 and nf4 matrices with float32 activations, row by row, compiled by Numba."""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .numba_jobs import emit, matrix_of, rows_of
from .numba_math import word
from .simd import fma, load_f32, read_f32, read_i64, splat_f32
from .words import AUX, AUX2, AUX3, BLOCK_SIZE, DATA, PADDED, PADDED_STRIDE, ROUND, TABLE, WIDTH, N

F32, F16, BF16, Q8, NF4, NF4_NESTED = range(6)


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
    emit(job, matrix, token, row, simd.sum_lanes(a0) + _tail(codec, matrix, data, row, width, whole, x))
    if row + 1 <= last:
        emit(job, matrix, token, row + 1, simd.sum_lanes(a1) + _tail(codec, matrix, data, row + 1, width, whole, x))
    if row + 2 <= last:
        emit(job, matrix, token, row + 2, simd.sum_lanes(a2) + _tail(codec, matrix, data, row + 2, width, whole, x))
    if row + 3 <= last:
        emit(job, matrix, token, row + 3, simd.sum_lanes(a3) + _tail(codec, matrix, data, row + 3, width, whole, x))


@njit(forceinline=True)
def _dense_unit(codec, job, unit):
    """One pool unit of matrices of the other codecs."""
    matrix = matrix_of(job, unit)
    start, stop = rows_of(matrix, unit)
    for row in range(start, stop, 4):
        _dense_tile(codec, job, matrix, row, stop - 1)


# ==== Tasks: one for each codec, so that only what a model needs is compiled ====


def f32(job, unit):
    _dense_unit(F32, job, unit)


def f16(job, unit):
    _dense_unit(F16, job, unit)


def bf16(job, unit):
    _dense_unit(BF16, job, unit)


def q8(job, unit):
    _dense_unit(Q8, job, unit)


def nf4(job, unit):
    _dense_unit(NF4, job, unit)


def nf4_nested(job, unit):
    _dense_unit(NF4_NESTED, job, unit)
