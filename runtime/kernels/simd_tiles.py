"""Vector operations of the attention kernels: sums of sixteen vectors at once, lanes by number, prefetching."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from .simd_cpu import load_f16
from .vectors import (
    F32X16,
    I8,
    I32,
    I32X16,
    LANES,
    U8X64,
    const,
    exchanged,
    f32x16,
    load,
    operation,
    pointer,
    shuffle,
    splat,
    store,
    transposed_lines,
    u8x64,
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


@operation(types.void, types.intp, types.intp)
def prefetch(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> None:
    """Ask for a cache line; any address is allowed."""
    where = pointer(b, base, offset, I8)
    hints = [ir.Constant(I32, n) for n in (0, 3, 1)]  # to be read, kept in all caches, data
    function = cgutils.get_or_insert_function(
        b.module, ir.FunctionType(ir.VoidType(), [where.type, I32, I32, I32]), "llvm.prefetch.p0"
    )
    b.call(function, [where, *hints])


@operation(types.UniTuple(u8x64, 8), types.intp, types.intp)
def strided_tile(b: ir.IRBuilder, base: ir.Value, stride: ir.Value) -> ir.Value:
    """32 bytes of sixteen rows, `stride` bytes apart, transposed as `simd.load_tile` does."""
    lines = []
    for _ in range(LANES):
        lines.append(b.load(b.inttoptr(base, ir.VectorType(I32, LANES // 2).as_pointer()), align=1))
        base = b.add(base, stride)
    return transposed_lines(b, lines)


def _quads(n: int) -> Any:
    lanes = n // 16  # of 128 bits: first every one by itself

    def zipped(b: ir.IRBuilder, x: ir.Value, y: ir.Value, size: int) -> list[ir.Value]:
        """Interleave pieces of `size` bytes of the lower half of every lane, then of the upper one."""
        order = [16 * lane + half + i + k for lane in range(lanes) for half in (0, 8) for i in range(0, 8, size)
                 for k in (*range(size), *range(n, n + size))]  # fmt: skip
        return [shuffle(b, x, y, [k for i, k in enumerate(order) if i // 16 % 2 == half]) for half in (0, 1)]

    def emit(b: ir.IRBuilder, base: ir.Value, stride: ir.Value) -> ir.Value:
        rows = []
        for _ in range(4):
            rows.append(b.load(b.inttoptr(base, ir.VectorType(I8, n).as_pointer()), align=1))
            base = b.add(base, stride)
        pairs = zip(zipped(b, rows[0], rows[1], 1), zipped(b, rows[2], rows[3], 1), strict=True)
        v = [part for low, high in pairs for part in zipped(b, low, high, 2)]  # columns 4 k .. 4 k + 3 of all lanes
        result = ir.Constant(ir.ArrayType(U8X64, lanes), ir.Undefined)
        for lane in range(lanes):
            part = list(range(16 * lane, 16 * lane + 16)) + list(range(n + 16 * lane, n + 16 * lane + 16))
            halves = shuffle(b, v[0], v[1], part), shuffle(b, v[2], v[3], part)
            result = b.insert_value(result, shuffle(b, halves[0], halves[1], list(range(64))), lane)
        return result

    emit.__name__ = f"quads_{n}"
    emit.__doc__ = f"{n} bytes of four rows, `stride` bytes apart, sixteen in a vector: lane i is byte i of each row."
    return operation(types.UniTuple(u8x64, lanes), types.intp, types.intp)(emit)


quads_16, quads_32, quads_64 = _quads(16), _quads(32), _quads(64)


def _spread_f16(n: int) -> Any:
    def emit(b: ir.IRBuilder, source: ir.Value, out: ir.Value, stride: ir.Value) -> None:
        vectors = [load_f16(b, source, ir.Constant(source.type, 32 * i)) for i in range(n)]
        step = n
        while step > 1:  # each time the lowest bit of a number's place becomes the highest
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            vectors = [shuffle(b, pair[0], pair[1], list(range(odd, 2 * LANES, 2))) for odd in (0, 1) for pair in pairs]
            step //= 2
        for vector in vectors:
            store(b, out, ir.Constant(out.type, 0), vector)
            out = b.add(out, stride)

    emit.__name__ = f"spread_f16_{n}"
    emit.__doc__ = f"Sixteen rows of {n} float16, without gaps, as columns of float32, `stride` bytes apart."
    return operation(types.void, types.intp, types.intp, types.intp)(emit)


spread_f16_2, spread_f16_4, spread_f16_8 = (_spread_f16(n) for n in (2, 4, 8))
