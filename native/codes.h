// The ring's codecs: vectors turned and rounded. runtime/ring/rounding.py is the definition.
#pragma once
#include "jobs.h"

enum { RING_F32, RING_F16, RING_Q8, RING_Q4 };
enum { KEY = 1, QUERY };  // where the factors of each stand in Plane.mirror
enum { FITS = 2 };  // of scale and base of a q4 group
#define LARGEST 65504.0f  // of float16

INLINE float round_f16(float x) { return v_round_f16(v_splat(x))[0]; }

INLINE void write_f16(uint16_t *target, float x) {
    uint16_t halves[LANES];
    v_store_f16(halves, v_splat(x));
    *target = halves[0];
}

// In this order NaN stays NaN.
INLINE vf limited(vf x, float largest) { return v_max(v_splat(-largest), v_min(v_splat(largest), x)); }

// x / y, and zero where y is zero.
INLINE vf quotient(vf x, float y) { return y > 0.0f ? x / y : v_splat(0.0f); }

INLINE void encode_q8(const float *x, int64_t size, int8_t *codes, uint16_t *scale_at) {
    vf top = v_abs(v_load(x));
    for (int64_t i = LANES; i < size; i += LANES) top = v_larger(top, v_abs(v_load(x + i)));
    float largest = largest_magnitude(top) / 127.0f, scale = round_f16(largest > LARGEST ? LARGEST : largest);
    write_f16(scale_at, scale);
    for (int64_t i = 0; i < size; i += LANES) v_store_i8(codes + i, v_round(limited(quotient(v_load(x + i), scale), 127.0f)));
}

// A group's scale and base, and its codes as numbers.
typedef struct { float scale, base, codes[32]; } q4_group;

// In these orders NaN stays NaN.
INLINE float scale_q4(float scale) { return round_f16(scale > LARGEST ? LARGEST : scale); }
INLINE float base_q4(float base) {
    base = base > LARGEST ? LARGEST : base;
    return round_f16(base < -LARGEST ? -LARGEST : base);
}

INLINE q4_group code_q4(const float *x, float scale, float base) {
    q4_group g = {scale, base, {0}};
    for (int i = 0; i < 32; i += LANES) {
        vf code = quotient(v_load(x + i) - base, scale);
        v_store(g.codes + i, v_to_f32(v_round(v_max(v_min(code, v_splat(15.0f)), v_splat(0.0f)))));
    }
    return g;
}

// The sum of the products of the numbers of two groups.
INLINE float product_q4(const float *x, const float *y) {
    return sum16(add16(mul16(load16(x), load16(y)), mul16(load16(x + 16), load16(y + 16))));
}

// The sum of squared errors of a group.
INLINE float error_q4(const float *x, q4_group g) {
    float error[32];
    for (int i = 0; i < 32; i += LANES) v_store(error + i, (v_load(x + i) - g.base) - v_load(g.codes + i) * g.scale);
    return product_q4(error, error);
}

// The scale and base with the least squared error for a group's codes, and new codes for these. Sums are those of
// numbers less `start`.
INLINE q4_group fit_q4(const float *x, q4_group g, float start) {
    float moved[32];
    for (int i = 0; i < 32; i += LANES) v_store(moved + i, v_load(x + i) - start);
    float of_codes = sum16(add16(load16(g.codes), load16(g.codes + 16)));
    float of_x = sum16(add16(load16(moved), load16(moved + 16)));
    float spread = 32.0f * product_q4(g.codes, g.codes) - of_codes * of_codes;
    float scale = 32.0f * product_q4(g.codes, moved) - of_codes * of_x;
    scale = scale_q4(spread > 0.0f ? scale / spread : 0.0f);
    return code_q4(x, scale, base_q4(start + (of_x - scale * of_codes) / 32.0f));
}

