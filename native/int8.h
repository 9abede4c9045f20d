// Products of q8 and nf4 matrices with int8 activations.
//
// As many rows as a register has lanes are taken together, 32 bytes of each at a time: a tile, transposed so that a
// row is a lane. NF4 levels are 8-bit integers. Every output adds its groups of 16 inputs in their order.
#pragma once
#include "dense.h"
#include "panel.h"

enum { TILES = 16 };       // tiles whose scales are decoded at a time
enum { MOST_GROUPS = 4 };  // of 16 inputs in a tile, which nf4 has

// LANES rows of a matrix: addresses of their bytes and numbers of their blocks.
typedef struct { const uint8_t *data[LANES]; int64_t block[LANES]; } lines;

// A matrix and what is made of it once: the factors of its levels, and what one of them is worth.
typedef struct { int codec, groups; words matrix; int64_t tiles; float step; uint8_t levels[BYTES]; } int8_source;

INLINE int8_source int8_source_of(int codec, words job, words matrix) {
    int8_source s = {codec, codec == Q8 ? 2 : 4, matrix, 0, 1.0f, {0}};
    s.tiles = (job[WIDTH] + s.groups * GROUP - 1) / (s.groups * GROUP);
    if (codec == Q8) return s;
    const uint8_t *table = at(matrix[TABLE], 0);
    vu factors = v_factor_i8(v_load_bytes(table + TABLE_LEVELS));
    memcpy(s.levels, &factors, sizeof s.levels);
    memcpy(&s.step, table + TABLE_STEP, sizeof s.step);
    return s;
}

INLINE lines lines_of(const int8_source *s, int64_t row, int64_t last) {
    lines l;
    for (int r = 0; r < LANES; r++) {
        l.block[r] = min_of(row + r, last) * s->tiles;
        l.data[r] = at(s->matrix[DATA], l.block[r] * TILE_BYTES);
    }
    return l;
}

// The factors of the tile number t of LANES rows: four vectors for each group of 16 inputs.
INLINE void decode_tile(const int8_source *s, const lines *l, int64_t t, vu q[MOST_GROUPS][4]) {
    vu tile[8];
    v_load_tile(l->data, t * TILE_BYTES, tile);
    UNROLL for (int i = 0; i < 8; i++) {
        if (s->codec == Q8) {
            q[i / 4][i % 4] = v_factor_i8(tile[i]);
        } else {
            q[i / 2][i % 2 * 2] = v_lookup_u8(s->levels, tile[i] >> 4);
            q[i / 2][i % 2 * 2 + 1] = v_lookup_u8(s->levels, tile[i] & 15);
        }
    }
}

// scales[i] = the scale of a row's block number `block` + i, i < count. Of NF4, a change of the nested scale comes once.
INLINE void row_scales(const int8_source *s, int64_t block, int64_t count, float *scales) {
    source w = {s->codec, 0, s->matrix, 0};
    if (s->codec != NF4_NESTED || count < TILES) {
        for (int64_t i = 0; i < count; i++) scales[i] = scale_of(w, block + i);
        return;
    }
    const uint8_t *codes = at(s->matrix[AUX], block);
    const float *nested = at(s->matrix[AUX2], 0), *offset_and_levels = at(s->matrix[AUX3], 0);
    int64_t change = NESTED_BLOCKS - block % NESTED_BLOCKS, last = block + TILES - 1;
    float levels[TILES], here = nested[block / NESTED_BLOCKS], next = nested[last / NESTED_BLOCKS];
    for (int i = 0; i < TILES; i++) levels[i] = offset_and_levels[1 + codes[i]];
    for (int i = 0; i < TILES; i++) scales[i] = levels[i] * (i < change ? here : next) + offset_and_levels[0];
}

