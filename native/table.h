// How isa.c hands its kernels to dispatch.c: one table for each instruction set, ended by a NULL name.
#pragma once
#include "kernels.h"

struct named_kernel {
    const char *name;
    kernel *run;
};

extern const struct named_kernel kernels_avx512[], kernels_avxvnni[], kernels_avx2[], kernels_neon[],
    kernels_generic[];

// The pool's two halves are the same for all instruction sets (pool.c).
kernel serve, run_jobs;
