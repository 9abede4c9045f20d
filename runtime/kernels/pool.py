"""Threads that run compiled tasks: claimed one by one, finished together, without the GIL.

A job runs units 0 .. n-1 of one kernel. The calling thread and the workers claim units from one atomic counter, so a
job ends even if no worker is awake, and which thread ran a unit never matters to the result. Workers spin for a
moment after each job, because the next one of the same token follows within microseconds, then sleep on a lock.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import address
from .program import Program
from .words import JOB_WORDS, PARKED, STARTED, STATE_WORDS, STOP, THREADS

# A kernel as ctypes calls it (the GIL is released): places for Numba's result and error, then two integers.
_KERNEL = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_ssize_t] * 4)
_PATIENCE = 50  # looks, 20 microseconds apart, at whether the workers have woken


def usable_cores() -> int:
    """Cores that this process may use: its affinity, limited by a cgroup's CPU quota (Linux, cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup, or "max": no limit
        pass
    return cores


class Pool:
    """`n_threads` threads, the caller's included. Jobs of several callers queue; a fork starts its own workers."""

    def __init__(self, n_threads: int, resolve: Callable[[str, str], int]) -> None:
        """resolve: gives the address of a kernel by module and function (words.py)."""
        if n_threads < 1:
            raise ValueError(f"n_threads is {n_threads}; it must be 1 or more")
        self.n_threads = n_threads
        self._lock = threading.Lock()
        self._recording: Program | None = None
        self._one = np.ones(1 + JOB_WORDS, np.int64)  # a list of one job
        self._serve = _KERNEL(resolve("numba_pool", "serve"))
        self._run_jobs = _KERNEL(resolve("numba_pool", "run_jobs"))
        self._reset()

    def _reset(self) -> None:
        self._state = np.zeros(STATE_WORDS, np.int64)
        self._state[THREADS] = self.n_threads
        self._base = self._state.ctypes.data
        self._spare = self._base + (STATE_WORDS - 2) * 8
        self._bell = threading.Semaphore(0)
        self._workers: list[threading.Thread] = []
        self._pid = os.getpid()

    def _start(self) -> None:
        for i in range(self.n_threads - 1):
            worker = threading.Thread(target=self._live, name=f"trit-worker-{i}", daemon=True)
            self._workers.append(worker)
            worker.start()

    def _live(self) -> None:
        state, bell = self._state, self._bell
        while True:
            spare = (ctypes.c_int64 * 2)()
            self._serve(ctypes.addressof(spare), ctypes.addressof(spare) + 8, self._base, 0)
            bell.acquire()
            if state[STOP]:
                return

    def run(self, task: int, words: np.ndarray, units: int, *keep: Any) -> None:
        """Run units 0 .. units-1 of a kernel and return when all are done.

        task: the kernel's address; words: its arguments, (n,) int64; keep: what they point to
        """
        if self._recording is not None:
            self._recording.add(task, words, units, keep)
        with self._lock:
            self._one[1:] = task, address(words), units
            self._submit(self._one, parallel=units > 1)

    def call(self, function: Callable[[], object]) -> None:
        """Call a function that does in Python what no kernel does, between the jobs before and after it."""
        if self._recording is not None:
            self._recording.add_call(function)
        function()

    def run_jobs(self, jobs: np.ndarray) -> None:
        """Run a list of jobs (words.py), one after another."""
        with self._lock:
            self._submit(jobs, parallel=True)

    def record(self, work: Callable[[], object]) -> Program:
        """Do some work and return it as a program: the jobs and calls that the pool was asked for meanwhile."""
        program = self._recording = Program()
        try:
            work()
        finally:
            self._recording = None
        program.finish()
        return program

    def _submit(self, jobs: np.ndarray, parallel: bool) -> None:
        if self._pid != os.getpid():
            self._reset()
        if parallel and self.n_threads > 1:
            if not self._workers:
                self._start()
            asleep = len(self._workers) - self._awake()
            if asleep:
                self._wake(asleep)
        self._run_jobs(self._spare, self._spare + 8, self._base, address(jobs))

    def _awake(self) -> int:
        return int(self._state[STARTED] - self._state[PARKED])

    def _wake(self, asleep: int) -> None:
        """Rouse the workers that sleep, and let go of the GIL until they run: jobs are too short for them to get it."""
        self._bell.release(asleep)
        for _ in range(_PATIENCE):
            time.sleep(2e-5)
            if self._awake() == len(self._workers):
                break

    def close(self) -> None:
        """End the workers. The pool can be used again; it then starts new ones."""
        with self._lock:
            if self._workers and self._pid == os.getpid():
                self._state[STOP] = 1
                self._bell.release(len(self._workers))
                for worker in self._workers:
                    worker.join()
            self._reset()
