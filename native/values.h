// Sums of values; see runtime/kernels/numba_values.py.
#pragma once
#include "weights.h"

enum { PLANES = 2 * CACHED };  // bytes of a row's weights: high ones, then low ones; or one for each
enum { WITHIN = LANES == 8 ? 2 : 4 };  // rows that are summed at once: as many as there are registers for

INLINE int has_bases(words side) { return side[SD_INT8] && side[SD_CODEC] == RING_Q4; }

// ==== Weights are rounded ====

enum { PER_BLOCK = CACHED / LANES };  // vectors of what each token of a block has one of

// What is known of a block's values when the code is compiled: their codec, whether weights are rounded to two bytes
// rather than one, whether all rows see all of the block.
typedef struct { int codec, two, whole; } form;

// Of one group, for a block's tokens: scales, and what is to be added to the products with codes.
typedef struct { vf scales[PER_BLOCK], bases[PER_BLOCK]; } group_units;

// What scales are multiplied with before weights times scales are rounded, and what a unit of a rounded one is worth.
typedef struct { float factor, unit; } lift;

// The scales of group g of a block, zero but for tokens that are seen. q4 has a base after each scale.
INLINE group_units read_units(form f, const uint16_t *scales, int64_t g, sight seen) {
    group_units units;
    scales += (f.codec == RING_Q4 ? 2 * g : g) * CACHED;
    UNROLL for (int64_t i = 0; i < PER_BLOCK; i++) {
        int64_t lane = i * LANES;
        vf scale = v_load_f16(scales + lane), base = scale;
        // Codes are taken less 8.
        if (f.codec == RING_Q4) base = v_fma(scale, v_splat(8.0f), v_load_f16(scales + CACHED + lane));
        units.scales[i] = f.whole ? scale : keep_lanes(scale, lane, seen, 0.0f);
        units.bases[i] = f.whole ? base : keep_lanes(base, lane, seen, 0.0f);
    }
    return units;
}

// For the largest scale of those that are seen to become the largest number that weights are rounded to.
INLINE lift find_lift(form f, const group_units *units, sight seen) {
    vf top = v_splat(0.0f);
    UNROLL for (int i = 0; i < PER_BLOCK; i++) {
        vf scale = units->scales[i];
        top = v_larger(top, f.whole ? scale : keep_lanes(scale, i * LANES, seen, 0.0f));
    }
    float largest = largest_magnitude(top), most = f.two ? 16383.0f : f.codec == RING_Q4 ? 255.0f : 127.0f;
    return (lift){largest > 0.0f ? most / largest : 0.0f, largest / most};
}

// Round n rows' weights times scales, and write their bytes, or their high and their low ones; where there are bases, add
// weights times bases to sums in sixteen lanes: sums = sums * keep + share * products.
INLINE void round_weights(form f, const float *weights, int64_t n, const group_units *units, float factor,
                          const float *keep, const float *share, float *sums, int8_t *planes, const task *t) {
    sight tokens = tokens_of_block(f.whole, t);
    group_units u = *units;  // in registers: bytes are written that might be anything else
    UNROLL for (int i = 0; i < PER_BLOCK; i++) u.scales[i] *= factor;
    for (int64_t r = 0; r < n; r++, weights += CACHED, planes += PLANES, sums += 16) {
        f32x16 total = splat16(0.0f);
        UNROLL for (int64_t i = tokens.start / LANES; i < tokens.stop / LANES; i++) {
            // At 1.5 * 2^23 a float's last bit counts ones.
            vf x = v_load(weights + i * LANES);
            vi bits = (vi)v_fma(x, u.scales[i], v_splat(12582912.0f));
            v_store_i8(planes + i * LANES, f.two ? bits >> 7 : bits);
            if (f.two) v_store_i8(planes + CACHED + i * LANES, bits & 127);
            if (f.codec == RING_Q4) total.v[i % PARTS] = v_fma(x, u.bases[i], total.v[i % PARTS]);
        }
        if (f.codec != RING_Q4) continue;
        total = fma16(total, splat16(share[r]), mul16(load16(sums), splat16(keep[r])));
        UNROLL for (int p = 0; p < PARTS; p++) v_store(sums + p * LANES, total.v[p]);
    }
}

