// Products of decoded 8-bit weights with the int8 activations of many tokens, in exact integer sums. The rows of a unit
// are taken abreast: a panel, 16 inputs of them all, is decoded once and used for every token.
#pragma once
#include "jobs.h"

enum { AT_ONCE = 512 };                 // tokens that share one decoding of the weights
enum { COLUMNS = UNIT_ROWS / LANES };   // vectors that hold a number of each row
enum { ABREAST = LANES == 8 ? 2 : 4 };  // of these, those that registers have room for

typedef struct { vu q[COLUMNS][4]; vf unit[COLUMNS]; } panel;
typedef float unit_sums[AT_ONCE][UNIT_ROWS];

// Tokens first .. first + count - 1 of a job.
typedef struct { int64_t first; int count; } span;

// Where a job keeps a group of activations: the bytes (plane 1: in the order of nibbles), their sums, their scales.
INLINE const int8_t *quants_of(words job, int plane, int64_t group) {
    return at(job[QUANTS], (plane * groups_of(job) * job[N] + group) * GROUP);
}
INLINE int32_t sum_of(words job, int64_t group) { return *(const int32_t *)at(job[SUMS], group * 4); }
INLINE float scale_of_group(words job, int64_t group) { return *(const float *)at(job[SCALES], group * 4); }

// total + 16 inputs of one token times LANES rows; plain: weights are unsigned, and offset is what has been added to
// them, times -1; else they are what v_factor_i8 makes.
INLINE vf add_group(int plain, const vu q[4], vf unit, int32_t offset, const int8_t *x, int32_t sum, float scale, vf total) {
    vi exact = v_splat_i32(sum * offset);
    UNROLL for (int j = 0; j < 4; j++) {
        vu inputs = v_splat_quad(x + 4 * j);
        exact = plain ? v_dot4(exact, q[j], inputs) : v_dot4_i8(exact, q[j], inputs);
    }
    return v_fma(v_to_f32(exact) * scale, unit, total);
}

// Add the products of a panel and the tokens of a span, whose activations are group number `group`.
INLINE void add_panel(int plain, const panel *w, int32_t offset, words job, int plane, int64_t group, span tokens, int columns,
                      unit_sums total) {
    int64_t start = group * job[N] + tokens.first;
    const int8_t *x = quants_of(job, plane, start);
    for (int c = 0; c < columns; c += ABREAST)
        for (int i = 0; i < tokens.count; i++) {
            int32_t sum = sum_of(job, start + i);
            float scale = scale_of_group(job, start + i);
            UNROLL for (int k = 0; k < ABREAST; k++) {
                float *here = &total[i][(c + k) * LANES];
                v_store(here, add_group(plain, w->q[c + k], w->unit[c + k], offset, x + i * GROUP, sum, scale, v_load(here)));
            }
        }
}

// Write the outputs of rows row .. stop - 1.
INLINE void emit_panel(words job, words matrix, int64_t row, int64_t stop, span tokens, unit_sums total) {
    for (int i = 0; i < tokens.count; i++) {
        int r = 0;
        for (; row + r + LANES <= stop; r += LANES) emit_rows(job, matrix, tokens.first + i, row + r, v_load(&total[i][r]));
        for (; row + r < stop; r++) emit(job, matrix, tokens.first + i, row + r, total[i][r]);
    }
}
