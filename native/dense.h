// Products of f32, f16, bf16, q8 and nf4 matrices with float32 activations.
//
// Each output is sixteen sums, one for each lane, over the columns that fill vectors, added up as a tree, then the
// other columns. One to three tokens read the weights where they lie; for more, a piece of four rows is expanded to
// float32 and used for all tokens.
#pragma once
#include "jobs.h"

enum codec { F32, F16, BF16, Q8, NF4, NF4_NESTED };

enum { NESTED_BLOCKS = 256 };        // NF4 blocks whose scales share one nested scale
enum { STRIP = 4, PIECE = 512 };      // rows that are computed together; columns that are expanded at a time
enum { WIDE = LANES == 8 ? 2 : 4 };  // tokens that are computed together, as registers allow

// A matrix's codec and how its values are rounded are constants wherever this is inlined.
typedef struct { int codec, rounding; words matrix; const void *data; } source;

// The scale of a block of q8 or NF4, the latter in bitsandbytes' order of rounding.
INLINE float scale_of(source w, int64_t block) {
    if (w.codec == Q8) return v_read_f16((const uint16_t *)at(w.matrix[AUX], 0) + block);
    if (w.codec == NF4) return *(const float *)at(w.matrix[AUX], block * 4);
    const float *offset_and_levels = at(w.matrix[AUX3], 0);
    float nested = *(const float *)at(w.matrix[AUX2], block / NESTED_BLOCKS * 4);
    return offset_and_levels[1 + *(const uint8_t *)at(w.matrix[AUX], block)] * nested + offset_and_levels[0];
}

// The scale of the NF4 block that holds the weight number `flat`.
INLINE float absmax(source w, int64_t flat) { return scale_of(w, flat >> w.matrix[BLOCK_SHIFT]); }

INLINE vf as_stored(source w, vf value) {
    return w.rounding == 1 ? v_round_f16(value) : w.rounding == 2 ? v_round_bf16(value) : value;
}

// 32 weights from number `flat` on (a multiple of 32); those of q8 and nf4 share one scale.
INLINE void load32(source w, int64_t flat, vf weights[2 * PARTS]) {
    float scale = 1.0f;
    if (w.codec == Q8) scale = scale_of(w, flat >> 5);
    if (w.codec >= NF4) scale = absmax(w, flat);
    const float *table = at(w.matrix[TABLE], 0);
    UNROLL for (int i = 0; i < 2 * PARTS; i++) {
        int64_t k = flat + i * LANES;
        switch (w.codec) {
        case F32: weights[i] = v_load((const float *)w.data + k); break;
        case F16: weights[i] = v_load_f16((const uint16_t *)w.data + k); break;
        case BF16: weights[i] = v_load_bf16((const uint16_t *)w.data + k); break;
        case Q8: weights[i] = v_to_f32(v_load_i8((const int8_t *)w.data + k)) * scale; break;
        default: weights[i] = as_stored(w, v_lookup16(table, v_load_nibbles((const uint8_t *)w.data + k / 2)) * scale);
        }
    }
}

// One weight, for the columns that fill no vector. The rows of q8 are padded to whole ones.
INLINE float load1(source w, int64_t flat) {
    uint32_t bits;
    switch (w.codec) {
    case F32: return ((const float *)w.data)[flat];
    case F16: return v_read_f16((const uint16_t *)w.data + flat);
    case BF16: bits = (uint32_t)((const uint16_t *)w.data)[flat] << 16; return float_of_bits(bits);
    case Q8: return 0.0f;
    default: bits = ((const uint8_t *)w.data)[flat / 2] >> (flat % 2 ? 0 : 4) & 15;
    }
    float value = ((const float *)at(w.matrix[TABLE], 0))[bits] * absmax(w, flat);
    return as_stored(w, v_splat(value))[0];
}

// Four rows, from `first` on; `last` is repeated if fewer are left. start: the number of each row's first weight.
typedef struct { int64_t first, last, width, whole, start[STRIP]; } rows;

// Add the lanes of one token's four rows, and the columns from `whole` on, and write the outputs.
INLINE void finish(source w, words job, rows r, int64_t token, const f32x16 sum[STRIP]) {
    const float *x = at(job[PADDED], token * job[PADDED_STRIDE]);
    for (int i = 0; i < STRIP && r.first + i <= r.last; i++) {
        float rest = 0.0f;
        for (int64_t k = r.whole; k < r.width; k++) rest += load1(w, r.start[i] + k) * x[k];
        emit(job, w.matrix, token, r.first + i, sum16(sum[i]) + rest);
    }
}

// One token, straight from the packed weights.
INLINE void one_token(source w, words job, rows r, int64_t token) {
    const float *x = at(job[PADDED], token * job[PADDED_STRIDE]);
    f32x16 sum[STRIP] = {0};
    for (int64_t k = 0; k < r.whole; k += 32)
        UNROLL for (int i = 0; i < STRIP; i++) {
            vf weights[2 * PARTS];
            load32(w, r.start[i] + k, weights);
            UNROLL for (int p = 0; p < 2 * PARTS; p++)
                sum[i].v[p % PARTS] = v_fma(weights[p], v_load(x + k + p * LANES), sum[i].v[p % PARTS]);
        }
    finish(w, job, r, token, sum);
}

