// Vectors of 32-bit lanes as wide as the CPU's registers, in GCC's and Clang's own notation (a + b, v >> 4), and the
// few operations that this notation lacks. The kernels work on sixteen lanes, that is on PARTS registers: every
// instruction set adds in the same order.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512VNNI__)
#include "vectors_avx512.h"
#elif defined(__AVX2__)
#include "vectors_avx2.h"
#elif defined(__ARM_FEATURE_DOTPROD)
#include "vectors_neon.h"
#else
#include "vectors_generic.h"
#endif
// Each of these defines LANES, the types vf (float), vi (int32_t) and vu (uint8_t, four to a lane), and
//   v_fma(x, y, z)       x * y + z (rounded once where the CPU can)
//   v_max, v_min         x > y ? x : y; x < y ? x : y
//   v_min_u8(x, y)       of bytes
//   v_dot4(acc, q, x)    acc + the sum of four products in each lane: q unsigned and at most 127, x signed; exact
//   v_dot4_u8(acc, q, x) the same of any unsigned q, and x of at most 64 in magnitude
//   v_dot4_i8(acc, q, x) the same of signed q, as v_factor_i8 gives it, and x above -128, if I8_OFFSET times the sum
//                        of x is added to acc
//   v_load_tile(rows, offset, tile)    32 bytes of LANES rows, transposed: lane r of tile[j] is bytes 4 j .. 4 j + 3
//                        of row r
//   v_lookup_u8(table, i) table[i] for each byte, from 16 bytes; i below 16
//   v_lookup(table, i)   table[i mod 32] for each lane, from 32 floats
//   v_lookup16(table, i) table[i mod 16]
//   v_load_f16(p), v_store_f16(p, x)   LANES half floats, rounded to nearest, ties to even
//   v_read_f16(p)        one half float as a float
//   v_load_bf16(p)       LANES bfloat16 numbers
//   v_load_u8(p), v_load_i8(p)         LANES bytes as integers
//   v_load_nibbles(p)    LANES / 2 bytes as 4-bit numbers, the high nibble of each byte first; higher bits are junk
//   v_store_i8(p, x)     the low bytes of the lanes
//   v_sum_lanes(x), v_top_lane(x)      the sum and the largest of integer lanes
//   v_quarter(x, i)      lanes 4 i .. 4 i + 3 of sixteen
//   v_of_four(x), v_four(x)            four lanes again and again; the first four lanes
//   v4_max(x, y)         v_max of four lanes

enum { BYTES = 4 * LANES };  // of a vector
enum { TILE_BYTES = 32 };    // of each row of a tile

#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

INLINE vf v_load(const float *p) { vf x; memcpy(&x, p, sizeof x); return x; }
INLINE vi v_load_i32(const void *p) { vi x; memcpy(&x, p, sizeof x); return x; }
INLINE vu v_load_bytes(const uint8_t *p) { vu x; memcpy(&x, p, sizeof x); return x; }
INLINE void v_store(float *p, vf x) { memcpy(p, &x, sizeof x); }

INLINE vf v_splat(float x) { return x - (vf){0}; }
INLINE vi v_splat_i32(int32_t x) { return x - (vi){0}; }

// Four bytes from memory in all lanes.
INLINE vu v_splat_quad(const int8_t *p) { int32_t x; memcpy(&x, p, sizeof x); return (vu)v_splat_i32(x); }

INLINE vf v_to_f32(vi x) { return __builtin_convertvector(x, vf); }

