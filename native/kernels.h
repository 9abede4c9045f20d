// What the library offers. build.py reads the declarations below for cffi: plain C, one declaration for both sides.
#pragma once
#include <stdint.h>

// A kernel runs one unit of a job. job: address of its words (words.h); result and error are not used.
typedef int32_t kernel(void *result, void *error, intptr_t job, intptr_t unit);

// Names of the instruction sets that this library was built for, best first, separated by spaces.
const char *trit_built_isas(void);

// Whether this CPU can run the kernels of that instruction set.
int32_t trit_isa_works(const char *isa);

// A kernel by name, such as "trit4_int8", made for that instruction set. NULL if there is none.
kernel *trit_kernel(const char *isa, const char *name);
