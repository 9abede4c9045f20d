"""What all matrix products share: the job's words, the activations they read, and the outputs they write.

Activations are copied once per product to zero-padded rows and, if int8 is wanted, quantised in groups of 16. Pool
units count through all matrices of a job, 64 rows each. Every output is one sum over the inputs in one fixed order,
whatever the number of tokens or threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from .base import GROUP
from .numba_math import word
from .simd import load_f32, read_f32, store_f32
from .words import (
    ADD,
    BIAS,
    FIRST,
    HEAD,
    INT8,
    MATRICES,
    MATRIX,
    OUT,
    OUT_STRIDE,
    OUTPUTS,
    PADDED,
    PADDED_STRIDE,
    QUANTS,
    SCALES,
    SUMS,
    UNIT_ROWS,
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


def pack_activations(job, token):
    """Copy one token's inputs to a zero-padded row and, if int8 is wanted, quantise it in groups of 16.

    quants: (2, groups, n, 16) int8, in their order, then each eight as `evens_first` orders it
    scales: (groups, n) float32; sums: (groups, n) int32"""
    n, width, groups = word(job, N), word(job, WIDTH), groups_of(job)
    source = word(job, X) + token * word(job, X_STRIDE)
    padded = word(job, PADDED) + token * word(job, PADDED_STRIDE)
    whole = width // GROUP * GROUP
    for i in range(0, whole, GROUP):
        store_f32(padded, i * 4, load_f32(source, i * 4))
    for i in range(whole, groups * GROUP):
        simd.write_f32(padded, i * 4, read_f32(source, i * 4) if i < width else np.float32(0.0))
    if word(job, INT8) == 0:
        return
    quants, sums, scales = word(job, QUANTS), word(job, SUMS), word(job, SCALES)
    other = quants + groups * n * GROUP
    for g in range(groups):
        at = g * n + token
        x = load_f32(padded, g * GROUP * 4)
        largest = simd.largest_magnitude(simd.absolute(x))
        inverse = np.float32(127.0) / largest if largest > np.float32(0.0) else np.float32(0.0)
        q = simd.round_to_i32(x * inverse)
        simd.store_i32_as_i8(quants, at * GROUP, q)
        simd.store_i32_as_i8(other, at * GROUP, simd.evens_first(q))
        simd.write_i32(sums, at * 4, simd.sum_lanes_i32(q))
        simd.write_f32(scales, at * 4, largest / np.float32(127.0))


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
