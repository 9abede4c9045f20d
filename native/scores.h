// Scores of a block of cached tokens; see runtime/kernels/numba_scores.py.
#pragma once
#include "queries.h"

// total + 32 codes of LANES tokens times 32 numbers of a row; two sums, which the CPU makes at the same time.
INLINE vi dot32(vi total, const vu v[8], const int8_t *x) {
    vi other = {0};
    UNROLL for (int i = 0; i < 8; i += 4) {
        other = v_dot4_i8(v_dot4_i8(other, v[i], v_splat_quad(x + 4 * i)), v[i + 1], v_splat_quad(x + 4 * i + 4));
        total = v_dot4_i8(v_dot4_i8(total, v[i + 2], v_splat_quad(x + 4 * i + 8)), v[i + 3], v_splat_quad(x + 4 * i + 12));
    }
    return other + total;
}

// Add one group's products to LANES scores of n rows. codes: 8 or 16 vectors; base: of q4, else null
INLINE void add_scores(int count, const vu *codes, const float *scales, const float *base, int64_t n, int first,
                      const int8_t *quants, int64_t seen, const query_step *steps, int64_t groups, float *scores) {
    vf scale = v_load(scales);
    for (int64_t r = 0; r < n; r++) {
        const query_step *step = steps + r * groups;
        vi exact = dot32(v_splat_i32(step->start), codes, quants + r * seen);
        if (count == 16) exact += dot32((vi){0}, codes + 8, quants + r * seen + 32);
        float *out = scores + r * CACHED;
        vf before = first ? v_splat(0.0f) : v_load(out), value = v_fma(v_to_f32(exact), scale * step->scale, before);
        v_store(out, base ? v_fma(v_load(base), v_splat(step->sum), value) : value);
    }
}

// Codes of LANES of a tile's sixteen tokens: of q8 `count` vectors, of q4 eight: the low halves of four, then the high
// ones.
INLINE void load_codes(int codec, int count, const uint8_t *tile, vu codes[16]) {
    UNROLL for (int i = 0; i < 16; i++) {
        if (codec == RING_Q8 && i < count) codes[i] = v_factor_i8(v_load_bytes(tile + i * 64));
        if (codec == RING_Q4 && i < 4) {
            vu both = v_load_bytes(tile + i * 64);
            codes[i] = both & 15, codes[4 + i] = both >> 4;
        }
    }
}

// Add sixteen tokens' group of codes to their scores. count: see load_codes; quants, steps: of that group
INLINE void add_tile(int codec, int count, const uint8_t *tile, const float *scales, int64_t n, int first,
                     const int8_t *quants, int64_t seen, const query_step *steps, int64_t groups, float *scores) {
    UNROLL for (int p = 0; p < PARTS; p++) {
        vu codes[16];
        load_codes(codec, count, tile + p * BYTES, codes);
        const float *scale = scales + p * LANES;
        add_scores(count, codes, scale, codec == RING_Q4 ? scale + CACHED : 0, n, first, quants, seen, steps, groups,
                   scores + p * LANES);
    }
}

// scores[r, j] = rounded row r times token j of a block, for all tokens.
static void exact_scores(words side, const uint8_t *codes, const float *units, int64_t n, const int8_t *quants,
                         const query_step *steps, float *scores) {
    int64_t seen = side[SD_SEEN], size = side[SD_GROUP], groups = seen / size, block = side[SD_CODE_BYTES] * CACHED;
    int64_t step = block / (CACHED / TILE * groups);  // bytes of a group of sixteen tokens
    for (int64_t j = 0; j < CACHED; j += TILE)
        for (int64_t g = 0; g < groups; g++, codes += step) {
            const int8_t *x = quants + g * size;
            const float *scale = units + (side[SD_CODEC] == RING_Q4 ? 2 * g : g) * CACHED + j;
            ask_early(codes + block, step);
            if (side[SD_CODEC] == RING_Q4)
                add_tile(RING_Q4, 8, codes, scale, n, g == 0, x, seen, steps + g, groups, scores + j);
            else if (size == 64)
                add_tile(RING_Q8, 16, codes, scale, n, g == 0, x, seen, steps + g, groups, scores + j);
            else
                add_tile(RING_Q8, 8, codes, scale, n, g == 0, x, seen, steps + g, groups, scores + j);
        }
}

// Scores of rows r .. r + n - 1, all of one key-value head if heads have keys of their own. queries: the area where rows
// are packed; near: whether those for the sinks are meant
static void score(words job, float *area, float *queries, int near, int64_t r, int64_t n, int64_t kv_head, const task *t) {
    words keys = job + AT_KEYS;
    int64_t width = keys[SD_SEEN], head = keys[SD_HEADS] > 1 ? kv_head : 0, start = (t->low - t->block) / 4 * 4;
    float *scores = in(area, job[AT_SCORES]) + r * CACHED;
    if (keys[SD_INT8]) {
        lines_of_block lines = find_lines(job, keys, head, t->block);
        int64_t row = (near ? rows_of_task(job, t) : 0) + r;
        float *units = in(area, job[AT_UNITS]);
        spread_scales(keys, lines.scales, (sight){t->low - t->block, t->high - t->block}, units);
        exact_scores(keys, lines.codes, units, n, row_quants(job, queries, row), row_steps(job, queries, row), scores);
        return;
    }
    const float *rows = in(queries, job[near ? AT_NEAR : AT_QUERY]) + r * width;
    if (is_direct(keys, n)) {
        const void *x = find_lines(job, keys, head, t->block).codes;
        dots_f16(rows, width, n, x, width, start, t->high - t->block, width, scores, CACHED);
    } else {
        const float *x = decoded(job, keys, area, kv_head, t->low, t->high - t->low) - (t->low - t->block) * width;
        dots(rows, width, n, x, width, start, t->high - t->block, width, scores, CACHED);
    }
}
