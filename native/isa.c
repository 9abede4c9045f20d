// All kernels for one instruction set. build.py compiles this file once for each, with ISA=avx2 and the like.
#include "attention.h"
#include "dense.h"
#include "int8.h"
#include "layers.h"
#include "table.h"
#include "trits.h"

#define JOIN(a, b) a##b
#define TABLE_OF(isa) JOIN(kernels_, isa)
#define ENTRY(name) {#name, name}

const struct named_kernel TABLE_OF(ISA)[] = {
    ENTRY(pack_activations),
    ENTRY(trit1_int8), ENTRY(trit2_int8), ENTRY(trit3_int8), ENTRY(trit4_int8),
    ENTRY(trit1_f32), ENTRY(trit2_f32), ENTRY(trit3_f32), ENTRY(trit4_f32),
    ENTRY(f32), ENTRY(f16), ENTRY(bf16), ENTRY(q8), ENTRY(nf4), ENTRY(nf4_nested),
    ENTRY(q8_int8), ENTRY(nf4_int8), ENTRY(nf4_nested_int8),
    ENTRY(rmsnorm), ENTRY(swiglu),
    ENTRY(rope), ENTRY(append), ENTRY(rope_append),
    ENTRY(attend_whole), ENTRY(attend_pack), ENTRY(attend_spans), ENTRY(attend_join),
    {0, 0},
};
