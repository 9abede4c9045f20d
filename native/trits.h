// Products of trit matrices with activations.
//
// A matrix is read strip by strip (16 rows, one 32-bit lane each; formats/SPEC.md gives the bytes): a superblock is
// decoded once, as many rows at a time as a register has lanes, and used for all tokens, with int8 activations in
// exact integer sums, or with float32 ones. No byte leads a read astray: lookups take their index modulo 32.
#pragma once
#include "panel.h"

enum { ROWS = 16 };                // of a strip
enum { AHEAD = 8192 };             // bytes between what is read and what is asked for

#define SUPERBLOCK(depth) (256 * (depth) + 48)

// Split v into its digit of that weight, 0..2, and the rest below it. For values below three times the weight a
// byte-wise minimum does the comparing: v - weight wraps to something large unless v has it.
INLINE vu digit(vu v, int weight, vu *rest) {
    vu once = v_min_u8(v, v - (uint8_t)weight);
    *rest = v_min_u8(once, once - (uint8_t)weight);
    // The low two bits of 81 and 9 count upwards (0, 1, 2), those of 27 and 3 downwards (0, 3, 2).
    return (weight == 81 || weight == 9 ? v - *rest : *rest - v) & 3;
}

INLINE vu triple(vu v) { return v + v + v; }

// The byte vectors of one quad as levels of the five groups, unsigned 0 .. 3^depth - 1.
INLINE void decode(int depth, const uint8_t *bytes, vu q[GROUPS]) {
    vu t0, t1, t2, t3, a, b, c, rest, v0 = v_load_bytes(bytes);
    if (depth == 1) {
        q[0] = digit(v0, 81, &rest);
        q[1] = digit(rest, 27, &rest);
        q[2] = digit(rest, 9, &rest);
        q[3] = digit(rest, 3, &q[4]);
        return;
    }
    t0 = digit(v0, 81, &q[0]);
    t1 = digit(v_load_bytes(bytes + 64), 81, &q[1]);
    if (depth == 2) {
        vu other = q[1];
        a = digit(q[0], 27, &rest);
        b = digit(rest, 9, &q[0]);
        q[1] = triple(a) + b;
        a = digit(other, 27, &rest);
        b = digit(rest, 9, &q[2]);
        q[3] = triple(a) + b;
        q[4] = triple(t0) + t1;
        return;
    }
    t2 = digit(v_load_bytes(bytes + 128), 81, &q[2]);
    if (depth == 3) {
        a = digit(q[0], 27, &q[0]);
        b = digit(q[1], 27, &q[1]);
        c = digit(q[2], 27, &q[2]);
        q[3] = triple(triple(t2) + t0) + a;
        q[4] = triple(triple(c) + t1) + b;
        return;
    }
    t3 = digit(v_load_bytes(bytes + 192), 81, &q[3]);
    q[4] = triple(triple(triple(t0) + t1) + t2) + t3;
}

// The units (LANES rows) of the five groups, from their scale codes.
INLINE void decode_units(const uint8_t *codes, const float *table, vf unit[GROUPS]) {
    vi s0 = v_load_u8(codes), s1 = v_load_u8(codes + 16), s2 = v_load_u8(codes + 32);
    vi h0 = s0 * 2428 >> 16, h1 = s1 * 2428 >> 16, h2 = s2 * 2428 >> 16;  // / 27 for 0 .. 255
    vi third = h2 * 21846 >> 16;                                         // / 3
    unit[0] = v_lookup(table, s0 - h0 * 27);
    unit[1] = v_lookup(table, s1 - h1 * 27);
    unit[2] = v_lookup(table, s2 - h2 * 27);
    unit[3] = v_lookup(table, h0 + (h2 - third * 3) * 9);
    unit[4] = v_lookup(table, h1 + third * 9);
}

// LANES rows of a superblock, from the row `part` of its strip on: sixteen inputs of each group.
INLINE void decode_part(int depth, const uint8_t *block, const float *table, int part, vu q[GROUPS][4], vf unit[GROUPS]) {
    UNROLL for (int j = 0; j < 4; j++) {
        vu levels[GROUPS];
        decode(depth, block + j * 64 * depth + part * 4, levels);
        UNROLL for (int g = 0; g < GROUPS; g++) q[g][j] = levels[g];
    }
    decode_units(block + 256 * depth + part, table, unit);
}

// Levels are stored unsigned: -L times the sum of the inputs is added again.
INLINE int32_t offset_of(int depth) { return depth == 1 ? -1 : depth == 2 ? -4 : depth == 3 ? -13 : -40; }

// total = 16 rows times the int8 activations of a single token.
INLINE void strip_int8(int depth, words job, const uint8_t *data, const float *table, float total[ROWS]) {
    int64_t blocks = (job[WIDTH] + BLOCK - 1) / BLOCK;
    for (int part = 0; part < ROWS; part += LANES) {
        const uint8_t *block = data;
        vf sum = {0};
        for (int64_t k = 0; k < blocks; k++, block += SUPERBLOCK(depth)) {
            vu q[GROUPS][4];
            vf unit[GROUPS];
            if (part == 0) ask_for(block + AHEAD, SUPERBLOCK(depth));
            decode_part(depth, block, table, part, q, unit);
            UNROLL for (int g = 0; g < GROUPS; g++) {
                int64_t group = k * GROUPS + g;
                sum = add_group(1, q[g], unit[g], offset_of(depth), quants_of(job, 0, group), sum_of(job, group),
                                scale_of_group(job, group), sum);
            }
        }
        v_store(total + part, sum);
    }
}