// Round the weights of rows first .. first + n - 1 for group g: planes (n, PLANES), and what a unit of them is worth.
// lifted: for rows that see all of the block
INLINE void round_group(form f, words job, float *area, const uint16_t *scales, int64_t g, lift lifted, int64_t first,
                        int64_t n, int8_t *planes, float *worth, const task *t) {
    const float *weights = in(area, job[AT_SCORES]) + first * CACHED;
    row_state state = state_of(job, area, t->all_rows);
    const float *keep = state.keep + first, *share = state.share + first;
    float *sums = in(area, job[AT_BASES]) + (g * t->all_rows + first) * 16;
    group_units units = read_units(f, scales, g, (sight){t->low - t->block, t->high - t->block});
    if (f.whole) {
        round_weights(f, weights, n, &units, lifted.factor, keep, share, sums, planes, t);
        for (int64_t r = 0; r < n; r += 4) store4(worth + r, load4(share + r) * lifted.unit);
        return;
    }
    for (int64_t r = 0; r < n; r++, weights += CACHED, keep++, share++, sums += 16, planes += PLANES) {
        // What others see must not matter.
        lifted = find_lift(f, &units, sight_of(job, first + r, t));
        round_weights(f, weights, 1, &units, lifted.factor, keep, share, sums, planes, t);
        worth[r] = lifted.unit * *share;
    }
}

// ==== Products ====

// Add 2 LANES columns' sums, LANES from each of two halves of 32, to some rows of the result.
// codes: of q8 bytes, of q4 the halves of bytes, less 8, so that errors of weights mostly cancel
// ahead: from codes to those that are asked for meanwhile, or 0; many lines at once would be waited for; e: what else is
INLINE void multiply(form f, const uint8_t *codes, const int8_t *planes, const float *keep, const float *factors, float *out,
                     int64_t out_stride, int64_t ahead, errand e, const task *t) {
    vi high[WITHIN][2] = {{{0}}}, low[WITHIN][2] = {{{0}}};
    sight tokens = tokens_of_block(f.whole, t);
    codes += tokens.start * bytes_of_32(f.codec);
    for (int64_t j = tokens.start; j < tokens.stop; j += 4, codes += 4 * bytes_of_32(f.codec)) {
        if (ahead) ask_for(codes + ahead, 4 * bytes_of_32(f.codec));
        if (e.step) ask_for(e.next + j / 4 * e.step, 64);
        vu a = v_load_bytes(codes), b = f.codec == RING_Q4 ? (a >> 4) - 8 : v_load_bytes(codes + 64);
        if (f.codec == RING_Q4) a = (a & 15) - 8;
        UNROLL for (int r = 0; r < WITHIN; r++) {
            vu x = v_splat_quad(planes + r * PLANES + j);
            if (f.codec == RING_Q4)
                high[r][0] = v_dot4_u8(high[r][0], x, a), high[r][1] = v_dot4_u8(high[r][1], x, b);
            else
                high[r][0] = v_dot4(high[r][0], x, a), high[r][1] = v_dot4(high[r][1], x, b);
            if (f.two) {
                vu y = v_splat_quad(planes + r * PLANES + CACHED + j);
                low[r][0] = v_dot4(low[r][0], y, a), low[r][1] = v_dot4(low[r][1], y, b);
            }
        }
    }
    UNROLL for (int r = 0; r < WITHIN; r++)
        UNROLL for (int half = 0; half < 2; half++) {
            float *to = out + r * out_stride + half * 16;
            vf sum = v_to_f32(f.two ? (high[r][half] << 7) + low[r][half] : high[r][half]);
            v_store(to, v_fma(sum, v_splat(factors[r]), v_load(to) * keep[r]));
        }
}

