// AVX2 with FMA and F16C, with or without AVX-VNNI: see vectors.h.
#pragma once
#include <immintrin.h>

#define LANES 8
typedef float vf __attribute__((vector_size(32)));
typedef int32_t vi __attribute__((vector_size(32)));
typedef uint8_t vu __attribute__((vector_size(32)));
typedef float v4f __attribute__((vector_size(16)));

#define v_fma(x, y, z) ((vf)_mm256_fmadd_ps(x, y, z))
#define v_max(x, y) ((vf)_mm256_max_ps(x, y))
#define v_min(x, y) ((vf)_mm256_min_ps(x, y))
#define v_min_u8(x, y) ((vu)_mm256_min_epu8((__m256i)(x), (__m256i)(y)))
#define v_load_f16(p) ((vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)(p))))
#define v_store_f16(p, x) _mm_storeu_si128((void *)(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT))
#define v_read_f16(p) _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(*(const uint16_t *)(p))))
#define v_load_bf16(p) \
    ((vf)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)(p))), 16)))
#define v_load_u8(p) ((vi)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const void *)(p))))
#define v_load_i8(p) ((vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)(p))))
#define v_of_four(x) ((vf)_mm256_insertf128_ps(_mm256_castps128_ps256(x), x, 1))
#define v_four(x) ((v4f)_mm256_castps256_ps128(x))
#define v4_max(x, y) ((v4f)_mm_max_ps(x, y))
#define v_quarter(x, i) ((v4f)_mm256_extractf128_ps((x)[(i) / 2], (i) % 2))

#define v_lookup_u8(table, i) \
    ((vu)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const void *)(table))), (__m256i)(i)))

#define v_dot4_u8 v_dot4  // 16 bits hold 2 * 255 * 64
#if defined(__AVXVNNI__)
// The instruction wants unsigned factors: they become q + 128.
#define I8_OFFSET -128
#define v_factor_i8(q) ((q) ^ 128)
#define v_dot4_i8 v_dot4
#define v_dot4(acc, q, x) ((vi)_mm256_dpbusd_avx_epi32((__m256i)(acc), (__m256i)(q), (__m256i)(x)))
#else
// The pairs cannot saturate: 2 * 127 * 127 is below 2^15, which is why q must not exceed 127.
static inline vi v_dot4(vi acc, vu q, vu x) {
    __m256i pairs = _mm256_maddubs_epi16((__m256i)q, (__m256i)x);
    return acc + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
}

// |q| times x with the sign of q. |q| may be 128, but nothing is added to that: 2 * 128 * 127 is below 2^15 too.
#define I8_OFFSET 0
#define v_factor_i8(q) (q)
static inline vi v_dot4_i8(vi acc, vu q, vu x) {
    return v_dot4(acc, (vu)_mm256_abs_epi8((__m256i)q), (vu)_mm256_sign_epi8((__m256i)x, (__m256i)q));
}
#endif

static inline int32_t v_sum_lanes(vi x) {
    __m128i y = _mm_add_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(y, _mm_shuffle_epi32(y, 0xB1)));
}

static inline int32_t v_top_lane(vi x) {
    __m128i y = _mm_max_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
    y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(y, _mm_shuffle_epi32(y, 0xB1)));
}

static inline __m256 eight(const float *table, vi index) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
}

static inline vf v_lookup16(const float *table, vi index) {
    return (vf)_mm256_blendv_ps(eight(table, index), eight(table + 8, index), (__m256)(index << 28));
}

static inline vf v_lookup(const float *table, vi index) {
    vf low = v_lookup16(table, index), high = v_lookup16(table + 16, index);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(index << 27));
}

static inline vi v_load_nibbles(const uint8_t *p) {
    int32_t bytes;
    memcpy(&bytes, p, sizeof bytes);
    // Lane i takes byte i / 2 and shifts its nibble down: the high one in even lanes.
    __m256i shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
    return (vi)_mm256_srlv_epi32(_mm256_set1_epi32(bytes), shifts);
}

static inline void v_store_i8(int8_t *p, vi x) {
    int64_t low, high;
    __m256i bytes = _mm256_shuffle_epi8((__m256i)x, _mm256_set1_epi32(0x0C080400));
    low = _mm256_extract_epi32(bytes, 0), high = _mm256_extract_epi32(bytes, 4);
    int64_t both = (low & 0xFFFFFFFF) | high << 32;
    memcpy(p, &both, sizeof both);
}

static inline __attribute__((always_inline)) void v_load_tile(const uint8_t *const *rows, int64_t offset, vu *tile) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_si256((const void *)(rows[i] + offset));
    // A square of eight rows by eight columns: exchange blocks of one, two, then four lanes.
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int k = 0; k < 2; k++) {
            a[i + 2 * k] = _mm256_unpacklo_epi64(b[i + k], b[i + k + 2]);
            a[i + 2 * k + 1] = _mm256_unpackhi_epi64(b[i + k], b[i + k + 2]);
        }
    for (int i = 0; i < 4; i++) {
        tile[i] = (vu)_mm256_permute2x128_si256(a[i], a[i + 4], 0x20);
        tile[i + 4] = (vu)_mm256_permute2x128_si256(a[i], a[i + 4], 0x31);
    }
}
