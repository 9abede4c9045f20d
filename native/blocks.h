// Blocks of cached tokens as attention wants them; see runtime/kernels/numba_blocks.py.
#pragma once
#include "ring.h"
#include "tiles.h"

INLINE float *in(float *area, int64_t offset) { return area + offset / 4; }

// ==== As they are stored ====

typedef struct { const uint8_t *codes; const uint16_t *scales; } lines_of_block;

// Copy the rows low - block .. high - block - 1 of a block; the others, and one after the last, become zeros.
static lines_of_block copy_lines(words job, words side, float *area, int64_t head, int64_t block, int64_t low, int64_t high) {
    int64_t code_bytes = side[SD_CODE_BYTES], scale_bytes = side[SD_SCALE_BYTES], slot = slot_of(job, low);
    uint8_t *codes = (uint8_t *)in(area, job[AT_LINES]), *scales = codes + (CACHED + 1) * code_bytes;
    memset(codes, 0, (CACHED + 1) * code_bytes + CACHED * scale_bytes);
    for (int64_t k = low - block; k < high - block; k++) {
        int64_t row = head * job[AT_SLOTS] + slot;
        memcpy(codes + k * code_bytes, at(side[SD_DATA], row * code_bytes), code_bytes);
        if (scale_bytes) memcpy(scales + k * scale_bytes, at(side[SD_SCALES], row * scale_bytes), scale_bytes);
        slot = slot + 1 < job[AT_SLOTS] ? slot + 1 : clock_of(job, SINKS);
    }
    return (lines_of_block){codes, (const uint16_t *)scales};
}

// The codes and scales of a block, of which positions low .. high - 1 are wanted. Sixteen bytes after its last row may
// be read.
static lines_of_block find_lines(words job, words side, float *area, int64_t head, int64_t block, int64_t low, int64_t high) {
    int64_t slot = slot_of(job, low), row = head * job[AT_SLOTS] + slot;
    if (low > block || high < block + CACHED || slot + CACHED >= job[AT_SLOTS])
        return copy_lines(job, side, area, head, block, low, high);
    return (lines_of_block){at(side[SD_DATA], row * side[SD_CODE_BYTES]), at(side[SD_SCALES], row * side[SD_SCALE_BYTES])};
}

// Ask for a line of each of `count` rows a block later: few at a time, or the CPU waits until all are there.
INLINE void ask_for_rows(const uint8_t *codes, int64_t stride, int count) {
    UNROLL for (int i = 0; i < count; i++) __builtin_prefetch(codes + (CACHED + i) * stride);
}

// LANES rows of n halves, without gaps, as columns of floats, CACHED apart.
INLINE void spread_f16(int n, const uint16_t *source, float *out) {
    vf v[8], next[8];
    UNROLL for (int i = 0; i < n; i++) v[i] = v_load_f16(source + i * LANES);
    UNROLL for (int step = n; step > 1; step /= 2) {  // each time the lowest bit of a number's place becomes the highest
        UNROLL for (int i = 0; i < n / 2; i++) v_unzip(v[2 * i], v[2 * i + 1], &next[i], &next[n / 2 + i]);
        UNROLL for (int i = 0; i < n; i++) v[i] = next[i];
    }
    UNROLL for (int i = 0; i < n; i++) v_store(out + i * CACHED, v[i]);
}

// Scales (CACHED, n) as (n, CACHED) floats; q4 has scale and base for each group.
static void spread_scales(words side, const uint16_t *scales, float *units) {
    int64_t n = side[SD_SCALE_BYTES] / 2;
    ask_for((const uint8_t *)(scales + n * CACHED), 2 * n * CACHED);
    for (int64_t k = 0; k < CACHED; k += LANES) {
        const uint16_t *source = scales + k * n;
        if (n == 1) spread_f16(1, source, units + k);
        else if (n == 2) spread_f16(2, source, units + k);
        else if (n == 4) spread_f16(4, source, units + k);
        else if (n == 8) spread_f16(8, source, units + k);
        else
            for (int64_t i = 0; i < LANES * n; i++) units[i % n * CACHED + k + i / n] = v_read_f16(source + i);
    }
}

