// The two products that attention is made of, on floats in scratch, four rows by four at a time. Strides count floats.
// Every result is one sum in one fixed order, whatever the number of rows.
#pragma once
#include "jobs.h"

enum { ACROSS = LANES == 16 ? 4 : 2 };  // what is summed at once beside four rows: as much as there are registers for

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(x, y, a, b, c, d) __builtin_shufflevector(x, y, a, b, c, d)
#else
typedef int32_t v4i __attribute__((vector_size(16)));
#define PICK(x, y, a, b, c, d) __builtin_shuffle(x, y, (v4i){a, b, c, d})
#endif

// The sums of the lanes of four vectors, as the trees of halves that sum16 makes.
INLINE v4f sum_four(const f32x16 x[4]) {
    v4f q[4];
    UNROLL for (int i = 0; i < 4; i++)
        q[i] = (v_quarter(x[i].v, 0) + v_quarter(x[i].v, 2)) + (v_quarter(x[i].v, 1) + v_quarter(x[i].v, 3));
    v4f low = PICK(q[0], q[1], 0, 1, 4, 5) + PICK(q[0], q[1], 2, 3, 6, 7);
    v4f high = PICK(q[2], q[3], 0, 1, 4, 5) + PICK(q[2], q[3], 2, 3, 6, 7);
    return PICK(low, high, 0, 2, 4, 6) + PICK(low, high, 1, 3, 5, 7);
}

// out[i, j] = the sum over d of a[i, d] * b[j, d], for i < rows and first <= j < stop, both in fours.
// width: of a multiple of 16; what lies between a whole number of fours and the ends is computed too.
static void dots(const float *a, int64_t a_stride, int64_t rows, const float *b, int64_t b_stride, int64_t first,
                 int64_t stop, int64_t width, float *out, int64_t out_stride) {
    for (int64_t j = first; j < stop; j += 4)
        for (int64_t i = 0; i < rows; i += 4) {
            f32x16 sums[4][4];
            const float *x = a + i * a_stride, *y = b + j * b_stride;
            UNROLL for (int c = 0; c < 4; c += ACROSS)
                UNROLL for (int p = 0; p < PARTS; p++) {
                    vf s[4][ACROSS] = {{{0}}};
                    for (int64_t d = p * LANES; d < width; d += 16) {
                        vf columns[ACROSS];
                        UNROLL for (int k = 0; k < ACROSS; k++) columns[k] = v_load(y + (c + k) * b_stride + d);
                        UNROLL for (int r = 0; r < 4; r++) {
                            vf row = v_load(x + r * a_stride + d);
                            UNROLL for (int k = 0; k < ACROSS; k++) s[r][k] = v_fma(row, columns[k], s[r][k]);
                        }
                    }
                    UNROLL for (int r = 0; r < 4; r++)
                        UNROLL for (int k = 0; k < ACROSS; k++) sums[r][c + k].v[p] = s[r][k];
                }
            UNROLL for (int r = 0; r < 4; r++) {
                v4f four = sum_four(sums[r]);
                memcpy(out + (i + r) * out_stride + j, &four, sizeof four);
            }
        }
}

// One step of `weigh`: four rows and n vectors of columns.
#define WEIGH(n)                                                                                           \
    do {                                                                                                   \
        vf s[4][n];                                                                                        \
        UNROLL for (int r = 0; r < 4; r++)                                                                 \
            UNROLL for (int k = 0; k < n; k++) s[r][k] = v_load(o + r * out_stride + k * LANES) * keep[i + r]; \
        for (int64_t j = first; j < stop; j++) {                                                           \
            vf y[n];                                                                                       \
            UNROLL for (int k = 0; k < n; k++) y[k] = v_load(vectors + j * stride + d + k * LANES);        \
            UNROLL for (int r = 0; r < 4; r++) {                                                           \
                vf x = v_splat(weights[(i + r) * CACHED + j]);                                             \
                UNROLL for (int k = 0; k < n; k++) s[r][k] = v_fma(x, y[k], s[r][k]);                      \
            }                                                                                              \
        }                                                                                                  \
        UNROLL for (int r = 0; r < 4; r++)                                                                 \
            UNROLL for (int k = 0; k < n; k++) v_store(o + r * out_stride + k * LANES, s[r][k]);           \
    } while (0)

// out[i] = out[i] * keep[i] + the sum over j of weights[i, j] * vectors[j], for i < rows, first <= j < stop.
// rows: in fours; width: of a multiple of 16. Few columns at a time, so that the vectors stay in the nearest cache.
static void weigh(const float *weights, int64_t rows, const float *keep, const float *vectors, int64_t stride,
                  int64_t first, int64_t stop, int64_t width, float *out, int64_t out_stride) {
    int64_t step = ACROSS * LANES, d = 0;
    for (; d + step <= width; d += step)
        for (int64_t i = 0; i < rows; i += 4) {
            float *o = out + i * out_stride + d;
            WEIGH(ACROSS);
        }
    for (; d < width; d += LANES)
        for (int64_t i = 0; i < rows; i += 4) {
            float *o = out + i * out_stride + d;
            WEIGH(1);
        }
}
