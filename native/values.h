// Sums of values; see runtime/kernels/numba_values.py.
#pragma once
#include "weights.h"

#define TOP 16383.0f          // the largest weight: two bytes of 7 bits
enum { PLANES = 2 * CACHED };  // bytes of a row's weights: high ones, then low ones

INLINE int has_bases(words side) { return side[SD_INT8] && side[SD_CODEC] == RING_Q4; }

// Codes of a block as bytes: for each group, for each four tokens, its columns of these four together.
static void spread_codes(words side, const uint8_t *codes, uint8_t *out) {
    int64_t stride = side[SD_CODE_BYTES], size = side[SD_GROUP], is_q4 = side[SD_CODEC] == RING_Q4;
    for (int64_t start = 0; start < side[SD_PADDED]; start += size)
        for (int64_t j = 0; j < CACHED; j += 4, out += size * 4) {
            const uint8_t *rows = codes + j * stride + (is_q4 ? start / 2 : start);
            ask_for_rows(rows, stride, 4);
            for (int64_t i = 0; i < (is_q4 ? 16 : size); i += 16) {
                vu v[PARTS];
                v_quads(rows + i, stride, v);
                UNROLL for (int p = 0; p < PARTS; p++) {
                    v_store_bytes(out + i * 4 + p * BYTES, is_q4 ? v[p] & 15 : v[p]);
                    if (is_q4) v_store_bytes(out + 64 + p * BYTES, v[p] >> 4);
                }
            }
        }
}

// out = scales / the largest of those that are seen, in units of TOP. Returns what undoes that.
INLINE float invert(const float *scales, sight seen, float *out) {
    vf top = v_splat(0.0f);
    for (int64_t i = 0; i < CACHED; i += LANES) top = v_larger(top, keep_lanes(v_load(scales + i), i, seen, 0.0f));
    float largest = largest_magnitude(top), inverse = largest > 0.0f ? TOP / largest : 0.0f;
    for (int64_t i = 0; i < CACHED; i += LANES) v_store(out + i, v_load(scales + i) * inverse);
    return largest / TOP;
}

// Round weights times scales and write their high and their low bytes.
INLINE void split(const float *weights, const float *scales, int8_t *planes) {
    UNROLL for (int64_t i = 0; i < CACHED; i += LANES) {
        // At 1.5 * 2^23 a float's last bit counts ones.
        vi bits = (vi)v_fma(v_load(weights + i), v_load(scales + i), v_splat(12582912.0f));
        v_store_i8(planes + i, bits >> 7);
        v_store_i8(planes + CACHED + i, bits & 127);
    }
}

// Add LANES columns' sums to four rows of the result.
INLINE void multiply(const uint8_t *codes, int64_t stride, const int8_t *planes, const float *keep, const float *factors,
                     float *out, int64_t out_stride) {
    vi high[4] = {{0}}, low[4] = {{0}};
    for (int64_t j = 0; j < CACHED; j += 4) {
        vu x = v_load_bytes(codes + j / 4 * stride);
        UNROLL for (int r = 0; r < 4; r++) {
            high[r] = v_dot4(high[r], v_splat_quad(planes + r * PLANES + j), x);
            low[r] = v_dot4(low[r], v_splat_quad(planes + r * PLANES + CACHED + j), x);
        }
    }
    UNROLL for (int r = 0; r < 4; r++) {
        float *to = out + r * out_stride;
        v_store(to, v_fma(v_to_f32((high[r] << 7) + low[r]), v_splat(factors[r]), v_load(to) * keep[r]));
    }
}

// sums = sums * keep + share * the products of a row's weights with bases, in sixteen lanes.
INLINE void add_bases(const float *weights, const float *base, float keep, float share, float *sums) {
    f32x16 total = splat16(0.0f), past = load16(sums);
    UNROLL for (int64_t i = 0; i < CACHED; i += 16) total = fma16(load16(weights + i), load16(base + i), total);
    total = fma16(total, splat16(share), mul16(past, splat16(keep)));
    UNROLL for (int p = 0; p < PARTS; p++) v_store(sums + p * LANES, total.v[p]);
}

