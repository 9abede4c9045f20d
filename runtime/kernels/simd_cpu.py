"""Vector operations that ask the CPU what it has, each with a plain form for machines that have nothing.

The int8 dot product, the table lookup, and float16. All forms of one operation give the same bits.
"""

from __future__ import annotations

from llvmlite import binding as llvm
from llvmlite import ir
from numba import types

from .vectors import (
    F32X16,
    FLOAT,
    HALF,
    I16,
    I32,
    I32X16,
    I64,
    LANES,
    call,
    const,
    cpu_features,
    f32x16,
    i32x16,
    joined,
    load,
    operation,
    splat,
    split,
    store,
    u8x64,
)


def _dot_vnni(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value, bits: int) -> ir.Value:
    if llvm.llvm_version_info[0] < 21:  # older LLVM declares the bytes as 32-bit lanes
        lanes = ir.VectorType(I32, bits // 32)
        q, x = b.bitcast(q, lanes), b.bitcast(x, lanes)
    return call(b, f"llvm.x86.avx512.vpdpbusd.{bits}", acc.type, [acc, q, x])


def _dot_avx2(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value) -> ir.Value:
    pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), [q, x])
    quads = call(b, "llvm.x86.avx2.pmadd.wd", acc.type, [pairs, const(pairs.type, 1)])
    return b.add(acc, quads)


def _dot_plain(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value) -> ir.Value:
    q, x = b.bitcast(q, I32X16), b.bitcast(x, I32X16)
    for k in range(4):
        weight = b.and_(b.lshr(q, const(I32X16, 8 * k)), const(I32X16, 255))
        value = b.ashr(b.shl(x, const(I32X16, 24 - 8 * k)), const(I32X16, 24))
        acc = b.add(acc, b.mul(weight, value))
    return acc


@operation(i32x16, i32x16, u8x64, u8x64)
def dot4(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value) -> ir.Value:
    """acc + the sum of four products in each lane: q unsigned and at most 127, x signed. Exact on every machine.

    pmaddubsw saturates at 16 bits; 2 * 127 * 127 stays below that, which is why q must not exceed 127."""
    features = cpu_features()
    if {"avx512vnni", "avx512f"} <= features:
        return _dot_vnni(b, acc, q, x, 512)
    if "avxvnni" in features:
        narrow, parts = (lambda a, q, x: _dot_vnni(b, a, q, x, 256)), 2
    elif "avx2" in features:
        narrow, parts = (lambda a, q, x: _dot_avx2(b, a, q, x)), 2
    elif "dotprod" in features:
        narrow, parts = (lambda a, q, x: call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", a.type, [a, q, x])), 4
    else:
        return _dot_plain(b, acc, q, x)
    pieces = zip(split(b, acc, parts), split(b, q, parts), split(b, x, parts), strict=True)
    return joined(b, [narrow(*piece) for piece in pieces])


@operation(f32x16, types.intp, i32x16)
def lookup(b: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """table[index] for each lane, from 32 float32 at the address `table`; only the low five bits of an index count."""
    index = b.and_(index, const(I32X16, 31))
    if "avx512f" in cpu_features():
        low, high = (load(b, table, ir.Constant(I64, 64 * k), F32X16) for k in range(2))
        return call(b, "llvm.x86.avx512.vpermi2var.ps.512", F32X16, [low, index, high])
    result = ir.Constant(F32X16, ir.Undefined)
    for lane in range(LANES):
        at = b.zext(b.extract_element(index, ir.Constant(I32, lane)), I64)
        value = load(b, table, b.shl(at, ir.Constant(I64, 2)), FLOAT)
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
    magnitude = b.shl(b.and_(wide, const(ints, 0x7FFF)), const(ints, 13))
    scaled = b.bitcast(b.fmul(b.bitcast(magnitude, floats), const(floats, 2.0**112)), ints)
    special = b.icmp_unsigned(">=", magnitude, const(ints, 0x0F800000))  # infinity and NaN keep their fields
    scaled = b.select(special, b.or_(magnitude, const(ints, 0x7F800000)), scaled)
    sign = b.shl(b.and_(wide, const(ints, 0x8000)), const(ints, 16))
    return b.bitcast(b.or_(scaled, sign), floats)


def _f32_to_f16_bits(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """<16 x float> to <16 x i16>, halves to even; what exceeds the range becomes infinity."""
    if _has_f16():
        return b.bitcast(b.fptrunc(value, ir.VectorType(HALF, LANES)), ir.VectorType(I16, LANES))
    bits = b.bitcast(value, I32X16)
    sign = b.and_(bits, const(I32X16, -0x80000000))
    magnitude = b.and_(bits, const(I32X16, 0x7FFFFFFF))
    # Normal halves: rebias the exponent and round the 13 dropped bits, halves to even.
    odd = b.and_(b.lshr(magnitude, const(I32X16, 13)), const(I32X16, 1))
    normal = b.lshr(b.add(b.add(magnitude, const(I32X16, (-112 << 23) + 0xFFF)), odd), const(I32X16, 13))
    # Subnormal halves: adding 0.5 lets the float adder round at the right bit.
    half = const(F32X16, 0.5)
    tiny = b.sub(b.bitcast(b.fadd(b.bitcast(magnitude, F32X16), half), I32X16), b.bitcast(half, I32X16))
    result = b.select(b.icmp_unsigned("<", magnitude, const(I32X16, 0x38800000)), tiny, normal)
    result = b.select(b.icmp_unsigned(">=", magnitude, const(I32X16, 0x47800000)), const(I32X16, 0x7C00), result)
    result = b.select(b.icmp_unsigned(">", magnitude, const(I32X16, 0x7F800000)), const(I32X16, 0x7E00), result)
    return b.trunc(b.or_(result, b.lshr(sign, const(I32X16, 16))), ir.VectorType(I16, LANES))


@operation(f32x16, types.intp, types.intp)
def load_f16_as_f32(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    return _f16_bits_to_f32(b, load(b, base, offset, ir.VectorType(I16, LANES)))


@operation(types.float32, types.intp, types.intp)
def read_f16(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
    one = splat(b, load(b, base, offset, I16), LANES)
    return b.extract_element(_f16_bits_to_f32(b, one), ir.Constant(I32, 0))


@operation(types.void, types.intp, types.intp, types.float32)
def write_f16(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    bits = _f32_to_f16_bits(b, splat(b, value, LANES))
    store(b, base, offset, b.extract_element(bits, ir.Constant(I32, 0)))


@operation(types.void, types.intp, types.intp, f32x16)
def store_f32_as_f16(b: ir.IRBuilder, base: ir.Value, offset: ir.Value, value: ir.Value) -> None:
    store(b, base, offset, _f32_to_f16_bits(b, value))


@operation(f32x16, f32x16)
def round_f16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Rounded to what a float16 holds, halves to even."""
    return _f16_bits_to_f32(b, _f32_to_f16_bits(b, value))


@operation(f32x16, f32x16)
def round_bf16(b: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Rounded to what a bfloat16 holds, halves to even (finite values)."""
    bits = b.bitcast(value, I32X16)
    odd = b.and_(b.lshr(bits, const(I32X16, 16)), const(I32X16, 1))
    rounded = b.add(bits, b.add(odd, const(I32X16, 0x7FFF)))
    return b.bitcast(b.and_(rounded, const(I32X16, -0x10000)), F32X16)
