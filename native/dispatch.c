// Which instruction sets this CPU has, and the kernels by name. BUILT_... are set by build.py.
#include <stddef.h>
#include <string.h>

#include "table.h"

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>

static int32_t has_avx2(void) {
    unsigned a, b, c = 0, d;
    __get_cpuid(1, &a, &b, &c, &d);
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (c & bit_F16C);
}

static int32_t has_avxvnni(void) {
    unsigned a = 0, b, c, d;
    __get_cpuid_count(7, 1, &a, &b, &c, &d);
    return has_avx2() && (a >> 4 & 1);
}

static int32_t has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>

static int32_t has_dotprod(void) { return getauxval(AT_HWCAP) >> 20 & 1; }  // HWCAP_ASIMDDP
#elif defined(__aarch64__)
static int32_t has_dotprod(void) { return 1; }  // every Mac with this architecture
#endif

static int32_t always(void) { return 1; }

static const struct {
    const char *name;
    const struct named_kernel *kernels;
    int32_t (*works)(void);
} isas[] = {  // best first, as in build.py
#ifdef BUILT_avx512
    {"avx512", kernels_avx512, has_avx512},
#endif
#ifdef BUILT_avxvnni
    {"avxvnni", kernels_avxvnni, has_avxvnni},
#endif
#ifdef BUILT_avx2
    {"avx2", kernels_avx2, has_avx2},
#endif
#ifdef BUILT_neon
    {"neon", kernels_neon, has_dotprod},
#endif
    {"generic", kernels_generic, always},
};

static const size_t n_isas = sizeof isas / sizeof isas[0];

const char *trit_built_isas(void) {
    return ""
#ifdef BUILT_avx512
           "avx512 "
#endif
#ifdef BUILT_avxvnni
           "avxvnni "
#endif
#ifdef BUILT_avx2
           "avx2 "
#endif
#ifdef BUILT_neon
           "neon "
#endif
           "generic";
}

int32_t trit_isa_works(const char *isa) {
    for (size_t i = 0; i < n_isas; i++)
        if (strcmp(isas[i].name, isa) == 0) return isas[i].works() != 0;
    return 0;
}

kernel *trit_kernel(const char *isa, const char *name) {
    if (strcmp(name, "serve") == 0) return serve;
    if (strcmp(name, "run_jobs") == 0) return run_jobs;
    for (size_t i = 0; i < n_isas; i++) {
        if (strcmp(isas[i].name, isa)) continue;
        for (const struct named_kernel *k = isas[i].kernels; k->name; k++)
            if (strcmp(k->name, name) == 0) return k->run;
    }
    return NULL;
}
