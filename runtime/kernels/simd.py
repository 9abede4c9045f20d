"""Vectors for Numba: 512-bit values that compiled Python code can hold, add, compare and multiply.

Three types, `u8x64`, `i32x16` and `f32x16`, behave like numbers inside `@njit` code: `a + b`, `q * 3`, `v >> 4`.
LLVM splits them for narrower machines, so one kernel source serves AVX-512, AVX2, NEON and plain SSE2. Only the
int8 dot product, the table lookup and the float16 conversion ask the CPU what it has; each has a plain form for
the rest. Memory is addressed by integers (`address(array)` plus a byte offset); nothing checks bounds here.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

LANES = 16


class Vector(types.Type):
    """The Numba type of a vector: `n` elements of the scalar type `scalar`."""

    def __init__(self, scalar: types.Type, n: int) -> None:
        self.scalar, self.n = scalar, n
        super().__init__(name=f"{scalar}x{n}")


u8x64, i32x16, f32x16 = Vector(types.uint8, 64), Vector(types.int32, LANES), Vector(types.float32, LANES)

I8, I16, I32, I64, HALF, FLOAT = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.HalfType(), ir.FloatType()
_SCALARS = {types.uint8: I8, types.int32: I32, types.float32: FLOAT}


def _ir(vector: Vector) -> ir.VectorType:
    return ir.VectorType(_SCALARS[vector.scalar], vector.n)


U8X64, I32X16, F32X16 = _ir(u8x64), _ir(i32x16), _ir(f32x16)


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, _ir(vector))


def cpu_features() -> set[str]:
    """LLVM names of the features that compiled code may use here (NUMBA_CPU_FEATURES and NUMBA_CPU_NAME respected)."""
    if config.CPU_FEATURES is not None:
        return {item[1:] for item in str(config.CPU_FEATURES).split(",") if item.startswith("+")}
    if config.CPU_NAME not in (None, "host"):
        return set()
    return {name for name, present in llvm.get_host_cpu_features().items() if present}


# ==== Emitting LLVM ====


def _const(vector: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(vector, [value] * vector.count)


def _splat(b: ir.IRBuilder, value: ir.Value, n: int) -> ir.Value:
    vector = ir.VectorType(value.type, n)
    first = b.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, first, _const(ir.VectorType(I32, n), 0))


def _shuffle(b: ir.IRBuilder, low: ir.Value, high: ir.Value, lanes: list[int]) -> ir.Value:
    return b.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))


def _pointer(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, pointee: ir.Type) -> ir.Value:
    return b.inttoptr(b.add(base, offset), pointee.as_pointer())


def _load(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, pointee: ir.Type) -> ir.Value:
    return b.load(_pointer(b, base, offset, pointee), align=1)


def _call(b: ir.IRBuilder, name: str, result: ir.Type, args: list[ir.Value]) -> ir.Value:
    function = cgutils.get_or_insert_function(b.module, ir.FunctionType(result, [a.type for a in args]), name)
    return b.call(function, args)


def _operation(result: types.Type, *argument_types: types.Type) -> Callable[[Callable[..., ir.Value]], Any]:
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


def _halves(b: ir.IRBuilder, value: ir.Value, parts: int) -> list[ir.Value]:
    step = value.type.count // parts
    return [_shuffle(b, value, value, list(range(i * step, (i + 1) * step))) for i in range(parts)]


def _joined(b: ir.IRBuilder, parts: list[ir.Value]) -> ir.Value:
    while len(parts) > 1:
        n = parts[0].type.count
        parts = [_shuffle(b, p, q, list(range(2 * n))) for p, q in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


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
            right = _splat(b, context.cast(b, right, sig.args[1], vector.scalar), vector.n)
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


# ==== Memory ====


@intrinsic
def address(_typingctx: Any, array: types.Array) -> Any:
    """The address of an array's first element."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return b.ptrtoint(context.make_array(sig.args[0])(context, b, args[0]).data, I64)

    return types.intp(array), codegen


@_operation(types.intp)
def scratch_32k(b: ir.IRBuilder) -> ir.Value:
    """The address of 32768 bytes on the stack, aligned to 64, the same for every call at this place."""
    with b.goto_entry_block():
        slot = b.alloca(ir.ArrayType(I8, 32768))
        slot.align = 64
    return b.ptrtoint(slot, I64)


