// The arguments of the kernels: every job is a list of int64 words, and these are their places.
// The same as runtime/kernels/words.py, which a test holds this file to.
#pragma once

enum { UNIT_ROWS = 64 };  // rows of a matrix that a pool unit computes

// A matrix product: these, then MATRIX words for each matrix.
enum { N, WIDTH, X, X_STRIDE, PADDED, PADDED_STRIDE, QUANTS, SUMS, SCALES, INT8, ADD, MATRICES, HEAD };
enum { FIRST, OUT, OUT_STRIDE, OUTPUTS, DATA, TABLE, AUX, AUX2, AUX3, BLOCK_SHIFT, BIAS, ROUND, MATRIX };

// RMSNorm and SwiGLU; NORM_EPS holds a float32.
enum { NORM_X, NORM_GAIN, NORM_OUT, NORM_DIM, NORM_EPS, NORM_WORDS };
enum { GLU_GATE, GLU_UP, GLU_DIM, GLU_WORDS };

// The pool's shared state, one cache line apart so that the threads do not fight over them.
enum { CLAIM = 0, DONE = 8, STARTED = 16, PARKED = 17, STOP = 24, THREADS = 25 };
enum { TASK = 32, ARGUMENTS = 33, UNITS = 34, STATE_WORDS = 40 };
// A list of jobs: their number, then these words for each.
enum { JOB_TASK, JOB_ARGUMENTS, JOB_UNITS, JOB_WORDS };

// RoPE and attention; AT_SCALE holds a float32.
enum { AT_N, AT_HEADS, AT_KV_HEADS, AT_HEAD_DIM, AT_PADDED, AT_SLOTS, AT_SINKS, AT_WINDOW, AT_START };
enum { AT_Q = 9, AT_Q_SINK, AT_K, AT_V, AT_COS, AT_SIN, AT_COS_SINK, AT_SIN_SINK };
enum { AT_KEYS = 17, AT_VALUES, AT_OUT, AT_SCALE, AT_WORDS };
