"""Blocks of cached tokens as attention wants them: their codes, their scales by group, or what they decode to.

A block is CACHED tokens that begin at a multiple of CACHED. It lies in the ring in one piece.
"""

from __future__ import annotations

from numba import njit

from . import words as w
from .compiling import BARE
from .numba_codes import F16, hadamard
from .numba_math import gelu, gelu_tanh, word
from .numba_ring import codes_at, expand, rotate, scales_at, slot_of
from .numba_tiles import dots
from .simd import load_f32, store_f32
from .simd_tiles import prefetch_far
from .words import CACHED, TILE

PIECES_AHEAD, NEAR = 2, 4096  # pieces, of a block and a head, and bytes, from what is read to what is asked for
PER_FOUR = 4 * CACHED // 16 * 64  # bytes that are asked for with the weights of four rows

# ==== As they are stored ====


@njit(forceinline=True)
def find(job, side, kv_head, kv_heads, block):
    """Addresses of the codes and the scales that a block has of one head, of which not all may be there, and how far
    off those are that the unit reads PIECES_AHEAD pieces later. kv_heads: first and end of the unit's"""
    heads, head, number, slot = 1, 0, 0, slot_of(job, block)
    if word(side, w.SD_HEADS) > 1:
        heads, head, number = kv_heads[1] - kv_heads[0], kv_head, kv_head - kv_heads[0]
    later = number + PIECES_AHEAD
    ahead = later // heads * word(side, w.SD_BLOCK_STRIDE) + (later % heads - number) * word(side, w.SD_HEAD_STRIDE)
    return codes_at(side, head, slot), scales_at(side, head, slot), ahead


@njit(forceinline=True)
def ask_for(address, count):
    """Ask for bytes that will be read soon: a few lines at once, or the CPU waits until all are there,
    and in the order of their addresses, which the hardware goes on with."""
    for i in range(0, count, 64):
        prefetch_far(address, i)


@njit(forceinline=True)
def plan_keys(job, kv_heads, all_rows):
    """How many bytes of keys a unit asks for during each step of a block's sums: scores, weights, and values.

    They follow each other in memory. The last number is whether they are all heads' of the next block, or of a piece
    that is read PIECES_AHEAD pieces later; scales and codes. kv_heads: first and end of the unit's

    Of keys that stay codes, a line is asked for with each sixteen weights, the others with scores. Where one unit has
    all heads, and they share values, values are summed for longer than it takes to read them, and keys are read for
    longer than it takes to multiply them: half of the keys are then asked for with values, or less, 64 bytes with each
    step."""
    keys, values, heads = job + w.AT_KEYS * 8, job + w.AT_VALUES * 8, kv_heads[1] - kv_heads[0]
    if not word(keys, w.SD_INT8):
        return 0, 0, 0, False
    if heads == 1 or heads != word(keys, w.SD_HEADS):
        piece = CACHED * (word(keys, w.SD_SCALE_BYTES) + word(keys, w.SD_CODE_BYTES))
        return piece - PER_FOUR, PER_FOUR, 0, False
    whole = word(keys, w.SD_BLOCK_STRIDE)
    weights, with_values = min(all_rows // 4, whole // 4 // PER_FOUR) * PER_FOUR, 0
    if word(values, w.SD_INT8) and word(values, w.SD_SHARED):
        with_values = min(whole // 2, word(values, w.SD_SEEN) * all_rows * 16)
    return whole - weights - with_values, weights, with_values, True


@njit(forceinline=True)
def _asked_keys(job, kv_heads, block, next_block):
    """Where keys begin that a unit asks for during a block."""
    keys = job + w.AT_KEYS * 8
    _, scales, ahead = find(job, keys, kv_heads[0], kv_heads, block)
    return scales + (word(keys, w.SD_BLOCK_STRIDE) if next_block else ahead)


@njit(forceinline=True)
def asked_with_scores(job, kv_head, kv_heads, block, all_rows):
    """What is asked for with every 64 bytes of the codes of a head: from where on, how many bytes, and how far ahead
    codes are asked into the nearest cache."""
    keys, (scores, _, _, next_block) = job + w.AT_KEYS * 8, plan_keys(job, kv_heads, all_rows)
    share = scores // (word(keys, w.SD_HEADS) if next_block else 1)
    step, start = share // (CACHED * word(keys, w.SD_CODE_BYTES) // 64), _asked_keys(job, kv_heads, block, next_block)
    if next_block:
        return start + (kv_head - kv_heads[0]) * share, step, 2 * NEAR
    return start, step, NEAR


@njit(forceinline=True)
def asked_with_weights(job, kv_heads, block, all_rows):
    """What is asked for with every sixteen weights, 64 bytes: from where on, and with those of how many rows."""
    scores, weights, _, next_block = plan_keys(job, kv_heads, all_rows)
    return _asked_keys(job, kv_heads, block, next_block) + scores, weights // PER_FOUR * 4


@njit(forceinline=True)
def asked_with_values(job, kv_heads, block, all_rows):
    """What is asked for with every sum of four rows, four tokens and 32 numbers: from where on, and how many bytes."""
    scores, weights, values, next_block = plan_keys(job, kv_heads, all_rows)
    steps = word(job + w.AT_VALUES * 8, w.SD_SEEN) // 32 * all_rows // 4 * (CACHED // 4)
    return _asked_keys(job, kv_heads, block, next_block) + scores + weights, values // steps


@njit(forceinline=True)
def tiles_of(sight):
    """The tokens of a block's tiles in which those lie that are wanted: the first, and where they end."""
    _, _, _, block, low, high = sight
    return (low - block) // TILE * TILE, (high - block + TILE - 1) // TILE * TILE


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
    head_dim, slot = word(job, w.AT_HEAD_DIM), slot_of(job, first)
    for i in range(count):
        turn = (slot + i) * head_dim * 2
        rotate(x + i * stride, x + i * stride, word(side, w.SD_COS) + turn, word(side, w.SD_SIN) + turn, head_dim)


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
    for i in range(count):
        hadamard(codes + i * padded * 4, word(side, w.SD_WIDTH), word(side, w.SD_ROTATED))
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
