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

// The new tokens of one tile of the ring: what two threads write does not share cache lines.
typedef struct { int64_t first, stop; } stretch;

INLINE stretch tokens_of(words job, int64_t unit) {
    int64_t before = clock_of(job, LENGTH) % TILE;
    return (stretch){max_of(unit * TILE - before, 0), min_of((unit + 1) * TILE - before, job[AT_N])};
}

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

// Rotate the queries and keys of one tile's new tokens in place.
//
// Once tokens have slid out, the queries are also rotated for a position that is nearer by as many tokens: with these
// the sinks are read, so that they stay as close as they would be in a context without the lost tokens.
static void rope_tile(words job, int64_t unit) {
    stretch tokens = tokens_of(job, unit);
    for (int64_t token = tokens.first; token < tokens.stop; token++) rope_token(job, token);
}

// ==== Where it lies ====

// The ring slot of a position: blocks with sinks stay as they are, the others go round.
INLINE int64_t slot_of(words job, int64_t position) {
    int64_t base = (clock_of(job, SINKS) + CACHED - 1) / CACHED * CACHED;
    return position < base ? position : base + (position - base) % (job[AT_SLOTS] - base);
}

// Where the codes of a slot's tile begin: rows one after the other, or, with scales, a tile of sixteen keys or of four
// values (see codecs.py).
INLINE char *codes_at(words job, words side, int64_t head, int64_t slot) {
    int64_t tokens = !side[SD_SCALE_BYTES] ? 1 : side[SD_VALUES] ? 4 : TILE;
    return at(side[SD_DATA], (head * job[AT_SLOTS] + slot / tokens * tokens) * side[SD_CODE_BYTES]);
}

// Where the scales of a slot's sixteen tokens begin.
INLINE uint16_t *scales_at(words job, words side, int64_t head, int64_t slot) {
    return at(side[SD_SCALES], (head * job[AT_SLOTS] + slot / TILE * TILE) * side[SD_SCALE_BYTES]);
}

// ==== Encoding ====

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

// Store bytes first .. first + n_codes - 1 of a slot's codes, and the scales that belong to them.
INLINE void put(words job, words side, int64_t head, int64_t slot, int64_t first, const char *codes, int64_t n_codes,
                const uint16_t *scales, int64_t n_scales) {
    char *target = codes_at(job, side, head, slot);
    if (!n_scales)
        memcpy(target + first, codes, n_codes);
    else if (side[SD_VALUES])
        for (int64_t i = 0; i < n_codes; i++) target[(first + i) * 4 + slot % 4] = codes[i];
    else
        for (int64_t i = 0; i < n_codes; i += 4) memcpy(target + (first + i) * TILE + slot % TILE * 4, codes + i, 4);
    uint16_t *to = scales_at(job, side, head, slot) + first * n_scales / n_codes * TILE + slot % TILE;
    for (int64_t i = 0; i < n_scales; i++) to[i * TILE] = scales[i];
}

// Encode one vector, its last group filled with zeros, and store it.
static void store(words job, words side, int64_t head, int64_t slot, const float *source) {
    _Alignas(64) float x[CHUNK], vector[LONGEST_HEAD];
    char codes[CHUNK * 4];
    uint16_t scales[CHUNK / 16];
    int64_t width = side[SD_WIDTH], padded = side[SD_PADDED];
    if (side[SD_ROTATED] > 1) {
        memcpy(vector, source, width * 4);
        turn(side, head, vector, width, KEY);
        source = vector;
    }
    for (int64_t start = 0; start < padded; start += CHUNK) {
        int64_t count = min_of(CHUNK, padded - start), given = max_of(0, min_of(count, width - start));
        memcpy(x, source + start, given * 4);
        memset(x + given, 0, (count - given) * 4);
        encode(side, x, count, codes, scales);
        int64_t n_codes = side[SD_CODE_BYTES] * count / padded, n_scales = side[SD_SCALE_BYTES] / 2 * count / padded;
        put(job, side, head, slot, start * n_codes / count, codes, n_codes, scales, n_scales);
    }
}