typedef float piece[STRIP][PIECE];

// Add the products of a piece's columns to `count` tokens' sums, one part of the sixteen lanes after the other.
INLINE void add_piece(const piece weights, int64_t columns, const float *x, int64_t stride, int count, f32x16 (*sum)[STRIP]) {
    for (int p = 0; p < PARTS; p++) {
        vf acc[WIDE][STRIP];
        UNROLL for (int t = 0; t < count; t++)
            UNROLL for (int i = 0; i < STRIP; i++) acc[t][i] = sum[t][i].v[p];
        for (int64_t k = p * LANES; k < columns; k += 16) {
            UNROLL for (int t = 0; t < count; t++) {
                vf inputs = v_load((const float *)((const char *)(x + k) + t * stride));
                UNROLL for (int i = 0; i < STRIP; i++) acc[t][i] = v_fma(v_load(&weights[i][k]), inputs, acc[t][i]);
            }
        }
        UNROLL for (int t = 0; t < count; t++)
            UNROLL for (int i = 0; i < STRIP; i++) sum[t][i].v[p] = acc[t][i];
    }
}

enum { MANY = 64 };  // tokens whose sums are kept at a time

// Tokens first .. first + count - 1, from pieces of the four rows expanded to float32.
INLINE void many_tokens(source w, words job, rows r, int64_t first, int count) {
    _Alignas(64) piece weights;
    f32x16 sum[MANY][STRIP];
    memset(sum, 0, count * sizeof sum[0]);
    int64_t stride = job[PADDED_STRIDE];
    for (int64_t start = 0; start < r.whole; start += PIECE) {
        int64_t columns = min_of(PIECE, r.whole - start);
        for (int i = 0; i < STRIP; i++)
            for (int64_t k = 0; k < columns; k += 32) {
                vf some[2 * PARTS];
                load32(w, r.start[i] + start + k, some);
                UNROLL for (int p = 0; p < 2 * PARTS; p++) v_store(&weights[i][k + p * LANES], some[p]);
            }
        int t = 0;
        for (; t + WIDE <= count; t += WIDE)
            add_piece(weights, columns, at(job[PADDED], (first + t) * stride + start * 4), stride, WIDE, sum + t);
        for (; t < count; t++)
            add_piece(weights, columns, at(job[PADDED], (first + t) * stride + start * 4), stride, 1, sum + t);
    }
    for (int t = 0; t < count; t++) finish(w, job, r, first + t, sum[t]);
}

INLINE void dense_rows(int codec, int rounding, words job, words matrix, int64_t unit) {
    source w = {codec, rounding, matrix, at(matrix[DATA], 0)};
    int64_t n = job[N], width = codec == Q8 ? (job[WIDTH] + 31) / 32 * 32 : job[WIDTH];
    int64_t whole = codec >= NF4 && width % 32 ? 0 : width / 32 * 32;  // nf4 blocks do not end with the rows
    int64_t stop = last_row(matrix, unit);
    for (int64_t row = first_row(matrix, unit); row < stop; row += STRIP) {
        rows r = {row, stop - 1, width, whole, {0}};
        for (int i = 0; i < STRIP; i++) r.start[i] = min_of(row + i, stop - 1) * width;
        if (n < STRIP)
            for (int64_t token = 0; token < n; token++) one_token(w, job, r, token);
        else
            for (int64_t first = 0; first < n; first += MANY)
                many_tokens(w, job, r, first, (int)min_of(MANY, n - first));
    }
}

// One pool unit. Only nf4 rounds its values, to the type that the file states.
INLINE void dense_unit(int codec, words job, int64_t unit) {
    words matrix = matrix_of(job, unit);
    if (codec >= NF4 && matrix[ROUND] == 1)
        dense_rows(codec, 1, job, matrix, unit);
    else if (codec >= NF4 && matrix[ROUND] == 2)
        dense_rows(codec, 2, job, matrix, unit);
    else
        dense_rows(codec, 0, job, matrix, unit);
}

KERNEL(f32) { UNUSED; dense_unit(F32, at(address, 0), unit); return 0; }
KERNEL(f16) { UNUSED; dense_unit(F16, at(address, 0), unit); return 0; }
KERNEL(bf16) { UNUSED; dense_unit(BF16, at(address, 0), unit); return 0; }
KERNEL(q8) { UNUSED; dense_unit(Q8, at(address, 0), unit); return 0; }
KERNEL(nf4) { UNUSED; dense_unit(NF4, at(address, 0), unit); return 0; }
KERNEL(nf4_nested) { UNUSED; dense_unit(NF4_NESTED, at(address, 0), unit); return 0; }
