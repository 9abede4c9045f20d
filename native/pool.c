// The pool: claiming units, running them, waiting for the next job. The threads belong to the caller (pool.py).
// The claim word is (job number << 32) | next unit.
#include <stdatomic.h>
#include <stdbool.h>

#include "table.h"
#include "words.h"

enum { UNIT_BITS = 32 };
// Some 50 microseconds of waiting before others may have the core; then about a millisecond before a worker sleeps.
enum { SPINS = 2000, YIELDS = 2000 };

typedef _Atomic uint64_t word;

static void run_unit(uint64_t task, uint64_t arguments, uint64_t unit) {
    int64_t spare[2];
    ((kernel *)(intptr_t)task)(spare, spare + 1, (intptr_t)arguments, (intptr_t)unit);
}

static void pause_core(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Let a moment pass. After some rounds the core is offered to others: what is waited for may need it.
static void wait_a_moment(word *state, int rounds) {
    if (rounds < SPINS)
        pause_core();
    else
        ((int32_t (*)(void))(intptr_t)atomic_load(&state[YIELD]))();
}

// Claim and run some units of the current job. False when none is left.
// Claims shrink with what is left (guided self-scheduling, Polychronopoulos and Kuck, 1987): a claim costs as much as
// a small unit where cores share no cache, and neighbouring units read neighbouring memory.
static bool work(word *state) {
    uint64_t claim = atomic_load(&state[CLAIM]);
    // These are read before the claim is confirmed: if it is, the job was live all along and they belong to it.
    uint64_t task = atomic_load(&state[TASK]), arguments = atomic_load(&state[ARGUMENTS]);
    uint64_t units = atomic_load(&state[UNITS]), shares = 2 * atomic_load(&state[THREADS]);
    uint64_t first = claim & (((uint64_t)1 << UNIT_BITS) - 1);
    if (first >= units) return false;
    uint64_t count = (units - first + shares - 1) / shares;
    if (atomic_compare_exchange_strong(&state[CLAIM], &claim, claim + count)) {
        for (uint64_t unit = first; unit < first + count; unit++) run_unit(task, arguments, unit);
        atomic_fetch_add(&state[DONE], count);
    }
    return true;
}

// Run one job to its end. No worker looks at it before the claim word changes: UNITS is 0 between jobs.
static void run_job(word *state, const int64_t *job) {
    uint64_t task = (uint64_t)job[JOB_TASK], arguments = (uint64_t)job[JOB_ARGUMENTS];
    uint64_t units = (uint64_t)job[JOB_UNITS];
    if (units == 1) {
        run_unit(task, arguments, 0);
        return;
    }
    atomic_store(&state[TASK], task);
    atomic_store(&state[ARGUMENTS], arguments);
    atomic_store(&state[DONE], 0);
    uint64_t number = (atomic_load(&state[CLAIM]) >> UNIT_BITS) + 1;
    atomic_store(&state[CLAIM], number << UNIT_BITS);
    atomic_store(&state[UNITS], units);
    while (work(state)) continue;
    for (int rounds = 0; atomic_load(&state[DONE]) < units; rounds += rounds < SPINS) wait_a_moment(state, rounds);
    atomic_store(&state[UNITS], 0);
}

// Run jobs one after another. Only one thread may be in here at a time.
// jobs: address of their number, then of JOB_WORDS words for each.
int32_t run_jobs(void *result, void *error, intptr_t base, intptr_t jobs) {
    (void)result, (void)error;
    const int64_t *list = (const int64_t *)jobs;
    for (int64_t i = 0; i < list[0]; i++) run_job((word *)base, list + 1 + i * JOB_WORDS);
    return 0;
}

// A worker's life between two sleeps.
int32_t serve(void *result, void *error, intptr_t base, intptr_t unit) {
    (void)result, (void)error, (void)unit;
    word *state = (word *)base;
    atomic_fetch_add(&state[STARTED], 1);
    for (int idle = 0; idle < SPINS + YIELDS && atomic_load(&state[STOP]) == 0;) {
        if (work(state))
            idle = 0;
        else
            wait_a_moment(state, idle++);
    }
    atomic_fetch_add(&state[PARKED], 1);
    return 0;
}
