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
from .numba_math import exp, gelu, gelu_tanh, word
from .numba_ring import clock, expand, hadamard, is_sliding, rotate, slot_of, turn
from .numba_tiles import dots, weigh
from .simd import load_f32, read_f32, splat_f32, store_f32, write_f32
from .simd_tiles import keep_lanes
from .words import CACHED, SPAN

NOTHING = np.float32(-np.inf)


@njit(forceinline=True)
def _rows(job, tokens):
    """Rows of one key-value head, in fours."""
    group = word(job, w.AT_HEADS) // word(job, w.AT_KV_HEADS)
    return (tokens * group + 3) // 4 * 4


@njit(forceinline=True)
def _tile(job, tile):
    """First token of a tile, and how many it has."""
    first = word(job, w.AT_FIRST) + tile * word(job, w.AT_TILE)
    return first, min(word(job, w.AT_TILE), word(job, w.AT_N) - first)


@njit(forceinline=True)
def _oldest(job, position):
    """The first position of the window that a query sees."""
    sinks = clock(job, w.SINKS)
    return max(sinks, position + 1 - (word(job, w.AT_WINDOW) - sinks))


# ==== Queries ====


@njit(**BARE)
def _pack_rows(job, area, source, target, shift, kv_head, first, tokens):
    """Scale the queries of one key-value head and, where keys stay codes, multiply them by the keys' decoder."""
    keys = job + w.AT_KEYS * 8
    heads, head_dim = word(job, w.AT_HEADS), word(job, w.AT_HEAD_DIM)
    group, rows = heads // word(job, w.AT_KV_HEADS), _rows(job, tokens)
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
        turn(keys, kv_head, row, head_dim)
        write_f32(shift, r * 4, constant)
    if absorbed:
        matrix = word(keys, w.SD_OUTPUT) + kv_head * seen * padded * 4
        dots(packed, padded * 4, rows, matrix, padded * 4, 0, seen, padded, target, seen * 4)


@njit(**BARE)
def _pack(job, area, kv_first, kv_stop, first, tokens):
    """Prepare a unit's rows, for the window and, once tokens have slid out, for the sinks."""
    rows, seen = _rows(job, tokens), word(job, w.AT_KEYS + w.SD_SEEN)
    sliding, shifts = is_sliding(job), area + word(job, w.AT_SHIFT)
    for kv_head in range(kv_first, kv_stop):
        at = (kv_head - kv_first) * rows
        query, near = area + word(job, w.AT_QUERY) + at * seen * 4, area + word(job, w.AT_NEAR) + at * seen * 4
        all_rows = (kv_stop - kv_first) * rows
        _pack_rows(job, area, word(job, w.AT_Q), query, shifts + at * 4, kv_head, first, tokens)
        if sliding:
            shift = shifts + (all_rows + at) * 4
            _pack_rows(job, area, word(job, w.AT_Q_SINK), near, shift, kv_head, first, tokens)


# ==== One block of cached tokens ====


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


@njit(**BARE)
def _block(job, side, area, kv_head, first, count):
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


@njit(**BARE)
def _soften(scores, count, seen_first, seen_stop, shift, state, keep):
    """Turn one row's scores into weights below its running maximum; lanes that it does not see weigh nothing.

    scores: (CACHED,) float32; state: address of the running maximum, `keep` that of what the past is worth now"""
    before = read_f32(state, 0)
    shifts, top = splat_f32(shift), splat_f32(before)
    for i in range(0, count, 16):
        s = keep_lanes(load_f32(scores, i * 4) + shifts, seen_first - i, seen_stop - i, NOTHING)
        store_f32(scores, i * 4, s)
        top = simd.maximum(s, top)
    largest = simd.max_lanes(top)
    total, zero = splat_f32(np.float32(0.0)), np.float32(0.0)
    for i in range(0, count, 16):
        s = exp(load_f32(scores, i * 4) - splat_f32(largest))
        s = keep_lanes(s, seen_first - i, seen_stop - i, zero)
        store_f32(scores, i * 4, s)
        total = total + s
    # Nothing is there before the first block: its maximum is -inf and its share is nil.
    share = simd.first_lane(exp(splat_f32(before - largest))) if before > NOTHING else zero
    write_f32(state, 0, largest)
    write_f32(keep, 0, share)
    return simd.sum_lanes(total), share


