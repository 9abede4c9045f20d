"""Scores to weights, block by block, with a running maximum and sum for each row (Milakov and Gimelshein, 2018).

A block's weights are powers of two below the block's own largest score; `share` is what that is worth beside the
running maximum, `keep` what the sums of the past are.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from . import words as w
from .compiling import BARE
from .numba_blocks import asked_with_weights, tiles_of
from .numba_math import exp2, word
from .numba_queries import rows_of
from .numba_ring import clock
from .simd import fma, load_f32, read_f32, splat_f32, store_f32, write_f32
from .simd_tiles import keep_lanes, prefetch_far
from .words import CACHED

NOTHING = np.float32(-3.0e38)  # the score of what is not seen; finite, so that differences are numbers


@njit(forceinline=True)
def oldest_of(job, position):
    """The first position of the window that a query sees."""
    sinks = clock(job, w.SINKS)
    return max(sinks, position + 1 - (word(job, w.AT_WINDOW) - sinks))


@njit(forceinline=True)
def state_of(job, area, all_rows, which):
    """Where a span keeps of each row: 0 the running maximum, 1 the block's, 2 keep, 3 share, 4 the sum in 16 lanes."""
    return area + word(job, w.AT_STATE) + which * ((all_rows + 15) // 16 * 64)


@njit(**BARE)
def clear_state(job, area, all_rows):
    state = area + word(job, w.AT_STATE)
    ends = state_of(job, area, all_rows, 1) - state
    for i in range(0, ends, 64):
        store_f32(state, i, splat_f32(NOTHING))
    for i in range(4 * ends, 4 * ends + all_rows * 64, 64):
        store_f32(state, i, splat_f32(np.float32(0.0)))


@njit(forceinline=True)
def sight_of(job, r, rows, sight):
    """What row r sees of a block's positions, counted from the block on.

    sight: (first token, tokens, whether the span is one of the sinks, block, first position wanted, where they end)"""
    first, tokens, sinks, block, low, high = sight
    group = word(job, w.AT_HEADS) // word(job, w.AT_KV_HEADS)
    position = clock(job, w.LENGTH) + first + r % rows // group
    start = low if sinks else max(low, oldest_of(job, position))
    stop = min(high, position + 1) if r % rows < tokens * group else low
    return start - block, stop - block


@njit(forceinline=True)
def sees_all(job, sight):
    """Whether every token of a unit sees all of a block."""
    first, tokens, sinks, block, low, high = sight
    position = clock(job, w.LENGTH) + first
    whole = low == block and high == block + CACHED and high <= position + 1
    return whole and (sinks or low >= oldest_of(job, position + tokens - 1))


@njit(**BARE)
def weigh_up(job, area, shifts, all_rows, kv_heads, sight):
    """Turn scores of a block into weights, and note what all rows' sums are to be multiplied with.

    shifts: what is to be added to all scores of a row"""
    rows, scores = rows_of(job, sight[1]), area + word(job, w.AT_SCORES)
    tops, largest = state_of(job, area, all_rows, 0), state_of(job, area, all_rows, 1)
    keeps, shares = state_of(job, area, all_rows, 2), state_of(job, area, all_rows, 3)
    sums = state_of(job, area, all_rows, 4)
    whole, start, stop = sees_all(job, sight), 0, CACHED
    first, end = tiles_of(sight)
    asked, asking_rows = asked_with_weights(job, kv_heads, sight[3], all_rows)
    for r in range(all_rows):
        if not whole:
            start, stop = sight_of(job, r, rows, sight)
        top = splat_f32(NOTHING)
        for i in range(first, end, 16):
            s = load_f32(scores, (r * CACHED + i) * 4)
            if not whole:
                s = keep_lanes(s, start - i, stop - i, NOTHING)
            top = simd.maximum(s, top)
        write_f32(largest, r * 4, simd.max_lanes(top))
    for i in range(0, all_rows * 4, 64):
        before, mine = load_f32(tops, i), load_f32(largest, i) + load_f32(shifts, i)
        top = simd.maximum(mine, before)
        store_f32(tops, i, top)
        store_f32(keeps, i, exp2(before - top))
        store_f32(shares, i, exp2(mine - top))
    for r in range(all_rows):
        if not whole:
            start, stop = sight_of(job, r, rows, sight)
        top, total = splat_f32(read_f32(largest, r * 4)), splat_f32(np.float32(0.0))
        for i in range(first, end, 16):
            at = (r * CACHED + i) * 4
            if r < asking_rows:
                prefetch_far(asked, at)
            s = exp2(load_f32(scores, at) - top)
            if not whole:
                s = keep_lanes(s, start - i, stop - i, np.float32(0.0))
            store_f32(scores, at, s)
            total = total + s
        # The rest is what was there before: values round and add up the weights of whole blocks.
        for i in range(0, first, 16):
            store_f32(scores, (r * CACHED + i) * 4, splat_f32(np.float32(0.0)))
        for i in range(end, CACHED, 16):
            store_f32(scores, (r * CACHED + i) * 4, splat_f32(np.float32(0.0)))
        past = load_f32(sums, r * 64) * splat_f32(read_f32(keeps, r * 4))
        store_f32(sums, r * 64, fma(total, splat_f32(read_f32(shares, r * 4)), past))
