// Scores of a block of cached tokens; see runtime/kernels/numba_scores.py.
#pragma once
#include "queries.h"

// 32 codes of LANES of a tile's sixteen tokens: of q4 the low halves of four vectors, then the high ones.
INLINE void load_codes(int codec, const uint8_t *tile, vu codes[8]) {
    UNROLL for (int i = 0; i < 8; i++) {
        if (codec == RING_Q8) codes[i] = v_factor_i8(v_load_bytes(tile + i * 64));
        if (codec == RING_Q4) codes[i] = i < 4 ? v_load_bytes(tile + i * 64) & 15 : v_load_bytes(tile + (i - 4) * 64) >> 4;
    }
}

// Add the products of 32 codes with four rows, to two sums of each, so that none waits for another.
INLINE void four_dots(const vu codes[8], const int8_t *x, int64_t seen, vi exact[2][4]) {
    UNROLL for (int i = 0; i < 8; i++)
        UNROLL for (int r = 0; r < 4; r++)
            exact[i % 2][r] = v_dot4_i8(exact[i % 2][r], codes[i], v_splat_quad(x + r * seen + 4 * i));
}

// Scores of LANES tokens and four rows. size: numbers of a group; next: what to ask for, or null; tile: bytes of a group
// of sixteen tokens
INLINE void score_four(int codec, int64_t size, int64_t groups, const uint8_t *codes, int64_t tile, const uint16_t *scales,
                       const int8_t *quants, int64_t seen, const query_step *steps, const uint8_t *next, float *scores) {
    vf sums[4] = {{0}};
    for (int64_t g = 0; g < groups; g++, codes += tile, scales += CACHED, quants += size, steps++) {
        vi exact[2][4] = {{{0}}};
        vu v[8];
        UNROLL for (int r = 0; r < 4; r++) exact[0][r] = v_splat_i32(steps[r * groups].start);
        for (int64_t i = 0; i < size; i += 32) {
            if (next) ask_for(next + g * tile + i * TILE, bytes_of_32(codec) * TILE);
            load_codes(codec, codes + i * TILE, v);
            four_dots(v, quants + i, seen, exact);
        }
        vf scale = v_load_f16(scales);
        UNROLL for (int r = 0; r < 4; r++)
            sums[r] = v_fma(v_to_f32(exact[0][r] + exact[1][r]), scale * steps[r * groups].scale, sums[r]);
        if (codec == RING_Q4) {
            vf base = v_load_f16(scales += CACHED);
            UNROLL for (int r = 0; r < 4; r++) sums[r] = v_fma(base, v_splat(steps[r * groups].sum), sums[r]);
        }
    }
    UNROLL for (int r = 0; r < 4; r++) v_store(scores + r * CACHED, sums[r]);
}

// scores[r, j] = rounded row r times token j of a block, for `tokens`, which are whole tiles; those of tokens that are not
// there may be no numbers. n: rows, in fours
static void exact_scores(words side, const ring_piece *x, int64_t n, const int8_t *quants, const query_step *steps,
                         sight tokens, float *scores) {
    int64_t seen = side[SD_SEEN], size = side[SD_GROUP], groups = seen / size;
    int64_t tile = side[SD_CODE_BYTES] * TILE / groups;
    for (int64_t j = tokens.start; j < tokens.stop; j += LANES) {
        const uint8_t *lines = x->codes + j / TILE * groups * tile + j % TILE * 4;
        for (int64_t r = 0; r < n; r += 4) {
            const uint8_t *next = r == 0 && j % TILE == 0 ? lines + x->ahead : 0;
            const int8_t *row = quants + r * seen;
            const query_step *step = steps + r * groups;
            float *out = scores + r * CACHED + j;
            if (side[SD_CODEC] == RING_Q4)
                score_four(RING_Q4, 32, groups, lines, tile, x->scales + j, row, seen, step, next, out);
            else
                score_four(RING_Q8, size, groups, lines, tile, x->scales + j, row, seen, step, next, out);
        }
    }
}

// Scores of rows r .. r + n - 1, all of one key-value head if heads have keys of their own. queries: the area where rows
// are packed; near: whether those for the sinks are meant
static void score(words job, float *area, float *queries, int near, int64_t r, int64_t n, int64_t kv_head, const task *t) {
    words keys = job + AT_KEYS;
    int64_t width = keys[SD_SEEN], start = (t->low - t->block) / 4 * 4;
    float *scores = in(area, job[AT_SCORES]) + r * CACHED;
    if (keys[SD_INT8]) {
        ring_piece x = find_piece(keys, kv_head, t);
        int64_t row = (near ? t->all_rows : 0) + r;
        ask_for_scales(keys, &x);
        exact_scores(keys, &x, n, row_quants(job, queries, row), row_steps(job, queries, row), t->tiles, scores);
        return;
    }
    const float *rows = in(queries, job[near ? AT_NEAR : AT_QUERY]) + r * width;
    if (is_direct(keys, n)) {
        ring_piece x = find_piece(keys, kv_head, t);
        const uint16_t *halves = (const uint16_t *)x.codes;
        dots_f16(rows, width, n, halves, x.ahead, width, start, t->high - t->block, width, scores, CACHED);
    } else {
        const float *x = decoded(job, keys, area, kv_head, t->low, t->high - t->low) - (t->low - t->block) * width;
        dots(rows, width, n, x, width, start, t->high - t->block, width, scores, CACHED);
    }
}
