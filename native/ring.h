// RoPE, and numbers put into the ring and read back. runtime/ring/codecs.py is the definition of how they lie.
#pragma once
#include "codes.h"

enum { CHUNK = 512 };  // numbers that are encoded at a time: whole groups, and whole blocks of the Hadamard rotation

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

// The new tokens of one tile of the ring: what two threads write hardly shares cache lines.
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

// What a block has of one head: its scales, then its codes (see codecs.py).
INLINE uint16_t *scales_at(words side, int64_t head, int64_t slot) {
    return at(side[SD_DATA], head * side[SD_HEAD_STRIDE] + slot / CACHED * side[SD_BLOCK_STRIDE]);
}

INLINE char *codes_at(words side, int64_t head, int64_t slot) {
    return (char *)scales_at(side, head, slot) + CACHED * side[SD_SCALE_BYTES];
}

// Bytes of 32 codes, which lie together for all values of a block.
INLINE int64_t bytes_of_32(int64_t codec) { return codec == RING_Q4 ? 16 : 32; }

// Where byte i of a slot's codes lies among those of its block.
INLINE int64_t place_of(words side, int64_t slot, int64_t i) {
    int64_t token = slot % CACHED, row_bytes = side[SD_CODE_BYTES], run = bytes_of_32(side[SD_CODEC]);
    if (!side[SD_SCALE_BYTES]) return token * row_bytes + i;
    if (side[SD_VALUES]) return i / run * run * CACHED + token / 4 * 4 * run + i % run * 4 + token % 4;
    return token / TILE * TILE * row_bytes + i / 4 * 4 * TILE + token % TILE * 4 + i % 4;
}

// ==== Encoding ====

// Store bytes first .. first + n_codes - 1 of a slot's codes, and the scales that belong to them.
INLINE void put(words side, int64_t head, int64_t slot, int64_t first, const char *codes, int64_t n_codes,
                const uint16_t *scales, int64_t n_scales) {
    char *block = codes_at(side, head, slot), *target = block + place_of(side, slot, first);
    if (!n_scales)
        memcpy(target, codes, n_codes);
    else if (side[SD_VALUES])
        for (int64_t i = 0; i < n_codes; i += 16) {
            char *to = block + place_of(side, slot, first + i);
            for (int64_t k = 0; k < 16; k++) to[k * 4] = codes[i + k];
        }
    else
        for (int64_t i = 0; i < n_codes; i += 4) memcpy(target + i * TILE, codes + i, 4);
    uint16_t *to = scales_at(side, head, slot) + first * n_scales / n_codes * CACHED + slot % CACHED;
    for (int64_t i = 0; i < n_scales; i++) to[i * CACHED] = scales[i];
}

// Turn and encode one vector, its last group filled with zeros, and store it. What has a mirror is one chunk.
static void store(words side, int64_t head, int64_t slot, const float *source) {
    _Alignas(64) float x[CHUNK];
    char codes[CHUNK * 4];
    uint16_t scales[CHUNK / 16];
    int64_t width = side[SD_WIDTH], padded = side[SD_PADDED];
    for (int64_t start = 0; start < padded; start += CHUNK) {
        int64_t count = min_of(CHUNK, padded - start), given = max_of(0, min_of(count, width - start));
        memcpy(x, source + start, given * 4);
        turn(side, head, x, given, KEY);
        memset(x + given, 0, (count - given) * 4);
        encode(side, x, count, codes, scales);
        int64_t n_codes = side[SD_CODE_BYTES] * count / padded, n_scales = side[SD_SCALE_BYTES] / 2 * count / padded;
        put(side, head, slot, start * n_codes / count, codes, n_codes, scales, n_scales);
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
                store(side, head, slot, source + head * side[SD_WIDTH]);
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
    int64_t token = slot % 4;
    if (side[SD_VALUES]) return v_load_i32(codes + place_of(side, slot - token, i)) >> (int32_t)(token * 8) & 255;
    uint8_t bytes[LANES];
    UNROLL for (int k = 0; k < LANES; k += 4) memcpy(bytes + k, codes + place_of(side, slot, i + k), 4);
    return v_load_u8(bytes);
}

INLINE void expand_q8(words side, const char *codes, const uint16_t *scales, int64_t slot, float *row) {
    int64_t size = side[SD_GROUP];
    for (int64_t start = 0; start < side[SD_PADDED]; start += size) {
        vf scale = v_splat(v_read_f16(scales + start / size * CACHED));
        for (int64_t i = start; i < start + size; i += LANES) {
            vi q = some_codes(side, codes, i, slot);
            v_store(row + i, v_to_f32(q - ((q & 128) << 1)) * scale);
        }
    }
}

INLINE void expand_q4(words side, const char *codes, const uint16_t *scales, int64_t slot, float *row) {
    for (int64_t start = 0; start < side[SD_PADDED]; start += 32, scales += 2 * CACHED) {
        vf scale = v_splat(v_read_f16(scales)), base = v_splat(v_read_f16(scales + CACHED));
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
        const char *codes = codes_at(side, head, slot), *row = codes + place_of(side, slot, 0);
        const uint16_t *scales = scales_at(side, head, slot) + slot % CACHED;
        ask_for(codes_at(side, head, slot + CACHED) + slot % CACHED * row_bytes, row_bytes);
        if (side[SD_CODEC] == RING_F16)
            for (int64_t i = 0; i < padded; i += LANES) v_store(target + i, v_load_f16((const uint16_t *)row + i));
        else if (side[SD_CODEC] == RING_Q8)
            expand_q8(side, codes, scales, slot, target);
        else if (side[SD_CODEC] == RING_Q4)
            expand_q4(side, codes, scales, slot, target);
        else
            memcpy(target, row, padded * 4);
    }
}
