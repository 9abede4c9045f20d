// Attention over the ring, block by block with a running maximum and sum (Milakov and Gimelshein, 2018).
// The same as runtime/kernels/numba_attention.py, where it is explained, sum by sum.
#pragma once
#include "ring.h"
#include "tiles.h"

#define NOTHING (-__builtin_inff())

// A result: (rows, width) sums of values, (rows) maxima, (rows) sums of weights.
INLINE float *tops_of(float *result, int64_t rows, int64_t width) { return result + rows * width; }

INLINE int64_t padded16(int64_t n) { return (n + 15) / 16 * 16; }
INLINE int64_t group_of(words job) { return job[AT_HEADS] / job[AT_KV_HEADS]; }
// Rows of one key-value head, in fours.
INLINE int64_t rows_of_tokens(words job, int64_t tokens) { return (tokens * group_of(job) + 3) / 4 * 4; }
INLINE float *area_of(words job, int64_t unit) { return at(job[AT_AREA], unit * job[AT_AREA_BYTES]); }
INLINE float *in(float *area, int64_t offset) { return area + offset / 4; }

// The first position of the window that a query sees.
INLINE int64_t oldest_of(words job, int64_t position) {
    return max_of(clock_of(job, SINKS), position + 1 - (job[AT_WINDOW] - clock_of(job, SINKS)));
}

INLINE vf exp_of(float x) { return v_exp(v_splat(x)); }

// ==== Queries ====

// Scale the queries of one key-value head and, where keys stay codes, multiply them by the keys' decoder.
static void pack_rows(words job, float *area, const float *source, float *target, float *shift, int64_t kv_head,
                      int64_t first, int64_t tokens) {
    words keys = job + AT_KEYS;
    int64_t head_dim = job[AT_HEAD_DIM], group = group_of(job), rows = rows_of_tokens(job, tokens);
    int64_t seen = keys[SD_SEEN], padded = keys[SD_SHARED] ? padded16(head_dim) : seen;
    float *packed = keys[SD_SHARED] ? in(area, job[AT_FEATURES]) : target, scale = float_word(job + AT_SCALE);
    const float *bias = at(keys[SD_OUTPUT_BIAS], kv_head * padded * 4);
    for (int64_t r = 0; r < rows; r++) {
        const float *q = source + ((first + r / group) * job[AT_HEADS] + kv_head * group + r % group) * head_dim;
        float *row = packed + r * padded;
        shift[r] = 0.0f;
        memset(row, 0, padded * 4);
        if (r >= tokens * group) continue;
        for (int64_t i = 0; i < head_dim; i++) row[i] = q[i] * scale;
        turn(keys, kv_head, row, head_dim);
        if (keys[SD_SHARED])
            for (int64_t i = 0; i < head_dim; i++) shift[r] += row[i] * bias[i];
    }
    if (keys[SD_SHARED])
        dots(packed, padded, rows, at(keys[SD_OUTPUT], kv_head * seen * padded * 4), padded, 0, seen, padded, target, seen);
}

// Prepare a unit's rows, for the window and, once tokens have slid out, for the sinks.
static void pack_unit(words job, float *area, int64_t kv_first, int64_t kv_stop, int64_t first, int64_t tokens) {
    int64_t rows = rows_of_tokens(job, tokens), seen = job[AT_KEYS + SD_SEEN], all_rows = (kv_stop - kv_first) * rows;
    float *query = in(area, job[AT_QUERY]), *near = in(area, job[AT_NEAR]), *shift = in(area, job[AT_SHIFT]);
    for (int64_t kv_head = kv_first; kv_head < kv_stop; kv_head++) {
        int64_t r = (kv_head - kv_first) * rows;
        pack_rows(job, area, at(job[AT_Q], 0), query + r * seen, shift + r, kv_head, first, tokens);
        if (is_sliding(job))
            pack_rows(job, area, at(job[AT_Q_SINK], 0), near + r * seen, shift + all_rows + r, kv_head, first, tokens);
    }
}

// ==== One block of cached tokens ====

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
    for (int64_t i = 0; i < count; i++, x += stride) {
        rotate(x, x, at(side[SD_COS], slot * turn), at(side[SD_SIN], slot * turn), job[AT_HEAD_DIM]);
        slot = slot + 1 < job[AT_SLOTS] ? slot + 1 : clock_of(job, SINKS);
    }
}

