// Scores to weights, block by block, with a running maximum and sum for each row; see runtime/kernels/numba_weights.py.
#pragma once
#include "scores.h"

#define NOTHING -3.0e38f  // the score of what is not seen; finite, so that differences are numbers

// The first position of the window that a query sees.
INLINE int64_t oldest_of(words job, int64_t position) {
    return max_of(clock_of(job, SINKS), position + 1 - (job[AT_WINDOW] - clock_of(job, SINKS)));
}

// What a span keeps of each row: the running maximum, the block's, what its past and the block are to be multiplied
// with, and the sum of weights in 16 lanes.
typedef struct { float *tops, *largest, *keep, *share, *sums; } row_state;

INLINE row_state state_of(words job, float *area, int64_t all_rows) {
    float *state = in(area, job[AT_STATE]);
    int64_t n = padded16(all_rows);
    return (row_state){state, state + n, state + 2 * n, state + 3 * n, state + 4 * n};
}

static void clear_state(words job, float *area, int64_t all_rows) {
    row_state state = state_of(job, area, all_rows);
    for (int64_t i = 0; i < padded16(all_rows); i++) state.tops[i] = NOTHING;
    memset(state.sums, 0, all_rows * 64);
}

// What row r sees of a block's positions, counted from the block on.
INLINE sight sight_of(words job, int64_t r, int64_t rows, const task *t) {
    int64_t position = clock_of(job, LENGTH) + t->first + r % rows / group_of(job);
    int64_t start = t->sinks ? t->low : max_of(t->low, oldest_of(job, position));
    int64_t stop = r % rows < t->tokens * group_of(job) ? min_of(t->high, position + 1) : t->low;
    return (sight){start - t->block, stop - t->block};
}

// Whether every token of a unit sees all of a block.
INLINE int sees_all(words job, const task *t) {
    int64_t position = clock_of(job, LENGTH) + t->first;
    int whole = t->low == t->block && t->high == t->block + CACHED && t->high <= position + 1;
    return whole && (t->sinks || t->low >= oldest_of(job, position + t->tokens - 1));
}

// The largest score of a row that it sees.
INLINE float largest_score(const float *scores, int whole, sight seen) {
    vf top = v_splat(NOTHING);
    UNROLL for (int64_t i = 0; i < CACHED; i += LANES) {
        vf s = v_load(scores + i);
        top = v_max(whole ? s : keep_lanes(s, i, seen, NOTHING), top);
    }
    return largest_lane(top);
}

// One row's weights, and their sum in 16 lanes.
INLINE f32x16 weights_of_row(float *scores, float top, int whole, sight seen) {
    f32x16 total = splat16(0.0f);
    UNROLL for (int64_t i = 0; i < CACHED; i += LANES) {
        vf s = v_exp2(v_load(scores + i) - top);
        if (!whole) s = keep_lanes(s, i, seen, 0.0f);
        v_store(scores + i, s);
        total.v[i / LANES % PARTS] += s;
    }
    return total;
}

// Turn scores of a block into weights, and note what all rows' sums are to be multiplied with.
// shifts: what is to be added to all scores of a row
static void weigh_up(words job, float *area, const float *shifts, const task *t) {
    int64_t rows = rows_of_tokens(job, t->tokens), all_rows = rows_of_task(job, t);
    float *scores = in(area, job[AT_SCORES]);
    row_state state = state_of(job, area, all_rows);
    int whole = sees_all(job, t);
    sight seen = {0, CACHED};
    for (int64_t r = 0; r < all_rows; r++) {
        if (!whole) seen = sight_of(job, r, rows, t);
        state.largest[r] = largest_score(scores + r * CACHED, whole, seen);
    }
    for (int64_t i = 0; i < all_rows; i += LANES) {
        vf before = v_load(state.tops + i), mine = v_load(state.largest + i) + v_load(shifts + i), top = v_max(mine, before);
        v_store(state.tops + i, top);
        v_store(state.keep + i, v_exp2(before - top));
        v_store(state.share + i, v_exp2(mine - top));
    }
    for (int64_t r = 0; r < all_rows; r++) {
        if (!whole) seen = sight_of(job, r, rows, t);
        f32x16 total = weights_of_row(scores + r * CACHED, state.largest[r], whole, seen), past = load16(state.sums + r * 16);
        total = fma16(total, splat16(state.share[r]), mul16(past, splat16(state.keep[r])));
        UNROLL for (int p = 0; p < PARTS; p++) v_store(state.sums + r * 16 + p * LANES, total.v[p]);
    }
}
