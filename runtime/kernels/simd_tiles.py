"""Vector operations of the attention kernels: sums of sixteen vectors at once, lanes by number, prefetching."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .vectors import (
    F32X16,
    I8,
    I32,
    I32X16,
    LANES,
    const,
    exchanged,
    f32x16,
    i32x16,
    load,
    operation,
    pointer,
    shuffle,
    splat,
    store,
)

_QUARTER = 4  # lanes of 128 bits


@operation(f32x16, *[f32x16] * 16)
def sum_tile(b: ir.IRBuilder, *v: ir.Value) -> ir.Value:
    """Lane i of the result is the sum of the lanes of v[i], as the tree of halves that `sum_lanes` is."""
    half, ours, theirs = 8, list(range(LANES)), list(range(LANES, 2 * LANES))
    # Vectors 4 g + c, g = 0..3, give quarter g of column c; then the four columns are interleaved.
    columns = []
    for c in range(_QUARTER):
        x = []
        for p, q in ((v[c], v[4 + c]), (v[8 + c], v[12 + c])):
            x.append(
                b.fadd(shuffle(b, p, q, ours[:half] + theirs[:half]), shuffle(b, p, q, ours[half:] + theirs[half:]))
            )
        even = [k + j for k in range(0, 2 * LANES, half) for j in range(_QUARTER)]
        columns.append(b.fadd(shuffle(b, x[0], x[1], even), shuffle(b, x[0], x[1], [k + _QUARTER for k in even])))
    pairs = []
    for x, y in ((columns[0], columns[1]), (columns[2], columns[3])):
        first = [k + j for g in range(0, LANES, _QUARTER) for k in (g, g + LANES) for j in (0, 1)]
        pairs.append(b.fadd(shuffle(b, x, y, first), shuffle(b, x, y, [k + 2 for k in first])))
    even = [k + j for g in range(0, LANES, _QUARTER) for k in (g, g + LANES) for j in (0, 2)]
    low, high = pairs
    return b.fadd(shuffle(b, low, high, even), shuffle(b, low, high, [k + 1 for k in even]))


@operation(types.void, types.intp)
def transpose(b: ir.IRBuilder, base: ir.Value) -> None:
    """Transpose sixteen rows of sixteen float32 in place."""
    at = [ir.Constant(base.type, LANES * 4 * i) for i in range(LANES)]
    v = exchanged(b, [load(b, base, offset, F32X16) for offset in at])
    for offset, row in zip(at, v, strict=True):
        store(b, base, offset, row)


@operation(types.void, types.intp, types.intp, f32x16)
def store_tile(b: ir.IRBuilder, base: ir.Value, stride: ir.Value, value: ir.Value) -> None:
    """Store four rows of four numbers, `stride` bytes apart."""
    at = ir.Constant(stride.type, 0)
    for g in range(0, LANES, _QUARTER):
        store(b, base, at, shuffle(b, value, value, list(range(g, g + _QUARTER))))
        at = b.add(at, stride)


@operation(f32x16, f32x16, types.intp, types.intp, types.float32)
def keep_lanes(b: ir.IRBuilder, x: ir.Value, first: ir.Value, stop: ir.Value, other: ir.Value) -> ir.Value:
    """x in lanes first .. stop - 1, `other` in the rest; both numbers may lie outside of 0 .. 16."""
    lane = ir.Constant(I32X16, list(range(LANES)))
    low, high = (splat(b, b.trunc(n, I32), LANES) for n in (first, stop))
    inside = b.and_(b.icmp_signed(">=", lane, low), b.icmp_signed("<", lane, high))
    return b.select(inside, x, splat(b, other, LANES))


def _butterfly(step: int) -> Any:
    def emit(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
        signs = ir.Constant(F32X16, [-1.0 if lane & step else 1.0 for lane in range(LANES)])
        return b.fadd(shuffle(b, x, x, [lane ^ step for lane in range(LANES)]), b.fmul(x, signs))

    emit.__name__, emit.__doc__ = f"butterfly{step}", f"Lanes {step} apart become their sum and their difference."
    return operation(f32x16, f32x16)(emit)


butterfly1, butterfly2, butterfly4, butterfly8 = (_butterfly(step) for step in (1, 2, 4, 8))


@operation(f32x16, f32x16, f32x16)
def quotient(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """x / y, and zero where y is zero."""
    zero = const(F32X16, 0.0)
    return b.select(b.fcmp_ordered(">", y, zero), b.fdiv(x, y), zero)


def _prefetch(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, nearness: int) -> None:
    where = pointer(b, base, offset, I8)
    hints = [ir.Constant(I32, n) for n in (0, nearness, 1)]  # to be read, as near as that, data
    function = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(ir.VoidType(), [where.type, I32, I32, I32]), "llvm.prefetch.p0"
    )
    b.call(function, [where, *hints])


@operation(types.void, types.intp, types.intp)
def prefetch(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> None:
    """Ask for a cache line; any address is allowed."""
    _prefetch(b, base, offset, 3)


@operation(types.void, types.intp, types.intp)
def prefetch_far(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> None:
    """Ask for a cache line, but not in the nearest cache: what waits for memory there is soon too much."""
    _prefetch(b, base, offset, 2)


@operation(i32x16, types.intp, types.intp, types.intp)
def byte_of_lanes(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, place: ir.Value) -> ir.Value:
    """Byte `place`, from 0 on, of each of sixteen 32-bit lanes in memory, as unsigned numbers."""
    shift = splat(b, b.trunc(b.mul(place, ir.Constant(place.type, 8)), I32), LANES)
    return b.and_(b.lshr(load(b, base, offset, I32X16), shift), const(I32X16, 255))
