"""Vector types for Numba and the small language in which `simd.py` emits LLVM for them.

Three types, `u8x64`, `i32x16` and `f32x16`, behave like numbers inside `@njit` code: `a + b`, `q * 3`, `v >> 4`.
LLVM splits them for narrower machines, so one kernel source serves AVX-512, AVX2, NEON and plain SSE2.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from .compiling import cpu

LANES = 16


class Vector(types.Type):
    """The Numba type of a vector: `n` elements of the scalar type `scalar`."""

    def __init__(self, scalar: types.Type, n: int) -> None:
        self.scalar, self.n = scalar, n
        super().__init__(name=f"{scalar}x{n}")


u8x64, i32x16, f32x16 = Vector(types.uint8, 64), Vector(types.int32, LANES), Vector(types.float32, LANES)

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
HALF, FLOAT = ir.HalfType(), ir.FloatType()
_SCALARS = {types.uint8: I8, types.int32: I32, types.float32: FLOAT}


def ir_type(vector: Vector) -> ir.VectorType:
    return ir.VectorType(_SCALARS[vector.scalar], vector.n)


U8X64, I32X16, F32X16 = ir_type(u8x64), ir_type(i32x16), ir_type(f32x16)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, ir_type(vector))


def cpu_features() -> set[str]:
    """LLVM names of the features that compiled code may use."""
    return {item[1:] for item in cpu()[1].split(",") if item.startswith("+")}


# ==== Emitting LLVM ====


def const(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def splat(b: ir.IRBuilder, value: ir.Value, n: int) -> ir.Value:
    vector = ir.VectorType(value.type, n)
    first = b.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, first, const(ir.VectorType(I32, n), 0))


def shuffle(b: ir.IRBuilder, low: ir.Value, high: ir.Value, lanes: list[int]) -> ir.Value:
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def pointer(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, pointee: ir.Type) -> ir.Value:
    return b.inttoptr(b.add(base, offset), pointee.as_pointer())


def load(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, pointee: ir.Type) -> ir.Value:
    return b.load(pointer(b, base, offset, pointee), align=1)


def store(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    b.store(value, pointer(b, base, offset, value.type), align=1)


def call(b: ir.IRBuilder, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def operation(result: types.Type, *argument_types: types.Type) -> Callable[[Callable[..., ir.Value]], Any]:
    """Make a Numba function of `emit(builder, *values) -> value`, with fixed argument and result types."""

    def decorate(emit: Callable[..., ir.Value]) -> Any:
        def codegen(context: Any, b: ir.IRBuilder, _sig: Any, args: Any) -> ir.Value:
            value = emit(b, *args)
            return context.get_dummy_value() if value is None else value

        def operation(_typingctx: Any, *_types: types.Type) -> Any:
            return result(*argument_types), codegen

        names = ["typingctx", *(f"a{i}" for i in range(len(argument_types)))]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        operation.__signature__ = inspect.Signature([inspect.Parameter(n, kind) for n in names])  # type: ignore[attr-defined]
        operation.__name__, operation.__doc__ = emit.__name__, emit.__doc__
        return intrinsic(operation)

    return decorate


def split(b: ir.IRBuilder, value: ir.Value, parts: int) -> list[ir.Value]:
    step = value.type.count // parts
    return [shuffle(b, value, value, list(range(i * step, (i + 1) * step))) for i in range(parts)]


def joined(b: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    while len(parts) > 1:
        n = parts[0].type.count
        parts = [shuffle(b, p, q, list(range(2 * n))) for p, q in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


def exchanged(b: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Transpose squares of as many lanes as there are rows, by swapping ever larger blocks."""
    rows, lanes, step = list(rows), rows[0].type.count, 1
    while step < len(rows):
        even = [lane if lane & step == 0 else lanes + lane - step for lane in range(lanes)]
        for i in range(len(rows)):
            if i & step == 0:
                x, y = rows[i], rows[i + step]
                rows[i], rows[i + step] = shuffle(b, x, y, even), shuffle(b, x, y, [lane + step for lane in even])
        step *= 2
    return rows


def transposed_lines(b: ir.IRBuilder, lines: list[ir.Value]) -> ir.Value:
    """The tile of sixteen rows of eight lanes."""
    v = [shuffle(b, low, high, list(range(LANES))) for low, high in zip(lines[:8], lines[8:], strict=True)]
    v = exchanged(b, v)  # each half of the lanes is a square of eight rows by eight columns
    tile = ir.Constant(ir.ArrayType(U8X64, 8), ir.Undefined)
    for j in range(8):
        tile = b.insert_value(tile, b.bitcast(v[j], U8X64), j)
    return tile


# ==== Operators ====


def _define_operator(op: Callable[..., Any], integer: str, floating: str | None) -> None:
    @type_callable(op)
    def typing(_context: Any) -> Any:
        def resolve(a: types.Type, b: types.Type) -> types.Type | None:
            if not isinstance(a, Vector) or (a.scalar == types.float32 and floating is None):
                return None
            return a if a == b or isinstance(b, types.Integer | types.Float) else None

        return resolve

    def lower(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        left, right = args
        vector = sig.return_type
        if not isinstance(sig.args[1], Vector):
            right = splat(b, context.cast(b, right, sig.args[1], vector.scalar), vector.n)
        method = floating if vector.scalar == types.float32 else integer
        return getattr(b, str(method))(left, right)

    for right in (Vector, types.Integer, types.IntegerLiteral, types.Float):
        lower_builtin(op, Vector, right)(lower)


_define_operator(operator.add, "add", "fadd")
_define_operator(operator.sub, "sub", "fsub")
_define_operator(operator.mul, "mul", "fmul")
_define_operator(operator.truediv, "sdiv", "fdiv")
_define_operator(operator.rshift, "lshr", None)
_define_operator(operator.lshift, "shl", None)
_define_operator(operator.and_, "and_", None)
_define_operator(operator.or_, "or_", None)
