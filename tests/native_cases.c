// Runs kernels over cases written by tests/native_cases.py, outside of Python: under sanitizers, or in an emulator.
// Every buffer is its own block of exactly its size, so that a read past its end is seen.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../native/kernels.h"

static FILE *file;

static int64_t number(void) {
    int64_t value;
    if (fread(&value, sizeof value, 1, file) != 1) exit(3);
    return value;
}

static void *bytes(int64_t count) {
    char *data = malloc(count);
    if (count && fread(data, 1, count, file) != (size_t)count) exit(3);
    return data;
}

static int differs(const float *found, const float *expected, float limit) {
    return memcmp(found, expected, sizeof *found) && !(fabsf(*found - *expected) <= limit);
}

// One case: kernels with their units, which run one after another; buffers (the first is the job), places in the job
// that hold a buffer's number, and what one buffer of floats must hold afterwards, each within its own limit. Returns
// how many floats differ.
static int64_t run_case(const char *isa) {
    struct { char name[32]; int64_t units; } steps[4] = {0};
    int64_t n_steps = number();
    if (n_steps > 4) exit(3);
    for (int64_t i = 0; i < n_steps; i++) {
        int64_t length = number();
        char *text = bytes(length);
        memcpy(steps[i].name, text, length);
        free(text);
        steps[i].units = number();
    }
    int64_t n_buffers = number(), wrong = 0;
    char **buffers = calloc(n_buffers, sizeof *buffers);
    for (int64_t i = 0; i < n_buffers; i++) buffers[i] = bytes(number());
    int64_t *job = (int64_t *)buffers[0];
    for (int64_t i = number(); i > 0; i--) {
        int64_t place = number();
        job[place] = (intptr_t)buffers[job[place]];
    }
    for (int64_t i = 0; i < n_steps; i++) {
        kernel *run = trit_kernel(isa, steps[i].name);
        if (!run) exit(4);
        for (int64_t unit = 0; unit < steps[i].units; unit++) run(NULL, NULL, (intptr_t)job, unit);
    }
    float *out = (float *)buffers[number()];
    int64_t count = number();
    float *expected = bytes(count * 4), *limit = bytes(count * 4);
    for (int64_t i = 0; i < count; i++) wrong += differs(out + i, expected + i, limit[i]);
    if (wrong) printf("%s %s: %ld of %ld differ, first %g for %g\n", isa, steps[n_steps - 1].name, (long)wrong, (long)count, out[0], expected[0]);
    free(expected), free(limit);
    for (int64_t i = 0; i < n_buffers; i++) free(buffers[i]);
    free(buffers);
    return wrong;
}

int main(int argc, char **argv) {
    int64_t wrong = 0, runs = 0;
    char isas[100];
    if (argc < 2 || !(file = fopen(argv[1], "rb"))) return 2;
    strcpy(isas, trit_built_isas());
    for (char *isa = strtok(isas, " "); isa; isa = strtok(NULL, " ")) {
        if (!trit_isa_works(isa)) continue;
        rewind(file);
        for (int64_t n = number(); n > 0; n--, runs++) wrong += run_case(isa);
        printf("%s ", isa);
    }
    printf("%ld runs, %ld wrong\n", (long)runs, (long)wrong);
    return wrong != 0;
}
