// The arguments of the kernels: every job is a list of int64 words, and these are their places.
// The same as runtime/kernels/words.py, which a test holds this file to.
#pragma once

enum { UNIT_ROWS = 64, TOGETHER = 16 };  // rows of a matrix that a pool unit computes; tokens that one prepares

// A matrix product: these, then MATRIX words for each matrix.
enum { N, WIDTH, X, X_STRIDE, PADDED, PADDED_STRIDE, QUANTS, SUMS, SCALES, WANTED, ADD, MATRICES, HEAD };
// The forms of activations that a job reads, as bits of WANTED.
enum { FLOATS = 1, QUANTS_IN_ORDER = 2, QUANTS_AS_NIBBLES = 4 };
enum { FIRST, OUT, OUT_STRIDE, OUTPUTS, DATA, TABLE, AUX, AUX2, AUX3, BLOCK_SHIFT, BIAS, ROUND, MATRIX };

// The table of an NF4 matrix: sixteen levels as float32, then at these byte offsets as int8, four times, and what one of
// those is worth.
enum { TABLE_LEVELS = 64, TABLE_STEP = 128 };

// RMSNorm and SwiGLU; NORM_EPS holds a float32.
enum { NORM_X, NORM_GAIN, NORM_OUT, NORM_DIM, NORM_EPS, NORM_WORDS };
enum { GLU_GATE, GLU_UP, GLU_DIM, GLU_WORDS };

// The pool's shared state, one cache line apart so that the threads do not fight over them.
enum { CLAIM = 0, DONE = 8, STARTED = 16, PARKED = 17, STOP = 24, THREADS = 25, YIELD = 26 };
enum { TASK = 32, ARGUMENTS = 33, UNITS = 34, STATE_WORDS = 40 };
// A list of jobs: their number, then these words for each.
enum { JOB_TASK, JOB_ARGUMENTS, JOB_UNITS, JOB_WORDS };

// RoPE and attention; AT_SCALE holds a float32, AT_CLOCK where the ring's clock is.
enum { CACHED = 128, SPAN = 1024 };  // cached tokens that attention takes at once, and that it sums before it joins sums
enum { TILE = 32 };  // slots of the ring whose keys lie together
enum { ROUNDED = 16 };  // rows times groups of values whose weights are rounded before any is multiplied, if rows are no more
enum { AT_N, AT_HEADS, AT_KV_HEADS, AT_HEAD_DIM, AT_SLOTS, AT_WINDOW, AT_CLOCK, AT_SCALE };
enum { AT_Q = 8, AT_Q_SINK, AT_K, AT_V, AT_COS, AT_SIN, AT_COS_SINK, AT_SIN_SINK, AT_OUT };
enum { AT_FIRST = 17, AT_TILE, AT_SETS, AT_RUNS, AT_PARTS, AT_PART_BYTES };
enum { AT_AREA = 23, AT_AREA_BYTES, AT_QUERY, AT_NEAR, AT_SHIFT, AT_QUANTS, AT_STEPS, AT_TOTAL, AT_PART };
enum { AT_SCORES = 32, AT_STATE, AT_BLOCK, AT_CODES, AT_FEATURES, AT_LIFTS, AT_PLANES, AT_WORTH, AT_BASES };
// The clock of a ring: tokens in it, and how many of the first stay.
enum { LENGTH, SINKS };
// Two sides: how the ring stores them, and how codes are decoded.
enum { AT_KEYS = 48, AT_VALUES = 80, AT_WORDS = 112 };
enum { SD_CODEC, SD_HEADS, SD_WIDTH, SD_PADDED, SD_GROUP, SD_CODE_BYTES, SD_SCALE_BYTES, SD_DATA };
enum { SD_HEAD_STRIDE = 8, SD_BLOCK_STRIDE };
enum { SD_FEATURES = 10, SD_HIDDEN, SD_HIDDEN_BIAS, SD_ACTIVATION, SD_OUTPUT, SD_OUTPUT_BIAS };
enum { SD_COS = 16, SD_SIN, SD_SEEN, SD_SHARED, SD_ROTATED, SD_MIRROR, SD_INT8, SD_VALUES, SD_BYTES, SD_TURNED };
