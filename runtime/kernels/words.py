"""The arguments of the compiled kernels: every job is a list of int64 words, and these are their places.

Kept apart from the kernels so that the backend can fill jobs without importing Numba.
"""

from __future__ import annotations

UNIT_ROWS = 64  # rows of a matrix that a pool unit computes

# A matrix product (numba_jobs.py): these, then MATRIX words for each matrix.
N, WIDTH, X, X_STRIDE, PADDED, PADDED_STRIDE, QUANTS, SUMS, SCALES, INT8, ADD, MATRICES, HEAD = range(13)
FIRST, OUT, OUT_STRIDE, OUTPUTS, DATA, TABLE, AUX, AUX2, AUX3, BLOCK_SHIFT, BIAS, ROUND, MATRIX = range(13)

# RMSNorm and SwiGLU (numba_layers.py); NORM_EPS holds a float32.
NORM_X, NORM_GAIN, NORM_OUT, NORM_DIM, NORM_EPS, NORM_WORDS = range(6)
GLU_GATE, GLU_UP, GLU_DIM, GLU_WORDS = range(4)

# RoPE and attention (numba_attention.py); AT_SCALE holds a float32.
AT_N, AT_HEADS, AT_KV_HEADS, AT_HEAD_DIM, AT_PADDED, AT_SLOTS, AT_SINKS, AT_WINDOW, AT_START = range(9)
AT_Q, AT_Q_SINK, AT_K, AT_V, AT_COS, AT_SIN, AT_COS_SINK, AT_SIN_SINK = range(9, 17)
AT_KEYS, AT_VALUES, AT_OUT, AT_SCALE, AT_WORDS = range(17, 22)

# The pool's shared state (numba_pool.py), one cache line apart so that the threads do not fight over them.
CLAIM, DONE, STARTED, PARKED = 0, 8, 16, 17
STOP, THREADS, TASK, ARGUMENTS, UNITS, STATE_WORDS = 24, 25, 32, 33, 34, 40
# A list of jobs: their number, then these words for each.
JOB_TASK, JOB_ARGUMENTS, JOB_UNITS, JOB_WORDS = range(4)

KERNELS = {
    "numba_pool": ("serve", "run_jobs"),
    "numba_jobs": ("pack_activations",),
    "numba_trits": tuple(f"trit{depth}_{mode}" for mode in ("int8", "f32") for depth in (1, 2, 3, 4)),
    "numba_dense": ("f32", "f16", "bf16", "q8", "nf4", "nf4_nested"),
    "numba_layers": ("rmsnorm", "swiglu"),
    "numba_attention": ("rope_append_f16", "rope_append_f32", "attention_f16", "attention_f32"),
}
