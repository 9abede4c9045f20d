// The two products that attention is made of, on float or half float vectors, four rows by four at a time; halves are
// converted as they are read. Strides count numbers. Every result is one sum in one fixed order, whatever the number
// of rows.
#pragma once
#include "jobs.h"

enum { ACROSS = LANES == 16 ? 4 : 2 };  // what is summed at once beside four rows: as much as there are registers for
enum { FLOATS_32 = 4, FLOATS_16 = 2 };   // bytes of a number

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(x, y, a, b, c, d) __builtin_shufflevector(x, y, a, b, c, d)
#else
typedef int32_t v4i __attribute__((vector_size(16)));
#define PICK(x, y, a, b, c, d) __builtin_shuffle(x, y, (v4i){a, b, c, d})
#endif

// LANES numbers of a size.
INLINE vf numbers(int size, const void *p, int64_t offset) {
    return size == FLOATS_16 ? v_load_f16((const uint16_t *)p + offset) : v_load((const float *)p + offset);
}

// The sums of the lanes of four vectors, as the trees of halves that sum16 makes.
INLINE v4f sum_four(const f32x16 x[4]) {
    v4f q[4];
    UNROLL for (int i = 0; i < 4; i++)
        q[i] = (v_quarter(x[i].v, 0) + v_quarter(x[i].v, 2)) + (v_quarter(x[i].v, 1) + v_quarter(x[i].v, 3));
    v4f low = PICK(q[0], q[1], 0, 1, 4, 5) + PICK(q[0], q[1], 2, 3, 6, 7);
    v4f high = PICK(q[2], q[3], 0, 1, 4, 5) + PICK(q[2], q[3], 2, 3, 6, 7);
    return PICK(low, high, 0, 2, 4, 6) + PICK(low, high, 1, 3, 5, 7);
}

// The sums of four rows of four vectors.
INLINE void sum_sixteen(const f32x16 x[4][4], float *out, int64_t stride) {
#if LANES == 16
    vf halves[4][2], quarters[4], pairs[2];
    UNROLL for (int r = 0; r < 4; r++)
        UNROLL for (int c = 0; c < 2; c++) {
            vf a = x[r][2 * c].v[0], b = x[r][2 * c + 1].v[0];
            halves[r][c] = v_quarters(a, b, 0, 1, 0, 1) + v_quarters(a, b, 2, 3, 2, 3);
        }
    UNROLL for (int r = 0; r < 4; r++)
        quarters[r] = v_quarters(halves[r][0], halves[r][1], 0, 2, 0, 2) + v_quarters(halves[r][0], halves[r][1], 1, 3, 1, 3);
    UNROLL for (int i = 0; i < 2; i++) {
        vf a = quarters[2 * i], b = quarters[2 * i + 1];
        pairs[i] = v_of_quarters(a, b, 0, 1, 0, 1) + v_of_quarters(a, b, 2, 3, 2, 3);
    }
    vf sums = v_of_quarters(pairs[0], pairs[1], 0, 2, 0, 2) + v_of_quarters(pairs[0], pairs[1], 1, 3, 1, 3);
    sums = v_transposed(sums);
    UNROLL for (int r = 0; r < 4; r++) {
        v4f four = v_quarter(&sums, r);
        memcpy(out + r * stride, &four, sizeof four);
    }
#else
    UNROLL for (int r = 0; r < 4; r++) {
        v4f four = sum_four(x[r]);
        memcpy(out + r * stride, &four, sizeof four);
    }
#endif
}

// ahead: of halves, bytes from a vector to the one that is asked for meanwhile
INLINE void dots_of(int size, const float *a, int64_t a_stride, int64_t rows, const void *b, int64_t ahead,
                    int64_t b_stride, int64_t first, int64_t stop, int64_t width, float *out, int64_t out_stride) {
    for (int64_t j = first; j < stop; j += 4) {
        if (size == FLOATS_16) ask_for((const uint8_t *)b + j * b_stride * size + ahead, 4 * b_stride * size);
        for (int64_t i = 0; i < rows; i += 4) {
            f32x16 sums[4][4];
            const float *x = a + i * a_stride;
            UNROLL for (int c = 0; c < 4; c += ACROSS)
                UNROLL for (int p = 0; p < PARTS; p++) {
                    vf s[4][ACROSS] = {{{0}}};
                    for (int64_t d = p * LANES; d < width; d += 16) {
                        vf columns[ACROSS];
                        UNROLL for (int k = 0; k < ACROSS; k++) columns[k] = numbers(size, b, (j + c + k) * b_stride + d);
                        UNROLL for (int r = 0; r < 4; r++) {
                            vf row = v_load(x + r * a_stride + d);
                            UNROLL for (int k = 0; k < ACROSS; k++) s[r][k] = v_fma(row, columns[k], s[r][k]);
                        }
                    }
                    UNROLL for (int r = 0; r < 4; r++)
                        UNROLL for (int k = 0; k < ACROSS; k++) sums[r][c + k].v[p] = s[r][k];
                }
            sum_sixteen(sums, out + i * out_stride + j, out_stride);
        }
    }
}

