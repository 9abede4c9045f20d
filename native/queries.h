// The rows of a unit of attention; see runtime/kernels/numba_queries.py. A row is one query head of one token.
#pragma once
#include "blocks.h"

// Of a group of a rounded row: where its sum of products starts, its scale, scale times sum of codes.
typedef struct { int32_t start; float scale, sum; int32_t unused; } query_step;

INLINE int64_t padded16(int64_t n) { return (n + 15) / 16 * 16; }
INLINE int64_t group_of(words job) { return job[AT_HEADS] / job[AT_KV_HEADS]; }
// Rows of one key-value head, in fours.
INLINE int64_t rows_of_tokens(words job, int64_t tokens) { return (tokens * group_of(job) + 3) / 4 * 4; }

// Of keys that stay codes, a line is asked for with each sixteen weights, the others with scores. Where one unit has all
// heads, and they share values, values are summed for longer than it takes to read them, and keys are read for longer
// than it takes to multiply them: half of the keys are then asked for with values, or less, 64 bytes with each step.
INLINE key_plan plan_keys(words job, int64_t kv_heads, int64_t all_rows) {
    words keys = job + AT_KEYS, values = job + AT_VALUES;
    if (!keys[SD_INT8]) return (key_plan){0, 0, 0, 0};
    int64_t piece = CACHED * (keys[SD_SCALE_BYTES] + keys[SD_CODE_BYTES]), block = keys[SD_BLOCK_STRIDE];
    if (kv_heads == 1 || kv_heads != keys[SD_HEADS]) return (key_plan){piece - PER_FOUR, PER_FOUR, 0, 0};
    int64_t weights = min_of(all_rows / 4, block / 4 / PER_FOUR) * PER_FOUR, with_values = 0;
    if (values[SD_INT8] && values[SD_SHARED]) with_values = min_of(block / 2, values[SD_SEEN] * all_rows * 16);
    return (key_plan){block - weights - with_values, weights, with_values, 1};
}

INLINE task task_of(words job, int64_t kv_first, int64_t kv_stop, int64_t first, int64_t tokens) {
    int64_t rows = rows_of_tokens(job, tokens), heads = kv_stop - kv_first, all_rows = heads * rows;
    return (task){kv_first, kv_stop, first, tokens, rows, all_rows, plan_keys(job, heads, all_rows), .block = 0};
}

// Rounded rows and the steps of their groups, from a row on.
INLINE int8_t *row_quants(words job, float *area, int64_t row) {
    return (int8_t *)in(area, job[AT_QUANTS]) + row * job[AT_KEYS + SD_SEEN];
}
INLINE query_step *row_steps(words job, float *area, int64_t row) {
    return (query_step *)in(area, job[AT_STEPS]) + row * (job[AT_KEYS + SD_SEEN] / job[AT_KEYS + SD_GROUP]);
}

// Scale the queries of one key-value head and, where keys stay codes, multiply them by the keys' decoder.
static void pack_rows(words job, float *area, const float *source, float *target, float *shift, int64_t kv_head,
                      int64_t first, int64_t tokens) {
    words keys = job + AT_KEYS;
    int64_t head_dim = job[AT_HEAD_DIM], group = group_of(job), rows = rows_of_tokens(job, tokens);
    int64_t seen = keys[SD_SEEN], padded = keys[SD_SHARED] ? padded16(head_dim) : seen;
    float *packed = keys[SD_SHARED] ? in(area, job[AT_FEATURES]) : target, scale = float_word(job + AT_SCALE);
    const float *bias = at(keys[SD_OUTPUT_BIAS], kv_head * padded * 4);
    for (int64_t r = 0; r < rows; r++) {
        const float *q = source + ((first + r / group) * job[AT_HEADS] + kv_head * group + r % group) * head_dim;
        float *row = packed + r * padded;
        shift[r] = 0.0f;
        memset(row, 0, padded * 4);
        if (r >= tokens * group) continue;
        for (int64_t i = 0; i < head_dim; i++) row[i] = q[i] * scale;
        if (keys[SD_SHARED])
            for (int64_t i = 0; i < head_dim; i++) shift[r] += row[i] * bias[i];
    }
    if (keys[SD_SHARED])
        dots(packed, padded, rows, at(keys[SD_OUTPUT], kv_head * seen * padded * 4), padded, 0, seen, padded, target, seen);
    for (int64_t r = 0; r < rows; r++) turn(keys, kv_head, target + r * seen, keys[SD_WIDTH], QUERY);
}

// Round n rows to int8, with one scale for each group of keys.
static void round_rows(words side, const float *rows, int8_t *quants, query_step *steps, int64_t n) {
    int64_t size = side[SD_GROUP];
    int32_t offset = side[SD_CODEC] == RING_Q8 ? I8_OFFSET : 0;
    for (int64_t at = 0; at < n * side[SD_SEEN]; at += size, steps++) {
        vf top = v_splat(0.0f);
        for (int64_t i = at; i < at + size; i += LANES) top = v_larger(top, v_abs(v_load(rows + i)));
        float largest = largest_magnitude(top), inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        vi total = {0};
        for (int64_t i = at; i < at + size; i += LANES) {
            vi q = v_round(v_load(rows + i) * inverse);
            v_store_i8(quants + i, q);
            total += q;
        }
        int32_t sum = v_sum_lanes(total);
        *steps = (query_step){sum * offset, largest / 127.0f, largest / 127.0f * (float)sum, 0};
    }
}

// Prepare a unit's rows, for the window and, once tokens have slid out, for the sinks.
static void pack_unit(words job, float *area, int64_t kv_first, int64_t kv_stop, int64_t first, int64_t tokens) {
    int64_t rows = rows_of_tokens(job, tokens), seen = job[AT_KEYS + SD_SEEN], all_rows = (kv_stop - kv_first) * rows;
    for (int near = 0; near <= is_sliding(job); near++) {
        float *packed = in(area, job[near ? AT_NEAR : AT_QUERY]), *shift = in(area, job[AT_SHIFT]) + near * all_rows;
        for (int64_t kv_head = kv_first; kv_head < kv_stop; kv_head++) {
            int64_t r = (kv_head - kv_first) * rows;
            pack_rows(job, area, at(job[near ? AT_Q_SINK : AT_Q], 0), packed + r * seen, shift + r, kv_head, first, tokens);
        }
        if (job[AT_KEYS + SD_INT8])
            round_rows(job + AT_KEYS, packed, row_quants(job, area, near * all_rows), row_steps(job, area, near * all_rows), all_rows);
    }
}
