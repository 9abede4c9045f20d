"""Attention over the ring, block by block with a running maximum and sum (Milakov and Gimelshein, 2018).

Blocks and spans begin at fixed positions. What a token sees is summed within each span, and the spans' results are
joined from the oldest on, whether one unit went through all of them or each had its own: results depend neither on
threads, nor on chunks, nor on where in the ring a token lies.

A row is one query head of one token. A unit takes a tile of tokens and a set of key-value heads; its rows are sorted
by key-value head, the rows of each filled up to a multiple of four. Learned decoders are absorbed where they are
linear at the end: rows then hold queries times the decoder of keys, and sums of features that values are decoded
from. Keys that are rotated after decoding are decoded block by block.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import simd
from . import words as w
from .compiling import BARE
from .numba_blocks import ask_for
from .numba_codes import hadamard
from .numba_math import exp2, word
from .numba_queries import pack, rows_of
from .numba_ring import clock, is_sliding
from .numba_scores import score
from .numba_tiles import dots
from .numba_values import add_values, clear_values, finish_values
from .numba_weights import NOTHING, clear_state, oldest_of, state_of, weigh_up
from .simd import load_f32, read_f32, splat_f32, store_f32, write_f32
from .words import CACHED, SPAN


@njit(forceinline=True)
def _tile(job, tile):
    """First token of a tile, and how many it has."""
    first = word(job, w.AT_FIRST) + tile * word(job, w.AT_TILE)
    return first, min(word(job, w.AT_TILE), word(job, w.AT_N) - first)


# ==== One span ====


@njit(**BARE)
def _span(job, area, queries, result, kv_first, kv_stop, first, tokens, sinks, start, stop):
    """Attend to the positions start .. stop - 1, which lie in one span. queries: the area where rows are packed"""
    keys, values = job + w.AT_KEYS * 8, job + w.AT_VALUES * 8
    heads, rows = kv_stop - kv_first, rows_of(job, tokens)
    all_rows, near = heads * rows, sinks and is_sliding(job)
    shifts = queries + word(job, w.AT_SHIFT) + (all_rows * 4 if near else 0)
    key_sets = 1 if word(keys, w.SD_SHARED) else heads
    value_sets = 1 if word(values, w.SD_SHARED) else heads
    kv_heads = kv_first, kv_stop
    clear_state(job, area, all_rows)
    clear_values(job, area, result, all_rows)
    for block in range(start // CACHED * CACHED, stop, CACHED):
        sight = first, tokens, sinks, block, max(block, start), min(block + CACHED, stop)
        for k in range(key_sets):
            n, kv_head = all_rows // key_sets, kv_first + k
            score(job, area, queries, near, all_rows, k * rows, n, kv_head, kv_heads, sight)
        weigh_up(job, area, shifts, all_rows, kv_heads, sight)
        for k in range(value_sets):
            n, kv_head = all_rows // value_sets, kv_first + k
            add_values(job, area, result, k * rows, n, all_rows, kv_head, kv_heads, sight)
    finish_values(job, area, result, all_rows)
    tops = result + all_rows * word(values, w.SD_SEEN) * 4
    for r in range(all_rows):
        write_f32(tops, r * 4, read_f32(state_of(job, area, all_rows, 0), r * 4))
        total = simd.sum_lanes(load_f32(state_of(job, area, all_rows, 4), r * 64))
        write_f32(tops, (all_rows + r) * 4, total)


# ==== Joining spans, and the end ====


@njit(**BARE)
def _clear(result, rows, width):
    """An empty result: (rows, width) sums of values, (rows,) maxima, (rows,) sums of weights."""
    for i in range(0, rows * width * 4, 64):
        store_f32(result, i, splat_f32(np.float32(0.0)))
    for i in range(rows):
        write_f32(result, (rows * width + i) * 4, NOTHING)
        write_f32(result, (rows * width + rows + i) * 4, np.float32(0.0))


@njit(**BARE)
def _join(total, rows, result, result_rows, start, width):
    """Add rows start .. start + rows - 1 of a span's result to a total of the same form."""
    for r in range(rows):
        a, b = total + r * width * 4, result + (start + r) * width * 4
        tops, others = total + rows * width * 4 + r * 4, result + (result_rows * width + start + r) * 4
        top, other = read_f32(tops, 0), read_f32(others, 0)
        if other == NOTHING:
            continue
        largest = max(top, other)
        x = simd.first_lane(exp2(splat_f32(top - largest)))
        y = simd.first_lane(exp2(splat_f32(other - largest)))
        for d in range(0, width * 4, 64):
            store_f32(a, d, load_f32(a, d) * splat_f32(x) + load_f32(b, d) * splat_f32(y))
        write_f32(tops, 0, largest)
        write_f32(tops, rows * 4, read_f32(tops, rows * 4) * x + read_f32(others, result_rows * 4) * y)


