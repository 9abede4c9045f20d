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
INLINE sight sight_of(words job, int64_t r, const task *t) {
    int64_t position = clock_of(job, LENGTH) + t->first + r % t->rows / group_of(job);
    int64_t start = t->sinks ? t->low : max_of(t->low, oldest_of(job, position));
    int64_t stop = r % t->rows < t->tokens * group_of(job) ? min_of(t->high, position + 1) : t->low;
    return (sight){start - t->block, stop - t->block};
}

// Whether every token of a unit sees all of a block.
INLINE int sees_all(words job, const task *t) {
    int64_t position = clock_of(job, LENGTH) + t->first;
    int whole = t->low == t->block && t->high == t->block + CACHED && t->high <= position + 1;
    return whole && (t->sinks || t->low >= oldest_of(job, position + t->tokens - 1));
}

// The largest scores of those that a row sees, in sixteen lanes. tokens: those of the block that are looked at
INLINE f32x16 largest_scores(const float *scores, int whole, sight tokens, sight seen) {
    f32x16 top = splat16(NOTHING);
    UNROLL for (int64_t i = tokens.start; i < tokens.stop; i += LANES) {
        vf s = v_load(scores + i);
        top.v[i / LANES % PARTS] = v_max(whole ? s : keep_lanes(s, i, seen, NOTHING), top.v[i / LANES % PARTS]);
    }
    return top;
}

// One row's weights, and their sum in 16 lanes. e: what is asked for with every sixteen
INLINE f32x16 weights_of_row(float *scores, float top, int whole, sight tokens, sight seen, errand e) {
    f32x16 total = splat16(0.0f);
    UNROLL for (int64_t i = tokens.start; i < tokens.stop; i += LANES) {
        if (e.step && i % 16 == 0) ask_for(e.next + i / 16 * e.step, 64);
        vf s = v_exp2(v_load(scores + i) - top);
        if (!whole) s = keep_lanes(s, i, seen, 0.0f);
        v_store(scores + i, s);
        total.v[i / LANES % PARTS] += s;
    }
    return total;
}

// Turn the scores of a block and four rows into weights, and note what the rows' sums are to be multiplied with.
// shifts: what is to be added to all scores of a row; e: what is asked for with every sixteen weights
INLINE void weigh_four(words job, float *scores, const float *shifts, row_state state, int64_t r, int whole, errand e,
                       const task *t) {
    sight tokens = tokens_of_block(whole, t), seen[4];
    f32x16 tops[4];
    UNROLL for (int i = 0; i < 4; i++) {
        seen[i] = whole ? tokens : sight_of(job, r + i, t);
        tops[i] = largest_scores(scores + i * CACHED, whole, tokens, seen[i]);
    }
    v4f largest = largest_of_four(tops), before = load4(state.tops + r), mine = largest + load4(shifts + r);
    v4f top = v4_max(mine, before);
    vf keep = v_exp2(v_of_four(before - top)), share = v_exp2(v_of_four(mine - top));
    store4(state.tops + r, top);
    store4(state.largest + r, largest);
    store4(state.keep + r, v_four(keep));
    store4(state.share + r, v_four(share));
    UNROLL for (int i = 0; i < 4; i++) {
        float *sums = state.sums + (r + i) * 16;
        f32x16 past = load16(sums), total;
        total = weights_of_row(scores + i * CACHED, state.largest[r + i], whole, tokens, seen[i], e);
        e.next += CACHED / 16 * e.step;
        total = fma16(total, splat16(state.share[r + i]), mul16(past, splat16(state.keep[r + i])));
        UNROLL for (int p = 0; p < PARTS; p++) v_store(sums + p * LANES, total.v[p]);
    }
}

// Turn the scores of a block into weights.
static void weigh_up(words job, float *area, const float *shifts, const task *t) {
    row_state state = state_of(job, area, t->all_rows);
    errand e = asked_with_weights(job + AT_KEYS, t);
    for (int64_t r = 0; r < t->all_rows; r += 4, e.next += PER_FOUR) {
        if (r / 4 * PER_FOUR >= t->keys.weights) e.step = 0;
        float *scores = in(area, job[AT_SCORES]) + r * CACHED;
        if (t->whole)
            weigh_four(job, scores, shifts, state, r, 1, e, t);
        else
            weigh_four(job, scores, shifts, state, r, 0, e, t);
    }
}
