// Scores of a block of cached tokens; see runtime/kernels/numba_scores.py.
#pragma once
#include "queries.h"

// Tokens whose scores are summed at once: each row's codes are read for two vectors of keys.
enum { PAIR = 2 * LANES };

// Add the products of four numbers of each of PAIR tokens with those of rows first .. stop - 1 of four.
INLINE void add_dots(vu a, vu b, const int8_t *x, int64_t seen, int first, int stop, vi exact[4][2]) {
    UNROLL for (int r = first; r < stop; r++) {
        vu q = v_splat_quad(x + r * seen);
        exact[r][0] = v_dot4_i8(exact[r][0], a, q), exact[r][1] = v_dot4_i8(exact[r][1], b, q);
    }
}

// Ask for one line of what e says, and for one of the codes that are read soon.
INLINE void ask_once(errand *e, const uint8_t *codes) {
    if (!e->step) return;
    ask_for(e->next, 64);
    ask_near(codes + e->near);
    e->next += e->step;
}

// Add the products of 32 codes with four rows: of q4 the low halves of bytes are the first sixteen. e: what is asked for
// with every 64 bytes of codes, evenly: two lines at once are waited for
INLINE void add_dots_of_32(int codec, const uint8_t *codes, const int8_t *x, int64_t seen, errand *e, vi exact[4][2]) {
    UNROLL for (int i = 0; i < bytes_of_32(codec) / 4; i++, codes += 4 * TILE, x += 4) {
        vu a = v_load_bytes(codes), b = v_load_bytes(codes + BYTES);
        ask_once(e, codes);
        if (codec == RING_Q8)
            add_dots(a = v_factor_i8(a), b = v_factor_i8(b), x, seen, 0, 2, exact);
        else
            add_dots(a & 15, b & 15, x, seen, 0, 4, exact);
        if (2 * BYTES > 64) ask_once(e, codes + 64);
        if (codec == RING_Q8)
            add_dots(a, b, x, seen, 2, 4, exact);
        else
            add_dots(a >> 4, b >> 4, x + 16, seen, 0, 4, exact);
    }
}

// Scores of PAIR tokens and four rows. size: numbers of a group; tile: bytes of a group of a tile's tokens
INLINE void score_four(int codec, int64_t size, int64_t groups, const uint8_t *codes, int64_t tile, const uint16_t *scales,
                       const int8_t *quants, int64_t seen, const query_step *steps, errand e, float *scores) {
    vf sums[4][2] = {{{0}}};
    for (int64_t g = 0; g < groups; g++, codes += tile, scales += CACHED, quants += size, steps++) {
        vi exact[4][2];
        UNROLL for (int r = 0; r < 4; r++) exact[r][0] = exact[r][1] = v_splat_i32(steps[r * groups].start);
        for (int64_t i = 0; i < size; i += 32)
            add_dots_of_32(codec, codes + i / 32 * bytes_of_32(codec) * TILE, quants + i, seen, &e, exact);
        UNROLL for (int h = 0; h < 2; h++) {
            vf scale = v_load_f16(scales + h * LANES);
            UNROLL for (int r = 0; r < 4; r++)
                sums[r][h] = v_fma(v_to_f32(exact[r][h]), scale * steps[r * groups].scale, sums[r][h]);
        }
        if (codec != RING_Q4) continue;
        scales += CACHED;
        UNROLL for (int h = 0; h < 2; h++) {
            vf base = v_load_f16(scales + h * LANES);
            UNROLL for (int r = 0; r < 4; r++) sums[r][h] = v_fma(base, v_splat(steps[r * groups].sum), sums[r][h]);
        }
    }
    UNROLL for (int r = 0; r < 4; r++)
        UNROLL for (int h = 0; h < 2; h++) v_store(scores + r * CACHED + h * LANES, sums[r][h]);
}

// scores[r, j] = rounded row r times token j of a block, for `tokens`, which are whole tiles; those of tokens that are not
// there may be no numbers. n: rows, in fours
static void exact_scores(words side, const ring_piece *x, int64_t n, const int8_t *quants, const query_step *steps,
                         sight tokens, errand e, float *scores) {
    int64_t seen = side[SD_SEEN], size = side[SD_GROUP], groups = seen / size, row_bytes = side[SD_CODE_BYTES];
    int64_t tile = row_bytes * TILE / groups;
    for (int64_t j = tokens.start; j < tokens.stop; j += PAIR) {
        const uint8_t *lines = x->codes + j / TILE * TILE * row_bytes + j % TILE * 4;
        for (int64_t r = 0; r < n; r += 4) {
            errand wanted = {e.next + j * row_bytes / 64 * e.step, r || j * 4 % 64 ? 0 : e.step, e.near};
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
        errand e = asked_with_scores(keys, kv_head, t);
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
