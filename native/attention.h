// RoPE, the append to the ring, and attention over it.
#pragma once
#include "jobs.h"

enum { SLOTS = 64, LONGEST_HEAD = 512 };  // cached tokens in one attention block; numbers in a head

// ==== RoPE (Su et al., 2021) and the append to the ring ====

// The ring slot of a position: sinks keep theirs, the others go round.
INLINE int64_t slot_of(words job, int64_t position) {
    int64_t sinks = job[AT_SINKS];
    return position < sinks ? position : sinks + (position - sinks) % (job[AT_SLOTS] - sinks);
}

// Half-split rotation, as Hugging Face orders the rows: (a, b) -> (a cos - b sin, b cos + a sin).
INLINE void rotate(const float *source, float *target, const float *cos, const float *sin, int64_t half) {
    for (int64_t i = 0; i < half; i++) {
        float a = source[i], b = source[half + i];
        target[i] = a * cos[i] - b * sin[i];
        target[half + i] = b * cos[i] + a * sin[i];
    }
}

// Store one head's vector as float16 (wide: float32), padded with zeros to whole vectors.
INLINE void append(int wide, words job, int64_t plane, int64_t slot, const float *source) {
    float head[LONGEST_HEAD];
    int64_t padded = job[AT_PADDED], size = wide ? 4 : 2;
    memcpy(head, source, job[AT_HEAD_DIM] * 4);
    memset(head + job[AT_HEAD_DIM], 0, (padded - job[AT_HEAD_DIM]) * 4);
    for (int64_t i = 0; i < padded; i += LANES) {
        void *target = at(plane, (slot * padded + i) * size);
        if (wide)
            v_store(target, v_load(head + i));
        else
            v_store_f16(target, v_load(head + i));
    }
}

INLINE int64_t plane_bytes(int wide, words job) { return job[AT_SLOTS] * job[AT_PADDED] * (wide ? 4 : 2); }

// Rotate one token's queries and keys in place and put its keys and values into the ring.
//
// Once tokens have slid out, the queries are also rotated for a position that is nearer by as many tokens: with these
// the sinks are read, so that they stay as close as they would be in a context without the lost tokens.
INLINE void rope_append(int wide, words job, int64_t token) {
    int64_t head_dim = job[AT_HEAD_DIM], half = head_dim / 2, turn = token * half * 4;
    int64_t position = job[AT_START] + token, slot = slot_of(job, position);
    const float *cos = at(job[AT_COS], turn), *sin = at(job[AT_SIN], turn);
    for (int64_t head = 0; head < job[AT_HEADS]; head++) {
        int64_t offset = (token * job[AT_HEADS] + head) * head_dim * 4;
        float *q = at(job[AT_Q], offset);
        if (position >= job[AT_WINDOW])
            rotate(q, at(job[AT_Q_SINK], offset), at(job[AT_COS_SINK], turn), at(job[AT_SIN_SINK], turn), half);
        rotate(q, q, cos, sin, half);
    }
    for (int64_t head = 0; head < job[AT_KV_HEADS]; head++) {
        int64_t offset = (token * job[AT_KV_HEADS] + head) * head_dim * 4, plane = head * plane_bytes(wide, job);
        float *k = at(job[AT_K], offset);
        rotate(k, k, cos, sin, half);
        append(wide, job, job[AT_KEYS] + plane, slot, k);
        append(wide, job, job[AT_VALUES] + plane, slot, at(job[AT_V], offset));
    }
}

// ==== Attention over the ring, block by block with a running maximum and sum (Milakov and Gimelshein, 2018) ====

// What one query head has gathered so far.
typedef struct {
    float query[LONGEST_HEAD], values[LONGEST_HEAD];
    float maximum, sum;
} gathered;

// Sixteen cached numbers, number `index` of a plane and on.
INLINE f32x16 cached(int wide, const void *plane, int64_t index) {
    f32x16 x;
    UNROLL for (int i = 0; i < PARTS; i++)
        x.v[i] = wide ? v_load((const float *)plane + index + i * LANES)
                      : v_load_f16((const uint16_t *)plane + index + i * LANES);
    return x;
}

