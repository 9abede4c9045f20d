"""The ring's codecs: vectors turned and rounded. runtime/ring/rounding.py is the definition."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from . import simd
from . import words as w
from .compiling import BARE
from .numba_math import word
from .simd import load_f32, read_f32, splat_f32, store_f32
from .simd_tiles import butterfly1, butterfly2, butterfly4, butterfly8, quotient

F32, F16, Q8, Q4 = range(4)
KEY, QUERY = 1, 2  # where the factors of each stand in Plane.mirror
LARGEST = np.float32(65504.0)  # of float16
FITS = 2  # of scale and base of a q4 group


@njit(**BARE)
def hadamard(x, width, size):
    """Rotate by a Hadamard matrix, in place, in blocks of `size` numbers; 1 changes nothing. x: (width,) float32"""
    step = 1
    if size == 1:
        return
    if size >= 16:
        for i in range(0, width * 4, 64):
            store_f32(x, i, butterfly8(butterfly4(butterfly2(butterfly1(load_f32(x, i))))))
        step = 16
    while step < size:
        for pair in range(width // (2 * step)):
            low = x + pair * step * 8
            high = low + step * 4
            if step >= 16:
                for i in range(0, step * 4, 64):
                    a, b = load_f32(low, i), load_f32(high, i)
                    store_f32(low, i, a + b)
                    store_f32(high, i, a - b)
            else:
                for i in range(0, step * 4, 4):
                    c, d = read_f32(low, i), read_f32(high, i)
                    simd.write_f32(low, i, c + d)
                    simd.write_f32(high, i, c - d)
        step *= 2
    scale = np.float32(1.0 / math.sqrt(size))
    for i in range(0, width * 4, 4):
        simd.write_f32(x, i, read_f32(x, i) * scale)


@njit(**BARE)
def turn(side, head, x, width, which):
    """Balance, mirror and rotate one vector, in place; of what is not done to its side's vectors, nothing.

    which: KEY, to store it, or QUERY, to multiply it with what attention sees
    """
    if word(side, w.SD_MIRROR):
        normal, total = word(side, w.SD_MIRROR) + head * 3 * width * 4, splat_f32(np.float32(0.0))
        factors = normal + which * width * 4
        for i in range(0, width * 4, 64):
            balanced = load_f32(x, i) * load_f32(factors, i)
            store_f32(x, i, balanced)
            total = total + balanced * load_f32(normal, i)
        along = splat_f32(simd.sum_lanes(total))
        for i in range(0, width * 4, 64):
            store_f32(x, i, load_f32(x, i) - load_f32(normal, i) * along)
    hadamard(x, width, word(side, w.SD_ROTATED if which == KEY else w.SD_TURNED))


@njit(forceinline=True)
def _round_f16(x):
    return simd.first_lane(simd.round_f16(splat_f32(x)))


@njit(forceinline=True)
def _group_q8(x, size, codes, scale_at):
    top = simd.absolute(load_f32(x, 0))
    for i in range(64, size * 4, 64):
        top = simd.larger_magnitude(top, simd.absolute(load_f32(x, i)))
    largest = simd.largest_magnitude(top) / np.float32(127.0)
    scale = _round_f16(LARGEST if largest > LARGEST else largest)
    simd.write_f16(scale_at, 0, scale)
    for i in range(0, size, 16):
        q = simd.round_to_i32(_limited(quotient(load_f32(x, i * 4), splat_f32(scale)), 127.0))
        simd.store_i32_as_i8(codes, i, q)


@njit(forceinline=True)
def _limited(x, largest):
    top = splat_f32(np.float32(largest))
    return simd.maximum(top * np.float32(-1.0), simd.minimum(top, x))  # in this order NaN stays NaN


@njit(forceinline=True)
def _group_q4(x, codes, scale_at):
    a, b = load_f32(x, 0), load_f32(x, 64)
    high = simd.max_lanes(simd.maximum(a, b))
    low = -simd.max_lanes(simd.maximum(a * np.float32(-1.0), b * np.float32(-1.0)))
    scale, base = _scale_q4((high - low) / np.float32(15.0)), _base_q4(low)
    largest = simd.largest_magnitude(simd.larger_magnitude(simd.absolute(a), simd.absolute(b)))
    if largest != largest:  # NaN
        scale = largest
    code_a, code_b = _code_q4(a, base, scale), _code_q4(b, base, scale)
    fitted, moved, mine_a, mine_b = scale, base, code_a, code_b
    for _ in range(FITS):
        fitted, moved = _fit_q4(a, b, mine_a, mine_b, base)
        mine_a, mine_b = _code_q4(a, moved, fitted), _code_q4(b, moved, fitted)
    if _error_q4(a, b, mine_a, mine_b, moved, fitted) < _error_q4(a, b, code_a, code_b, base, scale):
        scale, base, code_a, code_b = fitted, moved, mine_a, mine_b
    simd.write_f16(scale_at, 0, scale)
    simd.write_f16(scale_at, 2, base)
    simd.store_i32_as_i8(codes, 0, simd.round_to_i32(code_a) | (simd.round_to_i32(code_b) << 4))


@njit(forceinline=True)
def _scale_q4(scale):
    return _round_f16(min(scale, LARGEST))


@njit(forceinline=True)
def _base_q4(base):
    return _round_f16(max(min(base, LARGEST), -LARGEST))


@njit(forceinline=True)
def _code_q4(x, base, scale):
    """Codes, as float32."""
    code = quotient(x - splat_f32(base), splat_f32(scale))
    code = simd.maximum(simd.minimum(code, splat_f32(np.float32(15.0))), splat_f32(np.float32(0.0)))
    return simd.to_f32(simd.round_to_i32(code))


@njit(forceinline=True)
def _error_q4(a, b, code_a, code_b, base, scale):
    """The sum of squared errors of a group, whose halves are a and b."""
    a = (a - splat_f32(base)) - code_a * splat_f32(scale)
    b = (b - splat_f32(base)) - code_b * splat_f32(scale)
    return simd.sum_lanes(a * a + b * b)


@njit(forceinline=True)
def _fit_q4(a, b, code_a, code_b, start):
    """Scale and base with the least squared error for these codes; sums are those of numbers less `start`."""
    a, b, n = a - splat_f32(start), b - splat_f32(start), np.float32(32.0)
    of_codes, of_x = simd.sum_lanes(code_a + code_b), simd.sum_lanes(a + b)
    spread = n * simd.sum_lanes(code_a * code_a + code_b * code_b) - of_codes * of_codes
    scale = n * simd.sum_lanes(code_a * a + code_b * b) - of_codes * of_x
    scale = _scale_q4(scale / spread if spread > np.float32(0.0) else np.float32(0.0))
    return scale, _base_q4(start + (of_x - scale * of_codes) / n)


@njit(forceinline=True)
def encode(codec, x, count, size, codes, scales):
    """Encode whole groups: `count` numbers."""
    for g in range(count // size):  # a step that is no constant would bring in Numba's run time
        at, group = g * size, x + g * size * 4
        if codec == F32:
            store_f32(codes, at * 4, load_f32(group, 0))
        elif codec == F16:
            simd.store_f32_as_f16(codes, at * 2, _limited(load_f32(group, 0), LARGEST))
        elif codec == Q8:
            _group_q8(group, size, codes + at, scales + g * 2)
        else:
            _group_q4(group, codes + at // 2, scales + g * 4)