// What attention sees of `count` tokens: rows of SD_SEEN floats.
static const float *block_of(words job, words side, float *area, int64_t kv_head, int64_t first, int64_t count) {
    int64_t features = side[SD_FEATURES], seen = side[SD_SEEN], four = (count + 3) / 4 * 4;
    float *target = in(area, job[AT_BLOCK]), *x = in(area, job[AT_CODES]);
    if (!side[SD_HIDDEN] && !side[SD_COS]) {
        read_back(job, side, side[SD_HEADS] > 1 ? kv_head : 0, first, count, target);
        return target;
    }
    read_back(job, side, 0, first, count, x);
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

// x in lanes first .. stop - 1 of the LANES from `lane` on, `other` in the rest.
INLINE vf keep_lanes(vf x, int64_t lane, int64_t first, int64_t stop, float other) {
    int32_t numbers[LANES];
    for (int i = 0; i < LANES; i++) numbers[i] = i;
    vi number = v_load_i32(numbers) + (int32_t)lane;
    vi inside = (vi)(number >= (int32_t)first) & (vi)(number < (int32_t)stop);
    return (vf)((inside & (vi)x) | (~inside & (vi)v_splat(other)));
}

// Turn one row's scores into weights below its running maximum; tokens that it does not see weigh nothing.
static void soften(float *scores, int64_t count, int64_t seen_first, int64_t seen_stop, float shift, float *top,
                   float *sum, float *keep) {
    vf tops = v_splat(*top);
    for (int64_t i = 0; i < count; i += LANES) {
        vf s = keep_lanes(v_load(scores + i) + shift, i, seen_first, seen_stop, NOTHING);
        v_store(scores + i, s);
        tops = v_max(s, tops);
    }
    float largest = largest_lane(tops);
    f32x16 total = splat16(0.0f);
    for (int64_t i = 0; i < count; i += 16)
        UNROLL for (int p = 0; p < PARTS; p++) {
            int64_t lane = i + p * LANES;
            vf s = keep_lanes(v_exp(v_load(scores + lane) - largest), lane, seen_first, seen_stop, 0.0f);
            v_store(scores + lane, s);
            total.v[p] += s;
        }
    // Nothing is there before the first block: its maximum is -inf and its share is nil.
    *keep = *top > NOTHING ? exp_of(*top - largest)[0] : 0.0f;
    *top = largest;
    *sum = *sum * *keep + sum16(total);
}

// One unit's work on one span: which tokens, which key-value heads, whether it is one of the sinks.
typedef struct {
    int64_t kv_first, kv_stop, first, tokens, start, stop;
    int sinks;
} task;

// Scores to weights for all rows of a unit, in one block of positions low .. high - 1 from `block` on.
static void weigh_rows(words job, float *area, float *result, const task *t, int64_t block, int64_t low, int64_t high,
                       const float *shifts) {
    int64_t rows = rows_of_tokens(job, t->tokens), all_rows = (t->kv_stop - t->kv_first) * rows, group = group_of(job);
    float *tops = tops_of(result, all_rows, job[AT_VALUES + SD_SEEN]), *sums = tops + all_rows;
    float *keeps = in(area, job[AT_KEEP]);
    for (int64_t r = 0; r < all_rows; r++) {
        int64_t position = clock_of(job, LENGTH) + t->first + r % rows / group;
        int64_t seen_first = t->sinks ? low : max_of(low, oldest_of(job, position));
        int64_t seen_stop = r % rows < t->tokens * group ? min_of(high, position + 1) : low;
        float *scores = in(area, job[AT_SCORES]) + r * CACHED;
        if (seen_first >= seen_stop) {
            memset(scores, 0, CACHED * 4);
            keeps[r] = 1.0f;
            continue;
        }
        soften(scores, padded16(high - block), seen_first - block, seen_stop - block, shifts[r], tops + r, sums + r,
               keeps + r);
    }
}

// An empty result.
static void clear(float *result, int64_t rows, int64_t width) {
    memset(result, 0, rows * width * 4);
    float *tops = tops_of(result, rows, width);
    for (int64_t i = 0; i < rows; i++) tops[i] = NOTHING, tops[rows + i] = 0.0f;
}

// Attend to the positions of one span. queries: the area where rows are packed
static void attend_span(words job, float *area, float *queries, float *result, const task *t) {
    words keys = job + AT_KEYS, values = job + AT_VALUES;
    int64_t heads = t->kv_stop - t->kv_first, rows = rows_of_tokens(job, t->tokens), all_rows = heads * rows;
    int64_t key_width = keys[SD_SEEN], value_width = values[SD_SEEN];
    int64_t key_sets = keys[SD_SHARED] ? 1 : heads, value_sets = values[SD_SHARED] ? 1 : heads;
    int near = t->sinks && is_sliding(job);
    const float *query = in(queries, job[near ? AT_NEAR : AT_QUERY]);
    const float *shifts = in(queries, job[AT_SHIFT]) + (near ? all_rows : 0);
    float *scores = in(area, job[AT_SCORES]), *keeps = in(area, job[AT_KEEP]);
    clear(result, all_rows, value_width);
    for (int64_t block = t->start / CACHED * CACHED; block < t->stop; block += CACHED) {
        int64_t low = max_of(block, t->start), high = min_of(block + CACHED, t->stop), skip = low - block;
        for (int64_t k = 0; k < key_sets; k++) {
            int64_t r = k * rows, n = all_rows / key_sets;
            const float *x = block_of(job, keys, area, t->kv_first + k, low, high - low) - skip * key_width;
            dots(query + r * key_width, key_width, n, x, key_width, skip / 4 * 4, high - block, key_width,
                 scores + r * CACHED, CACHED);
        }
        weigh_rows(job, area, result, t, block, low, high, shifts);
        for (int64_t k = 0; k < value_sets; k++) {
            int64_t r = k * rows, n = all_rows / value_sets;
            const float *x = block_of(job, values, area, t->kv_first + k, low, high - low) - skip * value_width;
            weigh(scores + r * CACHED, n, keeps + r, x, value_width, skip, high - block, value_width,
                  result + r * value_width, value_width);
        }
    }
}

// ==== Joining spans, and the end ====

// Add rows start .. start + rows - 1 of a span's result to a total of the same form.
static void join_rows(float *total, int64_t rows, float *result, int64_t result_rows, int64_t start, int64_t width) {
    float *tops = tops_of(total, rows, width), *others = tops_of(result, result_rows, width) + start;
    for (int64_t r = 0; r < rows; r++) {
        float *a = total + r * width, *b = result + (start + r) * width;
        if (others[r] == NOTHING) continue;
        float largest = tops[r] > others[r] ? tops[r] : others[r];
        float x = tops[r] > NOTHING ? exp_of(tops[r] - largest)[0] : 0.0f, y = exp_of(others[r] - largest)[0];
        for (int64_t d = 0; d < width; d += LANES) v_store(a + d, v_load(a + d) * x + v_load(b + d) * y);
        tops[r] = largest;
        tops[rows + r] = tops[rows + r] * x + others[result_rows + r] * y;
    }
}

// Divide by the sums of weights, decode where there is a decoder, and write the heads' outputs.
static void finish_heads(words job, float *area, float *total, int64_t rows, int64_t kv_head, int64_t first, int64_t tokens) {
    words values = job + AT_VALUES;
    int64_t head_dim = job[AT_HEAD_DIM], width = values[SD_SEEN], group = group_of(job), padded = padded16(head_dim);
    const float *sums = tops_of(total, rows, width) + rows, *decoded = total, *bias = 0;
    for (int64_t r = 0; r < tokens * group; r++) {
        float share = 1.0f / sums[r];
        for (int64_t d = 0; d < width; d += LANES) v_store(total + r * width + d, v_load(total + r * width + d) * share);
        hadamard(total + r * width, head_dim, values[SD_ROTATED]);
    }
    if (values[SD_SHARED]) {
        float *target = in(area, job[AT_FEATURES]);
        dots(total, width, rows, at(values[SD_OUTPUT], kv_head * padded * width * 4), width, 0, padded, width, target, padded);
        bias = at(values[SD_OUTPUT_BIAS], kv_head * padded * 4), decoded = target, width = padded;
    }
    for (int64_t r = 0; r < tokens * group; r++) {
        int64_t head = (first + r / group) * job[AT_HEADS] + kv_head * group + r % group;
        float *out = at(job[AT_OUT], head * head_dim * 4);
        for (int64_t i = 0; i < head_dim; i++) out[i] = bias ? decoded[r * width + i] + bias[i] : decoded[r * width + i];
    }
}

// What a tile sees besides the sinks: oldest position, end, and the number of spans with those of the sinks.
typedef struct { int64_t oldest, end, spans, of_sinks; } sight;

INLINE sight sight_of(words job, int64_t first, int64_t tokens) {
    int64_t position = clock_of(job, LENGTH) + first;
    sight s = {oldest_of(job, position), position + tokens, 0, 0};
    s.of_sinks = s.spans = (min_of(clock_of(job, SINKS), s.end) + SPAN - 1) / SPAN;
    if (s.end > s.oldest) s.spans += (s.end - 1) / SPAN - s.oldest / SPAN + 1;
    return s;
}

// Where span number `index` lies.
INLINE void set_span(words job, task *t, sight s, int64_t index) {
    int64_t base = index < s.of_sinks ? index * SPAN : (s.oldest / SPAN + index - s.of_sinks) * SPAN;
    t->sinks = index < s.of_sinks;
    t->start = t->sinks ? base : max_of(base, s.oldest);
    t->stop = min_of(base + SPAN, t->sinks ? min_of(clock_of(job, SINKS), s.end) : s.end);
}

// ==== Kernels ====

// Everything for one tile of tokens and one key-value head.
KERNEL(attend_whole) {
    UNUSED;
    words job = at(address, 0);
    int64_t kv_head = unit % job[AT_KV_HEADS], first = job[AT_FIRST] + unit / job[AT_KV_HEADS] * job[AT_TILE];
    int64_t tokens = min_of(job[AT_TILE], job[AT_N] - first), rows = rows_of_tokens(job, tokens);
    int64_t width = job[AT_VALUES + SD_SEEN];
    float *area = area_of(job, unit), *total = in(area, job[AT_TOTAL]), *part = in(area, job[AT_PART]);
    pack_unit(job, area, kv_head, kv_head + 1, first, tokens);
    clear(total, rows, width);
    task t = {kv_head, kv_head + 1, first, tokens, 0, 0, 0};
    sight s = sight_of(job, first, tokens);
    for (int64_t index = 0; index < s.spans; index++) {
        set_span(job, &t, s, index);
        attend_span(job, area, area, part, &t);
        join_rows(total, rows, part, rows, 0, width);
    }
    finish_heads(job, area, total, rows, kv_head, first, tokens);
    return 0;
}

// First of three steps for one token: its rows.
KERNEL(attend_pack) {
    UNUSED;
    words job = at(address, 0);
    int64_t share = job[AT_KV_HEADS] / job[AT_SETS];
    pack_unit(job, area_of(job, unit), unit * share, (unit + 1) * share, job[AT_FIRST], 1);
    return 0;
}

// Second: units count sets of key-value heads fastest, then runs of spans.
KERNEL(attend_spans) {
    UNUSED;
    words job = at(address, 0);
    int64_t sets = job[AT_SETS], share = job[AT_KV_HEADS] / sets, which = unit % sets;
    sight s = sight_of(job, job[AT_FIRST], 1);
    int64_t length = (s.spans + job[AT_RUNS] - 1) / job[AT_RUNS], run = unit / sets * length;
    task t = {which * share, (which + 1) * share, job[AT_FIRST], 1, 0, 0, 0};
    for (int64_t index = run; index < min_of(run + length, s.spans); index++) {
        set_span(job, &t, s, index);
        float *part = at(job[AT_PARTS], (index * sets + which) * job[AT_PART_BYTES]);
        attend_span(job, area_of(job, unit), area_of(job, which), part, &t);
    }
    return 0;
}

// Third: the spans of one key-value head together.
KERNEL(attend_join) {
    UNUSED;
    words job = at(address, 0);
    int64_t sets = job[AT_SETS], share = job[AT_KV_HEADS] / sets, rows = rows_of_tokens(job, 1);
    int64_t width = job[AT_VALUES + SD_SEEN];
    float *area = area_of(job, unit), *total = in(area, job[AT_TOTAL]);
    clear(total, rows, width);
    for (int64_t index = 0, spans = sight_of(job, job[AT_FIRST], 1).spans; index < spans; index++) {
        float *part = at(job[AT_PARTS], (index * sets + unit / share) * job[AT_PART_BYTES]);
        join_rows(total, rows, part, share * rows, unit % share * rows, width);
    }
    finish_heads(job, area, total, rows, unit, job[AT_FIRST], 1);
    return 0;
}