// Turn scores into weights, exp(score - maximum), with the old result's share of the new one as result.
INLINE float weigh(float scores[SLOTS], int count, gathered *head) {
    int filled = (count + 15) / 16 * 16;
    for (int i = count; i < filled; i++) scores[i] = -__builtin_inff();
    vf top = v_splat(head->maximum);
    for (int i = 0; i < filled; i += LANES) top = v_max(top, v_load(scores + i));
    float largest = largest_lane(top);
    // Nothing is there before the first block: its maximum is -inf and its share is nil.
    float keep = head->maximum > -__builtin_inff() ? v_exp(v_splat(head->maximum - largest))[0] : 0.0f;
    for (int i = 0; i < filled; i += LANES) v_store(scores + i, v_exp(v_load(scores + i) - largest));
    for (int i = count; i < filled; i++) scores[i] = 0.0f;
    f32x16 sums = splat16(0.0f);
    for (int i = 0; i < filled; i += 16) sums = add16(sums, load16(scores + i));
    head->maximum = largest;
    head->sum = head->sum * keep + sum16(sums);
    return keep;
}

// Add `count` cached tokens, at most SLOTS, from position `first` on to one head's result.
INLINE void attend_block(int wide, words job, const void *keys, const void *values, int64_t first, int count, gathered *head) {
    _Alignas(64) float scores[SLOTS];
    int64_t padded = job[AT_PADDED], sinks = job[AT_SINKS], slots = job[AT_SLOTS];
    float scale = float_word(job + AT_SCALE);
    int64_t start = slot_of(job, first), slot = start;
    for (int i = 0; i < count; i++) {
        f32x16 dot = splat16(0.0f);
        for (int64_t d = 0; d < padded; d += 16)
            dot = fma16(cached(wide, keys, slot * padded + d), load16(head->query + d), dot);
        scores[i] = sum16(dot) * scale;
        slot = slot + 1 < slots ? slot + 1 : sinks;
    }
    f32x16 keep = splat16(weigh(scores, count, head));
    for (int64_t d = 0; d < padded; d += 16) {
        f32x16 total = mul16(load16(head->values + d), keep);
        slot = start;
        for (int i = 0; i < count; i++) {
            total = fma16(splat16(scores[i]), cached(wide, values, slot * padded + d), total);
            slot = slot + 1 < slots ? slot + 1 : sinks;
        }
        UNROLL for (int i = 0; i < PARTS; i++) v_store(head->values + d + i * LANES, total.v[i]);
    }
}

// One query head at one position over all that it may see: the sinks (through `near`), then the window.
INLINE void attend(int wide, words job, int64_t plane, int64_t position, const float *query, const float *near, float *out) {
    _Alignas(64) gathered head;
    int64_t head_dim = job[AT_HEAD_DIM], sinks = job[AT_SINKS];
    const void *keys = at(job[AT_KEYS], plane), *values = at(job[AT_VALUES], plane);
    memset(head.query, 0, job[AT_PADDED] * 4);
    memset(head.values, 0, job[AT_PADDED] * 4);
    head.maximum = -__builtin_inff(), head.sum = 0.0f;
    memcpy(head.query, near, head_dim * 4);
    int64_t visible = min_of(sinks, position + 1);
    for (int64_t first = 0; first < visible; first += SLOTS)
        attend_block(wide, job, keys, values, first, (int)min_of(SLOTS, visible - first), &head);
    memcpy(head.query, query, head_dim * 4);
    int64_t oldest = max_of(sinks, position + 1 - (job[AT_WINDOW] - sinks));
    for (int64_t first = oldest; first <= position; first += SLOTS)
        attend_block(wide, job, keys, values, first, (int)min_of(SLOTS, position + 1 - first), &head);
    float share = 1.0f / head.sum;
    for (int64_t i = 0; i < head_dim; i++) out[i] = head.values[i] * share;
}

// All query heads of one key-value head for one token; units count key-value heads fastest.
INLINE void attention(int wide, words job, int64_t unit) {
    int64_t token = unit / job[AT_KV_HEADS], kv_head = unit % job[AT_KV_HEADS];
    int64_t group = job[AT_HEADS] / job[AT_KV_HEADS], position = job[AT_START] + token;
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++) {
        int64_t offset = (token * job[AT_HEADS] + head) * job[AT_HEAD_DIM] * 4;
        const float *query = at(job[AT_Q], offset);
        const float *near = position >= job[AT_WINDOW] ? at(job[AT_Q_SINK], offset) : query;
        attend(wide, job, kv_head * plane_bytes(wide, job), position, query, near, at(job[AT_OUT], offset));
    }
}

KERNEL(rope_append_f16) { UNUSED; rope_append(0, at(address, 0), unit); return 0; }
KERNEL(rope_append_f32) { UNUSED; rope_append(1, at(address, 0), unit); return 0; }
KERNEL(attention_f16) { UNUSED; attention(0, at(address, 0), unit); return 0; }
KERNEL(attention_f32) { UNUSED; attention(1, at(address, 0), unit); return 0; }
