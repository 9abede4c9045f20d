// RoPE, and the ring's codecs: numbers put into it and read back. runtime/ring/codecs.py is the definition.
#pragma once
#include "jobs.h"

enum { RING_F32, RING_F16, RING_Q8, RING_Q4 };
enum { KEY = 1, QUERY };  // where the factors of each stand in Plane.mirror
enum { LONGEST_HEAD = 512 };
enum { CHUNK = 64 };  // numbers that are encoded at a time: a whole number of groups of every codec
enum { FITS = 2 };  // of scale and base of a q4 group
#define LARGEST 65504.0f  // of float16

// How far the job's ring has come.
INLINE int64_t clock_of(words job, int which) { return ((words)at(job[AT_CLOCK], 0))[which]; }
// Whether tokens have slid out of what the job's last token sees.
INLINE int is_sliding(words job) { return clock_of(job, LENGTH) + job[AT_N] > job[AT_WINDOW]; }

// ==== RoPE (Su et al., 2021) ====

// Half-split rotation, as Hugging Face orders the rows: (a, b) -> (a cos - b sin, b cos + a sin).
static void rotate(const float *source, float *target, const float *cos, const float *sin, int64_t head_dim) {
    int64_t half = head_dim / 2, whole = half / LANES * LANES, i;
    for (i = 0; i < whole; i += LANES) {
        vf a = v_load(source + i), b = v_load(source + half + i), c = v_load(cos + i), s = v_load(sin + i);
        v_store(target + i, a * c - b * s);
        v_store(target + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = source[i], b = source[half + i];
        target[i] = a * cos[i] - b * sin[i];
        target[half + i] = b * cos[i] + a * sin[i];
    }
}

// Rotate one token's queries and keys in place.
//
// Once tokens have slid out, the queries are also rotated for a position that is nearer by as many tokens: with these
// the sinks are read, so that they stay as close as they would be in a context without the lost tokens.
INLINE void rope_token(words job, int64_t token) {
    int64_t head_dim = job[AT_HEAD_DIM], row = head_dim * 4, turn = head_dim * 2 * token;
    const float *cos = at(job[AT_COS], turn), *sin = at(job[AT_SIN], turn);
    int sliding = is_sliding(job);
    for (int64_t head = token * job[AT_HEADS]; head < (token + 1) * job[AT_HEADS]; head++) {
        float *q = at(job[AT_Q], head * row);
        if (sliding)
            rotate(q, at(job[AT_Q_SINK], head * row), at(job[AT_COS_SINK], turn), at(job[AT_SIN_SINK], turn), head_dim);
        rotate(q, q, cos, sin, head_dim);
    }
    for (int64_t head = token * job[AT_KV_HEADS]; head < (token + 1) * job[AT_KV_HEADS]; head++) {
        float *k = at(job[AT_K], head * row);
        rotate(k, k, cos, sin, head_dim);
    }
}

// ==== Encoding ====

// The ring slot of a position: sinks keep theirs, the others go round.
INLINE int64_t slot_of(words job, int64_t position) {
    int64_t sinks = clock_of(job, SINKS);
    return position < sinks ? position : sinks + (position - sinks) % (job[AT_SLOTS] - sinks);
}

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

INLINE float scale_q4(float scale) { return round_f16(scale < LARGEST ? scale : LARGEST); }
INLINE float base_q4(float base) {
    base = base < LARGEST ? base : LARGEST;
    return round_f16(base > -LARGEST ? base : -LARGEST);
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

// Rotate by a Hadamard matrix, in place, in blocks of `size` numbers; 1 changes nothing.
static void hadamard(float *x, int64_t width, int64_t size) {
    if (size == 1) return;
    for (int64_t step = 1; step < size; step *= 2)
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

// Balance, mirror and rotate one vector, in place, as its side's are stored; of what is not done to them, nothing.
// which: KEY or QUERY
INLINE void turn(words side, int64_t head, float *x, int64_t width, int which) {
    if (side[SD_MIRROR]) {
        const float *normal = at(side[SD_MIRROR], head * 3 * width * 4), *factors = normal + which * width;
        f32x16 total = splat16(0.0f);
        for (int64_t i = 0; i < width; i += LANES) v_store(x + i, v_load(x + i) * v_load(factors + i));
        for (int64_t i = 0; i < width; i += 16) total = add16(total, mul16(load16(x + i), load16(normal + i)));
        float along = sum16(total);
        for (int64_t i = 0; i < width; i += LANES) v_store(x + i, v_load(x + i) - v_load(normal + i) * along);
    }
    hadamard(x, width, side[SD_ROTATED]);
}

// Store one vector, its last group filled with zeros.
static void encode(words side, int64_t head, int64_t row, const float *source) {
    _Alignas(64) float x[CHUNK], vector[LONGEST_HEAD];
    int64_t width = side[SD_WIDTH], padded = side[SD_PADDED], size = side[SD_GROUP];
    if (side[SD_ROTATED] > 1) {
        memcpy(vector, source, width * 4);
        turn(side, head, vector, width, KEY);
        source = vector;
    }
    char *codes = at(side[SD_DATA], row * side[SD_CODE_BYTES]);
    uint16_t *scales = at(side[SD_SCALES], row * side[SD_SCALE_BYTES]);
    for (int64_t start = 0; start < padded; start += CHUNK) {
        int64_t count = min_of(CHUNK, padded - start), given = max_of(0, min_of(count, width - start));
        memcpy(x, source + start, given * 4);
        memset(x + given, 0, (count - given) * 4);
        for (int64_t i = 0; i < count; i += size) {
            int64_t to = start + i;
            if (side[SD_CODEC] == RING_F32)
                memcpy(codes + to * 4, x + i, size * 4);
            else if (side[SD_CODEC] == RING_F16)
                for (int64_t k = 0; k < size; k += LANES)
                    v_store_f16((uint16_t *)codes + to + k, limited(v_load(x + i + k), LARGEST));
            else if (side[SD_CODEC] == RING_Q8)
                encode_q8(x + i, size, (int8_t *)codes + to, scales + to / size);
            else
                encode_q4(x + i, (int8_t *)codes + to / 2, scales + to / size * 2);
        }
    }
}

// Put one token's keys and values, or their codes, into the ring.
INLINE void append_token(words job, int64_t token) {
    int64_t slot = slot_of(job, clock_of(job, LENGTH) + token);
    for (int which = 0; which < 2; which++) {
        words side = job + (which ? AT_VALUES : AT_KEYS);
        const float *source = at(job[which ? AT_V : AT_K], token * side[SD_HEADS] * side[SD_WIDTH] * 4);
        for (int64_t head = 0; head < side[SD_HEADS]; head++)
            encode(side, head, head * job[AT_SLOTS] + slot, source + head * side[SD_WIDTH]);
    }
}

KERNEL(rope) { UNUSED; rope_token(at(address, 0), unit); return 0; }
KERNEL(append) { UNUSED; append_token(at(address, 0), unit); return 0; }
KERNEL(rope_append) {
    UNUSED;
    rope_token(at(address, 0), unit);
    append_token(at(address, 0), unit);
    return 0;
}

// ==== Decoding ====

INLINE void expand_q8(const int8_t *codes, const uint16_t *scales, int64_t padded, int64_t size, float *row) {
    for (int64_t start = 0; start < padded; start += size) {
        vf scale = v_splat(v_read_f16(scales + start / size));
        for (int64_t i = start; i < start + size; i += LANES) v_store(row + i, v_to_f32(v_load_i8(codes + i)) * scale);
    }
}

INLINE void expand_q4(const uint8_t *codes, const uint16_t *scales, int64_t padded, float *row) {
    for (int64_t start = 0; start < padded; start += 32) {
        vf scale = v_splat(v_read_f16(scales + start / 16)), base = v_splat(v_read_f16(scales + start / 16 + 1));
        for (int64_t i = 0; i < 16; i += LANES) {
            vi q = v_load_u8(codes + start / 2 + i);
            v_store(row + start + i, v_fma(v_to_f32(q & 15), scale, base));
            v_store(row + start + 16 + i, v_fma(v_to_f32(q >> 4), scale, base));
        }
    }
}

// Read the vectors of `count` tokens from a position on: rows of SD_PADDED numbers.
static void read_back(words job, words side, int64_t head, int64_t position, int64_t count, float *target) {
    int64_t padded = side[SD_PADDED], slots = job[AT_SLOTS], slot = slot_of(job, position);
    for (int64_t k = 0; k < count; k++, target += padded) {
        int64_t row = head * slots + slot;
        const char *codes = at(side[SD_DATA], row * side[SD_CODE_BYTES]);
        const void *scales = at(side[SD_SCALES], row * side[SD_SCALE_BYTES]);
        for (int64_t i = 0; i < side[SD_CODE_BYTES]; i += 64) __builtin_prefetch(codes + CACHED * side[SD_CODE_BYTES] + i);
        if (side[SD_CODEC] == RING_F16)
            for (int64_t i = 0; i < padded; i += LANES) v_store(target + i, v_load_f16((const uint16_t *)codes + i));
        else if (side[SD_CODEC] == RING_Q8)
            expand_q8((const int8_t *)codes, scales, padded, side[SD_GROUP], target);
        else if (side[SD_CODEC] == RING_Q4)
            expand_q4((const uint8_t *)codes, scales, padded, target);
        else
            memcpy(target, codes, padded * 4);
        slot = slot + 1 < slots ? slot + 1 : clock_of(job, SINKS);
    }
}
