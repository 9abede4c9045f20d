// Attention over the ring, block by block with a running maximum and sum (Milakov and Gimelshein, 2018).
// The same as runtime/kernels/numba_attention.py, where it is explained, sum by sum.
#pragma once
#include "values.h"

// A result: (rows, width) sums of values, (rows) maxima, (rows) sums of weights.
INLINE float *tops_of(float *result, int64_t rows, int64_t width) { return result + rows * width; }

INLINE float *area_of(words job, int64_t unit) { return at(job[AT_AREA], unit * job[AT_AREA_BYTES]); }

INLINE vf exp2_of(float x) { return v_exp2(v_splat(x)); }

// ==== One span ====

// What is to be known of the block that a task has come to.
INLINE void set_block(words job, task *t) {
    t->low = max_of(t->block, t->start), t->high = min_of(t->block + CACHED, t->stop);
    t->tiles = (sight){(t->low - t->block) / TILE * TILE, (t->high - t->block + TILE - 1) / TILE * TILE};
    t->slot = slot_of(job, t->block), t->whole = sees_all(job, t);
}

// Attend to the positions of one span. queries: the area where rows are packed
static void attend_span(words job, float *area, float *queries, float *result, task *t) {
    int64_t heads = t->kv_stop - t->kv_first, rows = t->rows, all_rows = t->all_rows;
    int64_t key_sets = job[AT_KEYS + SD_SHARED] ? 1 : heads, value_sets = job[AT_VALUES + SD_SHARED] ? 1 : heads;
    int near = t->sinks && is_sliding(job);
    const float *shifts = in(queries, job[AT_SHIFT]) + (near ? all_rows : 0);
    clear_state(job, area, all_rows);
    clear_values(job, area, result, all_rows);
    for (t->block = t->start / CACHED * CACHED; t->block < t->stop; t->block += CACHED) {
        set_block(job, t);
        for (int64_t k = 0; k < key_sets; k++)
            score(job, area, queries, near, k * rows, all_rows / key_sets, t->kv_first + k, t);
        weigh_up(job, area, shifts, t);
        for (int64_t k = 0; k < value_sets; k++)
            add_values(job, area, result, k * rows, all_rows / value_sets, t->kv_first + k, t);
    }
    finish_values(job, area, result, all_rows);
    float *tops = tops_of(result, all_rows, job[AT_VALUES + SD_SEEN]);
    row_state state = state_of(job, area, all_rows);
    for (int64_t r = 0; r < all_rows; r++) tops[r] = state.tops[r], tops[all_rows + r] = sum16(load16(state.sums + r * 16));
}

// ==== Joining spans, and the end ====

// An empty result.
static void clear(float *result, int64_t rows, int64_t width) {
    memset(result, 0, rows * width * 4);
    float *tops = tops_of(result, rows, width);
    for (int64_t i = 0; i < rows; i++) tops[i] = NOTHING, tops[rows + i] = 0.0f;
}

// Add rows start .. start + rows - 1 of a span's result to a total of the same form.
static void join_rows(float *total, int64_t rows, float *result, int64_t result_rows, int64_t start, int64_t width) {
    float *tops = tops_of(total, rows, width), *others = tops_of(result, result_rows, width) + start;
    for (int64_t r = 0; r < rows; r++) {
        float *a = total + r * width, *b = result + (start + r) * width;
        if (others[r] == NOTHING) continue;
        float largest = tops[r] > others[r] ? tops[r] : others[r];
        float x = exp2_of(tops[r] - largest)[0], y = exp2_of(others[r] - largest)[0];
        for (int64_t d = 0; d < width; d += LANES) v_store(a + d, v_load(a + d) * x + v_load(b + d) * y);
        tops[r] = largest;
        tops[rows + r] = tops[rows + r] * x + others[result_rows + r] * y;
    }
}

// Divide by the sums of weights, decode where there is a decoder, and write the heads' outputs.
static void finish_heads(words job, float *area, float *total, int64_t rows, int64_t kv_head, int64_t first, int64_t tokens) {
    words values = job + AT_VALUES;
    int64_t head_dim = job[AT_HEAD_DIM], width = values[SD_SEEN], group = group_of(job), padded = padded16(head_dim);
    const float *sums = tops_of(total, rows, width) + rows, *decoded = total, *bias = 0;
    for (int64_t r = 0; r < tokens * group; r++) {
        float share = 1.0f / sums[r];
        for (int64_t d = 0; d < width; d += LANES) v_store(total + r * width + d, v_load(total + r * width + d) * share);
        hadamard(total + r * width, values[SD_WIDTH], values[SD_TURNED]);
    }
    if (values[SD_SHARED]) {
        float *target = in(area, job[AT_FEATURES]);
        dots(total, width, rows, at(values[SD_OUTPUT], kv_head * padded * width * 4), width, 0, padded, width, target, padded);
        bias = at(values[SD_OUTPUT_BIAS], kv_head * padded * 4), decoded = target, width = padded;
    }
    for (int64_t r = 0; r < tokens * group; r++) {
        int64_t head = (first + r / group) * job[AT_HEADS] + kv_head * group + r % group;
        float *out = at(job[AT_OUT], head * head_dim * 4);
        for (int64_t i = 0; i < head_dim; i++) out[i] = bias ? decoded[r * width + i] + bias[i] : decoded[r * width + i];
    }
}