@_operation(u8x64, types.intp, types.intp)
def load_u8(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return _load(b, base, offset, U8X64)


@_operation(f32x16, types.intp, types.intp)
def load_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return _load(b, base, offset, F32X16)


@_operation(i32x16, types.intp, types.intp)
def load_u8_as_i32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return b.zext(_load(b, base, offset, ir.VectorType(I8, LANES)), I32X16)


@_operation(f32x16, types.intp, types.intp)
def load_i8_as_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return b.sitofp(b.sext(_load(b, base, offset, ir.VectorType(I8, LANES)), I32X16), F32X16)


@_operation(f32x16, types.intp, types.intp)
def load_bf16_as_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    bits = b.zext(_load(b, base, offset, ir.VectorType(I16, LANES)), I32X16)
    return b.bitcast(b.shl(bits, _const(I32X16, 16)), F32X16)


@_operation(i32x16, types.intp, types.intp)
def load_nibbles(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    """Sixteen 4-bit numbers from eight bytes, the high nibble of each byte first."""
    packed = _load(b, base, offset, ir.VectorType(I8, 8))
    high = b.lshr(packed, _const(packed.type, 4))
    low = b.and_(packed, _const(packed.type, 15))
    return b.zext(_shuffle(b, high, low, [k // 2 + 8 * (k % 2) for k in range(LANES)]), I32X16)


@_operation(types.float32, types.intp, types.intp)
def read_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return _load(b, base, offset, FLOAT)


@_operation(types.float32, types.intp, types.intp)
def read_bf16(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    bits = b.zext(_load(b, base, offset, I16), I32)
    return b.bitcast(b.shl(bits, ir.Constant(I32, 16)), FLOAT)


@_operation(types.int32, types.intp, types.intp)
def read_i32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return _load(b, base, offset, I32)


@_operation(types.uint8, types.intp, types.intp)
def read_u8(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return _load(b, base, offset, I8)


@_operation(types.int8, types.intp, types.intp)
def read_i8(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return _load(b, base, offset, I8)


@_operation(types.int64, types.intp, types.intp)
def read_i64(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return _load(b, base, offset, I64)


def _write(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    b.store(value, _pointer(b, base, offset, value.type), align=1)


@_operation(types.void, types.intp, types.intp, f32x16)
def store_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    _write(b, base, offset, value)


@_operation(types.void, types.intp, types.intp, i32x16)
def store_i32_as_i8(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    _write(b, base, offset, b.trunc(value, ir.VectorType(I8, LANES)))


@_operation(types.void, types.intp, types.intp, types.float32)
def write_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    _write(b, base, offset, value)


@_operation(types.void, types.intp, types.intp, types.int32)
def write_i32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    _write(b, base, offset, value)


# ==== Making vectors ====


@_operation(f32x16, types.float32)
def splat_f32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return _splat(b, value, LANES)


@_operation(i32x16, types.int32)
def splat_i32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return _splat(b, value, LANES)


@_operation(u8x64, types.intp, types.intp)
def splat_quad(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    """Four bytes from memory, repeated in all sixteen 32-bit lanes."""
    return b.bitcast(_splat(b, _load(b, base, offset, I32), LANES), U8X64)


@_operation(i32x16, u8x64)
def as_i32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same bits as sixteen 32-bit lanes."""
    return b.bitcast(value, I32X16)


@_operation(f32x16, i32x16)
def bits_to_f32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return b.bitcast(value, F32X16)


@_operation(f32x16, i32x16)
def to_f32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return b.sitofp(value, F32X16)


@_operation(i32x16, f32x16)
def round_to_i32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Nearest integers, halves to even. The values must fit in int32."""
    return b.fptosi(_call(b, "llvm.rint.v16f32", F32X16, [value]), I32X16)


# ==== Arithmetic ====


@_operation(f32x16, f32x16, f32x16, f32x16)
def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, rounded once."""
    return _call(b, "llvm.fma.v16f32", F32X16, [x, y, z])


@_operation(f32x16, f32x16, f32x16)
def maximum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@_operation(f32x16, f32x16, f32x16)
def minimum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@_operation(f32x16, f32x16)
def absolute(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return _call(b, "llvm.fabs.v16f32", F32X16, [x])


@_operation(types.float32, f32x16)
def first_lane(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return b.extract_element(x, ir.Constant(I32, 0))


@_operation(types.float32, f32x16)
def sum_lanes(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The sum of the lanes, as a tree of halves: one fixed order on every machine."""
    while x.type.count > 1:
        low, high = _halves(b, x, 2)
        x = b.fadd(low, high)
    return b.extract_element(x, ir.Constant(I32, 0))


@_operation(types.float32, f32x16)
def max_lanes(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    while x.type.count > 1:
        low, high = _halves(b, x, 2)
        x = b.select(b.fcmp_ordered(">", low, high), low, high)
    return b.extract_element(x, ir.Constant(I32, 0))


@_operation(types.int32, i32x16)
def sum_lanes_i32(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    while x.type.count > 1:
        low, high = _halves(b, x, 2)
        x = b.add(low, high)
    return b.extract_element(x, ir.Constant(I32, 0))


@_operation(u8x64, u8x64, types.uint8)
def trit(b: ir.IRBuilder, value: ir.Value, weight: ir.Value) -> ir.Value:
    """The ternary digit of that weight, for values below three times the weight: (v >= w) + (v >= 2w)."""
    one = b.icmp_unsigned(">=", value, _splat(b, weight, 64))
    two = b.icmp_unsigned(">=", value, _splat(b, b.add(weight, weight), 64))
    return b.add(b.zext(one, U8X64), b.zext(two, U8X64))


# ==== What depends on the CPU ====


def _dot_vnni(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value, bits: int) -> ir.Value:
    if llvm.llvm_version_info[0] < 21:  # older LLVM declares the bytes as 32-bit lanes
        lanes = ir.VectorType(I32, bits // 32)
        q, x = b.bitcast(q, lanes), b.bitcast(x, lanes)
    return _call(b, f"llvm.x86.avx512.vpdpbusd.{bits}", acc.type, [acc, q, x])


def _dot_avx2(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value) -> ir.Value:
    pairs = _call(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), [q, x])
    quads = _call(b, "llvm.x86.avx2.pmadd.wd", acc.type, [pairs, _const(pairs.type, 1)])
    return b.add(acc, quads)


def _dot_plain(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value) -> ir.Value:
    q, x = b.bitcast(q, I32X16), b.bitcast(x, I32X16)
    for k in range(4):
        weight = b.and_(b.lshr(q, _const(I32X16, 8 * k)), _const(I32X16, 255))
        value = b.ashr(b.shl(x, _const(I32X16, 24 - 8 * k)), _const(I32X16, 24))
        acc = b.add(acc, b.mul(weight, value))
    return acc


@_operation(i32x16, i32x16, u8x64, u8x64)
def dot4(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value) -> ir.Value:
    """acc + the sum of four products in each lane: q unsigned and at most 127, x signed. Exact on every machine.

    pmaddubsw saturates at 16 bits; 2 * 127 * 127 stays below that, which is why q must not exceed 127."""
    features = cpu_features()
    if {"avx512vnni", "avx512f"} <= features:
        return _dot_vnni(b, acc, q, x, 512)
    if "avxvnni" in features:
        narrow, parts = (lambda *v: _dot_vnni(b, *v, 256)), 2
    elif "avx2" in features:
        narrow, parts = (lambda *v: _dot_avx2(b, *v)), 2
    elif "dotprod" in features:
        narrow, parts = (lambda *v: _call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", v[0].type, list(v))), 4
    else:
        return _dot_plain(b, acc, q, x)
    pieces = zip(_halves(b, acc, parts), _halves(b, q, parts), _halves(b, x, parts), strict=True)
    return _joined(b, [narrow(*piece) for piece in pieces])


@_operation(f32x16, types.intp, i32x16)
def lookup(b: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """table[index] for each lane, from 32 float32 at the address `table`; only the low five bits of an index count."""
    index = b.and_(index, _const(I32X16, 31))
    if "avx512f" in cpu_features():
        low, high = (_load(b, table, ir.Constant(I64, 64 * k), F32X16) for k in range(2))
        return _call(b, "llvm.x86.avx512.vpermi2var.ps.512", F32X16, [low, index, high])
    result = ir.Constant(F32X16, ir.Undefined)
    for lane in range(LANES):
        at = b.zext(b.extract_element(index, ir.Constant(I32, lane)), I64)
        value = _load(b, table, b.shl(at, ir.Constant(I64, 2)), FLOAT)
        result = b.insert_element(result, value, ir.Constant(I32, lane))
    return result


def _has_f16() -> bool:
    return bool(cpu_features() & {"f16c", "avx512f", "fullfp16", "neon"})


def _f16_bits_to_f32(b: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """bits: <n x i16>. Shift the half's fields into place and let a multiplication by 2^112 mend the exponent."""
    n = bits.type.count
    if _has_f16():
        return b.fpext(b.bitcast(bits, ir.VectorType(HALF, n)), ir.VectorType(FLOAT, n))
    ints, floats = ir.VectorType(I32, n), ir.VectorType(FLOAT, n)
    wide = b.zext(bits, ints)
    magnitude = b.shl(b.and_(wide, _const(ints, 0x7FFF)), _const(ints, 13))
    scaled = b.bitcast(b.fmul(b.bitcast(magnitude, floats), _const(floats, 2.0**112)), ints)
    special = b.icmp_unsigned(">=", magnitude, _const(ints, 0x0F800000))  # infinity and NaN keep their fields
    scaled = b.select(special, b.or_(magnitude, _const(ints, 0x7F800000)), scaled)
    sign = b.shl(b.and_(wide, _const(ints, 0x8000)), _const(ints, 16))
    return b.bitcast(b.or_(scaled, sign), floats)


def _f32_to_f16_bits(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """<16 x float> to <16 x i16>, halves to even; what exceeds the range becomes infinity."""
    if _has_f16():
        return b.bitcast(b.fptrunc(value, ir.VectorType(HALF, LANES)), ir.VectorType(I16, LANES))
    bits = b.bitcast(value, I32X16)
    sign = b.and_(bits, _const(I32X16, -0x80000000))
    magnitude = b.and_(bits, _const(I32X16, 0x7FFFFFFF))
    # Normal halves: rebias the exponent and round the 13 dropped bits, halves to even.
    odd = b.and_(b.lshr(magnitude, _const(I32X16, 13)), _const(I32X16, 1))
    normal = b.lshr(b.add(b.add(magnitude, _const(I32X16, (-112 << 23) + 0xFFF)), odd), _const(I32X16, 13))
    # Subnormal halves: adding 0.5 lets the float adder round at the right bit.
    half = _const(F32X16, 0.5)
    tiny = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, F32X16), half), I32X16), b.bitcast(half, I32X16))
    result = b.select(b.icmp_unsigned("<", magnitude, _const(I32X16, 0x38800000)), tiny, normal)
    result = b.select(b.icmp_unsigned(">=", magnitude, _const(I32X16, 0x47800000)), _const(I32X16, 0x7C00), result)
    result = b.select(b.icmp_unsigned(">", magnitude, _const(I32X16, 0x7F800000)), _const(I32X16, 0x7E00), result)
    return b.trunc(b.or_(result, b.lshr(sign, _const(I32X16, 16))), ir.VectorType(I16, LANES))


@_operation(f32x16, types.intp, types.intp)
def load_f16_as_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return _f16_bits_to_f32(b, _load(b, base, offset, ir.VectorType(I16, LANES)))


@_operation(types.float32, types.intp, types.intp)
def read_f16(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    one = _splat(b, _load(b, base, offset, I16), LANES)
    return b.extract_element(_f16_bits_to_f32(b, one), ir.Constant(I32, 0))


@_operation(types.void, types.intp, types.intp, f32x16)
def store_f32_as_f16(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    _write(b, base, offset, _f32_to_f16_bits(b, value))


@_operation(f32x16, f32x16)
def round_f16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Rounded to what a float16 holds, halves to even."""
    return _f16_bits_to_f32(b, _f32_to_f16_bits(b, value))


@_operation(f32x16, f32x16)
def round_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Rounded to what a bfloat16 holds, halves to even (finite values)."""
    bits = b.bitcast(value, I32X16)
    odd = b.and_(b.lshr(bits, _const(I32X16, 16)), _const(I32X16, 1))
    rounded = b.add(bits, b.add(odd, _const(I32X16, 0x7FFF)))
    return b.bitcast(b.and_(rounded, _const(I32X16, -0x10000)), F32X16)
