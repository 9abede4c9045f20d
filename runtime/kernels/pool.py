"""Threads that run compiled tasks: claimed one by one, finished together, without the GIL.

A task is a C function `void task(intptr arguments, intptr unit)`. A job runs units 0 .. n-1 of one task. The calling
thread and the workers claim units from one atomic counter, so a job ends even if no worker is awake, and which
thread ran a unit never matters to the result. Workers spin for a moment after each job, because the next one of
the same token follows within microseconds, then sleep on a lock.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .compiling import compiled

# Words of the shared state, one cache line apart so that the threads do not fight over them.
_CLAIM, _DONE, _PARKED, _STOP, _JOB = 0, 8, 16, 24, 32
_TASK, _ARGUMENTS, _UNITS = _JOB, _JOB + 1, _JOB + 2
_WORDS = 40
_UNIT_BITS = 32  # the claim word is (job number << 32) | next unit
_SPINS = 20_000  # about 0.2 ms of waiting before a worker sleeps

_I64 = ir.IntType(64)


def _word(b: ir.IRBuilder, base: ir.Value, index: ir.Value) -> ir.Value:
    return b.inttoptr(b.add(base, b.shl(index, ir.Constant(_I64, 3))), _I64.as_pointer())


@intrinsic
def _atomic_load(_ctx: Any, base: Any, index: Any) -> Any:
    def codegen(_context: Any, b: ir.IRBuilder, _sig: Any, args: Any) -> ir.Value:
        return b.load_atomic(_word(b, *args), "seq_cst", 8)

    return types.int64(types.intp, types.intp), codegen


@intrinsic
def _atomic_store(_ctx: Any, base: Any, index: Any, value: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, _sig: Any, args: Any) -> ir.Value:
        b.store_atomic(args[2], _word(b, args[0], args[1]), "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.int64), codegen


@intrinsic
def _atomic_add(_ctx: Any, base: Any, index: Any, value: Any) -> Any:
    def codegen(_context: Any, b: ir.IRBuilder, _sig: Any, args: Any) -> ir.Value:
        return b.atomic_rmw("add", _word(b, args[0], args[1]), args[2], "seq_cst")

    return types.int64(types.intp, types.intp, types.int64), codegen


@intrinsic
def _compare_and_swap(_ctx: Any, base: Any, index: Any, old: Any, new: Any) -> Any:
    def codegen(_context: Any, b: ir.IRBuilder, _sig: Any, args: Any) -> ir.Value:
        pair = b.cmpxchg(_word(b, args[0], args[1]), args[2], args[3], "seq_cst", "seq_cst")
        return b.extract_value(pair, 1)

    return types.boolean(types.intp, types.intp, types.int64, types.int64), codegen


@intrinsic
def _call_task(_ctx: Any, task: Any, arguments: Any, unit: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, _sig: Any, args: Any) -> ir.Value:
        function = ir.FunctionType(ir.VoidType(), [_I64, _I64])
        b.call(b.inttoptr(args[0], function.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@njit(forceinline=True)
def _work(state: int) -> bool:
    """Claim and run one unit of the current job. False when none is left."""
    claim = _atomic_load(state, _CLAIM)
    # These three are read before the claim is confirmed: if it is, the job was live all along and they belong to it.
    task, arguments, units = (
        _atomic_load(state, _TASK),
        _atomic_load(state, _ARGUMENTS),
        _atomic_load(state, _UNITS),
    )
    unit = claim & ((1 << _UNIT_BITS) - 1)
    if unit >= units:
        return False
    if _compare_and_swap(state, _CLAIM, claim, claim + 1):
        _call_task(task, arguments, unit)
        _atomic_add(state, _DONE, 1)
    return True


@compiled("void(intp, intp, intp, intp)")
def _post_and_work(state: int, task: int, arguments: int, units: int) -> None:
    """Run a job to its end. Only one thread may be in here at a time."""
    _atomic_store(state, _UNITS, 0)
    _atomic_store(state, _TASK, task)
    _atomic_store(state, _ARGUMENTS, arguments)
    _atomic_store(state, _DONE, 0)
    job = (_atomic_load(state, _CLAIM) >> _UNIT_BITS) + 1
    _atomic_store(state, _CLAIM, job << _UNIT_BITS)
    _atomic_store(state, _UNITS, units)
    while _work(state):
        pass
    while _atomic_load(state, _DONE) < units:
        pass


@compiled("void(intp)")
def _serve(state: int) -> None:
    """A worker's life between two sleeps."""
    idle = 0
    while idle < _SPINS and _atomic_load(state, _STOP) == 0:
        idle = 0 if _work(state) else idle + 1
    _atomic_add(state, _PARKED, 1)


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

    def __init__(self, n_threads: int) -> None:
        if n_threads < 1:
            raise ValueError(f"n_threads is {n_threads}; it must be 1 or more")
        self.n_threads = n_threads
        self._lock = threading.Lock()
        self._reset()

    def _reset(self) -> None:
        self._state = np.zeros(_WORDS, np.int64)
        self._base = self._state.ctypes.data
        self._bell = threading.Semaphore(0)
        self._woken = 0  # of the workers that ever parked; both numbers only grow, so no wake-up is lost
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
            _serve(self._base)
            bell.acquire()
            if state[_STOP]:
                return

    def run(self, task: int, arguments: int, units: int) -> None:
        """Run units 0 .. units-1 of the task at that address and return when all are done."""
        with self._lock:
            if self._pid != os.getpid():
                self._reset()
            if units > 1 and self.n_threads > 1:
                if not self._workers:
                    self._start()
                asleep = int(self._state[_PARKED]) - self._woken
                if asleep:
                    self._woken += asleep
                    self._bell.release(asleep)
            _post_and_work(self._base, task, arguments, units)

    def close(self) -> None:
        """End the workers. The pool can be used again; it then starts new ones."""
        with self._lock:
            if self._workers and self._pid == os.getpid():
                self._state[_STOP] = 1
                self._bell.release(len(self._workers))
                for worker in self._workers:
                    worker.join()
            self._reset()
