// Any CPU: see vectors.h.
#pragma once

#define LANES 4
typedef float vf __attribute__((vector_size(16)));
typedef int32_t vi __attribute__((vector_size(16)));
typedef uint32_t vn __attribute__((vector_size(16)));
typedef uint8_t vu __attribute__((vector_size(16)));
typedef int16_t vs __attribute__((vector_size(16)));
typedef uint16_t vh __attribute__((vector_size(16)));
typedef vf v4f;

static inline vi choose(vi mask, vi yes, vi no) { return (mask & yes) | (~mask & no); }

#if defined(__FP_FAST_FMAF) || defined(__aarch64__)
static inline vf v_fma(vf x, vf y, vf z) {
    for (int i = 0; i < LANES; i++) z[i] = __builtin_fmaf(x[i], y[i], z[i]);
    return z;
}
#else
static inline vf v_fma(vf x, vf y, vf z) { return x * y + z; }
#endif

static inline vf v_max(vf x, vf y) { return (vf)choose(x > y, (vi)x, (vi)y); }
static inline vf v_min(vf x, vf y) { return (vf)choose(x < y, (vi)x, (vi)y); }
static inline vu v_min_u8(vu x, vu y) { return (vu)choose((vi)(x < y), (vi)x, (vi)y); }

static inline vi v_dot4(vi acc, vu q, vu x) {
    // Two products at a time, in 16 bits: 2 * 127 * 127 fits.
    vs even = ((vs)q & 255) * ((vs)x << 8 >> 8), odd = (vs)((vh)q >> 8) * ((vs)x >> 8);
    vi pairs = (vi)(even + odd);
    return acc + (pairs << 16 >> 16) + (pairs >> 16);
}

// The factors may be any bytes: -128 * 127 * 2 does not fit 16 bits, so each product is its own.
#define I8_OFFSET 0
#define v_factor_i8(q) (q)
#define v_dot4_u8 v_dot4
static inline vi v_dot4_i8(vi acc, vu q, vu x) {
    for (int k = 0; k < 32; k += 8) acc += ((vi)q << (24 - k) >> 24) * ((vi)x << (24 - k) >> 24);
    return acc;
}

static inline int32_t v_sum_lanes(vi x) { return (x[0] + x[1]) + (x[2] + x[3]); }
static inline int32_t v_top_lane(vi x) {
    int32_t low = x[0] > x[1] ? x[0] : x[1], high = x[2] > x[3] ? x[2] : x[3];
    return low > high ? low : high;
}

static inline vu v_lookup_u8(const uint8_t *table, vu index) {
    vu found;
    for (int i = 0; i < 16; i++) found[i] = table[index[i]];
    return found;
}

static inline vf v_lookup(const float *table, vi index) {
    return (vf){table[index[0] & 31], table[index[1] & 31], table[index[2] & 31], table[index[3] & 31]};
}
static inline vf v_lookup16(const float *table, vi index) { return v_lookup(table, index & 15); }

static inline vf v_load_bf16(const uint16_t *p) { return (vf)((vi){p[0], p[1], p[2], p[3]} << 16); }
static inline vi v_load_u8(const uint8_t *p) { return (vi){p[0], p[1], p[2], p[3]}; }
static inline vi v_load_i8(const int8_t *p) { return (vi){p[0], p[1], p[2], p[3]}; }
static inline vi v_load_nibbles(const uint8_t *p) { return (vi){p[0] >> 4, p[0] & 15, p[1] >> 4, p[1] & 15}; }

static inline void v_store_i8(int8_t *p, vi x) {
    for (int i = 0; i < LANES; i++) p[i] = (int8_t)x[i];
}

// Shift the half's fields into place and let a multiplication by 2^112 mend the exponent.
static inline vf v_load_f16(const uint16_t *p) {
    vi bits = {p[0], p[1], p[2], p[3]};
    vi magnitude = (bits & 0x7FFF) << 13;
    vi scaled = (vi)((vf)magnitude * 0x1p112f);
    vi special = magnitude >= 0x0F800000;  // infinity and NaN keep their fields
    scaled = choose(special, magnitude | 0x7F800000, scaled);
    return (vf)(scaled | (vi)((vn)(bits & 0x8000) << 16));
}

static inline float v_read_f16(const uint16_t *p) {
    uint16_t halves[LANES] = {*p};
    return v_load_f16(halves)[0];
}

// Halves to even; what exceeds the range becomes infinity.
static inline void v_store_f16(uint16_t *p, vf x) {
    vi magnitude = (vi)x & 0x7FFFFFFF, sign = (vi)((vn)x >> 16) & 0x8000;
    // Normal halves: rebias the exponent and round the 13 dropped bits, halves to even.
    vi odd = magnitude >> 13 & 1;
    vi normal = (vi)((vn)magnitude + (vn)odd - (112u << 23) + 0xFFFu) >> 13;
    // Subnormal halves: adding 0.5 lets the float adder round at the right bit.
    vf half = {0.5f, 0.5f, 0.5f, 0.5f};
    vi tiny = (vi)((vf)magnitude + half) - (vi)half;
    vi result = choose(magnitude < 0x38800000, tiny, normal);
    result = choose(magnitude >= 0x47800000, (vi){0} + 0x7C00, result);
    result = choose(magnitude > 0x7F800000, (vi){0} + 0x7E00, result);
    for (int i = 0; i < LANES; i++) p[i] = (uint16_t)(result[i] | sign[i]);
}

#define v_of_four(x) (x)
#define v_four(x) (x)
#define v4_max v_max
#define v_quarter(x, i) ((x)[i])

static inline void v_load_tile(const uint8_t *const *rows, int64_t offset, vu *tile) {
    for (int j = 0; j < 8; j++) {
        int32_t quads[LANES];
        for (int r = 0; r < LANES; r++) memcpy(quads + r, rows[r] + offset + j * 4, 4);
        memcpy(&tile[j], quads, sizeof quads);
    }
}
