"""The compiled half of the pool: claiming units, running them, waiting for the next job.

The claim word is (job number << 32) | next unit.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .words import ARGUMENTS, CLAIM, DONE, PARKED, STARTED, STOP, TASK, THREADS, UNITS, YIELD

_UNIT_BITS = 32
_SPINS = 2_000  # some 50 microseconds of waiting before others may have the core
_YIELDS = 2_000  # about a millisecond on an idle machine, before a worker sleeps

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
        # Numba's own calling convention: places for the result and for an error come first.
        with b.goto_entry_block():
            spare = [b.ptrtoint(b.alloca(_I64), _I64) for _ in range(2)]
        function = ir.FunctionType(ir.IntType(32), [_I64, _I64, _I64, _I64])
        b.call(b.inttoptr(args[0], function.as_pointer()), [*spare, *args[1:]])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@intrinsic
def _pause(_ctx: Any) -> Any:
    """Tell the core that this is a waiting loop."""

    def codegen(context: Any, b: ir.IRBuilder, _sig: Any, _args: Any) -> ir.Value:
        if b.module.triple.startswith(("x86", "i686", "amd64")):
            nothing = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, nothing, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def _call(_ctx: Any, function: Any) -> Any:
    def codegen(context: Any, b: ir.IRBuilder, _sig: Any, args: Any) -> ir.Value:
        b.call(b.inttoptr(args[0], ir.FunctionType(ir.IntType(32), []).as_pointer()), [])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


@njit(forceinline=True)
def _wait(state: int, rounds: int) -> None:
    """Let a moment pass. After some rounds the core is offered to others: what is waited for may need it."""
    if rounds < _SPINS:
        _pause()
    else:
        _call(_atomic_load(state, YIELD))


@njit(forceinline=True)
def _work(state: int) -> bool:
    """Claim and run some units of the current job. False when none is left.

    Claims shrink with what is left (guided self-scheduling, Polychronopoulos and Kuck, 1987): a claim costs as much as
    a small unit where cores share no cache, and neighbouring units read neighbouring memory."""
    claim = _atomic_load(state, CLAIM)
    # These are read before the claim is confirmed: if it is, the job was live all along and they belong to it.
    task, arguments = _atomic_load(state, TASK), _atomic_load(state, ARGUMENTS)
    units, shares = _atomic_load(state, UNITS), 2 * _atomic_load(state, THREADS)
    first = claim & ((1 << _UNIT_BITS) - 1)
    if first >= units:
        return False
    count = (units - first + shares - 1) // shares
    if _compare_and_swap(state, CLAIM, claim, claim + count):
        for unit in range(first, first + count):
            _call_task(task, arguments, unit)
        _atomic_add(state, DONE, count)
    return True


@njit(forceinline=True)
def _run_job(state: int, task: int, arguments: int, units: int) -> None:
    """Run one job to its end. No worker looks at it before the claim word changes: UNITS is 0 between jobs."""
    if units == 1:
        _call_task(task, arguments, 0)
        return
    _atomic_store(state, TASK, task)
    _atomic_store(state, ARGUMENTS, arguments)
    _atomic_store(state, DONE, 0)
    job = (_atomic_load(state, CLAIM) >> _UNIT_BITS) + 1
    _atomic_store(state, CLAIM, job << _UNIT_BITS)
    _atomic_store(state, UNITS, units)
    while _work(state):
        pass
    rounds = 0
    while _atomic_load(state, DONE) < units:
        _wait(state, rounds)
        rounds += 1
    _atomic_store(state, UNITS, 0)


def run_jobs(state: int, jobs: int) -> None:
    """Run jobs one after another. Only one thread may be in here at a time.

    jobs: the address of their number, then of task, arguments and units of each, all int64."""
    for i in range(_atomic_load(jobs, 0)):
        _run_job(
            state,
            _atomic_load(jobs, 1 + 3 * i),
            _atomic_load(jobs, 2 + 3 * i),
            _atomic_load(jobs, 3 + 3 * i),
        )


def serve(state: int, _unit: int) -> None:
    """A worker's life between two sleeps."""
    _atomic_add(state, STARTED, 1)
    idle = 0
    while idle < _SPINS + _YIELDS and _atomic_load(state, STOP) == 0:
        if _work(state):
            idle = 0
        else:
            _wait(state, idle)
            idle += 1
    _atomic_add(state, PARKED, 1)
