"""Threads that run compiled tasks: claimed one by one, finished together, without the GIL.

A job runs units 0 .. n-1 of one kernel. The calling thread and the workers claim units from one atomic counter, so a
job ends even if no worker is awake, and which thread ran a unit never matters to the result. Workers spin for a
moment after each job, because the next one of the same token follows within microseconds; then they let others have
the core, and in the end they sleep on a lock.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from ..fair_lock import FairLock
from .memory import address
from .program import Program
from .words import JOB_WORDS, PARKED, STARTED, STATE_WORDS, STOP, THREADS, YIELD

# A kernel as ctypes calls it (the GIL is released): places for Numba's result and error, then two integers.
_KERNEL = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_ssize_t] * 4)
_PATIENCE = 1e-3  # seconds that a short job waits for workers to wake


@cache
def _yield() -> int:
    """The address of the system's function that lets other threads have the core."""
    if sys.platform == "win32":
        function = ctypes.windll.kernel32.SwitchToThread
    else:
        function = ctypes.CDLL(None).sched_yield
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


def _live(serve: Callable[..., int], state: np.ndarray, bell: threading.Semaphore) -> None:
    """A worker's life. It does not hold the pool, which may be forgotten without having been closed."""
    spare, base = np.zeros(2, np.int64), address(state)
    while not state[STOP]:
        serve(address(spare), address(spare) + 8, base, 0)
        bell.acquire()


def _dismiss(state: np.ndarray, bell: threading.Semaphore, workers: list[threading.Thread]) -> None:
    state[STOP] = 1
    bell.release(len(workers) + 1)


class _Crew:
    """A number of threads, the caller's included, and the words through which they meet."""

    def __init__(self, n_threads: int, serve: Callable[..., int]) -> None:
        self.n_threads, self._serve = n_threads, serve
        self._state = np.zeros(STATE_WORDS, np.int64)
        self._state[THREADS], self._state[YIELD] = n_threads, _yield()
        self.base = address(self._state)
        self.spare = self.base + (STATE_WORDS - 2) * 8
        self._bell = threading.Semaphore(0)
        self._workers: list[threading.Thread] = []
        self._called = 0  # times that workers were asked to come
        self._dismiss = weakref.finalize(self, _dismiss, self._state, self._bell, self._workers)

    def gather(self) -> bool:
        """Call the workers that are asleep. Returns whether there were any."""
        asleep = self.n_threads - 1 - (self._called - int(self._state[PARKED]))
        if asleep <= 0:
            return False
        self._called += asleep
        if self._workers:
            self._bell.release(asleep)
        for i in range(len(self._workers), self.n_threads - 1):
            worker = threading.Thread(
                target=_live, args=(self._serve, self._state, self._bell), name=f"trit-worker-{i}", daemon=True
            )
            self._workers.append(worker)
            worker.start()
        return True

    def wait(self) -> None:
        """Let go of the GIL until the workers run: a short job would be over before they get it."""
        patience = time.perf_counter() + _PATIENCE
        while self._state[STARTED] < self._called and time.perf_counter() < patience:
            time.sleep(2e-5)

    def close(self, join: bool) -> None:
        """End the workers; `join` waits for them, which in a fork would be for ever."""
        self._dismiss()
        for worker in self._workers if join else ():
            worker.join()


class Pool:
    """`n_threads` threads, the caller's included. Jobs of several callers queue; a fork starts its own workers."""

    def __init__(self, n_threads: int, resolve: Callable[[str, str], int]) -> None:
        """resolve: gives the address of a kernel by module and function (words.py)."""
        self._lock = FairLock()
        self._recording: Program | None = None
        self._one = np.ones(1 + JOB_WORDS, np.int64)  # a list of one job
        self._serve = _KERNEL(resolve("numba_pool", "serve"))
        self._run_jobs = _KERNEL(resolve("numba_pool", "run_jobs"))
        self._crews: dict[int, _Crew] = {}
        self._pid = os.getpid()
        self.use(n_threads)

    def use(self, n_threads: int) -> None:
        """Run what follows on so many threads, until the next call."""
        if n_threads < 1:
            raise ValueError(f"n_threads is {n_threads}; it must be 1 or more")
        self.n_threads = n_threads

    def run(self, task: int, words: np.ndarray, units: int, *keep: Any) -> None:
        """Run units 0 .. units-1 of a kernel and return when all are done.

        task: the kernel's address; words: its arguments, (n,) int64; keep: what they point to
        """
        if self._recording is not None:
            self._recording.add(task, words, units, keep)
        with self._lock:
            crew = self._crew()
            self._one[1:] = task, address(words), units
            if units > 1 and crew.gather():
                crew.wait()
            self._submit(crew, self._one)

    def call(self, function: Callable[[], object]) -> None:
        """Call a function that does in Python what no kernel does, between the jobs before and after it."""
        if self._recording is not None:
            self._recording.add_call(function)
        function()

    def run_jobs(self, jobs: np.ndarray) -> None:
        """Run a list of jobs (words.py), one after another."""
        with self._lock:
            crew = self._crew()
            crew.gather()
            self._submit(crew, jobs)

    def record(self, work: Callable[[], object]) -> Program:
        """Do some work and return it as a program: the jobs and calls that the pool was asked for meanwhile."""
        program = self._recording = Program()
        try:
            work()
        finally:
            self._recording = None
        program.finish()
        return program

    def _crew(self) -> _Crew:
        if self._pid != os.getpid():
            self._crews, self._pid = {}, os.getpid()
        if self.n_threads not in self._crews:
            self._crews[self.n_threads] = _Crew(self.n_threads, self._serve)
        return self._crews[self.n_threads]

    def _submit(self, crew: _Crew, jobs: np.ndarray) -> None:
        self._run_jobs(crew.spare, crew.spare + 8, crew.base, address(jobs))

    def close(self) -> None:
        """End the workers. The pool can be used again; it then starts new ones."""
        with self._lock:
            for crew in self._crews.values():
                crew.close(join=self._pid == os.getpid())
            self._crews = {}
