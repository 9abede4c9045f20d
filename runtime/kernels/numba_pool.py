"""The compiled half of the pool: claiming units, running them, waiting for the next job.

The claim word is (job number << 32) | next unit.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .words import ARGUMENTS, CLAIM, DONE, PARKED, STOP, TASK, UNITS

_UNIT_BITS = 32
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
        # Numba's own calling convention: places for the result and for an error come first.
        with b.goto_entry_block():
            spare = [b.ptrtoint(b.alloca(_I64), _I64) for _ in range(2)]
        function = ir.FunctionType(ir.IntType(32), [_I64, _I64, _I64, _I64])
        b.call(b.inttoptr(args[0], function.as_pointer()), [*spare, *args[1:]])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp, types.intp), codegen


@njit(forceinline=True)
def _work(state: int) -> bool:
    """Claim and run one unit of the current job. False when none is left."""
    claim = _atomic_load(state, CLAIM)
    # These three are read before the claim is confirmed: if it is, the job was live all along and they belong to it.
    task, arguments, units = (
        _atomic_load(state, TASK),
        _atomic_load(state, ARGUMENTS),
        _atomic_load(state, UNITS),
    )
    unit = claim & ((1 << _UNIT_BITS) - 1)
    if unit >= units:
        return False
    if _compare_and_swap(state, CLAIM, claim, claim + 1):
        _call_task(task, arguments, unit)
        _atomic_add(state, DONE, 1)
    return True


def post_and_work(state: int, units: int) -> None:
    """Run the job whose task and arguments stand in the state to its end. Only one thread may be in here at a time.

    No worker looks at them before the claim word changes: UNITS is 0 between jobs."""
    _atomic_store(state, DONE, 0)
    job = (_atomic_load(state, CLAIM) >> _UNIT_BITS) + 1
    _atomic_store(state, CLAIM, job << _UNIT_BITS)
    _atomic_store(state, UNITS, units)
    while _work(state):
        pass
    while _atomic_load(state, DONE) < units:
        pass
    _atomic_store(state, UNITS, 0)


def serve(state: int, _unit: int) -> None:
    """A worker's life between two sleeps."""
    idle = 0
    while idle < _SPINS and _atomic_load(state, STOP) == 0:
        idle = 0 if _work(state) else idle + 1
    _atomic_add(state, PARKED, 1)
