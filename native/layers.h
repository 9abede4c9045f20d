// RMSNorm (Zhang and Sennrich, 2019) and SwiGLU (Shazeer, 2020).
#pragma once
#include "jobs.h"

// out = x / sqrt(mean(x^2) + eps) * gain for one token.
KERNEL(rmsnorm) {
    UNUSED;
    words job = at(address, 0);
    int64_t dim = job[NORM_DIM], whole = dim / 16 * 16, i;
    const float *x = at(job[NORM_X], unit * dim * 4), *gain = at(job[NORM_GAIN], 0);
    float *out = at(job[NORM_OUT], unit * dim * 4);
    f32x16 squares = splat16(0.0f);
    for (i = 0; i < whole; i += 16) squares = fma16(load16(x + i), load16(x + i), squares);
    float total = sum16(squares);
    for (; i < dim; i++) total += x[i] * x[i];
    float scale = 1.0f / __builtin_sqrtf(total / (float)dim + float_word(job + NORM_EPS));
    for (i = 0; i < whole; i += LANES) v_store(out + i, v_load(x + i) * scale * v_load(gain + i));
    for (; i < dim; i++) out[i] = x[i] * scale * gain[i];
    return 0;
}

INLINE vf silu_times(vf gate, vf up) {
    vf negative = v_min(gate * -1.0f, v_splat(88.0f));
    return gate / (v_exp(negative) + 1.0f) * up;
}

// gate = silu(gate) * up for one token, in place.
KERNEL(swiglu) {
    UNUSED;
    words job = at(address, 0);
    int64_t dim = job[GLU_DIM], whole = dim / 16 * 16, i;
    float *gate = at(job[GLU_GATE], unit * dim * 4);
    const float *up = at(job[GLU_UP], unit * dim * 4);
    for (i = 0; i < whole; i += LANES) v_store(gate + i, silu_times(v_load(gate + i), v_load(up + i)));
    for (; i < dim; i++) gate[i] = silu_times(v_splat(gate[i]), v_splat(up[i]))[0];
    return 0;
}
