"""Small functions that several compiled kernels share."""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .simd import fma, read_i64, splat_f32


@njit(forceinline=True)
def word(base, index):
    """A job's int64 word."""
    return read_i64(base, index * 8)


@njit(forceinline=True)
def exp(x):
    """e^x for x <= 88, relative error below 2e-7: x = n ln 2 + r, a polynomial in r (Cephes expf), times 2^n."""
    x = simd.maximum(x, splat_f32(np.float32(-87.0)))
    whole = simd.round_to_i32(x * np.float32(1.44269504))
    n = simd.to_f32(whole)
    r = fma(n, splat_f32(np.float32(-0.693359375)), x)
    r = fma(n, splat_f32(np.float32(2.12194440e-4)), r)
    p = splat_f32(np.float32(1.9875691500e-4))
    p = fma(p, r, splat_f32(np.float32(1.3981999507e-3)))
    p = fma(p, r, splat_f32(np.float32(8.3334519073e-3)))
    p = fma(p, r, splat_f32(np.float32(4.1665795894e-2)))
    p = fma(p, r, splat_f32(np.float32(1.6666665459e-1)))
    p = fma(p, r, splat_f32(np.float32(5.0000001201e-1)))
    p = fma(p, r * r, r) + np.float32(1.0)
    return p * simd.bits_to_f32((whole + 127) << 23)