@njit(**BARE)
def _weights(job, area, result, rows, all_rows, first, tokens, sinks, block, low, high, shifts):
    """Scores to weights for all rows of a unit, in one block of positions low .. high - 1 from `block` on."""
    group = word(job, w.AT_HEADS) // word(job, w.AT_KV_HEADS)
    tops = result + all_rows * word(job, w.AT_VALUES + w.SD_SEEN) * 4
    sums, keeps = tops + all_rows * 4, area + word(job, w.AT_KEEP)
    for r in range(all_rows):
        position = clock(job, w.LENGTH) + first + r % rows // group
        seen_first = low if sinks else max(low, _oldest(job, position))
        seen_stop = min(high, position + 1) if r % rows < tokens * group else low
        scores = area + word(job, w.AT_SCORES) + r * CACHED * 4
        if seen_first >= seen_stop:
            for i in range(0, CACHED * 4, 64):
                store_f32(scores, i, splat_f32(np.float32(0.0)))
            write_f32(keeps, r * 4, np.float32(1.0))
            continue
        count = (high - block + 15) // 16 * 16
        shift = read_f32(shifts, r * 4)
        total, share = _soften(scores, count, seen_first - block, seen_stop - block, shift, tops + r * 4, keeps + r * 4)
        write_f32(sums, r * 4, read_f32(sums, r * 4) * share + total)


@njit(**BARE)
def _clear(result, rows, width):
    """An empty result: (rows, width) sums of values, (rows,) maxima, (rows,) sums of weights."""
    for i in range(0, rows * width * 4, 64):
        store_f32(result, i, splat_f32(np.float32(0.0)))
    for i in range(rows):
        write_f32(result, (rows * width + i) * 4, NOTHING)
        write_f32(result, (rows * width + rows + i) * 4, np.float32(0.0))


@njit(**BARE)
def _span(job, area, queries, result, kv_first, kv_stop, first, tokens, sinks, start, stop):
    """Attend to the positions start .. stop - 1, which lie in one span. queries: the area where rows are packed"""
    keys, values = job + w.AT_KEYS * 8, job + w.AT_VALUES * 8
    rows = _rows(job, tokens)
    all_rows = (kv_stop - kv_first) * rows
    key_width, value_width = word(keys, w.SD_SEEN), word(values, w.SD_SEEN)
    near = sinks and is_sliding(job)
    query = queries + word(job, w.AT_NEAR if near else w.AT_QUERY)
    shifts = queries + word(job, w.AT_SHIFT) + (all_rows * 4 if near else 0)
    scores, keeps = area + word(job, w.AT_SCORES), area + word(job, w.AT_KEEP)
    key_sets = 1 if word(keys, w.SD_SHARED) else kv_stop - kv_first
    value_sets = 1 if word(values, w.SD_SHARED) else kv_stop - kv_first
    _clear(result, all_rows, value_width)
    for block in range(start // CACHED * CACHED, stop, CACHED):
        low, high = max(block, start), min(block + CACHED, stop)
        skip = low - block
        for k in range(key_sets):
            at, n = k * rows, all_rows // key_sets
            x = _block(job, keys, area, kv_first + k, low, high - low) - skip * key_width * 4
            a, s = query + at * key_width * 4, scores + at * CACHED * 4
            dots(a, key_width * 4, n, x, key_width * 4, skip // 4 * 4, high - block, key_width, s, CACHED * 4)
        _weights(job, area, result, rows, all_rows, first, tokens, sinks, block, low, high, shifts)
        for k in range(value_sets):
            at, n = k * rows, all_rows // value_sets
            x = _block(job, values, area, kv_first + k, low, high - low) - skip * value_width * 4
            o, s, width = result + at * value_width * 4, scores + at * CACHED * 4, value_width * 4
            weigh(s, CACHED * 4, n, keeps + at * 4, x, width, skip, high - block, value_width, o, width)


# ==== Joining spans, and the end ====


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
        x = simd.first_lane(exp(splat_f32(top - largest))) if top > NOTHING else np.float32(0.0)
        y = simd.first_lane(exp(splat_f32(other - largest)))
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
        hadamard(total + r * width * 4, head_dim, word(values, w.SD_ROTATED))
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
    oldest, end = _oldest(job, position), position + tokens
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
    rows, width = _rows(job, tokens), word(job, w.AT_VALUES + w.SD_SEEN)
    area = word(job, w.AT_AREA) + unit * word(job, w.AT_AREA_BYTES)
    total, result = area + word(job, w.AT_TOTAL), area + word(job, w.AT_PART)
    _pack(job, area, kv_head, kv_head + 1, first, tokens)
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
    _pack(job, area, unit * share, (unit + 1) * share, word(job, w.AT_FIRST), 1)


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
    sets, first, rows = word(job, w.AT_SETS), word(job, w.AT_FIRST), _rows(job, 1)
    share, width = word(job, w.AT_KV_HEADS) // sets, word(job, w.AT_VALUES + w.SD_SEEN)
    area = word(job, w.AT_AREA) + kv_head * word(job, w.AT_AREA_BYTES)
    total = area + word(job, w.AT_TOTAL)
    _clear(total, rows, width)
    _, _, count = _sight(job, first, 1)
    for index in range(count):
        result = word(job, w.AT_PARTS) + (index * sets + kv_head // share) * word(job, w.AT_PART_BYTES)
        _join(total, rows, result, share * rows, kv_head % share * rows, width)
    _finish(job, area, total, rows, kv_head, first, 1)
