"""The arguments of the compiled kernels: every job is a list of int64 words, and these are their places.

Kept apart from the kernels so that the backend can fill jobs without importing Numba.
"""

from __future__ import annotations

UNIT_ROWS, TOGETHER = 64, 16  # rows of a matrix that a pool unit computes; tokens that one prepares
CACHED, SPAN = 128, 1024  # cached tokens that attention takes at a time, and that it sums before it joins sums
TILE = 32  # slots of the ring whose keys lie together
ROUNDED = 16  # rows times groups of values whose weights are rounded before any is multiplied, if rows are no more

# A matrix product (numba_jobs.py): these, then MATRIX words for each matrix.
N, WIDTH, X, X_STRIDE, PADDED, PADDED_STRIDE, QUANTS, SUMS, SCALES, WANTED, ADD, MATRICES, HEAD = range(13)
# The forms of activations that a job reads, as bits of WANTED.
FLOATS, QUANTS_IN_ORDER, QUANTS_AS_NIBBLES = 1, 2, 4
FIRST, OUT, OUT_STRIDE, OUTPUTS, DATA, TABLE, AUX, AUX2, AUX3, BLOCK_SHIFT, BIAS, ROUND, MATRIX = range(13)

# The table of an NF4 matrix: sixteen levels as float32, then at these byte offsets as int8, four times, and what one of
# those is worth.
TABLE_LEVELS, TABLE_STEP = 64, 128

# RMSNorm and SwiGLU (numba_layers.py); NORM_EPS holds a float32.
NORM_X, NORM_GAIN, NORM_OUT, NORM_DIM, NORM_EPS, NORM_WORDS = range(6)
GLU_GATE, GLU_UP, GLU_DIM, GLU_WORDS = range(4)

# RoPE and attention (numba_ring.py, numba_attention.py); AT_SCALE holds a float32, AT_CLOCK where the ring's clock is.
AT_N, AT_HEADS, AT_KV_HEADS, AT_HEAD_DIM, AT_SLOTS, AT_WINDOW, AT_CLOCK, AT_SCALE = range(8)
AT_Q, AT_Q_SINK, AT_K, AT_V, AT_COS, AT_SIN, AT_COS_SINK, AT_SIN_SINK, AT_OUT = range(8, 17)
# How the work is cut: units take AT_TILE tokens from AT_FIRST on and one of AT_SETS equal sets of key-value heads. If
# the spans of a token are cut too, into AT_RUNS runs, AT_PARTS is where their results go, AT_PART_BYTES each.
AT_FIRST, AT_TILE, AT_SETS, AT_RUNS, AT_PARTS, AT_PART_BYTES = range(17, 23)
# A unit's scratch: AT_AREA + unit * AT_AREA_BYTES, and in it from these offsets on
AT_AREA, AT_AREA_BYTES, AT_QUERY, AT_NEAR, AT_SHIFT, AT_QUANTS, AT_STEPS, AT_TOTAL, AT_PART = range(23, 32)
AT_SCORES, AT_STATE, AT_BLOCK, AT_CODES, AT_FEATURES, AT_LIFTS, AT_PLANES, AT_WORTH, AT_BASES = range(32, 41)
# Two sides: how the ring stores them, and how codes are decoded (see attention_jobs.py)
AT_KEYS, AT_VALUES, AT_WORDS = 48, 80, 112
SD_CODEC, SD_HEADS, SD_WIDTH, SD_PADDED, SD_GROUP, SD_CODE_BYTES, SD_SCALE_BYTES, SD_DATA = range(8)
SD_HEAD_STRIDE, SD_BLOCK_STRIDE = range(8, 10)
SD_FEATURES, SD_HIDDEN, SD_HIDDEN_BIAS, SD_ACTIVATION, SD_OUTPUT, SD_OUTPUT_BIAS = range(10, 16)
SD_COS, SD_SIN, SD_SEEN, SD_SHARED, SD_ROTATED, SD_MIRROR, SD_INT8, SD_VALUES, SD_BYTES, SD_TURNED = range(16, 26)

# The clock of a ring (cache.py): tokens in it, and how many of the first stay.
LENGTH, SINKS = range(2)

# The pool's shared state (numba_pool.py), one cache line apart so that the threads do not fight over them.
CLAIM, DONE, STARTED, PARKED = 0, 8, 16, 17
STOP, THREADS, YIELD, TASK, ARGUMENTS, UNITS, STATE_WORDS = 24, 25, 26, 32, 33, 34, 40
# A list of jobs: their number, then these words for each.
JOB_TASK, JOB_ARGUMENTS, JOB_UNITS, JOB_WORDS = range(4)

KERNELS = {
    "numba_pool": ("serve", "run_jobs"),
    "numba_jobs": ("pack_activations",),
    "numba_trits": tuple(f"trit{depth}_{mode}" for mode in ("int8", "f32") for depth in (1, 2, 3, 4)),
    "numba_dense": ("f32", "f16", "bf16", "q8", "nf4", "nf4_nested"),
    "numba_int8": ("q8_int8", "nf4_int8", "nf4_nested_int8"),
    "numba_layers": ("rmsnorm", "swiglu"),
    "numba_ring": ("rope", "append", "rope_append"),
    "numba_attention": ("attend_whole", "attend_pack", "attend_spans", "attend_join"),
}
