// AVX-512 with VNNI: see vectors.h.
#pragma once
#include <immintrin.h>

#define LANES 16
typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint8_t vu __attribute__((vector_size(64)));
typedef float v4f __attribute__((vector_size(16)));

#define v_fma(x, y, z) ((vf)_mm512_fmadd_ps(x, y, z))
#define v_max(x, y) ((vf)_mm512_max_ps(x, y))
#define v_min(x, y) ((vf)_mm512_min_ps(x, y))
#define v_min_u8(x, y) ((vu)_mm512_min_epu8((__m512i)(x), (__m512i)(y)))
#define v_dot4(acc, q, x) ((vi)_mm512_dpbusd_epi32((__m512i)(acc), (__m512i)(q), (__m512i)(x)))
// The instruction wants unsigned factors: they become q + 128.
#define I8_OFFSET -128
#define v_factor_i8(q) ((q) ^ 128)
#define v_dot4_i8 v_dot4
#define v_dot4_u8 v_dot4
#define v_lookup_u8(table, i) \
    ((vu)_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const void *)(table))), (__m512i)(i)))
#define v_lookup(table, i) ((vf)_mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)(i), _mm512_loadu_ps((table) + 16)))
#define v_lookup16(table, i) ((vf)_mm512_permutexvar_ps((__m512i)(i), _mm512_loadu_ps(table)))
#define v_load_f16(p) ((vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)(p))))
#define v_store_f16(p, x) _mm256_storeu_si256((void *)(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))
#define v_read_f16(p) _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(*(const uint16_t *)(p))))
#define v_load_bf16(p) \
    ((vf)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)(p))), 16)))
#define v_load_u8(p) ((vi)_mm512_cvtepu8_epi32(_mm_loadu_si128((const void *)(p))))
#define v_load_i8(p) ((vi)_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)(p))))
#define v_store_i8(p, x) _mm_storeu_si128((void *)(p), _mm512_cvtepi32_epi8((__m512i)(x)))
#define v_sum_lanes(x) _mm512_reduce_add_epi32((__m512i)(x))
#define v_top_lane(x) _mm512_reduce_max_epi32((__m512i)(x))
#define v_of_four(x) ((vf)_mm512_broadcast_f32x4((__m128)(x)))
#define v_four(x) ((v4f)_mm512_castps512_ps128(x))
#define v4_max(x, y) ((v4f)_mm_max_ps(x, y))
// For sixteen lanes alone: quarters a and b of x, c and d of y; lanes of each quarter; quarters and lanes exchanged.
#define v_quarters(x, y, a, b, c, d) ((vf)_mm512_shuffle_f32x4(x, y, (a) | (b) << 2 | (c) << 4 | (d) << 6))
#define v_of_quarters(x, y, a, b, c, d) ((vf)_mm512_shuffle_ps(x, y, (a) | (b) << 2 | (c) << 4 | (d) << 6))
#define v_transposed(x) \
    ((vf)_mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), x))
#define v_quarter(x, i) ((v4f)_mm512_extractf32x4_ps((x)[0], i))

static inline vi v_load_nibbles(const uint8_t *p) {
    // Lane i takes the half of the eight bytes that holds its nibble and shifts it down: the high one in even lanes.
    __m512i half = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
    __m512i shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
    __m512i bytes = _mm512_castsi128_si512(_mm_loadl_epi64((const void *)p));
    return (vi)_mm512_srlv_epi32(_mm512_permutexvar_epi32(half, bytes), shifts);
}

static inline __attribute__((always_inline)) void v_load_tile(const uint8_t *const *rows, int64_t offset, vu *tile) {
    __m512i a[8], b[8];
    for (int i = 0; i < 8; i++) {
        __m256i low = _mm256_loadu_si256((const void *)(rows[i] + offset));
        __m256i high = _mm256_loadu_si256((const void *)(rows[i + 8] + offset));
        a[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    // Each half is a square of eight rows by eight columns: exchange blocks of one, two, then four lanes.
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; k++) {
            a[i + 2 * k] = _mm512_unpacklo_epi64(b[i + k], b[i + k + 2]);
            a[i + 2 * k + 1] = _mm512_unpackhi_epi64(b[i + k], b[i + k + 2]);
        }
    __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13), odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
    for (int i = 0; i < 4; i++) {
        tile[i] = (vu)_mm512_permutex2var_epi64(a[i], even, a[i + 4]);
        tile[i + 4] = (vu)_mm512_permutex2var_epi64(a[i], odd, a[i + 4]);
    }
}
