"""Vector operations for compiled kernels: memory, conversions and arithmetic.

Memory is addressed by integers (`address(array)` plus a byte offset); nothing checks bounds here.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .simd_cpu import dot4 as dot4
from .simd_cpu import dot4_i8 as dot4_i8
from .simd_cpu import dot4_u8 as dot4_u8
from .simd_cpu import factor_i8 as factor_i8
from .simd_cpu import i8_offset as i8_offset
from .simd_cpu import load_f16_as_f32 as load_f16_as_f32
from .simd_cpu import lookup as lookup
from .simd_cpu import lookup256 as lookup256
from .simd_cpu import lookup_u8 as lookup_u8
from .simd_cpu import read_f16 as read_f16
from .simd_cpu import round_bf16 as round_bf16
from .simd_cpu import round_f16 as round_f16
from .simd_cpu import store_f32_as_f16 as store_f32_as_f16
from .simd_cpu import write_f16 as write_f16
from .vectors import (
    F32X16,
    FLOAT,
    I8,
    I16,
    I32,
    I32X16,
    I64,
    LANES,
    U8X64,
    call,
    const,
    f32x16,
    i32x16,
    load,
    operation,
    shuffle,
    splat,
    split,
    store,
    transposed_lines,
    u8x64,
)

# ==== Memory ====


@intrinsic
def address(_typingctx: Any, array: types.Array) -> Any:
    """The address of an array's first element."""

    def codegen(context: Any, b: ir.IRBuilder, sig: Any, args: Any) -> ir.Value:
        return b.ptrtoint(context.make_array(sig.args[0])(context, b, args[0]).data, I64)

    return types.intp(array), codegen


def _scratch(name: str, nbytes: int) -> Any:
    def emit(b: ir.IRBuilder) -> ir.Value:
        with b.goto_entry_block():
            slot = b.alloca(ir.ArrayType(I8, nbytes))
            slot.align = 64
        return b.ptrtoint(slot, I64)

    emit.__name__ = name
    emit.__doc__ = f"The address of {nbytes} bytes on the stack, aligned to 64, the same for every call at this place."
    return operation(types.intp)(emit)


scratch_64, scratch_32k = _scratch("scratch_64", 64), _scratch("scratch_32k", 32768)
scratch_160k = _scratch("scratch_160k", 163840)