// Add a block's values, which are codes, to rows first .. first + n - 1. The weights of as many rows and groups as ROUNDED
// are rounded before any is multiplied, so that no product waits for its weights, and no weight for its group's lift.
INLINE void add_codes_of(form f, words job, float *area, const ring_piece *x, int64_t first, int64_t n, float *out,
                         const task *t) {
    words side = job + AT_VALUES;
    int64_t width = side[SD_SEEN], size = side[SD_GROUP], groups = width / size, together = max_of(1, ROUNDED / n);
    int64_t per_group = CACHED * (f.codec == RING_Q4 ? 2 : 1);  // scales, and bases
    int8_t *planes = (int8_t *)in(area, job[AT_PLANES]);
    float *worth = in(area, job[AT_WORTH]);
    lift *lifts = (lift *)in(area, job[AT_LIFTS]);
    const float *keep = state_of(job, area, t->all_rows).keep + first;
    errand e = asked_with_values(job, t);
    for (int64_t start = 0; start < groups; start += together) {
        int64_t stop = min_of(start + together, groups);
        for (int64_t g = start; f.whole && g < stop; g++) {
            group_units units = read_units(f, x->scales, g, (sight){0, CACHED});
            lifts[g - start] = find_lift(f, &units, (sight){0, CACHED});
        }
        for (int64_t g = start; g < stop; g++) {
            int64_t at = (g - start) * n;
            ask_for((const char *)(x->scales + g * per_group) + x->ahead, 2 * per_group);
            round_group(f, job, area, x->scales, g, lifts[g - start], first, n, planes + at * PLANES, worth + at, t);
        }
        for (int64_t d = start * size; d < stop * size; d += 32) {
            int64_t at = (d / size - start) * n;
            const uint8_t *codes = x->codes + d / 32 * bytes_of_32(f.codec) * CACHED;
            for (int64_t r = 0; r < n; r += WITHIN)
                UNROLL for (int p = 0; p < PARTS; p++) {
                    errand wanted = {e.next, r % 4 || p ? 0 : e.step};
                    multiply(f, codes + p * BYTES, planes + (at + r) * PLANES, keep + r, worth + at + r,
                             out + r * width + d + p * LANES, width, r || p ? 0 : x->ahead, wanted, t);
                    e.next += CACHED / 4 * wanted.step;
                }
        }
    }
}

static void add_codes(words job, float *area, const ring_piece *x, int64_t first, int64_t n, float *out, const task *t) {
    words side = job + AT_VALUES;
    if (has_bases(side) && t->whole)
        add_codes_of((form){RING_Q4, 0, 1}, job, area, x, first, n, out, t);
    else if (has_bases(side))
        add_codes_of((form){RING_Q4, 0, 0}, job, area, x, first, n, out, t);
    else if (side[SD_BYTES] == 2 && t->whole)
        add_codes_of((form){RING_Q8, 1, 1}, job, area, x, first, n, out, t);
    else if (side[SD_BYTES] == 2)
        add_codes_of((form){RING_Q8, 1, 0}, job, area, x, first, n, out, t);
    else if (t->whole)
        add_codes_of((form){RING_Q8, 0, 1}, job, area, x, first, n, out, t);
    else
        add_codes_of((form){RING_Q8, 0, 0}, job, area, x, first, n, out, t);
}

// Add a block's values to rows first .. first + n - 1, all of one key-value head if heads have values of their own.
static void add_values(words job, float *area, float *result, int64_t first, int64_t n, int64_t kv_head, const task *t) {
    words side = job + AT_VALUES;
    int64_t width = side[SD_SEEN];
    row_state state = state_of(job, area, t->all_rows);
    float *weights = in(area, job[AT_SCORES]) + first * CACHED, *out = result + first * width;
    const float *keep = state.keep + first, *share = state.share + first;
    int64_t start = t->low - t->block, stop = t->high - t->block;
    if (side[SD_INT8]) {
        ring_piece x = find_piece(side, kv_head, t);
        add_codes(job, area, &x, first, n, out, t);
    } else if (is_direct(side, n)) {
        ring_piece x = find_piece(side, kv_head, t);
        weigh_f16(weights, n, keep, share, (const uint16_t *)x.codes, x.ahead, start, stop, width, out);
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