// ==== Decoded ====

// x Phi(x), within 1e-6; erf by Abramowitz and Stegun, 7.1.26.
INLINE vf gelu(vf x) {
    vf z = v_abs(x) * 0.70710678f, t = 1.0f / v_fma(z, v_splat(0.3275911f), v_splat(1.0f));
    vf p = v_fma(t, v_splat(1.061405429f), v_splat(-1.453152027f));
    p = v_fma(t, p, v_splat(1.421413741f));
    p = v_fma(t, p, v_splat(-0.284496736f));
    p = v_fma(t, p, v_splat(0.254829592f));
    vf tail = p * t * v_exp(z * z * -1.0f) * 0.5f;  // 1 - Phi(|x|)
    return v_max(x, v_splat(0.0f)) - v_abs(x) * tail;
}

// GELU with a hyperbolic tangent for erf (Hendrycks and Gimpel, 2016).
INLINE vf gelu_tanh(vf x) {
    vf inner = v_fma(x * x, x * 0.044715f, x) * -1.5957691f;
    return x / (v_exp(v_min(inner, v_splat(88.0f))) + 1.0f);
}

static void add_bias(float *x, int64_t rows, int64_t width, const float *bias) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t d = 0; d < width; d += LANES) v_store(x + i * width + d, v_load(x + i * width + d) + v_load(bias + d));
}

static void activate(float *x, int64_t n, int exact) {
    for (int64_t i = 0; i < n; i += LANES) v_store(x + i, exact ? gelu(v_load(x + i)) : gelu_tanh(v_load(x + i)));
}

// Rotate decoded keys for their positions.
static void rotate_rows(words job, words side, int64_t first, int64_t count, float *x, int64_t stride) {
    int64_t slot = slot_of(job, first), turn = job[AT_HEAD_DIM] * 2;
    for (int64_t i = 0; i < count; i++, x += stride) {
        rotate(x, x, at(side[SD_COS], slot * turn), at(side[SD_SIN], slot * turn), job[AT_HEAD_DIM]);
        slot = slot + 1 < job[AT_SLOTS] ? slot + 1 : clock_of(job, SINKS);
    }
}

// Whether a side's halves are best converted while they are multiplied: few rows use them.
INLINE int is_direct(words side, int64_t rows) {
    return side[SD_CODEC] == RING_F16 && !side[SD_HIDDEN] && !side[SD_COS] && rows <= 8;
}

// What attention sees of `count` tokens: rows of SD_SEEN floats.
static const float *decoded(words job, words side, float *area, int64_t kv_head, int64_t first, int64_t count) {
    int64_t features = side[SD_FEATURES], seen = side[SD_SEEN], four = (count + 3) / 4 * 4;
    float *target = in(area, job[AT_BLOCK]), *x = in(area, job[AT_CODES]);
    if (!side[SD_HIDDEN] && !side[SD_COS]) {
        read_back(job, side, side[SD_HEADS] > 1 ? kv_head : 0, first, count, target);
        return target;
    }
    read_back(job, side, 0, first, count, x);
    if (side[SD_HIDDEN]) {
        float *hidden = side[SD_COS] ? in(area, job[AT_FEATURES]) : target;
        int64_t padded = side[SD_PADDED];
        dots(x, padded, four, at(side[SD_HIDDEN], 0), padded, 0, features, padded, hidden, features);
        add_bias(hidden, count, features, at(side[SD_HIDDEN_BIAS], 0));
        activate(hidden, count * features, side[SD_ACTIVATION] == 0);
        x = hidden;
    }
    if (side[SD_COS]) {
        const float *output = at(side[SD_OUTPUT], kv_head * seen * features * 4);
        dots(x, features, four, output, features, 0, seen, features, target, seen);
        add_bias(target, count, seen, at(side[SD_OUTPUT_BIAS], kv_head * seen * 4));
        rotate_rows(job, side, first, count, target, seen);
    }
    return target;
}
