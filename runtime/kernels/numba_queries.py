"""The rows of a unit of attention: queries scaled, rotated as keys are, and rounded to int8 where keys stay codes.

A row is one query head of one token. Scores are exponents of two: the scale has log2(e) in it.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from . import words as w
from .compiling import BARE
from .numba_codes import Q8, QUERY, turn
from .numba_math import word
from .numba_ring import is_sliding
from .numba_tiles import dots
from .simd import load_f32, read_f32, splat_f32, write_f32

STEP_BYTES = 16  # of a group of a rounded row: where its sum of products starts, its scale, scale times sum of codes


@njit(forceinline=True)
def rows_of(job, tokens):
    """Rows of one key-value head, in fours."""
    group = word(job, w.AT_HEADS) // word(job, w.AT_KV_HEADS)
    return (tokens * group + 3) // 4 * 4


@njit(**BARE)
def _pack_rows(job, area, source, target, shift, kv_head, first, tokens):
    """Scale the queries of one key-value head and, where keys stay codes, multiply them by the keys' decoder."""
    keys = job + w.AT_KEYS * 8
    heads, head_dim = word(job, w.AT_HEADS), word(job, w.AT_HEAD_DIM)
    group, rows = heads // word(job, w.AT_KV_HEADS), rows_of(job, tokens)
    absorbed, seen = word(keys, w.SD_SHARED) != 0, word(keys, w.SD_SEEN)
    padded = (head_dim + 15) // 16 * 16 if absorbed else seen
    packed = area + word(job, w.AT_FEATURES) if absorbed else target
    scale = read_f32(job, w.AT_SCALE * 8)
    bias = word(keys, w.SD_OUTPUT_BIAS) + kv_head * padded * 4
    for r in range(rows):
        token, head = first + r // group, kv_head * group + r % group
        q, row, constant = source + (token * heads + head) * head_dim * 4, packed + r * padded * 4, np.float32(0.0)
        for i in range(padded):
            x = read_f32(q, i * 4) * scale if r < tokens * group and i < head_dim else np.float32(0.0)
            write_f32(row, i * 4, x)
            if absorbed:
                constant += x * read_f32(bias, i * 4)
        write_f32(shift, r * 4, constant)
    if absorbed:
        matrix = word(keys, w.SD_OUTPUT) + kv_head * seen * padded * 4
        dots(packed, padded * 4, rows, matrix, padded * 4, 0, seen, padded, target, seen * 4)
    for r in range(rows):
        turn(keys, kv_head, target + r * seen * 4, word(keys, w.SD_WIDTH), QUERY)


@njit(**BARE)
def _round_rows(side, rows, quants, steps, n):
    """Round rows to int8, with one scale for each group of keys. rows: n of SD_SEEN float32"""
    seen, size = word(side, w.SD_SEEN), word(side, w.SD_GROUP)
    offset = simd.i8_offset() if word(side, w.SD_CODEC) == Q8 else np.int32(0)
    for at in range(0, n * seen, size):
        top = splat_f32(np.float32(0.0))
        for i in range(at, at + size, 16):
            top = simd.larger_magnitude(top, simd.absolute(load_f32(rows, i * 4)))
        largest = simd.largest_magnitude(top)
        inverse = np.float32(127.0) / largest if largest > np.float32(0.0) else np.float32(0.0)
        total = simd.splat_i32(np.int32(0))
        for i in range(at, at + size, 16):
            q = simd.round_to_i32(load_f32(rows, i * 4) * inverse)
            simd.store_i32_as_i8(quants, i, q)
            total = total + q
        step, scale, units = at // size * STEP_BYTES, largest / np.float32(127.0), simd.sum_lanes_i32(total)
        simd.write_i32(steps, step, units * offset)
        write_f32(steps, step + 4, scale)
        write_f32(steps, step + 8, scale * np.float32(units))


@njit(**BARE)
def pack(job, area, kv_first, kv_stop, first, tokens):
    """Prepare a unit's rows, for the window and, once tokens have slid out, for the sinks."""
    keys, rows = job + w.AT_KEYS * 8, rows_of(job, tokens)
    seen, all_rows, shifts = word(keys, w.SD_SEEN), (kv_stop - kv_first) * rows, area + word(job, w.AT_SHIFT)
    for near in range(2 if is_sliding(job) else 1):
        source = word(job, w.AT_Q_SINK if near else w.AT_Q)
        packed = area + word(job, w.AT_NEAR if near else w.AT_QUERY)
        for kv_head in range(kv_first, kv_stop):
            at = (kv_head - kv_first) * rows
            shift = shifts + (near * all_rows + at) * 4
            _pack_rows(job, area, source, packed + at * seen * 4, shift, kv_head, first, tokens)
        if word(keys, w.SD_INT8):
            quants, steps = rounded(job, area, near * all_rows)
            _round_rows(keys, packed, quants, steps, all_rows)


@njit(forceinline=True)
def rounded(job, area, row):
    """Where rounded rows and the words of their groups lie, from a row on."""
    keys = job + w.AT_KEYS * 8
    seen, size = word(keys, w.SD_SEEN), word(keys, w.SD_GROUP)
    steps = area + word(job, w.AT_STEPS) + row * (seen // size) * STEP_BYTES
    return area + word(job, w.AT_QUANTS) + row * seen, steps