// out[i, j] = the sum over d of a[i, d] * b[j, d], for i < rows and first <= j < stop, both in fours.
// width: of a multiple of 16; what lies between a whole number of fours and the ends is computed too.
static void dots(const float *a, int64_t a_stride, int64_t rows, const float *b, int64_t b_stride, int64_t first,
                 int64_t stop, int64_t width, float *out, int64_t out_stride) {
    dots_of(FLOATS_32, a, a_stride, rows, b, 0, b_stride, first, stop, width, out, out_stride);
}

static void dots_f16(const float *a, int64_t a_stride, int64_t rows, const uint16_t *b, int64_t ahead, int64_t b_stride,
                     int64_t first, int64_t stop, int64_t width, float *out, int64_t out_stride) {
    dots_of(FLOATS_16, a, a_stride, rows, b, ahead, b_stride, first, stop, width, out, out_stride);
}

// Sums of products with weights, four rows and `n` vectors of columns: what `weigh` adds up.
INLINE void weigh_columns(int size, int n, const float *weights, const float *keep, const float *share,
                          const void *vectors, int64_t ahead, int64_t stride, int64_t first, int64_t stop, float *out,
                          int64_t out_stride) {
    vf s[4][ACROSS] = {{{0}}};
    for (int64_t j = first; j < stop; j++) {
        vf y[ACROSS];
        if (size == FLOATS_16) ask_for((const uint8_t *)vectors + j * stride * size + ahead, n * LANES * size);
        UNROLL for (int k = 0; k < n; k++) y[k] = numbers(size, vectors, j * stride + k * LANES);
        UNROLL for (int r = 0; r < 4; r++) {
            vf x = v_splat(weights[r * CACHED + j]);
            UNROLL for (int k = 0; k < n; k++) s[r][k] = v_fma(x, y[k], s[r][k]);
        }
    }
    UNROLL for (int r = 0; r < 4; r++)
        UNROLL for (int k = 0; k < n; k++) {
            float *to = out + r * out_stride + k * LANES;
            v_store(to, v_fma(s[r][k], v_splat(share[r]), v_load(to) * keep[r]));
        }
}

INLINE void weigh_of(int size, const float *weights, int64_t rows, const float *keep, const float *share,
                     const void *vectors, int64_t ahead, int64_t stride, int64_t first, int64_t stop, int64_t width,
                     float *out, int64_t out_stride) {
    int64_t step = ACROSS * LANES, d = 0;
    for (; d + step <= width; d += step)
        for (int64_t i = 0; i < rows; i += 4)
            weigh_columns(size, ACROSS, weights + i * CACHED, keep + i, share + i, (const char *)vectors + d * size,
                          ahead, stride, first, stop, out + i * out_stride + d, out_stride);
    for (; d < width; d += LANES)
        for (int64_t i = 0; i < rows; i += 4)
            weigh_columns(size, 1, weights + i * CACHED, keep + i, share + i, (const char *)vectors + d * size, ahead,
                          stride, first, stop, out + i * out_stride + d, out_stride);
}

// out[i] = out[i] * keep[i] + share[i] * the sum over j of weights[i, j] * vectors[j], i < rows, first <= j < stop.
// rows: in fours; width: of a multiple of 16. Few columns at a time, so that the vectors stay in the nearest cache.
static void weigh(const float *weights, int64_t rows, const float *keep, const float *share, const float *vectors,
                  int64_t first, int64_t stop, int64_t width, float *out) {
    weigh_of(FLOATS_32, weights, rows, keep, share, vectors, 0, width, first, stop, width, out, width);
}

static void weigh_f16(const float *weights, int64_t rows, const float *keep, const float *share, const uint16_t *vectors,
                      int64_t ahead, int64_t first, int64_t stop, int64_t width, float *out) {
    weigh_of(FLOATS_16, weights, rows, keep, share, vectors, ahead, width, first, stop, width, out, width);
}
