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
    I8,
    I16,
    I32,
    I32X16,
    I64,
    LANES,
    U8X64,
    call,
    const,
    cpu_features,
    f32x16,
    i32x16,
    joined,
    load,
    operation,
    shuffle,
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


def _dot_avx2(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value, signed: bool) -> ir.Value:
    if signed:  # |q| times x with the sign of q
        x, q = (call(b, "llvm.x86.avx2.psign.b", q.type, [v, q]) for v in (x, q))
    pairs = call(b, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), [q, x])
    quads = call(b, "llvm.x86.avx2.pmadd.wd", acc.type, [pairs, const(pairs.type, 1)])
    return b.add(acc, quads)


def _dot_plain(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value, signed: bool) -> ir.Value:
    q, x = b.bitcast(q, I32X16), b.bitcast(x, I32X16)
    for k in range(4):
        top = b.shl(q, const(I32X16, 24 - 8 * k))
        weight = (b.ashr if signed else b.lshr)(top, const(I32X16, 24))
        value = b.ashr(b.shl(x, const(I32X16, 24 - 8 * k)), const(I32X16, 24))
        acc = b.add(acc, b.mul(weight, value))
    return acc


def _has_vnni() -> bool:
    features = cpu_features()
    return {"avx512vnni", "avx512f"} <= features or "avxvnni" in features


def _dot(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value, signed: bool) -> ir.Value:
    features = cpu_features()
    if {"avx512vnni", "avx512f"} <= features:
        return _dot_vnni(b, acc, q, x, 512)
    if "avxvnni" in features:
        narrow, parts = (lambda a, q, x: _dot_vnni(b, a, q, x, 256)), 2
    elif "avx2" in features:
        narrow, parts = (lambda a, q, x: _dot_avx2(b, a, q, x, signed)), 2
    elif "dotprod" in features:
        narrow, parts = (lambda a, q, x: call(b, "llvm.aarch64.neon.sdot.v4i32.v16i8", a.type, [a, q, x])), 4
    else:
        return _dot_plain(b, acc, q, x, signed)
    pieces = zip(split(b, acc, parts), split(b, q, parts), split(b, x, parts), strict=True)
    return joined(b, [narrow(*piece) for piece in pieces])


@operation(i32x16, i32x16, u8x64, u8x64)
def dot4(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value) -> ir.Value:
    """acc + the sum of four products in each lane: q unsigned and at most 127, x signed. Exact on every machine.

    pmaddubsw saturates at 16 bits; 2 * 127 * 127 stays below that, which is why q must not exceed 127."""
    return _dot(b, acc, q, x, signed=False)


@operation(i32x16, i32x16, u8x64, u8x64)
def dot4_u8(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value) -> ir.Value:
    """acc + the sum of four products in each lane: q unsigned, x signed and at most 64 in magnitude. Exact on every
    machine: 2 * 255 * 64 fits in 16 bits; NEON multiplies signed bytes, q - 128, and 128 times x is added."""
    if "dotprod" not in cpu_features():
        return _dot(b, acc, q, x, signed=False)
    sums = _dot(b, const(I32X16, 0), const(U8X64, 1), x, signed=False)
    return _dot(b, b.add(acc, b.shl(sums, const(I32X16, 7))), b.xor(q, const(U8X64, 128)), x, signed=False)


@operation(i32x16, i32x16, u8x64, u8x64)
def dot4_i8(b: ir.IRBuilder, acc: ir.Value, q: ir.Value, x: ir.Value) -> ir.Value:
    """acc + the sum of four products in each lane: q signed, but as `factor_i8` gives it, x signed and above -128.

    What `i8_offset` says is to be added to acc for every unit of x. Exact on every machine."""
    return _dot(b, acc, q, x, signed=True)


@operation(u8x64, u8x64)
def factor_i8(b: ir.IRBuilder, q: ir.Value) -> ir.Value:
    """Signed bytes as `dot4_i8` takes them. VNNI multiplies unsigned ones: they become q + 128."""
    return b.xor(q, const(U8X64, 128)) if _has_vnni() else q


@operation(types.int32)
def i8_offset(b: ir.IRBuilder) -> ir.Value:
    """What makes up for what `factor_i8` adds to every factor."""
    return ir.Constant(I32, -128 if _has_vnni() else 0)


# Instructions that look bytes up among sixteen, and how many of them a vector takes.
_BYTE_LOOKUPS = (
    ("avx512bw", "llvm.x86.avx512.pshuf.b.512", 1),
    ("avx2", "llvm.x86.avx2.pshuf.b", 2),
    ("ssse3", "llvm.x86.ssse3.pshuf.b.128", 4),
    ("neon", "llvm.aarch64.neon.tbl1.v16i8", 4),
)


@operation(u8x64, types.intp, u8x64)
def lookup_u8(b: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """table[index] for each byte, from 16 bytes at the address `table`; an index must be below 16."""
    entries = load(b, table, ir.Constant(I64, 0), ir.VectorType(I8, 16))
    for feature, name, parts in _BYTE_LOOKUPS:
        if feature in cpu_features():
            copies = shuffle(b, entries, entries, list(range(16)) * (4 // parts))
            return joined(b, [call(b, name, copies.type, [copies, some]) for some in split(b, index, parts)])
    result = const(U8X64, 0)
    for k in range(16):
        entry = splat(b, b.extract_element(entries, ir.Constant(I32, k)), 64)
        result = b.select(b.icmp_unsigned("==", index, const(U8X64, k)), entry, result)
    return result


@operation(f32x16, types.intp, i32x16)
def lookup(b: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """table[index] for each lane, from 32 float32 at the address `table`; only the low five bits of an index count."""
    index = b.and_(index, const(I32X16, 31))
    if "avx512f" in cpu_features():
        low, high = (load(b, table, ir.Constant(I64, 64 * k), F32X16) for k in range(2))
        return call(b, "llvm.x86.avx512.vpermi2var.ps.512", F32X16, [low, index, high])
    return _gather(b, table, index)


@operation(f32x16, types.intp, i32x16)
def lookup256(b: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
    """table[index] for each lane, from 256 float32; an index must be below 256."""
    if "avx512f" not in cpu_features():
        return _gather(b, table, index)
    entries = [load(b, table, ir.Constant(I64, 64 * k), F32X16) for k in range(16)]
    # Thirty-two entries at a time by the low five bits of the index, then one of two by each bit above.
    found = [
        call(b, "llvm.x86.avx512.vpermi2var.ps.512", F32X16, [low, index, high])
        for low, high in zip(entries[::2], entries[1::2], strict=True)
    ]
    for bit in (32, 64, 128):
        set_ = b.icmp_unsigned("!=", b.and_(index, const(I32X16, bit)), const(I32X16, 0))
        found = [b.select(set_, high, low) for low, high in zip(found[::2], found[1::2], strict=True)]
    return found[0]


def _gather(b: ir.IRBuilder, table: ir.Value, index: ir.Value) -> ir.Value:
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
    return load_f16(b, base, offset)


def load_f16(b: ir.IRBuilder, base: ir.Value, offset: ir.Value) -> ir.Value:
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