// The lanes of x and y, which are counted through, in another order. indices: a vector of as wide integers
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(indices, x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else
#define SHUFFLE(indices, x, y, ...) __builtin_shuffle(x, y, (indices){__VA_ARGS__})
#endif

// 16 bytes, of each eight those of even number first: the order in which bytes hold pairs of nibbles.
INLINE void evens_first(const int8_t *from, int8_t *to) {
    typedef int8_t v16b __attribute__((vector_size(16)));
    v16b x;
    memcpy(&x, from, sizeof x);
    x = SHUFFLE(v16b, x, x, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    memcpy(to, &x, sizeof x);
}

// Nearest integers, halves to even, of numbers below 2^22 in magnitude: at 1.5 * 2^23 a float's last bit counts ones.
INLINE vi v_round(vf x) { return (vi)(x + 12582912.0f) - 0x4B400000; }

INLINE vf v_abs(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }

// Rounded to what a bfloat16 holds, halves to even (finite values).
INLINE vf v_round_bf16(vf x) {
    vi bits = (vi)x;
    return (vf)((bits + ((bits >> 16 & 1) + 0x7FFF)) & -0x10000);
}

// Rounded to what a float16 holds, halves to even.
INLINE vf v_round_f16(vf x) {
    uint16_t halves[LANES];
    v_store_f16(halves, x);
    return v_load_f16(halves);
}

// e^x for x <= 88, relative error below 2e-7: x = n ln 2 + r, a polynomial in r (Cephes expf), times 2^n.
INLINE vf v_exp(vf x) {
    x = v_max(v_splat(-87.0f), x);  // in this order NaN stays NaN
    vi whole = v_round(x * 1.44269504f);
    vf n = v_to_f32(whole);
    vf r = v_fma(n, v_splat(-0.693359375f), x);
    r = v_fma(n, v_splat(2.12194440e-4f), r);
    vf p = v_splat(1.9875691500e-4f);
    p = v_fma(p, r, v_splat(1.3981999507e-3f));
    p = v_fma(p, r, v_splat(8.3334519073e-3f));
    p = v_fma(p, r, v_splat(4.1665795894e-2f));
    p = v_fma(p, r, v_splat(1.6666665459e-1f));
    p = v_fma(p, r, v_splat(5.0000001201e-1f));
    p = v_fma(p, r * r, r) + 1.0f;
    return p * (vf)((whole + 127) << 23);
}

// 2^x for x <= 126, relative error below 2e-7; at 0 it is 1. At 1.5 * 2^23 a float's last bit counts ones.
INLINE vf v_exp2(vf x) {
    vf near = v_max(v_splat(-125.0f), x);  // in this order NaN stays NaN
    vf shifted = near + 12582912.0f, r = near - (shifted - 12582912.0f);
    vf p = v_fma(v_splat(1.3264726e-3f), r, v_splat(9.6715127e-3f));
    p = v_fma(p, r, v_splat(5.5507337e-2f));
    p = v_fma(p, r, v_splat(2.4022242e-1f));
    p = v_fma(p, r, v_splat(6.9314698e-1f));
    p = v_fma(p, r, v_splat(1.0f));
    return (vf)((vi)p + ((vi)shifted << 23));
}

// ==== Sixteen lanes ====

enum { PARTS = 16 / LANES };

typedef struct { vf v[PARTS]; } f32x16;
typedef int32_t v4i __attribute__((vector_size(16)));

INLINE f32x16 load16(const float *p) {
    f32x16 x;
    UNROLL for (int i = 0; i < PARTS; i++) x.v[i] = v_load(p + i * LANES);
    return x;
}

INLINE f32x16 splat16(float value) {
    f32x16 x;
    UNROLL for (int i = 0; i < PARTS; i++) x.v[i] = v_splat(value);
    return x;
}

INLINE f32x16 add16(f32x16 x, f32x16 y) {
    UNROLL for (int i = 0; i < PARTS; i++) x.v[i] += y.v[i];
    return x;
}

INLINE f32x16 mul16(f32x16 x, f32x16 y) {
    UNROLL for (int i = 0; i < PARTS; i++) x.v[i] *= y.v[i];
    return x;
}

INLINE f32x16 fma16(f32x16 x, f32x16 y, f32x16 z) {
    UNROLL for (int i = 0; i < PARTS; i++) z.v[i] = v_fma(x.v[i], y.v[i], z.v[i]);
    return z;
}

INLINE v4f load4(const float *p) { v4f x; memcpy(&x, p, sizeof x); return x; }
INLINE void store4(float *p, v4f x) { memcpy(p, &x, sizeof x); }

// The largest lane of each of four, none of which is NaN.
INLINE v4f largest_of_four(const f32x16 x[4]) {
    v4f top[4];
    UNROLL for (int i = 0; i < 4; i++) {
        v4f even = v4_max(v_quarter(x[i].v, 0), v_quarter(x[i].v, 2)), odd = v4_max(v_quarter(x[i].v, 1), v_quarter(x[i].v, 3));
        top[i] = v4_max(even, odd);
    }
    v4f a = v4_max(SHUFFLE(v4i, top[0], top[1], 0, 4, 1, 5), SHUFFLE(v4i, top[0], top[1], 2, 6, 3, 7));
    v4f b = v4_max(SHUFFLE(v4i, top[2], top[3], 0, 4, 1, 5), SHUFFLE(v4i, top[2], top[3], 2, 6, 3, 7));
    return v4_max(SHUFFLE(v4i, a, b, 0, 1, 4, 5), SHUFFLE(v4i, a, b, 2, 3, 6, 7));
}

// The sum of the lanes, as a tree of halves: one fixed order on every machine.
INLINE float sum16(f32x16 x) {
    v4f half = (v_quarter(x.v, 0) + v_quarter(x.v, 2)) + (v_quarter(x.v, 1) + v_quarter(x.v, 3));
    return (half[0] + half[2]) + (half[1] + half[3]);
}

// The larger of two magnitudes, which have no signs. Bits are compared: NaN is larger than every number.
INLINE vf v_larger(vf x, vf y) {
    vi larger = (vi)((vi)x > (vi)y);
    return (vf)((larger & (vi)x) | (~larger & (vi)y));
}

INLINE float largest_magnitude(vf x) {
    int32_t largest = v_top_lane((vi)x);
    float magnitude;
    memcpy(&magnitude, &largest, sizeof magnitude);
    return magnitude;
}
