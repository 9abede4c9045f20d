"""Blocks of cached tokens as attention wants them: their codes, their scales by group, or what they decode to.

A block is CACHED tokens that begin at a multiple of CACHED. It is read where it lies in the ring, or, if not all of
it may be seen or the ring wraps within it, from a copy in which the other tokens are zeros.
"""

from __future__ import annotations

from numba import njit

from . import simd
from . import words as w
from .compiling import BARE
from .numba_math import gelu, gelu_tanh, word
from .numba_ring import F16, clock, expand, rotate, slot_of
from .numba_tiles import dots
from .simd import load_f32, splat_i32, store_f32, write_f32
from .simd_tiles import prefetch, spread_f16_2, spread_f16_4, spread_f16_8
from .words import CACHED

# ==== As they are stored ====


@njit(**BARE)
def _copy(job, side, area, head, block, low, high):
    """Copy the rows low - block .. high - block - 1 of a block; the others, and one after the last, become zeros."""
    slots, sinks = word(job, w.AT_SLOTS), clock(job, w.SINKS)
    code_bytes, scale_bytes = word(side, w.SD_CODE_BYTES), word(side, w.SD_SCALE_BYTES)
    codes = area + word(job, w.AT_LINES)
    scales = codes + (CACHED + 1) * code_bytes
    zero = simd.to_f32(splat_i32(0))
    for i in range(0, (CACHED + 1) * code_bytes + CACHED * scale_bytes, 64):
        store_f32(codes, i, zero)
    slot = slot_of(job, low)
    for k in range(low - block, high - block):
        row = head * slots + slot
        source = word(side, w.SD_DATA) + row * code_bytes
        for i in range(0, code_bytes, 8):
            simd.write_i64(codes + k * code_bytes, i, simd.read_i64(source, i))
        source = word(side, w.SD_SCALES) + row * scale_bytes
        for i in range(scale_bytes):
            simd.write_u8(scales + k * scale_bytes, i, simd.read_u8(source, i))
        slot = slot + 1 if slot + 1 < slots else sinks
    return codes, scales


@njit(forceinline=True)
def find(job, side, area, head, block, low, high):
    """Addresses of the codes and scales of a block, of which positions low .. high - 1 are wanted.

    Sixteen bytes after its last row may be read."""
    slots, slot = word(job, w.AT_SLOTS), slot_of(job, low)
    code_bytes, scale_bytes = word(side, w.SD_CODE_BYTES), word(side, w.SD_SCALE_BYTES)
    if low > block or high < block + CACHED or slot + CACHED >= slots:
        return _copy(job, side, area, head, block, low, high)
    row = head * slots + slot
    return word(side, w.SD_DATA) + row * code_bytes, word(side, w.SD_SCALES) + row * scale_bytes


@njit(forceinline=True)
def ask_for_rows(codes, stride, count):
    """Ask for a line of each of `count` rows a block later: few at a time, or the CPU waits until all are there."""
    for i in range(count):
        prefetch(codes, (CACHED + i) * stride)


@njit(**BARE)
def spread_scales(side, scales, units):
    """Scales (CACHED, n) as (n, CACHED) float32; q4 has scale and base for each group."""
    n = word(side, w.SD_SCALE_BYTES) // 2
    for i in range(0, 2 * n * CACHED, 64):
        prefetch(scales + 2 * n * CACHED, i)
    for k in range(0, CACHED, 16):
        source, out = scales + k * n * 2, units + k * 4
        if n == 1:
            store_f32(out, 0, simd.load_f16_as_f32(source, 0))
        elif n == 2:
            spread_f16_2(source, out, CACHED * 4)
        elif n == 4:
            spread_f16_4(source, out, CACHED * 4)
        elif n == 8:
            spread_f16_8(source, out, CACHED * 4)
        else:
            for i in range(16 * n):
                write_f32(out, i % n * CACHED * 4 + i // n * 4, simd.read_f16(source, i * 2))


# ==== Decoded ====


@njit(**BARE)
def _activate(rows, width, bias, exact, x):
    """x = gelu(x + bias), in place. x: (rows, width) float32"""
    for i in range(rows):
        for d in range(0, width * 4, 64):
            at = i * width * 4 + d
            y = load_f32(x, at) + load_f32(bias, d)
            store_f32(x, at, gelu(y) if exact else gelu_tanh(y))


@njit(**BARE)
def _rotate_rows(job, side, first, count, x, stride):
    """Rotate decoded keys for their positions."""
    slots, sinks, head_dim = word(job, w.AT_SLOTS), clock(job, w.SINKS), word(job, w.AT_HEAD_DIM)
    slot = slot_of(job, first)
    for i in range(count):
        turn = slot * head_dim * 2
        rotate(x + i * stride, x + i * stride, word(side, w.SD_COS) + turn, word(side, w.SD_SIN) + turn, head_dim)
        slot = slot + 1 if slot + 1 < slots else sinks


@njit(forceinline=True)
def is_direct(side, rows):
    """Whether a side's float16 numbers are best converted while they are multiplied: few rows use them."""
    return word(side, w.SD_CODEC) == F16 and word(side, w.SD_HIDDEN) == 0 and word(side, w.SD_COS) == 0 and rows <= 8


@njit(**BARE)
def decoded(job, side, area, kv_head, first, count):
    """What attention sees of `count` tokens: rows of SD_SEEN float32; returns their address."""
    features, hidden, output = word(side, w.SD_FEATURES), word(side, w.SD_HIDDEN), word(side, w.SD_OUTPUT)
    rotated = word(side, w.SD_COS) != 0
    target, four = area + word(job, w.AT_BLOCK), (count + 3) // 4 * 4
    padded = word(side, w.SD_PADDED)
    if hidden == 0 and not rotated:
        expand(job, side, kv_head if word(side, w.SD_HEADS) > 1 else 0, first, count, target)
        return target
    codes = area + word(job, w.AT_CODES)
    expand(job, side, 0, first, count, codes)
    if hidden:
        x = area + word(job, w.AT_FEATURES) if rotated else target
        dots(codes, padded * 4, four, hidden, padded * 4, 0, features, padded, x, features * 4)
        _activate(count, features, word(side, w.SD_HIDDEN_BIAS), word(side, w.SD_ACTIVATION) == 0, x)
        codes = x
    if rotated:
        seen = word(side, w.SD_SEEN)
        matrix, bias = output + kv_head * seen * features * 4, word(side, w.SD_OUTPUT_BIAS) + kv_head * seen * 4
        dots(codes, features * 4, four, matrix, features * 4, 0, seen, features, target, seen * 4)
        for i in range(count):
            for d in range(0, seen * 4, 64):
                store_f32(target, i * seen * 4 + d, load_f32(target, i * seen * 4 + d) + load_f32(bias, d))
        _rotate_rows(job, side, first, count, target, seen * 4)
    return target