INLINE void encode_q4(const float *x, int8_t *codes, uint16_t *scale_at) {
    float low = x[0], high = x[0];
    for (int i = 1; i < 32; i++) {
        low = x[i] < low ? x[i] : low;
        high = x[i] > high ? x[i] : high;
    }
    float scale = scale_q4((high - low) / 15.0f), largest = 0.0f;
    for (int i = 0; i < 32; i += LANES) largest = largest_magnitude(v_larger(v_splat(largest), v_abs(v_load(x + i))));
    if (largest != largest) scale = largest;  // NaN
    q4_group first = code_q4(x, scale, base_q4(low)), g = first;
    for (int fit = 0; fit < FITS; fit++) g = fit_q4(x, g, first.base);
    if (!(error_q4(x, g) < error_q4(x, first))) g = first;
    write_f16(scale_at, g.scale);
    write_f16(scale_at + 1, g.base);
    for (int i = 0; i < 16; i += LANES)
        v_store_i8(codes + i, v_round(v_load(g.codes + i)) | v_round(v_load(g.codes + 16 + i)) << 4);
}

// Sums and differences of sixteen numbers, each with that `step` places off: the sum at the lower of both places.
INLINE void butterfly(float *x, int32_t step) {
    vf parts[PARTS];
    UNROLL for (int p = 0; p < PARTS; p++) {
        int32_t numbers[LANES];
        for (int i = 0; i < LANES; i++) numbers[i] = p * LANES + i;
        vi place = v_load_i32(numbers), minus = ((place & step) != 0) & (int32_t)0x80000000;
        parts[p] = v_lookup16(x, place ^ step) + (vf)((vi)v_load(x + p * LANES) ^ minus);
    }
    UNROLL for (int p = 0; p < PARTS; p++) v_store(x + p * LANES, parts[p]);
}

// Rotate by a Hadamard matrix, in place, in blocks of `size` numbers; 1 changes nothing.
static void hadamard(float *x, int64_t width, int64_t size) {
    if (size == 1) return;
    int64_t step = 1;
    if (size >= 16)
        for (; step < 16; step *= 2)
            for (int64_t i = 0; i < width; i += 16) butterfly(x + i, (int32_t)step);
    for (; step < size; step *= 2)
        for (float *low = x; low < x + width; low += 2 * step) {
            float *high = low + step;
            int64_t i = 0;
            for (; i + LANES <= step; i += LANES) {
                vf a = v_load(low + i), b = v_load(high + i);
                v_store(low + i, a + b);
                v_store(high + i, a - b);
            }
            for (; i < step; i++) {
                float a = low[i], b = high[i];
                low[i] = a + b, high[i] = a - b;
            }
        }
    float scale = (float)(1.0 / __builtin_sqrt((double)size));
    for (int64_t i = 0; i < width; i++) x[i] *= scale;
}

// Balance, mirror and rotate one vector, in place; of what is not done to its side's vectors, nothing.
// which: KEY, to store it, or QUERY, to multiply it with what attention sees
INLINE void turn(words side, int64_t head, float *x, int64_t width, int which) {
    if (side[SD_MIRROR]) {
        const float *normal = at(side[SD_MIRROR], head * 3 * width * 4), *factors = normal + which * width;
        f32x16 total = splat16(0.0f);
        for (int64_t i = 0; i < width; i += LANES) v_store(x + i, v_load(x + i) * v_load(factors + i));
        for (int64_t i = 0; i < width; i += 16) total = add16(total, mul16(load16(x + i), load16(normal + i)));
        float along = sum16(total);
        for (int64_t i = 0; i < width; i += LANES) v_store(x + i, v_load(x + i) - v_load(normal + i) * along);
    }
    hadamard(x, width, side[which == KEY ? SD_ROTATED : SD_TURNED]);
}

// Encode whole groups: `count` numbers.
INLINE void encode(words side, const float *x, int64_t count, char *codes, uint16_t *scales) {
    int64_t size = side[SD_GROUP];
    for (int64_t i = 0; i < count; i += size)
        if (side[SD_CODEC] == RING_F32)
            memcpy(codes + i * 4, x + i, size * 4);
        else if (side[SD_CODEC] == RING_F16)
            for (int64_t k = i; k < i + size; k += LANES)
                v_store_f16((uint16_t *)codes + k, limited(v_load(x + k), LARGEST));
        else if (side[SD_CODEC] == RING_Q8)
            encode_q8(x + i, size, (int8_t *)codes + i, scales + i / size);
        else
            encode_q4(x + i, (int8_t *)codes + i / 2, scales + i / size * 2);
}