@operation(u8x64, types.intp, types.intp)
def load_u8(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return load(b, base, offset, U8X64)


@operation(f32x16, types.intp, types.intp)
def load_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return load(b, base, offset, F32X16)


@operation(i32x16, types.intp, types.intp)
def load_u8_as_i32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return b.zext(load(b, base, offset, ir.VectorType(I8, LANES)), I32X16)


@operation(f32x16, types.intp, types.intp)
def load_i8_as_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return b.sitofp(b.sext(load(b, base, offset, ir.VectorType(I8, LANES)), I32X16), F32X16)


@operation(f32x16, types.intp, types.intp)
def load_bf16_as_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    bits = b.zext(load(b, base, offset, ir.VectorType(I16, LANES)), I32X16)
    return b.bitcast(b.shl(bits, const(I32X16, 16)), F32X16)


@operation(i32x16, types.intp, types.intp)
def load_nibbles(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    """Sixteen 4-bit numbers from eight bytes, the high nibble of each byte first."""
    packed = load(b, base, offset, ir.VectorType(I8, 8))
    high = b.lshr(packed, const(packed.type, 4))
    low = b.and_(packed, const(packed.type, 15))
    return b.zext(shuffle(b, high, low, [k // 2 + 8 * (k % 2) for k in range(LANES)]), I32X16)


@operation(types.float32, types.intp, types.intp)
def read_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return load(b, base, offset, FLOAT)


@operation(types.float32, types.intp, types.intp)
def read_bf16(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    bits = b.zext(load(b, base, offset, I16), I32)
    return b.bitcast(b.shl(bits, ir.Constant(I32, 16)), FLOAT)


@operation(types.int32, types.intp, types.intp)
def read_i32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return load(b, base, offset, I32)


@operation(types.uint8, types.intp, types.intp)
def read_u8(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return load(b, base, offset, I8)


@operation(types.int64, types.intp, types.intp)
def read_i64(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return load(b, base, offset, I64)


@operation(types.void, types.intp, types.intp, f32x16)
def store_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    store(b, base, offset, value)


@operation(types.void, types.intp, types.intp, u8x64)
def store_u8(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    store(b, base, offset, value)


@operation(types.void, types.intp, types.intp, i32x16)
def store_i32_as_i8(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    store(b, base, offset, b.trunc(value, ir.VectorType(I8, LANES)))


@operation(types.void, types.intp, types.intp, types.float32)
def write_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    store(b, base, offset, value)


@operation(types.void, types.intp, types.intp, types.uint8)
def write_u8(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    store(b, base, offset, value)


@operation(types.void, types.intp, types.intp, types.int32)
def write_i32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    store(b, base, offset, value)


TILE_BYTES = 32  # of each row of a tile


@operation(types.UniTuple(u8x64, TILE_BYTES // 4), types.intp, types.intp)
def load_tile(b: ir.IRBuilder, rows: ir.Value, offset: ir.Value) -> ir.Value:
    """32 bytes of sixteen rows, transposed: lane r of vector j is the four bytes 4 j .. 4 j + 3 of row r.

    rows: the address of sixteen addresses; offset: to add to each"""
    eight = ir.VectorType(I32, LANES // 2)
    starts = [load(b, rows, ir.Constant(I64, 8 * r), I64) for r in range(LANES)]
    return transposed_lines(b, [load(b, start, offset, eight) for start in starts])


@operation(types.void, types.intp, types.intp, types.int64)
def write_i64(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    store(b, base, offset, value)


# ==== Making vectors ====


@operation(f32x16, types.float32)
def splat_f32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return splat(b, value, LANES)


@operation(i32x16, types.int32)
def splat_i32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return splat(b, value, LANES)


@operation(u8x64, types.intp, types.intp)
def splat_quad(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    """Four bytes from memory, repeated in all sixteen 32-bit lanes."""
    return b.bitcast(splat(b, load(b, base, offset, I32), LANES), U8X64)


@operation(i32x16, u8x64)
def as_i32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """The same bits as sixteen 32-bit lanes."""
    return b.bitcast(value, I32X16)


@operation(f32x16, i32x16)
def bits_to_f32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return b.bitcast(value, F32X16)


@operation(i32x16, f32x16)
def f32_bits(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return b.bitcast(value, I32X16)


@operation(f32x16, i32x16)
def to_f32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    return b.sitofp(value, F32X16)


@operation(i32x16, f32x16)
def round_to_i32(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Nearest integers, halves to even. The values must fit in int32."""
    return b.fptosi(call(b, "llvm.rint.v16f32", F32X16, [value]), I32X16)


@operation(i32x16, i32x16)
def evens_first(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """Of each eight lanes those of even number, then the others: the order in which bytes hold pairs of nibbles."""
    return shuffle(b, x, x, [8 * half + 2 * i + odd for half in (0, 1) for odd in (0, 1) for i in range(4)])


# ==== Arithmetic ====


@operation(f32x16, f32x16, f32x16, f32x16)
def fma(b: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """x * y + z, rounded once."""
    return call(b, "llvm.fma.v16f32", F32X16, [x, y, z])


@operation(f32x16, f32x16, f32x16)
def maximum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@operation(f32x16, f32x16, f32x16)
def minimum(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.fcmp_ordered("<", x, y), x, y)


@operation(f32x16, f32x16)
def absolute(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return call(b, "llvm.fabs.v16f32", F32X16, [x])


@operation(types.float32, f32x16)
def first_lane(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    return b.extract_element(x, ir.Constant(I32, 0))


@operation(types.float32, f32x16)
def sum_lanes(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    """The sum of the lanes, as a tree of halves: one fixed order on every machine."""
    while x.type.count > 1:
        low, high = split(b, x, 2)
        x = b.fadd(low, high)
    return b.extract_element(x, ir.Constant(I32, 0))


@operation(types.float32, f32x16)
def max_lanes(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    while x.type.count > 1:
        low, high = split(b, x, 2)
        x = b.select(b.fcmp_ordered(">", low, high), low, high)
    return b.extract_element(x, ir.Constant(I32, 0))


@operation(f32x16, f32x16, f32x16)
def larger_magnitude(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    """The larger of two magnitudes, which have no signs. Bits are compared: NaN is larger than every number."""
    return b.select(b.icmp_signed(">", b.bitcast(x, I32X16), b.bitcast(y, I32X16)), x, y)


@operation(types.float32, f32x16)
def largest_magnitude(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    bits = b.bitcast(x, I32X16)
    while bits.type.count > 1:
        low, high = split(b, bits, 2)
        bits = b.select(b.icmp_signed(">", low, high), low, high)
    return b.bitcast(b.extract_element(bits, ir.Constant(I32, 0)), ir.FloatType())


@operation(types.int32, i32x16)
def sum_lanes_i32(b: ir.IRBuilder, x: ir.Value) -> ir.Value:
    while x.type.count > 1:
        low, high = split(b, x, 2)
        x = b.add(low, high)
    return b.extract_element(x, ir.Constant(I32, 0))


@operation(u8x64, u8x64, u8x64)
def minimum_u8(b: ir.IRBuilder, x: ir.Value, y: ir.Value) -> ir.Value:
    return b.select(b.icmp_unsigned("<", x, y), x, y)