// unit[i][r] = what a factor is worth in tile t + i of row r, for as many of TILES as there are.
INLINE void tile_units(const int8_source *s, const lines *l, int64_t t, float (*unit)[LANES]) {
    float scales[LANES][TILES];
    const uint8_t *rows[LANES];
    for (int r = 0; r < LANES; r++) {
        row_scales(s, l->block[r] + t, min_of(TILES, s->tiles - t), scales[r]);
        rows[r] = (const uint8_t *)scales[r];
    }
    for (int i = 0; i < TILES; i += 8) {  // eight scales are as wide as a tile
        vu columns[8];
        v_load_tile(rows, i * 4, columns);
        UNROLL for (int j = 0; j < 8; j++) v_store(unit[i + j], (vf)columns[j] * s->step);
    }
}

// total = LANES rows times the activations of a single token.
INLINE vf one_product(const int8_source *s, const lines *l, words job) {
    float unit[TILES][LANES];
    int plane = s->codec != Q8;
    vf total = {0};
    const uint8_t *ahead = l->data[0] + LANES * s->tiles * TILE_BYTES;
    for (int64_t t = 0; t < s->tiles; t++) {
        if (t % TILES == 0) tile_units(s, l, t, unit);
        // The hardware cannot follow as many rows: ask for the next ones, in the order of their bytes.
        ask_for(ahead + t * LANES * TILE_BYTES, LANES * TILE_BYTES);
        vu q[MOST_GROUPS][4];
        decode_tile(s, l, t, q);
        vf factor = v_load(unit[t % TILES]);
        UNROLL for (int g = 0; g < s->groups; g++) {
            int64_t group = t * s->groups + g;
            total = add_group(0, q[g], factor, I8_OFFSET, quants_of(job, plane, group), sum_of(job, group),
                              scale_of_group(job, group), total);
        }
    }
    return total;
}

// total = the rows of a unit times the activations of the tokens of a span.
INLINE void panels_of_tiles(const int8_source *s, const lines *l, int columns, words job, span tokens, unit_sums total) {
    float unit[COLUMNS][TILES][LANES];
    panel panels[MOST_GROUPS];
    memset(panels, 0, sizeof panels);
    memset(total, 0, tokens.count * sizeof total[0]);
    for (int64_t t = 0; t < s->tiles; t++) {
        for (int c = 0; c < columns; c++) {
            vu q[MOST_GROUPS][4];
            if (t % TILES == 0) tile_units(s, l + c, t, unit[c]);
            decode_tile(s, l + c, t, q);
            UNROLL for (int g = 0; g < s->groups; g++) {
                UNROLL for (int j = 0; j < 4; j++) panels[g].q[c][j] = q[g][j];
                panels[g].unit[c] = v_load(unit[c][t % TILES]);
            }
        }
        for (int g = 0; g < s->groups; g++)
            add_panel(0, &panels[g], I8_OFFSET, job, s->codec != Q8, t * s->groups + g, tokens, columns, total);
    }
}

INLINE void int8_unit(int codec, words job, int64_t unit) {
    words matrix = matrix_of(job, unit);
    int64_t start = first_row(matrix, unit), stop = last_row(matrix, unit);
    int columns = (int)((stop - start + LANES - 1) / LANES);
    const int8_source s = int8_source_of(codec, job, matrix);
    lines l[COLUMNS];
    for (int c = 0; c < columns; c++) l[c] = lines_of(&s, start + c * LANES, stop - 1);
    _Alignas(64) unit_sums total;
    for (span tokens = {0, 0}; tokens.first < job[N]; tokens.first += AT_ONCE) {
        tokens.count = (int)min_of(AT_ONCE, job[N] - tokens.first);
        if (job[N] > 1)
            panels_of_tiles(&s, l, columns, job, tokens, total);
        else
            for (int c = 0; c < columns; c++) v_store(&total[0][c * LANES], one_product(&s, l + c, job));
        emit_panel(job, matrix, start, stop, tokens, total);
    }
}

KERNEL(q8_int8) { UNUSED; int8_unit(Q8, at(address, 0), unit); return 0; }
KERNEL(nf4_int8) { UNUSED; int8_unit(NF4, at(address, 0), unit); return 0; }
KERNEL(nf4_nested_int8) { UNUSED; int8_unit(NF4_NESTED, at(address, 0), unit); return 0; }