// total = the strips of a unit times the int8 activations of the tokens of a span.
INLINE void panels_int8(int depth, words job, const uint8_t *data, int strips, const float *table, span tokens, unit_sums total) {
    int64_t blocks = (job[WIDTH] + BLOCK - 1) / BLOCK;
    panel panels[GROUPS];
    memset(panels, 0, sizeof panels);
    memset(total, 0, tokens.count * sizeof total[0]);
    for (int64_t k = 0; k < blocks; k++) {
        for (int c = 0; c < strips * PARTS; c++) {
            vu q[GROUPS][4];
            vf unit[GROUPS];
            decode_part(depth, data + (c / PARTS * blocks + k) * SUPERBLOCK(depth), table, c % PARTS * LANES, q, unit);
            UNROLL for (int g = 0; g < GROUPS; g++) {
                UNROLL for (int j = 0; j < 4; j++) panels[g].q[c][j] = q[g][j];
                panels[g].unit[c] = unit[g];
            }
        }
        for (int g = 0; g < GROUPS; g++)
            add_panel(1, &panels[g], offset_of(depth), job, 0, k * GROUPS + g, tokens, strips * PARTS, total);
    }
}

INLINE vf rounded(vf value, int rounding) {
    return rounding == 1 ? v_round_f16(value) : rounding == 2 ? v_round_bf16(value) : value;
}

// 80 inputs of LANES rows as float32 weights, one vector for each input.
INLINE void expand(int depth, const uint8_t *data, const float *table, int rounding, int part, vf weights[BLOCK]) {
    int32_t top = depth == 1 ? 1 : depth == 2 ? 4 : depth == 3 ? 13 : 40;
    vf unit[GROUPS];
    decode_units(data + 256 * depth + part, table, unit);
    for (int j = 0; j < 4; j++) {
        vu q[GROUPS];
        decode(depth, data + j * 64 * depth + part * 4, q);
        UNROLL for (int g = 0; g < GROUPS; g++)
            UNROLL for (int k = 0; k < 4; k++)
                weights[g * 16 + j * 4 + k] = rounded(v_to_f32(((vi)q[g] >> (8 * k) & 255) - top) * unit[g], rounding);
    }
}

// Add 80 products to the sums of `count` tokens; x: their inputs, `stride` bytes apart.
INLINE void add_block(const vf weights[BLOCK], const float *x, int64_t stride, int count, int row, float (*total)[UNIT_ROWS]) {
    vf sum[4];
    UNROLL for (int i = 0; i < count; i++) sum[i] = v_load(&total[i][row]);
    for (int k = 0; k < BLOCK; k++)
        UNROLL for (int i = 0; i < count; i++)
            sum[i] = v_fma(weights[k], v_splat(*(const float *)((const char *)(x + k) + i * stride)), sum[i]);
    UNROLL for (int i = 0; i < count; i++) v_store(&total[i][row], sum[i]);
}

// total = 16 rows, the unit's from `row` on, times the float32 activations of the tokens of a span.
INLINE void strip_f32(int depth, words job, words matrix, const uint8_t *data, span tokens, int row, unit_sums total) {
    int64_t stride = job[PADDED_STRIDE], blocks = (job[WIDTH] + BLOCK - 1) / BLOCK;
    for (int i = 0; i < tokens.count; i++) memset(&total[i][row], 0, ROWS * 4);
    for (int64_t block = 0; block < blocks; block++, data += SUPERBLOCK(depth))
        for (int part = 0; part < ROWS; part += LANES) {
            vf weights[BLOCK];
            expand(depth, data, at(matrix[TABLE], 0), (int)matrix[ROUND], part, weights);
            const float *x = at(job[PADDED], tokens.first * stride + block * BLOCK * 4);
            int i = 0;
            for (; i + 4 <= tokens.count; i += 4) add_block(weights, at((intptr_t)x, i * stride), stride, 4, row + part, total + i);
            for (; i < tokens.count; i++) add_block(weights, at((intptr_t)x, i * stride), stride, 1, row + part, total + i);
        }
}

// One pool unit of trit matrices. Inlined into its kernel, so that depth and int8 are constants there.
INLINE void trit_unit(int depth, int int8, words job, int64_t unit) {
    words matrix = matrix_of(job, unit);
    const float *table = at(matrix[TABLE], 0);
    int64_t start = first_row(matrix, unit), stop = last_row(matrix, unit), blocks = (job[WIDTH] + BLOCK - 1) / BLOCK;
    int strips = (int)((stop - start + ROWS - 1) / ROWS);
    const uint8_t *data = at(matrix[DATA], start / ROWS * blocks * SUPERBLOCK(depth));
    _Alignas(64) unit_sums total;
    for (span tokens = {0, 0}; tokens.first < job[N]; tokens.first += AT_ONCE) {
        tokens.count = (int)min_of(AT_ONCE, job[N] - tokens.first);
        if (int8 && job[N] > 1)
            panels_int8(depth, job, data, strips, table, tokens, total);
        else
            for (int s = 0; s < strips; s++) {
                const uint8_t *strip = data + s * blocks * SUPERBLOCK(depth);
                if (int8)
                    strip_int8(depth, job, strip, table, &total[0][s * ROWS]);
                else
                    strip_f32(depth, job, matrix, strip, tokens, s * ROWS, total);
            }
        emit_panel(job, matrix, start, stop, tokens, total);
    }
}

#define TRIT_KERNELS(depth)                                                               \
    KERNEL(trit##depth##_int8) { UNUSED; trit_unit(depth, 1, at(address, 0), unit); return 0; } \
    KERNEL(trit##depth##_f32) { UNUSED; trit_unit(depth, 0, at(address, 0), unit); return 0; }

TRIT_KERNELS(1)
TRIT_KERNELS(2)
TRIT_KERNELS(3)
TRIT_KERNELS(4)