// Add one group of a block's values, in scratch as spread_codes leaves them, to rows first .. first + n - 1.
static void exact_group(words job, float *area, const uint8_t *codes, const float *scales, int64_t first, int64_t n, int64_t g,
                        float *out, const task *t) {
    words side = job + AT_VALUES;
    int64_t all_rows = rows_of_task(job, t), rows = rows_of_tokens(job, t->tokens), size = side[SD_GROUP];
    float *weights = in(area, job[AT_SCORES]) + first * CACHED, *own = in(area, job[AT_OWN]), *inverse = own + CACHED;
    int8_t *planes = (int8_t *)in(area, job[AT_PLANES]);
    row_state state = state_of(job, area, all_rows);
    float *factors = state.largest + first, *keep = state.keep + first, *share = state.share + first;
    int whole = sees_all(job, t);
    float unit = invert(scales, (sight){0, CACHED}, inverse);
    for (int64_t r = 0; r < n; r++) {  // what others see must not matter
        float factor = whole ? unit : invert(scales, sight_of(job, first + r, rows, t), own);
        split(weights + r * CACHED, whole ? inverse : own, planes + r * PLANES);
        factors[r] = factor * share[r];
    }
    if (has_bases(side)) {
        float *bases = in(area, job[AT_BASES]) + (g * all_rows + first) * 16;
        for (int64_t r = 0; r < n; r++)
            add_bases(weights + r * CACHED, scales + CACHED, keep[r], share[r], bases + r * 16);
    }
    for (int64_t d = 0; d < size; d += LANES)
        for (int64_t r = 0; r < n; r += 4)
            multiply(codes + d * 4, size * 4, planes + r * PLANES, keep + r, factors + r, out + r * side[SD_SEEN] + d, side[SD_SEEN]);
}

// Add a block's values to rows first .. first + n - 1, all of one key-value head if heads have values of their own.
static void add_values(words job, float *area, float *result, int64_t first, int64_t n, int64_t kv_head, const task *t) {
    words side = job + AT_VALUES;
    int64_t width = side[SD_SEEN], head = side[SD_HEADS] > 1 ? kv_head : 0, size = side[SD_GROUP];
    row_state state = state_of(job, area, rows_of_task(job, t));
    float *weights = in(area, job[AT_SCORES]) + first * CACHED, *out = result + first * width;
    const float *keep = state.keep + first, *share = state.share + first;
    int64_t start = t->low - t->block, stop = t->high - t->block;
    if (side[SD_INT8]) {
        lines_of_block lines = find_lines(job, side, area, head, t->block, t->low, t->high);
        float *units = in(area, job[AT_UNITS]);
        uint8_t *codes = (uint8_t *)in(area, job[AT_QUADS]);
        spread_scales(side, lines.scales, units);
        spread_codes(side, lines.codes, codes);
        for (int64_t g = 0; g < width / size; g++)
            exact_group(job, area, codes + g * CACHED * size, units + (has_bases(side) ? 2 * g : g) * CACHED, first, n, g,
                        out + g * size, t);
    } else if (is_direct(side, n)) {
        const void *x = find_lines(job, side, area, head, t->block, t->low, t->high).codes;
        weigh_f16(weights, n, keep, share, x, start, stop, width, out);
    } else {
        const float *x = decoded(job, side, area, kv_head, t->low, t->high - t->low) - start * width;
        weigh(weights, n, keep, share, x, start, stop, width, out);
    }
}

// Nothing is summed yet.
static void clear_values(words job, float *area, float *result, int64_t all_rows) {
    words side = job + AT_VALUES;
    memset(result, 0, all_rows * side[SD_SEEN] * 4);
    if (has_bases(side)) memset(in(area, job[AT_BASES]), 0, side[SD_SEEN] / 32 * all_rows * 64);
}

// Add what bases came to.
static void finish_values(words job, float *area, float *result, int64_t all_rows) {
    words side = job + AT_VALUES;
    int64_t width = side[SD_SEEN];
    if (!has_bases(side)) return;
    for (int64_t g = 0; g < width / 32; g++)
        for (int64_t r = 0; r < all_rows; r++) {
            float base = sum16(load16(in(area, job[AT_BASES]) + (g * all_rows + r) * 16)), *out = result + r * width + g * 32;
            for (int64_t i = 0; i < 32; i += LANES) v_store(out + i, v_load(out + i) + base);
        }
}
