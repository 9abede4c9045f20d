"""RMSNorm and SwiGLU, compiled by Numba."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from . import simd
from .numba_math import exp, word
from .simd import fma, load_f32, read_f32, splat_f32, store_f32
from .words import GLU_DIM, GLU_GATE, GLU_UP, NORM_DIM, NORM_EPS, NORM_GAIN, NORM_OUT, NORM_X

# ==== RMSNorm (Zhang and Sennrich, 2019) and SwiGLU (Shazeer, 2020) ====


def rmsnorm(job, token):
    """out = x / sqrt(mean(x^2) + eps) * gain for one token."""
    dim = word(job, NORM_DIM)
    x, out = word(job, NORM_X) + token * dim * 4, word(job, NORM_OUT) + token * dim * 4
    whole = dim // 16 * 16
    squares = splat_f32(np.float32(0.0))
    for i in range(0, whole, 16):
        v = load_f32(x, i * 4)
        squares = fma(v, v, squares)
    total = simd.sum_lanes(squares)
    for i in range(whole, dim):
        total += read_f32(x, i * 4) * read_f32(x, i * 4)
    scale = np.float32(1.0) / np.float32(math.sqrt(total / np.float32(dim) + read_f32(job, NORM_EPS * 8)))
    gain = word(job, NORM_GAIN)
    for i in range(0, whole, 16):
        store_f32(out, i * 4, load_f32(x, i * 4) * splat_f32(scale) * load_f32(gain, i * 4))
    for i in range(whole, dim):
        simd.write_f32(out, i * 4, read_f32(x, i * 4) * scale * read_f32(gain, i * 4))


@njit(forceinline=True)
def _silu_times(gate, up):
    negative = simd.minimum(gate * np.float32(-1.0), splat_f32(np.float32(88.0)))
    return gate / (exp(negative) + np.float32(1.0)) * up


def swiglu(job, token):
    """gate = silu(gate) * up for one token, in place."""
    dim = word(job, GLU_DIM)
    gate, up = word(job, GLU_GATE) + token * dim * 4, word(job, GLU_UP) + token * dim * 4
    whole = dim // 16 * 16
    for i in range(0, whole, 16):
        store_f32(gate, i * 4, _silu_times(load_f32(gate, i * 4), load_f32(up, i * 4)))
    for i in range(whole, dim):
        one = _silu_times(splat_f32(read_f32(gate, i * 4)), splat_f32(read_f32(up, i * 4)))
        simd.write_f32(gate, i * 4, simd.first_lane(one))
