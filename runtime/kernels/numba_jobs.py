"""What all matrix products share: the job's words, the activations they read, and the outputs they write.

Activations are prepared once per product: as zero-padded rows, quantised in groups of 16, or both. Pool units count
through all matrices of a job, 64 rows each. Every output is one sum over the inputs in one fixed order, whatever the
number of tokens or threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .base import GROUP
from .numba_math import word
from .simd import load_f32, read_f32, store_f32
from .simd_tiles import prefetch
from .words import (
    ADD,
    BIAS,
    FIRST,
    FLOATS,
    HEAD,
    MATRICES,
    MATRIX,
    OUT,
    OUT_STRIDE,
    OUTPUTS,
    PADDED,
    PADDED_STRIDE,
    QUANTS,
    QUANTS_AS_NIBBLES,
    QUANTS_IN_ORDER,
    SCALES,
    SUMS,
    TOGETHER,
    UNIT_ROWS,
    WANTED,
    WIDTH,
    X_STRIDE,
    N,
    X,
)

BLOCK = 80  # inputs of a trit superblock
PADDING = 160  # rows of activations are padded to whole superblocks and to whole tiles of q8


@njit(forceinline=True)
def groups_of(job):
    """Groups of 16 that a padded row of activations has."""
    return (word(job, WIDTH) + PADDING - 1) // PADDING * (PADDING // GROUP)


@njit(forceinline=True)
def _inputs(job, token, group):
    """16 inputs of a token, zero beyond its width."""
    width, first = word(job, WIDTH), group * GROUP
    source = word(job, X) + token * word(job, X_STRIDE) + first * 4
    prefetch(source, 4 * GROUP * 4)  # so many rows are more than the hardware follows
    if first + GROUP <= width:
        return load_f32(source, 0)
    some = simd.scratch_64()
    for i in range(GROUP):
        simd.write_f32(some, i * 4, read_f32(source, i * 4) if first + i < width else np.float32(0.0))
    return load_f32(some, 0)


@njit(forceinline=True)
def _quantize(job, x, at, nibbles):
    """Put 16 inputs as int8 with one scale, and their sum, at place number `at` of the job's arrays."""
    largest = simd.largest_magnitude(simd.absolute(x))
    inverse = np.float32(127.0) / largest if largest > np.float32(0.0) else np.float32(0.0)
    q = simd.round_to_i32(x * inverse)
    if word(job, WANTED) & QUANTS_IN_ORDER:
        simd.store_i32_as_i8(word(job, QUANTS), at * GROUP, q)
    if word(job, WANTED) & QUANTS_AS_NIBBLES:
        simd.store_i32_as_i8(word(job, QUANTS), (nibbles + at) * GROUP, simd.evens_first(q))
    simd.write_i32(word(job, SUMS), at * 4, simd.sum_lanes_i32(q))
    simd.write_f32(word(job, SCALES), at * 4, largest / np.float32(127.0))


def pack_activations(job, unit):
    """Prepare 16 tokens: zero-padded rows of float32, quantised groups, or both, as is wanted.

    quants: (2, groups, n, 16) int8, in their order, then each eight as `evens_first` orders it
    scales: (groups, n) float32; sums: (groups, n) int32"""
    n, groups, wanted, first = word(job, N), groups_of(job), word(job, WANTED), unit * TOGETHER
    for g in range(groups):
        for token in range(first, min(first + TOGETHER, n)):
            x = _inputs(job, token, g)
            if wanted & FLOATS:
                store_f32(word(job, PADDED) + token * word(job, PADDED_STRIDE), g * GROUP * 4, x)
            if wanted & ~FLOATS:
                _quantize(job, x, g * n + token, groups * n)


@njit(forceinline=True)
def matrix_of(job, unit):
    """The matrix that a unit belongs to: units count through all matrices of the job, 64 rows each."""
    matrix = job + HEAD * 8
    for _ in range(1, word(job, MATRICES)):
        if unit < word(matrix + MATRIX * 8, FIRST):
            break
        matrix += MATRIX * 8
    return matrix


@njit(forceinline=True)
def rows_of(matrix, unit):
    start = (unit - word(matrix, FIRST)) * UNIT_ROWS
    return start, min(start + UNIT_ROWS, word(matrix, OUTPUTS))


@njit(forceinline=True)
def emit(job, matrix, token, row, value):
    """Write or add one output, with the bias if there is one."""
    bias = word(matrix, BIAS)
    if bias:
        value += read_f32(bias, row * 4)
    out = word(matrix, OUT) + token * word(matrix, OUT_STRIDE)
    if word(job, ADD):
        value += read_f32(out, row * 4)
    simd.write_f32(out, row * 4, value)


@njit(forceinline=True)
def emit_rows(job, matrix, token, row, values):
    """Write or add sixteen outputs of neighbouring rows: the same sums as `emit`, all lanes at once."""
    bias = word(matrix, BIAS)
    if bias:
        values = values + load_f32(bias, row * 4)
    out = word(matrix, OUT) + token * word(matrix, OUT_STRIDE)
    if word(job, ADD):
        values = values + load_f32(out, row * 4)
    store_f32(out, row * 4, values)