// Put one tile's new tokens, keys and values or their codes, into the ring.
static void append_tile(words job, int64_t unit) {
    stretch tokens = tokens_of(job, unit);
    for (int64_t token = tokens.first; token < tokens.stop; token++) {
        int64_t slot = slot_of(job, clock_of(job, LENGTH) + token);
        for (int which = 0; which < 2; which++) {
            words side = job + (which ? AT_VALUES : AT_KEYS);
            const float *source = at(job[which ? AT_V : AT_K], token * side[SD_HEADS] * side[SD_WIDTH] * 4);
            for (int64_t head = 0; head < side[SD_HEADS]; head++)
                store(job, side, head, slot, source + head * side[SD_WIDTH]);
        }
    }
}

KERNEL(rope) { UNUSED; rope_tile(at(address, 0), unit); return 0; }
KERNEL(append) { UNUSED; append_tile(at(address, 0), unit); return 0; }
KERNEL(rope_append) {
    UNUSED;
    rope_tile(at(address, 0), unit);
    append_tile(at(address, 0), unit);
    return 0;
}

// ==== Decoding ====

// LANES bytes of a slot's codes from byte i on, unsigned.
INLINE vi some_codes(words side, const char *codes, int64_t i, int64_t slot) {
    if (side[SD_VALUES]) return v_load_i32(codes + i * 4) >> (int32_t)(slot % 4 * 8) & 255;
    uint8_t bytes[LANES];
    UNROLL for (int k = 0; k < LANES; k += 4) memcpy(bytes + k, codes + (i + k) * TILE + slot % TILE * 4, 4);
    return v_load_u8(bytes);
}

INLINE void expand_q8(words side, const char *codes, const uint16_t *scales, int64_t slot, float *row) {
    int64_t size = side[SD_GROUP];
    for (int64_t start = 0; start < side[SD_PADDED]; start += size) {
        vf scale = v_splat(v_read_f16(scales + start / size * TILE));
        for (int64_t i = start; i < start + size; i += LANES) {
            vi q = some_codes(side, codes, i, slot);
            v_store(row + i, v_to_f32(q - ((q & 128) << 1)) * scale);
        }
    }
}

INLINE void expand_q4(words side, const char *codes, const uint16_t *scales, int64_t slot, float *row) {
    for (int64_t start = 0; start < side[SD_PADDED]; start += 32, scales += 2 * TILE) {
        vf scale = v_splat(v_read_f16(scales)), base = v_splat(v_read_f16(scales + TILE));
        for (int64_t i = 0; i < 16; i += LANES) {
            vi q = some_codes(side, codes, start / 2 + i, slot);
            v_store(row + start + i, v_fma(v_to_f32(q & 15), scale, base));
            v_store(row + start + 16 + i, v_fma(v_to_f32(q >> 4), scale, base));
        }
    }
}

// Read the vectors of `count` tokens of one block from a position on: rows of SD_PADDED numbers.
static void read_back(words job, words side, int64_t head, int64_t position, int64_t count, float *target) {
    int64_t padded = side[SD_PADDED], row_bytes = side[SD_CODE_BYTES], slot = slot_of(job, position);
    for (int64_t stop = slot + count; slot < stop; slot++, target += padded) {
        const char *codes = codes_at(job, side, head, slot);
        const uint16_t *scales = scales_at(job, side, head, slot) + slot % TILE;
        ask_for(at(side[SD_DATA], (head * job[AT_SLOTS] + slot + CACHED) * row_bytes), row_bytes);
        if (side[SD_CODEC] == RING_F16)
            for (int64_t i = 0; i < padded; i += LANES) v_store(target + i, v_load_f16((const uint16_t *)codes + i));
        else if (side[SD_CODEC] == RING_Q8)
            expand_q8(side, codes, scales, slot, target);
        else if (side[SD_CODEC] == RING_Q4)
            expand_q4(side, codes, scales, slot, target);
        else
            memcpy(target, codes, padded * 4);
    }
}
