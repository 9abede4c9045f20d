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
    x = simd.maximum(splat_f32(np.float32(-87.0)), x)  # in this order NaN stays NaN
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


@njit(forceinline=True)
def exp2(x):
    """2^x for x <= 126, relative error below 2e-7; at 0 it is 1. At 1.5 * 2^23 a float's last bit counts ones."""
    near = simd.maximum(splat_f32(np.float32(-125.0)), x)  # in this order NaN stays NaN
    shifted = near + np.float32(12582912.0)
    r = near - (shifted - np.float32(12582912.0))
    p = splat_f32(np.float32(1.3264726e-3))
    p = fma(p, r, splat_f32(np.float32(9.6715127e-3)))
    p = fma(p, r, splat_f32(np.float32(5.5507337e-2)))
    p = fma(p, r, splat_f32(np.float32(2.4022242e-1)))
    p = fma(p, r, splat_f32(np.float32(6.9314698e-1)))
    p = fma(p, r, splat_f32(np.float32(1.0)))
    return simd.bits_to_f32(simd.f32_bits(p) + (simd.f32_bits(shifted) << 23))


@njit(forceinline=True)
def gelu(x):
    """x Phi(x), within 1e-6; erf by Abramowitz and Stegun, 7.1.26."""
    z = simd.absolute(x) * np.float32(0.70710678)
    t = splat_f32(np.float32(1.0)) / fma(z, splat_f32(np.float32(0.3275911)), splat_f32(np.float32(1.0)))
    p = fma(t, splat_f32(np.float32(1.061405429)), splat_f32(np.float32(-1.453152027)))
    p = fma(t, p, splat_f32(np.float32(1.421413741)))
    p = fma(t, p, splat_f32(np.float32(-0.284496736)))
    p = fma(t, p, splat_f32(np.float32(0.254829592)))
    tail = p * t * exp(z * z * np.float32(-1.0)) * np.float32(0.5)  # 1 - Phi(|x|)
    zero = splat_f32(np.float32(0.0))
    return simd.maximum(x, zero) - simd.absolute(x) * tail


@njit(forceinline=True)
def gelu_tanh(x):
    """GELU with a hyperbolic tangent for erf (Hendrycks and Gimpel, 2016)."""
    inner = fma(x * x, x * np.float32(0.044715), x) * np.float32(-1.5957691)
    return x / (exp(simd.minimum(inner, splat_f32(np.float32(88.0)))) + np.float32(1.0))
