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

// Add the products of 32 codes with four rows, to two sums of each, so that none waits for another. e: what is asked for
// with every 64 bytes of codes, evenly: many lines at once would be waited for; soon: where codes are that are read soon
INLINE void four_dots(int codec, const vu codes[8], const int8_t *x, int64_t seen, errand e, const uint8_t *soon,
                      vi exact[2][4]) {
    int per_vector = codec == RING_Q4 ? 2 : 1;  // products of one vector of codes
    UNROLL for (int i = 0; i < 8; i++) {
        if (e.step && i % per_vector == 0) {
            ask_for(e.next + i / per_vector * e.step, 64);
            ask_near(soon + i / per_vector * 64);
        }
        UNROLL for (int r = 0; r < 4; r++)
            exact[i % 2][r] = v_dot4_i8(exact[i % 2][r], codes[i], v_splat_quad(x + r * seen + 4 * i));
    }
}

// Scores of LANES tokens and four rows. size: numbers of a group; tile: bytes of a group of sixteen tokens
INLINE void score_four(int codec, int64_t size, int64_t groups, const uint8_t *codes, int64_t tile, const uint16_t *scales,
                       const int8_t *quants, int64_t seen, const query_step *steps, errand e, float *scores) {
    vf sums[4] = {{0}};
    for (int64_t g = 0; g < groups; g++, codes += tile, scales += CACHED, quants += size, steps++) {
        vi exact[2][4] = {{{0}}};
        vu v[8];
        UNROLL for (int r = 0; r < 4; r++) exact[0][r] = v_splat_i32(steps[r * groups].start);
        for (int64_t i = 0; i < size; i += 32, e.next += bytes_of_32(codec) / 4 * e.step) {
            load_codes(codec, codes + i * TILE, v);
            four_dots(codec, v, quants + i, seen, e, codes + i * TILE + e.near, exact);
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
                         sight tokens, errand e, float *scores) {
    int64_t seen = side[SD_SEEN], size = side[SD_GROUP], groups = seen / size;
    int64_t tile = side[SD_CODE_BYTES] * TILE / groups;
    for (int64_t j = tokens.start; j < tokens.stop; j += LANES) {
        const uint8_t *lines = x->codes + j / TILE * groups * tile + j % TILE * 4;
        for (int64_t r = 0; r < n; r += 4) {
            errand wanted = {e.next + j / TILE * (side[SD_CODE_BYTES] / 4) * e.step, r || j % TILE ? 0 : e.step, e.near};
            const int8_t *row = quants + r * seen;
            const query_step *step = steps + r * groups;
            float *out = scores + r * CACHED + j;
            if (side[SD_CODEC] == RING_Q4)
                score_four(RING_Q4, 32, groups, lines, tile, x->scales + j, row, seen, step, wanted, out);
            else
                score_four(RING_Q8, size, groups, lines, tile, x->scales + j, row, seen, step, wanted, out);
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
        if (!t->early) ask_for_scales(keys, &x);
        errand e = asked_with_scores(keys, &x, kv_head, t);
        exact_scores(keys, &x, n, row_quants(job, queries, row), row_steps(job, queries, row), t->tiles, e, scores);
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
