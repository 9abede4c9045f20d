// Sums of values; see runtime/kernels/numba_values.py.
#pragma once
#include "weights.h"

enum { PLANES = 2 * CACHED };  // bytes of a row's weights: high ones, then low ones; or one for each
enum { WITHIN = LANES == 8 ? 2 : 4 };  // rows that are summed at once: as many as there are registers for

INLINE int has_bases(words side) { return side[SD_INT8] && side[SD_CODEC] == RING_Q4; }

// out = scales / the largest of those that are seen, in units of top, zero for the others. Returns what undoes that.
INLINE float invert(const float *scales, int whole, sight seen, float top, float *out) {
    vf x[CACHED / LANES], largest = v_splat(0.0f);
    UNROLL for (int64_t i = 0; i < CACHED / LANES; i++) {
        x[i] = v_load(scales + i * LANES);
        if (!whole) x[i] = keep_lanes(x[i], i * LANES, seen, 0.0f);
        largest = v_larger(largest, x[i]);
    }
    float unit = largest_magnitude(largest) / top, inverse = unit > 0.0f ? 1.0f / unit : 0.0f;
    UNROLL for (int64_t i = 0; i < CACHED / LANES; i++) v_store(out + i * LANES, x[i] * inverse);
    return unit;
}

// Round weights times scales, and write their bytes, or their high and their low ones.
INLINE void round_weights(const float *weights, const float *scales, int two, int8_t *planes) {
    UNROLL for (int64_t i = 0; i < CACHED; i += LANES) {
        // At 1.5 * 2^23 a float's last bit counts ones.
        vi bits = (vi)v_fma(v_load(weights + i), v_load(scales + i), v_splat(12582912.0f));
        v_store_i8(planes + i, two ? bits >> 7 : bits);
        if (two) v_store_i8(planes + CACHED + i, bits & 127);
    }
}

// Add 2 LANES columns' sums, LANES from each of two halves of 32, to some rows of the result. two: bytes of a weight
// codes: of q8 bytes, of q4 the halves of bytes, less 8, so that errors of weights mostly cancel; stride: from four
// tokens to the next
INLINE void multiply(int codec, int two, const uint8_t *codes, int64_t stride, const int8_t *planes, const float *keep,
                     const float *factors, float *out, int64_t out_stride) {
    vi high[WITHIN][2] = {{{0}}}, low[WITHIN][2] = {{{0}}};
    for (int64_t j = 0; j < CACHED; j += 4, codes += stride) {
        vu a = v_load_bytes(codes), b = codec == RING_Q4 ? (a >> 4) - 8 : v_load_bytes(codes + 64);
        if (codec == RING_Q4) a = (a & 15) - 8;
        UNROLL for (int r = 0; r < WITHIN; r++) {
            vu x = v_splat_quad(planes + r * PLANES + j);
            high[r][0] = v_dot4(high[r][0], x, a), high[r][1] = v_dot4(high[r][1], x, b);
            if (two) {
                vu y = v_splat_quad(planes + r * PLANES + CACHED + j);
                low[r][0] = v_dot4(low[r][0], y, a), low[r][1] = v_dot4(low[r][1], y, b);
            }
        }
    }
    UNROLL for (int r = 0; r < WITHIN; r++)
        UNROLL for (int half = 0; half < 2; half++) {
            float *to = out + r * out_stride + half * 16;
            vf sum = v_to_f32(two ? (high[r][half] << 7) + low[r][half] : high[r][half]);
            v_store(to, v_fma(sum, v_splat(factors[r]), v_load(to) * keep[r]));
        }
}

// Add 32 columns' sums to n rows of the result.
INLINE void multiply_rows(int codec, int two, const uint8_t *codes, int64_t stride, int64_t n, const int8_t *planes,
                          const float *keep, const float *factors, float *out, int64_t out_stride) {
    for (int64_t r = 0; r < n; r += WITHIN)
        UNROLL for (int p = 0; p < PARTS; p++)
            multiply(codec, two, codes + p * BYTES, stride, planes + r * PLANES, keep + r, factors + r,
                     out + r * out_stride + p * LANES, out_stride);
}

