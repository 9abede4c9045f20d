// What all matrix products share: the job's words, the activations they read, and the outputs they write.
//
// Activations are prepared once per product: as zero-padded rows, quantised in groups of 16, or both. Pool
// units count through all matrices of a job, UNIT_ROWS rows each. Every output is one sum over the inputs in one fixed
// order, whatever the number of tokens or threads.
#pragma once
#include "vectors.h"
#include "words.h"

#define KERNEL(name) static int32_t name(void *result, void *error, intptr_t address, intptr_t unit)
#define UNUSED (void)result, (void)error, (void)unit

enum { GROUP = 16 };                // inputs that share one scale when activations are int8
enum { BLOCK = 80, GROUPS = 5 };    // inputs of a trit superblock, and their groups
enum { PADDING = 160 };             // rows of activations are padded to whole superblocks and to whole tiles of q8

typedef const int64_t *words;

INLINE void *at(int64_t address, int64_t offset) { return (char *)(intptr_t)address + offset; }

INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE float float_word(const int64_t *word) {
    float value;
    memcpy(&value, word, sizeof value);
    return value;
}

INLINE float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Groups of 16 that a padded row of activations has.
INLINE int64_t groups_of(words job) { return (job[WIDTH] + PADDING - 1) / PADDING * (PADDING / GROUP); }

// 16 inputs as int8 with one scale, and their sum, at place number k of the job's arrays.
INLINE void quantize_group(words job, const float *x, int64_t k, int64_t nibbles) {
    vf top = v_abs(v_load(x));
    for (int i = LANES; i < GROUP; i += LANES) top = v_larger(top, v_abs(v_load(x + i)));
    float largest = largest_magnitude(top), inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    int8_t quants[GROUP];
    vi total = {0};
    for (int i = 0; i < GROUP; i += LANES) {
        vi q = v_round(v_load(x + i) * inverse);
        v_store_i8(quants + i, q);
        total += q;
    }
    *(int32_t *)at(job[SUMS], k * 4) = v_sum_lanes(total);
    *(float *)at(job[SCALES], k * 4) = largest / 127.0f;
    if (job[WANTED] & QUANTS_IN_ORDER) memcpy(at(job[QUANTS], k * GROUP), quants, GROUP);
    if (job[WANTED] & QUANTS_AS_NIBBLES) evens_first(quants, at(job[QUANTS], (nibbles + k) * GROUP));
}

// Prepare the activations of TOGETHER tokens: zero-padded rows of float32, quantised groups, or both, as is wanted.
// quants: (2, groups, n, 16), in their order, then evens first; scales, sums: (groups, n)
KERNEL(pack_activations) {
    UNUSED;
    words job = at(address, 0);
    int64_t n = job[N], width = job[WIDTH], groups = groups_of(job);
    int64_t first = unit * TOGETHER, stop = min_of(first + TOGETHER, n);
    for (int64_t g = 0; g < groups; g++)
        for (int64_t token = first; token < stop; token++) {
            const float *x = at(job[X], token * job[X_STRIDE] + g * GROUP * 4);
            __builtin_prefetch(x + 4 * GROUP);  // so many rows are more than the hardware follows
            float filled[GROUP] = {0};
            if ((g + 1) * GROUP > width) x = memcpy(filled, x, max_of(0, width - g * GROUP) * 4);
            if (job[WANTED] & FLOATS) memcpy(at(job[PADDED], token * job[PADDED_STRIDE] + g * GROUP * 4), x, GROUP * 4);
            if (job[WANTED] & ~FLOATS) quantize_group(job, x, g * n + token, groups * n);
        }
    return 0;
}

// The matrix that a unit belongs to.
INLINE words matrix_of(words job, int64_t unit) {
    words matrix = job + HEAD;
    for (int64_t i = 1; i < job[MATRICES] && unit >= matrix[MATRIX + FIRST]; i++) matrix += MATRIX;
    return matrix;
}

// Ask for memory that will be read soon, wherever it lies: the hardware alone does not look far enough ahead. A few lines
// at once, or the CPU waits until all are there, in the order of their addresses, which the hardware goes on with, and
// into the second cache: what waits for memory in the nearest is soon too much.
INLINE void ask_for(const void *bytes, int64_t count) {
    UNROLL for (int64_t i = 0; i < count; i += 64) __builtin_prefetch((const char *)bytes + i, 0, 2);
}

// Ask for one line of what is read next to come into the nearest cache.
INLINE void ask_near(const void *bytes) { __builtin_prefetch(bytes, 0, 3); }

INLINE int64_t first_row(words matrix, int64_t unit) { return (unit - matrix[FIRST]) * UNIT_ROWS; }
INLINE int64_t last_row(words matrix, int64_t unit) {
    return min_of(first_row(matrix, unit) + UNIT_ROWS, matrix[OUTPUTS]);
}

// Write or add one output, with the bias if there is one.
INLINE void emit(words job, words matrix, int64_t token, int64_t row, float value) {
    float *out = at(matrix[OUT], token * matrix[OUT_STRIDE] + row * 4);
    if (matrix[BIAS]) value += *(float *)at(matrix[BIAS], row * 4);
    if (job[ADD]) value += *out;
    *out = value;
}

// Write or add LANES outputs of neighbouring rows: the same sums as `emit`, all lanes at once.
INLINE void emit_rows(words job, words matrix, int64_t token, int64_t row, vf values) {
    float *out = at(matrix[OUT], token * matrix[OUT_STRIDE] + row * 4);
    if (matrix[BIAS]) values += v_load(at(matrix[BIAS], row * 4));
    if (job[ADD]) values += v_load(out);
    v_store(out, values);
}
