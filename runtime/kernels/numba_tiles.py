"""The two products that attention is made of, on float32 in scratch, four rows by four at a time.

Addresses and strides are bytes. Every result is one sum in one fixed order, whatever the number of rows.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .compiling import BARE
from .simd import fma, load_f32, read_f32, splat_f32, store_f32
from .simd_tiles import store_tile, sum_tile


@njit(**BARE)
def dots(a, a_stride, rows, b, b_stride, first, stop, width, out, out_stride):
    """out[i, j] = the sum over d of a[i, d] * b[j, d], for i < rows and first <= j < stop, both in fours.

    width: of a multiple of 16; what lies between a whole number of fours and the ends is computed too."""
    for j in range(first, stop, 4):
        b0 = b + j * b_stride
        b1, b2, b3 = b0 + b_stride, b0 + 2 * b_stride, b0 + 3 * b_stride
        for i in range(0, rows, 4):
            a0 = a + i * a_stride
            a1, a2, a3 = a0 + a_stride, a0 + 2 * a_stride, a0 + 3 * a_stride
            zero = splat_f32(np.float32(0.0))
            s00, s01, s02, s03 = zero, zero, zero, zero
            s10, s11, s12, s13 = zero, zero, zero, zero
            s20, s21, s22, s23 = zero, zero, zero, zero
            s30, s31, s32, s33 = zero, zero, zero, zero
            for d in range(0, width * 4, 64):
                y0, y1, y2, y3 = load_f32(b0, d), load_f32(b1, d), load_f32(b2, d), load_f32(b3, d)
                x = load_f32(a0, d)
                s00, s01, s02, s03 = fma(x, y0, s00), fma(x, y1, s01), fma(x, y2, s02), fma(x, y3, s03)
                x = load_f32(a1, d)
                s10, s11, s12, s13 = fma(x, y0, s10), fma(x, y1, s11), fma(x, y2, s12), fma(x, y3, s13)
                x = load_f32(a2, d)
                s20, s21, s22, s23 = fma(x, y0, s20), fma(x, y1, s21), fma(x, y2, s22), fma(x, y3, s23)
                x = load_f32(a3, d)
                s30, s31, s32, s33 = fma(x, y0, s30), fma(x, y1, s31), fma(x, y2, s32), fma(x, y3, s33)
            tile = sum_tile(s00, s01, s02, s03, s10, s11, s12, s13, s20, s21, s22, s23, s30, s31, s32, s33)
            store_tile(out + i * out_stride + j * 4, out_stride, tile)


@njit(**BARE)
def weigh(weights, stride, rows, keep, vectors, vector_stride, first, stop, width, out, out_stride):
    """out[i] = out[i] * keep[i] + the sum over j of weights[i, j] * vectors[j], for i < rows, first <= j < stop.

    rows: in fours; width: of a multiple of 16; keep: (rows,) float32"""
    # Few columns at a time, so that the vectors stay in the nearest cache while all rows use them.
    whole = width // 64 * 256
    for d in range(0, whole, 256):
        for i in range(0, rows, 4):
            _weigh_64(weights + i * stride, stride, keep + i * 4, vectors + d, vector_stride, first, stop,
                      out + i * out_stride + d, out_stride)  # fmt: skip
    for d in range(whole, width * 4, 64):
        for i in range(0, rows, 4):
            _weigh_16(weights + i * stride, stride, keep + i * 4, vectors + d, vector_stride, first, stop,
                      out + i * out_stride + d, out_stride)  # fmt: skip


@njit(forceinline=True)
def _weigh_64(w0, stride, keep, vectors, vector_stride, first, stop, o0, out_stride):
    """Four rows, 64 columns."""
    w1, w2, w3 = w0 + stride, w0 + 2 * stride, w0 + 3 * stride
    o1, o2, o3 = o0 + out_stride, o0 + 2 * out_stride, o0 + 3 * out_stride
    s00, s01, s02, s03 = _load_row(o0, read_f32(keep, 0))
    s10, s11, s12, s13 = _load_row(o1, read_f32(keep, 4))
    s20, s21, s22, s23 = _load_row(o2, read_f32(keep, 8))
    s30, s31, s32, s33 = _load_row(o3, read_f32(keep, 12))
    for j in range(first, stop):
        v = vectors + j * vector_stride
        y0, y1, y2, y3 = load_f32(v, 0), load_f32(v, 64), load_f32(v, 128), load_f32(v, 192)
        x = splat_f32(read_f32(w0, j * 4))
        s00, s01, s02, s03 = fma(x, y0, s00), fma(x, y1, s01), fma(x, y2, s02), fma(x, y3, s03)
        x = splat_f32(read_f32(w1, j * 4))
        s10, s11, s12, s13 = fma(x, y0, s10), fma(x, y1, s11), fma(x, y2, s12), fma(x, y3, s13)
        x = splat_f32(read_f32(w2, j * 4))
        s20, s21, s22, s23 = fma(x, y0, s20), fma(x, y1, s21), fma(x, y2, s22), fma(x, y3, s23)
        x = splat_f32(read_f32(w3, j * 4))
        s30, s31, s32, s33 = fma(x, y0, s30), fma(x, y1, s31), fma(x, y2, s32), fma(x, y3, s33)
    _store_row(o0, s00, s01, s02, s03)
    _store_row(o1, s10, s11, s12, s13)
    _store_row(o2, s20, s21, s22, s23)
    _store_row(o3, s30, s31, s32, s33)


@njit(forceinline=True)
def _weigh_16(w0, stride, keep, vectors, vector_stride, first, stop, o0, out_stride):
    """Four rows, 16 columns."""
    w1, w2, w3 = w0 + stride, w0 + 2 * stride, w0 + 3 * stride
    o1, o2, o3 = o0 + out_stride, o0 + 2 * out_stride, o0 + 3 * out_stride
    s0, s1 = load_f32(o0, 0) * splat_f32(read_f32(keep, 0)), load_f32(o1, 0) * splat_f32(read_f32(keep, 4))
    s2, s3 = load_f32(o2, 0) * splat_f32(read_f32(keep, 8)), load_f32(o3, 0) * splat_f32(read_f32(keep, 12))
    for j in range(first, stop):
        y = load_f32(vectors, j * vector_stride)
        s0, s1 = fma(splat_f32(read_f32(w0, j * 4)), y, s0), fma(splat_f32(read_f32(w1, j * 4)), y, s1)
        s2, s3 = fma(splat_f32(read_f32(w2, j * 4)), y, s2), fma(splat_f32(read_f32(w3, j * 4)), y, s3)
    store_f32(o0, 0, s0)
    store_f32(o1, 0, s1)
    store_f32(o2, 0, s2)
    store_f32(o3, 0, s3)


@njit(forceinline=True)
def _load_row(row, factor):
    x = splat_f32(factor)
    return load_f32(row, 0) * x, load_f32(row, 64) * x, load_f32(row, 128) * x, load_f32(row, 192) * x


@njit(forceinline=True)
def _store_row(row, a, b, c, d):
    store_f32(row, 0, a)
    store_f32(row, 64, b)
    store_f32(row, 128, c)
    store_f32(row, 192, d)
