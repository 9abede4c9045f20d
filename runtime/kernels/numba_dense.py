"""Products of f32, f16, bf16, q8 and nf4 matrices with float32 activations, row by row, compiled by Numba."""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .numba_jobs import emit, matrix_of, rows_of
from .numba_math import word
from .simd import fma, load_f32, read_f32, splat_f32
from .words import AUX, AUX2, AUX3, BLOCK_SHIFT, DATA, PADDED, PADDED_STRIDE, ROUND, TABLE, WIDTH, N

F32, F16, BF16, Q8, NF4, NF4_NESTED = range(6)
NESTED_SHIFT = 8  # scales of 256 NF4 blocks share one nested scale


@njit(forceinline=True)
def _absmax(codec, matrix, flat):
    """The scale of the NF4 block that holds the weight number `flat`, in bitsandbytes' order of rounding."""
    block = flat >> word(matrix, BLOCK_SHIFT)
    if codec == NF4:
        return read_f32(word(matrix, AUX), block * 4)
    code = np.intp(simd.read_u8(word(matrix, AUX), block))
    nested = read_f32(word(matrix, AUX2), (block >> NESTED_SHIFT) * 4)
    product = read_f32(word(matrix, AUX3), 4 + code * 4) * nested
    return product + read_f32(word(matrix, AUX3), 0)


@njit(forceinline=True)
def _rounded(value, rounding):
    if rounding == 1:
        return simd.round_f16(value)
    if rounding == 2:
        return simd.round_bf16(value)
    return value


@njit(forceinline=True)
def _weights(codec, matrix, data, flat):
    """32 weights from number `flat` on (a multiple of 32) as two float32 vectors; they share one scale."""
    if codec == F32:
        return load_f32(data, flat * 4), load_f32(data, flat * 4 + 64)
    if codec == F16:
        return simd.load_f16_as_f32(data, flat * 2), simd.load_f16_as_f32(data, flat * 2 + 32)
    if codec == BF16:
        return simd.load_bf16_as_f32(data, flat * 2), simd.load_bf16_as_f32(data, flat * 2 + 32)
    if codec == Q8:
        scale = splat_f32(simd.read_f16(word(matrix, AUX), flat >> 5 << 1))
        return simd.load_i8_as_f32(data, flat) * scale, simd.load_i8_as_f32(data, flat + 16) * scale
    scale = splat_f32(_absmax(codec, matrix, flat))
    table, rounding = word(matrix, TABLE), word(matrix, ROUND)
    low = simd.lookup(table, simd.load_nibbles(data, flat >> 1))
    high = simd.lookup(table, simd.load_nibbles(data, (flat >> 1) + 8))
    return _rounded(low * scale, rounding), _rounded(high * scale, rounding)


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
    nibble = (simd.read_u8(data, flat >> 1) >> (4 if flat & 1 == 0 else 0)) & 15
    value = read_f32(word(matrix, TABLE), np.intp(nibble) * 4) * _absmax(codec, matrix, flat)
    return simd.first_lane(_rounded(splat_f32(value), word(matrix, ROUND)))


@njit(forceinline=True)
def _tail(codec, matrix, data, row, width, column, x):
    total = np.float32(0.0)
    for k in range(column, width):
        total += _weight(codec, matrix, data, row * width + k) * read_f32(x, k * 4)
    return total


@njit(forceinline=True)
def _step(weights, x, k, acc):
    """acc + 32 products, lane by lane."""
    return fma(weights[1], load_f32(x, k * 4 + 64), fma(weights[0], load_f32(x, k * 4), acc))


@njit(forceinline=True)
def _dense_tile(codec, job, matrix, row, last):
    """Four rows (the last one repeated if fewer are left) for all tokens, four tokens at a time."""
    n, data = word(job, N), word(matrix, DATA)
    width = (word(job, WIDTH) + 31) // 32 * 32 if codec == Q8 else word(job, WIDTH)
    whole = 0 if codec >= NF4 and width % 32 else width // 32 * 32
    i0, i1, i2, i3 = (
        row * width,
        min(row + 1, last) * width,
        min(row + 2, last) * width,
        min(row + 3, last) * width,
    )
    stride = word(job, PADDED_STRIDE)
    zero = splat_f32(np.float32(0.0))
    token = 0
    while token < n:
        x0 = word(job, PADDED) + token * stride
        a0, a1, a2, a3 = zero, zero, zero, zero
        if token + 4 <= n:
            x1, x2, x3 = x0 + stride, x0 + 2 * stride, x0 + 3 * stride
            b0, b1, b2, b3, c0, c1, c2, c3 = zero, zero, zero, zero, zero, zero, zero, zero
            d0, d1, d2, d3 = zero, zero, zero, zero
            for k in range(0, whole, 32):
                w = _weights(codec, matrix, data, i0 + k)
                a0, b0, c0, d0 = _step(w, x0, k, a0), _step(w, x1, k, b0), _step(w, x2, k, c0), _step(w, x3, k, d0)
                w = _weights(codec, matrix, data, i1 + k)
                a1, b1, c1, d1 = _step(w, x0, k, a1), _step(w, x1, k, b1), _step(w, x2, k, c1), _step(w, x3, k, d1)
                w = _weights(codec, matrix, data, i2 + k)
                a2, b2, c2, d2 = _step(w, x0, k, a2), _step(w, x1, k, b2), _step(w, x2, k, c2), _step(w, x3, k, d2)
                w = _weights(codec, matrix, data, i3 + k)
                a3, b3, c3, d3 = _step(w, x0, k, a3), _step(w, x1, k, b3), _step(w, x2, k, c3), _step(w, x3, k, d3)
            _finish(codec, job, matrix, token, row, last, whole, width, a0, a1, a2, a3)
            _finish(codec, job, matrix, token + 1, row, last, whole, width, b0, b1, b2, b3)
            _finish(codec, job, matrix, token + 2, row, last, whole, width, c0, c1, c2, c3)
            _finish(codec, job, matrix, token + 3, row, last, whole, width, d0, d1, d2, d3)
            token += 4
        else:
            for k in range(0, whole, 32):
                a0 = _step(_weights(codec, matrix, data, i0 + k), x0, k, a0)
                a1 = _step(_weights(codec, matrix, data, i1 + k), x0, k, a1)
                a2 = _step(_weights(codec, matrix, data, i2 + k), x0, k, a2)
                a3 = _step(_weights(codec, matrix, data, i3 + k), x0, k, a3)
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
