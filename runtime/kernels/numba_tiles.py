"""The two products that attention is made of, on float32 or float16 vectors, four rows by four at a time.

Addresses and strides are bytes; float16 is converted as it is read. Every result is one sum in one fixed order,
whatever the number of rows.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .compiling import BARE
from .simd import fma, load_f16_as_f32, load_f32, read_f32, splat_f32, store_f32
from .simd_tiles import prefetch_far, store_tile, sum_tile


@njit(forceinline=True)
def _four(load, at, a0, a1, a2, a3):
    return load(a0, at), load(a1, at), load(a2, at), load(a3, at)


@njit(forceinline=True)
def _dots(load, size, a, a_stride, rows, b, ahead, b_stride, first, stop, width, out, out_stride):
    """See dots. load, size: how sixteen numbers of b are read, and the bytes of one; ahead: of halves, bytes from a
    vector to the one that is asked for meanwhile"""
    for j in range(first, stop, 4):
        b0 = b + j * b_stride
        b1, b2, b3 = b0 + b_stride, b0 + 2 * b_stride, b0 + 3 * b_stride
        if size == 2:
            for i in range(0, b_stride * 4, 64):
                prefetch_far(b0 + ahead, i)
        for i in range(0, rows, 4):
            a0 = a + i * a_stride
            a1, a2, a3 = a0 + a_stride, a0 + 2 * a_stride, a0 + 3 * a_stride
            zero = splat_f32(np.float32(0.0))
            s00, s01, s02, s03 = zero, zero, zero, zero
            s10, s11, s12, s13 = zero, zero, zero, zero
            s20, s21, s22, s23 = zero, zero, zero, zero
            s30, s31, s32, s33 = zero, zero, zero, zero
            for d in range(0, width, 16):
                y0, y1, y2, y3 = _four(load, d * size, b0, b1, b2, b3)
                x = load_f32(a0, d * 4)
                s00, s01, s02, s03 = fma(x, y0, s00), fma(x, y1, s01), fma(x, y2, s02), fma(x, y3, s03)
                x = load_f32(a1, d * 4)
                s10, s11, s12, s13 = fma(x, y0, s10), fma(x, y1, s11), fma(x, y2, s12), fma(x, y3, s13)
                x = load_f32(a2, d * 4)
                s20, s21, s22, s23 = fma(x, y0, s20), fma(x, y1, s21), fma(x, y2, s22), fma(x, y3, s23)
                x = load_f32(a3, d * 4)
                s30, s31, s32, s33 = fma(x, y0, s30), fma(x, y1, s31), fma(x, y2, s32), fma(x, y3, s33)
            tile = sum_tile(s00, s01, s02, s03, s10, s11, s12, s13, s20, s21, s22, s23, s30, s31, s32, s33)
            store_tile(out + i * out_stride + j * 4, out_stride, tile)


@njit(**BARE)
def dots(a, a_stride, rows, b, b_stride, first, stop, width, out, out_stride):
    """out[i, j] = the sum over d of a[i, d] * b[j, d], for i < rows and first <= j < stop, both in fours.

    width: of a multiple of 16; what lies between a whole number of fours and the ends is computed too."""
    _dots(load_f32, 4, a, a_stride, rows, b, 0, b_stride, first, stop, width, out, out_stride)


@njit(**BARE)
def dots_f16(a, a_stride, rows, b, ahead, b_stride, first, stop, width, out, out_stride):
    """The same with float16 b."""
    _dots(load_f16_as_f32, 2, a, a_stride, rows, b, ahead, b_stride, first, stop, width, out, out_stride)


@njit(forceinline=True)
def _weigh(
    load, size, weights, stride, rows, keep, share, vectors, ahead, v_stride, first, stop, width, out, out_stride
):
    """See weigh. load, size: as above"""
    # Few columns at a time, so that the vectors stay in the nearest cache while all rows use them.
    whole = width // 64 * 64
    for d in range(0, whole, 64):
        for i in range(0, rows, 4):
            _weigh_64(load, size, weights + i * stride, stride, keep + i * 4, share + i * 4, vectors + d * size,
                      ahead, v_stride, first, stop, out + i * out_stride + d * 4, out_stride)  # fmt: skip
    for d in range(whole, width, 16):
        for i in range(0, rows, 4):
            _weigh_16(load, weights + i * stride, stride, keep + i * 4, share + i * 4, vectors + d * size,
                      v_stride, first, stop, out + i * out_stride + d * 4, out_stride)  # fmt: skip


@njit(**BARE)
def weigh(weights, stride, rows, keep, share, vectors, v_stride, first, stop, width, out, out_stride):
    """out[i] = out[i] * keep[i] + share[i] * the sum over j of weights[i, j] * vectors[j], i < rows, first <= j < stop.

    rows: in fours; width: of a multiple of 16; keep, share: (rows,) float32"""
    _weigh(load_f32, 4, weights, stride, rows, keep, share, vectors, 0, v_stride, first, stop, width, out, out_stride)


@njit(**BARE)
def weigh_f16(weights, stride, rows, keep, share, vectors, ahead, v_stride, first, stop, width, out, out_stride):
    """The same with float16 vectors."""
    _weigh(load_f16_as_f32, 2, weights, stride, rows, keep, share, vectors, ahead, v_stride, first, stop, width, out,
           out_stride)  # fmt: skip


@njit(forceinline=True)
def _weigh_64(load, size, w0, stride, keep, share, vectors, ahead, v_stride, first, stop, o0, out_stride):
    """Four rows, 64 columns."""
    w1, w2, w3 = w0 + stride, w0 + 2 * stride, w0 + 3 * stride
    zero = splat_f32(np.float32(0.0))
    s00, s01, s02, s03 = zero, zero, zero, zero
    s10, s11, s12, s13 = zero, zero, zero, zero
    s20, s21, s22, s23 = zero, zero, zero, zero
    s30, s31, s32, s33 = zero, zero, zero, zero
    for j in range(first, stop):
        v = vectors + j * v_stride
        if size == 2:
            prefetch_far(v + ahead, 0)
            prefetch_far(v + ahead, 64)
        y0, y1, y2, y3 = load(v, 0), load(v, 16 * size), load(v, 32 * size), load(v, 48 * size)
        x = splat_f32(read_f32(w0, j * 4))
        s00, s01, s02, s03 = fma(x, y0, s00), fma(x, y1, s01), fma(x, y2, s02), fma(x, y3, s03)
        x = splat_f32(read_f32(w1, j * 4))
        s10, s11, s12, s13 = fma(x, y0, s10), fma(x, y1, s11), fma(x, y2, s12), fma(x, y3, s13)
        x = splat_f32(read_f32(w2, j * 4))
        s20, s21, s22, s23 = fma(x, y0, s20), fma(x, y1, s21), fma(x, y2, s22), fma(x, y3, s23)
        x = splat_f32(read_f32(w3, j * 4))
        s30, s31, s32, s33 = fma(x, y0, s30), fma(x, y1, s31), fma(x, y2, s32), fma(x, y3, s33)
    _add_row(o0, keep, share, s00, s01, s02, s03)
    _add_row(o0 + out_stride, keep + 4, share + 4, s10, s11, s12, s13)
    _add_row(o0 + 2 * out_stride, keep + 8, share + 8, s20, s21, s22, s23)
    _add_row(o0 + 3 * out_stride, keep + 12, share + 12, s30, s31, s32, s33)


@njit(forceinline=True)
def _weigh_16(load, w0, stride, keep, share, vectors, v_stride, first, stop, o0, out_stride):
    """Four rows, 16 columns."""
    w1, w2, w3 = w0 + stride, w0 + 2 * stride, w0 + 3 * stride
    zero = splat_f32(np.float32(0.0))
    s0, s1, s2, s3 = zero, zero, zero, zero
    for j in range(first, stop):
        y = load(vectors, j * v_stride)
        s0, s1 = fma(splat_f32(read_f32(w0, j * 4)), y, s0), fma(splat_f32(read_f32(w1, j * 4)), y, s1)
        s2, s3 = fma(splat_f32(read_f32(w2, j * 4)), y, s2), fma(splat_f32(read_f32(w3, j * 4)), y, s3)
    add_scaled(o0, keep, share, s0)
    add_scaled(o0 + out_stride, keep + 4, share + 4, s1)
    add_scaled(o0 + 2 * out_stride, keep + 8, share + 8, s2)
    add_scaled(o0 + 3 * out_stride, keep + 12, share + 12, s3)


@njit(forceinline=True)
def add_scaled(out, keep, share, x):
    """out = out * keep + share * x, for sixteen columns of a row."""
    store_f32(out, 0, fma(x, splat_f32(read_f32(share, 0)), load_f32(out, 0) * splat_f32(read_f32(keep, 0))))


@njit(forceinline=True)
def _add_row(out, keep, share, a, b, c, d):
    add_scaled(out, keep, share, a)
    add_scaled(out + 64, keep, share, b)
    add_scaled(out + 128, keep, share, c)
    add_scaled(out + 192, keep, share, d)