@njit(**BARE)
def _finish(job, area, total, rows, kv_head, first, tokens):
    """Divide by the sums of weights, decode where there is a decoder, and write the heads' outputs."""
    values = job + w.AT_VALUES * 8
    heads, head_dim, width = word(job, w.AT_HEADS), word(job, w.AT_HEAD_DIM), word(values, w.SD_SEEN)
    group, padded = heads // word(job, w.AT_KV_HEADS), (head_dim + 15) // 16 * 16
    sums = total + (rows * width + rows) * 4
    used = tokens * group
    for r in range(used):
        share = splat_f32(np.float32(1.0) / read_f32(sums, r * 4))
        for d in range(0, width * 4, 64):
            store_f32(total, r * width * 4 + d, load_f32(total, r * width * 4 + d) * share)
        hadamard(total + r * width * 4, word(values, w.SD_WIDTH), word(values, w.SD_TURNED))
    decoded, bias = total, 0
    if word(values, w.SD_SHARED):
        matrix = word(values, w.SD_OUTPUT) + kv_head * padded * width * 4
        bias, decoded = word(values, w.SD_OUTPUT_BIAS) + kv_head * padded * 4, area + word(job, w.AT_FEATURES)
        dots(total, width * 4, rows, matrix, width * 4, 0, padded, width, decoded, padded * 4)
        width = padded
    for r in range(used):
        token, head = first + r // group, kv_head * group + r % group
        out = word(job, w.AT_OUT) + (token * heads + head) * head_dim * 4
        for i in range(head_dim):
            x = read_f32(decoded, (r * width + i) * 4)
            write_f32(out, i * 4, x + read_f32(bias, i * 4) if bias else x)


@njit(forceinline=True)
def _span_bounds(job, index, oldest, end):
    """Span number `index` of a tile that sees the sinks and positions oldest .. end - 1: (is of sinks, start, stop)."""
    sinks = min(clock(job, w.SINKS), end)
    of_sinks = (sinks + SPAN - 1) // SPAN
    if index < of_sinks:
        return True, index * SPAN, min(index * SPAN + SPAN, sinks)
    base = (oldest // SPAN + index - of_sinks) * SPAN
    return False, max(base, oldest), min(base + SPAN, end)


@njit(forceinline=True)
def _sight(job, first, tokens):
    """What a tile sees besides the sinks: oldest position, end, and the number of spans with those of the sinks."""
    position = clock(job, w.LENGTH) + first
    oldest, end = oldest_of(job, position), position + tokens
    spans = (min(clock(job, w.SINKS), end) + SPAN - 1) // SPAN
    if end > oldest:
        spans += (end - 1) // SPAN - oldest // SPAN + 1
    return oldest, end, spans


# ==== Kernels ====


def attend_whole(job, unit):
    """Everything for one tile of tokens and one key-value head."""
    kv_heads = word(job, w.AT_KV_HEADS)
    kv_head = unit % kv_heads
    first, tokens = _tile(job, unit // kv_heads)
    rows, width = rows_of(job, tokens), word(job, w.AT_VALUES + w.SD_SEEN)
    area = word(job, w.AT_AREA) + unit * word(job, w.AT_AREA_BYTES)
    total, result = area + word(job, w.AT_TOTAL), area + word(job, w.AT_PART)
    pack(job, area, kv_head, kv_head + 1, first, tokens)
    _clear(total, rows, width)
    oldest, end, count = _sight(job, first, tokens)
    for index in range(count):
        sinks, start, stop = _span_bounds(job, index, oldest, end)
        _span(job, area, area, result, kv_head, kv_head + 1, first, tokens, sinks, start, stop)
        _join(total, rows, result, rows, 0, width)
    _finish(job, area, total, rows, kv_head, first, tokens)


def attend_pack(job, unit):
    """First of three steps for one token: its rows."""
    share = word(job, w.AT_KV_HEADS) // word(job, w.AT_SETS)
    area = word(job, w.AT_AREA) + unit * word(job, w.AT_AREA_BYTES)
    pack(job, area, unit * share, (unit + 1) * share, word(job, w.AT_FIRST), 1)


def attend_spans(job, unit):
    """Second: units count sets of key-value heads fastest, then runs of spans."""
    sets, first = word(job, w.AT_SETS), word(job, w.AT_FIRST)
    share, which = word(job, w.AT_KV_HEADS) // sets, unit % sets
    area = word(job, w.AT_AREA) + unit * word(job, w.AT_AREA_BYTES)
    queries = word(job, w.AT_AREA) + which * word(job, w.AT_AREA_BYTES)
    oldest, end, count = _sight(job, first, 1)
    length = (count + word(job, w.AT_RUNS) - 1) // word(job, w.AT_RUNS)
    run = unit // sets * length
    for index in range(run, min(run + length, count)):
        sinks, start, stop = _span_bounds(job, index, oldest, end)
        result = word(job, w.AT_PARTS) + (index * sets + which) * word(job, w.AT_PART_BYTES)
        _span(job, area, queries, result, which * share, (which + 1) * share, first, 1, sinks, start, stop)


def attend_join(job, kv_head):
    """Third: the spans of one key-value head together."""
    sets, first, rows = word(job, w.AT_SETS), word(job, w.AT_FIRST), rows_of(job, 1)
    share, values = word(job, w.AT_KV_HEADS) // sets, job + w.AT_VALUES * 8
    width = word(values, w.SD_SEEN)
    area = word(job, w.AT_AREA) + kv_head * word(job, w.AT_AREA_BYTES)
    total = area + word(job, w.AT_TOTAL)
    _clear(total, rows, width)
    _, _, count = _sight(job, first, 1)
    decoder = (word(job, w.AT_HEAD_DIM) + 15) // 16 * 16 * width * 4 if word(values, w.SD_SHARED) else 0
    for index in range(count):
        ask_for(word(values, w.SD_OUTPUT) + kv_head * decoder + index * (decoder // count), decoder // count)
        result = word(job, w.AT_PARTS) + (index * sets + kv_head // share) * word(job, w.AT_PART_BYTES)
        _join(total, rows, result, share * rows, kv_head % share * rows, width)
    _finish(job, area, total, rows, kv_head, first, 1)
