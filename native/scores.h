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

// 32 bytes of LANES rows, transposed.
INLINE void load_lines(const uint8_t *rows, int64_t stride, vu tile[8]) {
    const uint8_t *starts[LANES];
    UNROLL for (int i = 0; i < LANES; i++) starts[i] = rows + i * stride;
    v_load_tile(starts, 0, tile);
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

// The low halves of LANES rows' sixteen bytes, then the high ones.
INLINE void split_nibbles(const vu tile[4], vu codes[8]) {
    UNROLL for (int i = 0; i < 4; i++) codes[i] = tile[i] & 15, codes[4 + i] = tile[i] >> 4;
}

// scores[r, j] = rounded row r times token j of a block, for all tokens.
static void exact_scores(words side, const uint8_t *codes, const float *units, int64_t n, const int8_t *quants,
                         const query_step *steps, float *scores) {
    int64_t seen = side[SD_SEEN], size = side[SD_GROUP], stride = side[SD_CODE_BYTES], groups = seen / size;
    for (int64_t j = 0; j < CACHED; j += LANES) {
        const uint8_t *line = codes + j * stride;
        for (int64_t g = 0; g < groups; g++) {
            vu tile[16], half[8];
            if (side[SD_CODEC] == RING_Q4) {
                const float *scale = units + 2 * g * CACHED + j;
                if (g % 2 == 0) ask_for_rows(line + g * 16, stride, LANES), load_lines(line + g * 16, stride, tile);
                split_nibbles(tile + g % 2 * 4, half);
                add_scores(8, half, scale, scale + CACHED, n, g == 0, quants + g * 32, seen, steps + g, groups, scores + j);
                continue;
            }
            ask_for_rows(line + g * size, stride, LANES);
            load_lines(line + g * size, stride, tile);
            if (size == 64) load_lines(line + g * size + 32, stride, tile + 8);
            UNROLL for (int i = 0; i < 16; i++) if (i < size / 4) tile[i] = v_factor_i8(tile[i]);
            const float *scale = units + g * CACHED + j;
            if (size == 64)
                add_scores(16, tile, scale, 0, n, g == 0, quants + g * 64, seen, steps + g, groups, scores + j);
            else
                add_scores(8, tile, scale, 0, n, g == 0, quants + g * 32, seen, steps + g, groups, scores + j);
        }
    }
}

// Scores of rows r .. r + n - 1, all of one key-value head if heads have keys of their own. queries: the area where rows
// are packed; near: whether those for the sinks are meant
static void score(words job, float *area, float *queries, int near, int64_t r, int64_t n, int64_t kv_head, const task *t) {
    words keys = job + AT_KEYS;
    int64_t width = keys[SD_SEEN], head = keys[SD_HEADS] > 1 ? kv_head : 0, start = (t->low - t->block) / 4 * 4;
    float *scores = in(area, job[AT_SCORES]) + r * CACHED;
    if (keys[SD_INT8]) {
        lines_of_block lines = find_lines(job, keys, area, head, t->block, t->low, t->high);
        int64_t row = (near ? rows_of_task(job, t) : 0) + r;
        float *units = in(area, job[AT_UNITS]);
        spread_scales(keys, lines.scales, units);
        exact_scores(keys, lines.codes, units, n, row_quants(job, queries, row), row_steps(job, queries, row), scores);
        return;
    }
    const float *rows = in(queries, job[near ? AT_NEAR : AT_QUERY]) + r * width;
    if (is_direct(keys, n)) {
        const void *x = find_lines(job, keys, area, head, t->block, t->low, t->high).codes;
        dots_f16(rows, width, n, x, width, start, t->high - t->block, width, scores, CACHED);
    } else {
        const float *x = decoded(job, keys, area, kv_head, t->low, t->high - t->low) - (t->low - t->block) * width;
        dots(rows, width, n, x, width, start, t->high - t->block, width, scores, CACHED);
    }
}
