// 64-bit ARM with the int8 dot product: see vectors.h.
#pragma once
#include <arm_neon.h>

#define LANES 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint8_t vu __attribute__((vector_size(16)));
typedef vf v4f;

#define v_fma(x, y, z) ((vf)vfmaq_f32((float32x4_t)(z), (float32x4_t)(x), (float32x4_t)(y)))
#define v_max(x, y) ((vf)vbslq_f32(vcgtq_f32((float32x4_t)(x), (float32x4_t)(y)), (float32x4_t)(x), (float32x4_t)(y)))
#define v_min(x, y) ((vf)vbslq_f32(vcltq_f32((float32x4_t)(x), (float32x4_t)(y)), (float32x4_t)(x), (float32x4_t)(y)))
#define v_min_u8(x, y) ((vu)vminq_u8((uint8x16_t)(x), (uint8x16_t)(y)))
// q is at most 127, so its bytes are the same numbers when signed.
#define v_dot4(acc, q, x) ((vi)vdotq_s32((int32x4_t)(acc), (int8x16_t)(q), (int8x16_t)(x)))
#define I8_OFFSET 0
#define v_factor_i8(q) (q)
#define v_dot4_i8 v_dot4
// The instruction wants signed factors: they become q - 128, and x times 128 is added.
#define v_dot4_u8(acc, q, x) (v_dot4(acc, (vu)(q) ^ 128, x) + (v_dot4((vi){0}, (vu){0} + 1, x) << 7))
#define v_lookup_u8(table, i) ((vu)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)(i)))
#define v_load_f16(p) ((vf)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16((const uint16_t *)(p)))))
#define v_store_f16(p, x) vst1_u16((uint16_t *)(p), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)(x))))
#define v_read_f16(p) ((float)*(const __fp16 *)(p))
#define v_sum_lanes(x) vaddvq_s32((int32x4_t)(x))
#define v_top_lane(x) vmaxvq_s32((int32x4_t)(x))
#define v_of_four(x) (x)
#define v_four(x) (x)
#define v4_max v_max
#define v_quarter(x, i) ((x)[i])

// Byte places, within a table of floats, of the floats with these numbers.
static inline uint8x16_t bytes_of(vi index) {
    return (uint8x16_t)(index * 0x04040404 + 0x03020100);
}

static inline vf v_lookup16(const float *table, vi index) {
    return (vf)vqtbl4q_u8(vld1q_u8_x4((const uint8_t *)table), bytes_of(index & 15));
}

static inline vf v_lookup(const float *table, vi index) {
    uint8x16_t at = bytes_of(index & 31);
    uint8x16_t low = vqtbl4q_u8(vld1q_u8_x4((const uint8_t *)table), at);  // places from 64 on give zero
    return (vf)vqtbx4q_u8(low, vld1q_u8_x4((const uint8_t *)(table + 16)), vsubq_u8(at, vdupq_n_u8(64)));
}

static inline vf v_load_bf16(const uint16_t *p) { return (vf)((vi){p[0], p[1], p[2], p[3]} << 16); }
static inline vi v_load_u8(const uint8_t *p) { return (vi){p[0], p[1], p[2], p[3]}; }
static inline vi v_load_i8(const int8_t *p) { return (vi){p[0], p[1], p[2], p[3]}; }
static inline vi v_load_nibbles(const uint8_t *p) { return (vi){p[0] >> 4, p[0] & 15, p[1] >> 4, p[1] & 15}; }

static inline void v_store_i8(int8_t *p, vi x) {
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)x[i];
}

static inline __attribute__((always_inline)) void v_load_tile(const uint8_t *const *rows, int64_t offset, vu *tile) {
    for (int half = 0; half < 2; half++) {
        uint32x4_t a[4];
        for (int i = 0; i < 4; i++) a[i] = vreinterpretq_u32_u8(vld1q_u8(rows[i] + offset + half * 16));
        // Rows 0 and 1, then 2 and 3, column by column; then pairs of columns.
        uint32x4x2_t p = vtrnq_u32(a[0], a[1]), q = vtrnq_u32(a[2], a[3]);
        for (int k = 0; k < 2; k++) {
            tile[half * 4 + k] = (vu)vcombine_u32(vget_low_u32(p.val[k]), vget_low_u32(q.val[k]));
            tile[half * 4 + k + 2] = (vu)vcombine_u32(vget_high_u32(p.val[k]), vget_high_u32(q.val[k]));
        }
    }
}
