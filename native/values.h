// Sums of values; see runtime/kernels/numba_values.py.
#pragma once
#include "weights.h"

enum { PLANES = 2 * CACHED };  // bytes of a row's weights: high ones, then low ones; or one for each
enum { WITHIN = LANES == 8 ? 2 : 4 };  // rows that are summed at once: as many as there are registers for

INLINE int has_bases(words side) { return side[SD_INT8] && side[SD_CODEC] == RING_Q4; }

// Floats from the scales of a group to those of the next.
INLINE int64_t scales_step(words side) { return has_bases(side) ? 2 * CACHED : CACHED; }

// The largest scale of a group of those that are seen.
INLINE float largest_scale(const float *scales, int whole, sight seen) {
    vf largest = v_splat(0.0f);
    UNROLL for (int64_t i = 0; i < CACHED; i += LANES) {
        vf x = v_load(scales + i);
        largest = v_larger(largest, whole ? x : keep_lanes(x, i, seen, 0.0f));
    }
    return largest_magnitude(largest);
}

// Round weights times scales times a factor, and write their bytes, or their high and their low ones.
INLINE void round_weights(const float *weights, const float *scales, float factor, int two, int8_t *planes) {
    UNROLL for (int64_t i = 0; i < CACHED; i += LANES) {
        // At 1.5 * 2^23 a float's last bit counts ones.
        vi bits = (vi)v_fma(v_load(weights + i) * factor, v_load(scales + i), v_splat(12582912.0f));
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

// Add 32 columns' sums to four rows of the result.
static void multiply_four(words side, const uint8_t *codes, const int8_t *planes, const float *keep, const float *factors,
                          float *out) {
    int64_t width = side[SD_SEEN], stride = side[SD_CODE_BYTES] * 4;
    for (int64_t r = 0; r < 4; r += WITHIN)
        UNROLL for (int p = 0; p < PARTS; p++) {
            const uint8_t *x = codes + p * BYTES;
            const int8_t *rounded = planes + r * PLANES;
            float *to = out + r * width + p * LANES;
            if (side[SD_CODEC] == RING_Q4)
                multiply(RING_Q4, 0, x, stride, rounded, keep + r, factors + r, to, width);
            else if (side[SD_BYTES] == 2)
                multiply(RING_Q8, 1, x, stride, rounded, keep + r, factors + r, to, width);
            else
                multiply(RING_Q8, 0, x, stride, rounded, keep + r, factors + r, to, width);
        }
}

// sums = sums * keep + share * the products of a row's weights with bases, in sixteen lanes.
INLINE void add_bases(const float *weights, const float *base, float keep, float share, float *sums) {
    f32x16 total = splat16(0.0f), past = load16(sums);
    UNROLL for (int64_t i = 0; i < CACHED; i += 16) total = fma16(load16(weights + i), load16(base + i), total);
    total = fma16(total, splat16(share), mul16(past, splat16(keep)));
    UNROLL for (int p = 0; p < PARTS; p++) v_store(sums + p * LANES, total.v[p]);
}

// What scales are multiplied with so that the largest is `top`.
INLINE float lift(float top, float largest) { return largest > 0.0f ? top / largest : 0.0f; }

// Round the weights of rows first .. first + n - 1 for one group: planes (n, PLANES), and what a unit of them is worth.
// largest: the largest of the group's scales in the block
static void round_group(words job, float *area, const float *scales, float largest, int64_t first, int64_t n,
                        int8_t *planes, float *worth, const task *t) {
    words side = job + AT_VALUES;
    const float *weights = in(area, job[AT_SCORES]) + first * CACHED;
    const float *share = state_of(job, area, rows_of_task(job, t)).share + first;
    int64_t rows = rows_of_tokens(job, t->tokens);
    int whole = sees_all(job, t), two = side[SD_BYTES] == 2;
    float top = two ? 16383.0f : 127.0f, factor = lift(top, largest), unit = largest / top;
    for (int64_t r = 0; r < n; r++, weights += CACHED, planes += PLANES) {
        if (!whole) {  // what others see must not matter
            largest = largest_scale(scales, 0, sight_of(job, first + r, rows, t));
            factor = lift(top, largest), unit = largest / top;
        }
        round_weights(weights, scales, factor, two, planes);
        worth[r] = unit * share[r];
    }
}

// Add a block's values, which are codes, to rows first .. first + n - 1. The weights of as many rows and groups as ROUNDED are
// rounded before any is multiplied, so that no product waits for its weights.
static void add_codes(words job, float *area, const uint8_t *codes, float *scales, int64_t first, int64_t n, float *out,
                      const task *t) {
    words side = job + AT_VALUES;
    int64_t all_rows = rows_of_task(job, t), width = side[SD_SEEN], size = side[SD_GROUP], groups = width / size;
    int64_t row_bytes = side[SD_CODE_BYTES], step = scales_step(side), together = max_of(1, ROUNDED / n);
    int8_t *planes = (int8_t *)in(area, job[AT_PLANES]);
    float *weights = in(area, job[AT_SCORES]) + first * CACHED, *worth = in(area, job[AT_WORTH]);
    row_state state = state_of(job, area, all_rows);
    const float *keep = state.keep + first, *share = state.share + first;
    for (int64_t start = 0; start < groups; start += together) {
        int64_t stop = min_of(start + together, groups);
        for (int64_t g = start; g < stop; g++) {
            float *scale = scales + g * step, largest = largest_scale(scale, 1, (sight){0, CACHED});
            int64_t at = (g - start) * n;
            round_group(job, area, scale, largest, first, n, planes + at * PLANES, worth + at, t);
            if (!has_bases(side)) continue;
            float *bases = in(area, job[AT_BASES]) + (g * all_rows + first) * 16;
            for (int64_t i = 0; i < CACHED; i += LANES)
                v_store(scale + CACHED + i, v_fma(v_load(scale + i), v_splat(8.0f), v_load(scale + CACHED + i)));
            for (int64_t r = 0; r < n; r++)
                add_bases(weights + r * CACHED, scale + CACHED, keep[r], share[r], bases + r * 16);
        }
        for (int64_t d = start * size; d < stop * size; d += 32) {
            int64_t at = (d / size - start) * n, column = d * row_bytes / width;
            ask_for(codes + (BLOCKS_AHEAD * row_bytes + column) * CACHED, 32 * row_bytes / width * CACHED);
            for (int64_t r = 0; r < n; r += 4) {
                const int8_t *rounded = planes + (at + r) * PLANES;
                multiply_four(side, codes + column * 4, rounded, keep + r, worth + at + r, out + r * width + d);
            }
        }
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
        add_codes(job, area, lines.codes, units, first, n, out, t);
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