// sums = sums * keep + share * the products of a row's weights with bases, in sixteen lanes.
INLINE void add_bases(const float *weights, const float *base, float keep, float share, float *sums) {
    f32x16 total = splat16(0.0f), past = load16(sums);
    UNROLL for (int64_t i = 0; i < CACHED; i += 16) total = fma16(load16(weights + i), load16(base + i), total);
    total = fma16(total, splat16(share), mul16(past, splat16(keep)));
    UNROLL for (int p = 0; p < PARTS; p++) v_store(sums + p * LANES, total.v[p]);
}

// Add group number g of a block's values to rows first .. first + n - 1.
static void exact_group(words job, float *area, const uint8_t *codes, float *scales, int64_t first, int64_t n,
                        int64_t g, float *out, const task *t) {
    words side = job + AT_VALUES;
    int64_t all_rows = rows_of_task(job, t), rows = rows_of_tokens(job, t->tokens), width = side[SD_SEEN];
    int64_t row_bytes = side[SD_CODE_BYTES], step = 32 * row_bytes / width, size = side[SD_GROUP];
    float *weights = in(area, job[AT_SCORES]) + first * CACHED, *own = in(area, job[AT_OWN]), *inverse = own + CACHED;
    int8_t *planes = (int8_t *)in(area, job[AT_PLANES]);
    row_state state = state_of(job, area, all_rows);
    float *factors = state.largest + first, *keep = state.keep + first, *share = state.share + first;
    int whole = sees_all(job, t), two = side[SD_BYTES] == 2;
    float top = two ? 16383.0f : 127.0f, unit = invert(scales, 1, (sight){0, CACHED}, top, inverse);
    for (int64_t r = 0; r < n; r++) {  // what others see must not matter
        float factor = whole ? unit : invert(scales, 0, sight_of(job, first + r, rows, t), top, own);
        round_weights(weights + r * CACHED, whole ? inverse : own, two, planes + r * PLANES);
        factors[r] = factor * share[r];
    }
    if (has_bases(side)) {
        for (int64_t i = 0; i < CACHED; i += LANES)
            v_store(scales + CACHED + i, v_fma(v_load(scales + i), v_splat(8.0f), v_load(scales + CACHED + i)));
        float *bases = in(area, job[AT_BASES]) + (g * all_rows + first) * 16;
        for (int64_t r = 0; r < n; r++)
            add_bases(weights + r * CACHED, scales + CACHED, keep[r], share[r], bases + r * 16);
    }
    for (int64_t d = g * size, at = d * row_bytes / width; d < (g + 1) * size; d += 32, at += step) {
        ask_for(codes + (row_bytes + at) * CACHED, step * CACHED);
        if (side[SD_CODEC] == RING_Q4)
            multiply_rows(RING_Q4, 0, codes + at * 4, row_bytes * 4, n, planes, keep, factors, out + d, width);
        else if (two)
            multiply_rows(RING_Q8, 1, codes + at * 4, row_bytes * 4, n, planes, keep, factors, out + d, width);
        else
            multiply_rows(RING_Q8, 0, codes + at * 4, row_bytes * 4, n, planes, keep, factors, out + d, width);
    }
}

// Add a block's values to rows first .. first + n - 1, all of one key-value head if heads have values of their own.
static void add_values(words job, float *area, float *result, int64_t first, int64_t n, int64_t kv_head, const task *t) {
    words side = job + AT_VALUES;
    int64_t width = side[SD_SEEN], head = side[SD_HEADS] > 1 ? kv_head : 0;
    row_state state = state_of(job, area, rows_of_task(job, t));
    float *weights = in(area, job[AT_SCORES]) + first * CACHED, *out = result + first * width;
    const float *keep = state.keep + first, *share = state.share + first;
    int64_t start = t->low - t->block, stop = t->high - t->block;
    if (side[SD_INT8]) {
        lines_of_block lines = find_lines(job, side, head, t->block);
        float *units = in(area, job[AT_UNITS]);
        spread_scales(side, lines.scales, (sight){start, stop}, units);
        for (int64_t g = 0; g < width / side[SD_GROUP]; g++)
            exact_group(job, area, lines.codes, units + (has_bases(side) ? 2 * g : g) * CACHED, first, n, g, out, t);
    } else if (is_direct(side, n)) {
        const void *x = find_lines(job, side, head, t->block).codes;
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
