// Blocks of cached tokens as attention wants them; see runtime/kernels/numba_blocks.py.
#pragma once
#include "ring.h"
#include "tiles.h"

INLINE float *in(float *area, int64_t offset) { return area + offset / 4; }

// ==== As they are stored ====

// Of a block's tokens those that are seen: from start to before stop.
typedef struct { int64_t start, stop; } sight;

// How many bytes of keys a unit asks for during each step of a block's sums, in this order of their addresses; and whether
// they are all heads' of the next block, or of a piece that is read PIECES_AHEAD pieces later; scales and codes.
typedef struct { int64_t scores, weights, values; int next_block; } key_plan;

enum { PER_FOUR = 4 * CACHED / 16 * 64 };  // bytes that are asked for with the weights of four rows

// One unit's work: its key-value heads and tokens, rows of one head and of all heads; the span that it is at, and whether
// that is one of the sinks; the block of it that it is at, the block's slot, of which positions low .. high - 1 are
// wanted, the tiles that these lie in, and whether every row sees all of the block
typedef struct {
    int64_t kv_first, kv_stop, first, tokens, rows, all_rows;
    key_plan keys;
    int64_t start, stop;
    int sinks, whole;
    int64_t block, slot, low, high;
    sight tiles;
} task;

enum { PIECES_AHEAD = 2, NEAR = 4096 };  // pieces, and bytes, from what is read to what is asked for

// A block's scales and codes of one head, and how far off those are that the unit reads PIECES_AHEAD pieces later.
typedef struct { const uint16_t *scales; const uint8_t *codes; int64_t ahead; } ring_piece;

// A task's block of one head, of which not all tokens may be there.
INLINE ring_piece find_piece(words side, int64_t kv_head, const task *t) {
    int64_t own = side[SD_HEADS] > 1, head = own ? kv_head : 0;
    int64_t heads = own ? t->kv_stop - t->kv_first : 1, number = own ? kv_head - t->kv_first : 0;
    int64_t later = number + PIECES_AHEAD, blocks = 0;
    for (; later >= heads; later -= heads) blocks++;
    int64_t ahead = blocks * side[SD_BLOCK_STRIDE] + (later - number) * side[SD_HEAD_STRIDE];
    return (ring_piece){scales_at(side, head, t->slot), (uint8_t *)codes_at(side, head, t->slot), ahead};
}

// What is asked for while something else is read: from where on, and how many bytes with each step; with 0 nothing is.
// near: bytes from what is read to what is to come from the second cache into the nearest
typedef struct { const uint8_t *next; int64_t step, near; } errand;

// Where keys begin that a unit asks for during a block.
INLINE const uint8_t *asked_keys(words keys, const task *t) {
    ring_piece x = find_piece(keys, t->kv_first, t);
    return (const uint8_t *)x.scales + (t->keys.next_block ? keys[SD_BLOCK_STRIDE] : x.ahead);
}

// With every 64 bytes of the codes of a head.
INLINE errand asked_with_scores(words keys, int64_t kv_head, const task *t) {
    int64_t heads = t->keys.next_block ? keys[SD_HEADS] : 1, share = t->keys.scores / heads;
    int64_t step = share / (CACHED * keys[SD_CODE_BYTES] / 64), number = heads > 1 ? kv_head - t->kv_first : 0;
    return (errand){asked_keys(keys, t) + number * share, step, t->keys.next_block ? 2 * NEAR : NEAR};
}

// With every sixteen weights of some rows.
INLINE errand asked_with_weights(words keys, const task *t) {
    return (errand){asked_keys(keys, t) + t->keys.scores, 64, 0};
}

// With every sum of four rows, four tokens and 32 numbers.
INLINE errand asked_with_values(words job, const task *t) {
    int64_t steps = job[AT_VALUES + SD_SEEN] / 32 * t->all_rows / 4 * (CACHED / 4);
    const uint8_t *next = asked_keys(job + AT_KEYS, t) + t->keys.scores + t->keys.weights;
    return (errand){next, t->keys.values / steps, 0};
}

// The tokens of a block that a step goes through: all of them is known when the code is compiled.
INLINE sight tokens_of_block(int whole, const task *t) { return whole ? (sight){0, CACHED} : t->tiles; }

// x in lanes start .. stop - 1 of the LANES from `lane` on, `other` in the rest.
INLINE vf keep_lanes(vf x, int64_t lane, sight seen, float other) {
    int32_t numbers[LANES];
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    vi number = v_load_i32(numbers) + (int32_t)lane;
    vi inside = (vi)(number >= (int32_t)seen.start) & (vi)(number < (int32_t)seen.stop);
    return (vf)((inside & (vi)x) | (~inside & (vi)v_splat(other)));
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
    for (int64_t i = 0; i < count; i++, slot++, x += stride)
        rotate(x, x, at(side[SD_COS], slot * turn), at(side[SD_SIN], slot * turn), job[AT_HEAD_DIM]);
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
    for (int64_t i = 0; i < count; i++) hadamard(x + i * side[SD_PADDED], side[SD_WIDTH], side[SD_ROTATED]);
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
