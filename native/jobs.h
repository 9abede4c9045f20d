// What all matrix products share: the job's words, the activations they read, and the outputs they write.
//
// Activations are copied once per product to zero-padded rows and, if int8 is wanted, quantised in blocks of 80. Pool
// units count through all matrices of a job, UNIT_ROWS rows each. Every output is one sum over the inputs in one fixed
// order, whatever the number of tokens or threads.
#pragma once
#include "vectors.h"
#include "words.h"

#define KERNEL(name) static int32_t name(void *result, void *error, intptr_t address, intptr_t unit)
#define UNUSED (void)result, (void)error, (void)unit

enum { BLOCK = 80, GROUPS = 5 };

typedef const int64_t *words;

INLINE void *at(int64_t address, int64_t offset) { return (char *)(intptr_t)address + offset; }

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

// One block of 80 inputs as int8 with one scale, and the sums of its groups of 16.
INLINE void quantize_block(const float *x, int8_t *quants, int32_t *sums, float *scale) {
    vf top = v_abs(v_load(x));
    for (int i = LANES; i < BLOCK; i += LANES) top = v_larger(top, v_abs(v_load(x + i)));
    float largest = largest_magnitude(top);
    float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
    *scale = largest / 127.0f;
    for (int g = 0; g < GROUPS; g++) {
        vi sum = {0};
        for (int i = g * 16; i < g * 16 + 16; i += LANES) {
            vi q = v_round(v_load(x + i) * inverse);
            v_store_i8(quants + i, q);
            sum += q;
        }
        sums[g] = 0;
        for (int i = 0; i < LANES; i++) sums[g] += sum[i];
    }
}

// Copy one token's inputs to a zero-padded row and, if int8 is wanted, quantise it.
// quants: (blocks, n, 80); scales: (blocks, n); sums: (blocks, n, 5)
KERNEL(pack_activations) {
    UNUSED;
    words job = at(address, 0);
    int64_t n = job[N], width = job[WIDTH], whole = job[PADDED_STRIDE] / 4;
    float *padded = at(job[PADDED], unit * job[PADDED_STRIDE]);
    memcpy(padded, at(job[X], unit * job[X_STRIDE]), width * 4);
    memset(padded + width, 0, (whole - width) * 4);
    if (!job[INT8]) return 0;
    int8_t *quants = at(job[QUANTS], unit * BLOCK);
    int32_t *sums = at(job[SUMS], unit * GROUPS * 4);
    float *scales = at(job[SCALES], unit * 4);
    for (int64_t block = 0; block * BLOCK < width; block++)
        quantize_block(padded + block * BLOCK, quants + block * n * BLOCK, sums + block * n * GROUPS, scales + block * n);
    return 0;
}

// The matrix that a unit belongs to.
INLINE words matrix_of(words job, int64_t unit) {
    words matrix = job + HEAD;
    for (int64_t i = 1; i < job[MATRICES] && unit >= matrix[MATRIX + FIRST]; i++) matrix += MATRIX;
    return matrix;
}

INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

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