// What a tile sees besides the sinks: oldest position, end, and the number of spans with those of the sinks.
typedef struct { int64_t oldest, end, spans, of_sinks; } vista;

INLINE vista vista_of(words job, int64_t first, int64_t tokens) {
    int64_t position = clock_of(job, LENGTH) + first;
    vista s = {oldest_of(job, position), position + tokens, 0, 0};
    s.of_sinks = s.spans = (min_of(clock_of(job, SINKS), s.end) + SPAN - 1) / SPAN;
    if (s.end > s.oldest) s.spans += (s.end - 1) / SPAN - s.oldest / SPAN + 1;
    return s;
}

// Where span number `index` lies.
INLINE void set_span(words job, task *t, vista s, int64_t index) {
    int64_t base = index < s.of_sinks ? index * SPAN : (s.oldest / SPAN + index - s.of_sinks) * SPAN;
    t->sinks = index < s.of_sinks;
    t->start = t->sinks ? base : max_of(base, s.oldest);
    t->stop = min_of(base + SPAN, t->sinks ? min_of(clock_of(job, SINKS), s.end) : s.end);
}

// ==== Kernels ====

// Everything for one tile of tokens and one key-value head.
KERNEL(attend_whole) {
    UNUSED;
    words job = at(address, 0);
    int64_t kv_head = unit % job[AT_KV_HEADS], first = job[AT_FIRST] + unit / job[AT_KV_HEADS] * job[AT_TILE];
    int64_t tokens = min_of(job[AT_TILE], job[AT_N] - first), width = job[AT_VALUES + SD_SEEN];
    task t = task_of(job, kv_head, kv_head + 1, first, tokens);
    float *area = area_of(job, unit), *total = in(area, job[AT_TOTAL]), *part = in(area, job[AT_PART]);
    pack_unit(job, area, kv_head, kv_head + 1, first, tokens);
    clear(total, t.rows, width);
    vista s = vista_of(job, first, tokens);
    for (int64_t index = 0; index < s.spans; index++) {
        set_span(job, &t, s, index);
        attend_span(job, area, area, part, &t);
        join_rows(total, t.rows, part, t.rows, 0, width);
    }
    finish_heads(job, area, total, t.rows, kv_head, first, tokens);
    return 0;
}

// First of three steps for one token: its rows.
KERNEL(attend_pack) {
    UNUSED;
    words job = at(address, 0);
    int64_t share = job[AT_KV_HEADS] / job[AT_SETS];
    pack_unit(job, area_of(job, unit), unit * share, (unit + 1) * share, job[AT_FIRST], 1);
    return 0;
}

// Second: units count sets of key-value heads fastest, then runs of spans.
KERNEL(attend_spans) {
    UNUSED;
    words job = at(address, 0);
    int64_t sets = job[AT_SETS], share = job[AT_KV_HEADS] / sets, which = unit % sets;
    vista s = vista_of(job, job[AT_FIRST], 1);
    int64_t length = (s.spans + job[AT_RUNS] - 1) / job[AT_RUNS], run = unit / sets * length;
    task t = task_of(job, which * share, (which + 1) * share, job[AT_FIRST], 1);
    for (int64_t index = run; index < min_of(run + length, s.spans); index++) {
        set_span(job, &t, s, index);
        float *part = at(job[AT_PARTS], (index * sets + which) * job[AT_PART_BYTES]);
        attend_span(job, area_of(job, unit), area_of(job, which), part, &t);
    }
    return 0;
}

// Third: the spans of one key-value head together.
KERNEL(attend_join) {
    UNUSED;
    words job = at(address, 0);
    int64_t sets = job[AT_SETS], share = job[AT_KV_HEADS] / sets, rows = rows_of_tokens(job, 1);
    words values = job + AT_VALUES;
    int64_t width = values[SD_SEEN], spans = vista_of(job, job[AT_FIRST], 1).spans;
    float *area = area_of(job, unit), *total = in(area, job[AT_TOTAL]);
    int64_t decoder = values[SD_SHARED] ? padded16(job[AT_HEAD_DIM]) * width * 4 : 0;
    clear(total, rows, width);
    for (int64_t index = 0; index < spans; index++) {
        if (decoder) ask_for(at(values[SD_OUTPUT], unit * decoder + index * (decoder / spans)), decoder / spans);
        float *part = at(job[AT_PARTS], (index * sets + unit / share) * job[AT_PART_BYTES]);
        join_rows(total, rows, part, share * rows, unit % share * rows, width);
    }
    finish_heads(job, area, total, rows, unit, job[AT_FIRST], 1);
    return 0;
}
