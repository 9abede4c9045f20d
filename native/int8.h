// Products of q8 and nf4 matrices with int8 activations.
//
// As many rows as a register has lanes are taken together, 32 bytes of each at a time: a tile, transposed so that a
// row is a lane. It is decoded once and used for all tokens, two groups of 16 inputs at a time, in exact integer sums.
// NF4 levels are integers of 14 bits, split in two bytes. Every output adds its groups in their order.
#pragma once
#include "dense.h"

enum { AT_ONCE = 256 };  // tokens that share one decoding of the weights
enum { TILES = 16 };     // tiles whose scales are decoded at a time

// LANES rows of a matrix: addresses of their bytes and numbers of their blocks.
typedef struct { const uint8_t *data[LANES]; int64_t block[LANES]; } lines;

// The weights of 32 inputs: four vectors to a group of 16, of q8; high bytes, then low ones, of nf4.
typedef struct { vu q[2][8]; } weights32;

INLINE vf q8_group(const vu *q, const int8_t *x, int32_t sum) {
    vi total = v_splat_i32(sum * I8_OFFSET);
    UNROLL for (int j = 0; j < 4; j++) total = v_dot4_i8(total, q[j], v_splat_quad(x + 4 * j));
    return v_to_f32(total);
}

INLINE vf nf4_group(const vu *q, const int8_t *x, int32_t sum) {
    vi high = v_splat_i32(sum * -LEVEL_MIDDLE), low = {0};
    UNROLL for (int j = 0; j < 4; j++) {
        vu inputs = v_splat_quad(x + 4 * j);
        high = v_dot4(high, q[j], inputs);
        low = v_dot4(low, q[4 + j], inputs);
    }
    return v_to_f32((high << LEVEL_BITS) + low);
}

// total + 32 inputs of one token times LANES rows; group: the number of the first of its two groups, n apart.
INLINE vf add32(int codec, const weights32 *w, words job, int64_t n, int64_t group, vf factor, vf total) {
    const int8_t *quants = at(job[QUANTS], codec == Q8 ? 0 : groups_of(job) * n * GROUP);  // those ordered as nibbles
    vf both = {0};
    UNROLL for (int i = 0; i < 2; i++) {
        int64_t k = group + i * n;
        int32_t sum = *(const int32_t *)at(job[SUMS], k * 4);
        float scale = *(const float *)at(job[SCALES], k * 4);
        vf exact = codec == Q8 ? q8_group(w->q[i], quants + k * GROUP, sum) : nf4_group(w->q[i], quants + k * GROUP, sum);
        both = i ? v_fma(exact, v_splat(scale), both) : exact * scale;
    }
    return v_fma(both, factor, total);
}

// 32 inputs of LANES rows, from four or eight vectors of a tile.
INLINE weights32 weights_of(int codec, const vu *tile, const float *table) {
    weights32 w;
    UNROLL for (int i = 0; i < 2; i++)
        UNROLL for (int j = 0; j < 4; j++) {
            if (codec == Q8) {
                w.q[i][j] = v_factor_i8(tile[i * 4 + j]);
            } else {
                vu codes = tile[i * 2 + j / 2], index = j % 2 ? codes & 15 : codes >> 4;
                w.q[i][j] = v_lookup_u8((const uint8_t *)table + TABLE_HIGH, index);
                w.q[i][4 + j] = v_lookup_u8((const uint8_t *)table + TABLE_LOW, index);
            }
        }
    return w;
}

// scale[i][r] = the scale of block `start` + i of row r, for the blocks that `count` says.
INLINE void tile_scales(int codec, words matrix, const lines *rows, int64_t start, int64_t count, float (*scale)[LANES]) {
    source w = {codec, 0, matrix, 0};
    for (int r = 0; r < LANES; r++)
        for (int64_t i = 0; i < count; i++) scale[i][r] = scale_of(w, rows->block[r] + start + i);
}

// total = LANES rows times the int8 activations of tokens first .. first + count - 1.
INLINE void strip(int codec, int single, words job, words matrix, const lines *rows, int64_t first, int count, vf *total) {
    int64_t n = job[N], inputs = codec == Q8 ? 32 : 64, tiles = (job[WIDTH] + inputs - 1) / inputs;
    const float *table = at(matrix[TABLE], 0);
    float scale[TILES][LANES];
    vf alone = {0};
    for (int i = 0; i < count; i++) total[i] = alone;
    const uint8_t *ahead = rows->data[0] + LANES * tiles * TILE_BYTES;
    for (int64_t t = 0; t < tiles; t++) {
        if (t % TILES == 0) tile_scales(codec, matrix, rows, t, min_of(TILES, tiles - t), scale);
        vf factor = v_load(scale[t % TILES]);
        vu tile[8];
        v_load_tile(rows->data, t * TILE_BYTES, tile);
        // The hardware cannot follow as many rows: ask for the next ones, in the order of their bytes.
        if (single) ask_for(ahead + t * LANES * TILE_BYTES, LANES * TILE_BYTES);
        for (int half = 0; half < inputs / 32; half++) {
            weights32 w = weights_of(codec, tile + half * 4, table);
            int64_t group = (t * inputs + half * 32) / GROUP;
            if (single)
                alone = add32(codec, &w, job, 1, group, factor, alone);
            else
                for (int i = 0; i < count; i++) total[i] = add32(codec, &w, job, n, group * n + first + i, factor, total[i]);
        }
    }
    if (single) total[0] = alone;
}

INLINE void int8_unit(int codec, words job, int64_t unit) {
    words matrix = matrix_of(job, unit);
    int64_t stop = last_row(matrix, unit), inputs = codec == Q8 ? 32 : 64, tiles = (job[WIDTH] + inputs - 1) / inputs;
    float step = codec == Q8 ? 1.0f : *(const float *)at(matrix[TABLE], TABLE_UNIT);
    vf total[AT_ONCE];
    for (int64_t row = first_row(matrix, unit); row < stop; row += LANES) {
        lines rows;
        for (int r = 0; r < LANES; r++) {
            rows.block[r] = min_of(row + r, stop - 1) * tiles;
            rows.data[r] = at(matrix[DATA], rows.block[r] * TILE_BYTES);
        }
        for (int64_t first = 0; first < job[N]; first += AT_ONCE) {
            int count = (int)min_of(AT_ONCE, job[N] - first);
            if (job[N] == 1)
                strip(codec, 1, job, matrix, &rows, 0, 1, total);
            else
                strip(codec, 0, job, matrix, &rows, first, count, total);
            for (int i = 0; i < count; i++) {
                vf value = total[i] * step;
                if (row + LANES <= stop)
                    emit_rows(job, matrix, first + i, row, value);
                else
                    for (int r = 0; row + r < stop; r++) emit(job, matrix, first + i, row + r, value[r]);
            }
        }
    }
}

KERNEL(q8_int8) { UNUSED; int8_unit(Q8, at(address, 0), unit); return 0; }
KERNEL(nf4_int8) { UNUSED; int8_unit(NF4, at(address, 0), unit); return 0; }
KERNEL(nf4_nested_int8) { UNUSED; int8_unit(NF4_NESTED, at(address, 0), unit); return 0; }
