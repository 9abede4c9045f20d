"""NF4: every byte, bytes written by hand, and what bitsandbytes makes of the same matrices."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from formats import CODECS
from formats.codecs import nf4
from formats.codecs.base import from_bf16
from tests.matrices import same_bits

NF4_VECTORS = np.load(Path(__file__).parent / "data" / "nf4-vectors.npz")
NF4_CASES = sorted({key[:3] for key in NF4_VECTORS.files if key[0] == "c"})
each_case = pytest.mark.parametrize("case", NF4_CASES)


def test_every_nf4_byte():
    packed = np.arange(256, dtype=np.uint8)
    codes = nf4.unpack_codes(packed, 512)
    assert codes[0::2].tolist() == [b // 16 for b in range(256)]
    assert codes[1::2].tolist() == [b % 16 for b in range(256)]
    assert same_bits(nf4.pack_codes(codes), packed)
    params = {"block": 64, "nested_block": 0, "dtype": "float32"}
    parts = {"codes": packed, "levels": nf4.LEVELS, "absmax": np.full(8, 2, np.float32)}
    assert same_bits(CODECS["nf4"].dequantize(parts, (512,), params), nf4.LEVELS[codes] * np.float32(2))


def test_nf4_bytes_by_hand():
    w = np.array([[-1.0, 1.0, 0.0, 0.5, -0.1]], np.float32) * 3
    params, parts = CODECS["nf4"].quantize(w, nested_block=0)
    assert params == {"block": 64, "nested_block": 0, "dtype": "float32"}
    assert parts["codes"].tobytes().hex() == "0f7c67"
    assert parts["absmax"].tolist() == [3.0]


def test_nf4_tables_are_those_of_bitsandbytes():
    assert same_bits(nf4.LEVELS, NF4_VECTORS["nf4_table"])
    assert same_bits(nf4.nested_levels(), NF4_VECTORS["dynamic_map"])


def nf4_case(case):
    meta = json.loads(NF4_VECTORS[f"{case}_meta"].item())
    parts = {
        "codes": NF4_VECTORS[f"{case}_packed"].reshape(-1),
        "levels": NF4_VECTORS["nf4_table"],
        "absmax": NF4_VECTORS[f"{case}_absmax"],
    }
    if meta["nested"]:
        parts["nested_absmax"] = NF4_VECTORS[f"{case}_nested_absmax"]
        parts["nested_levels"] = NF4_VECTORS["dynamic_map"]
        parts["offset"] = np.array([meta["nested_offset"]], np.float32)
    return meta, parts


@each_case
def test_nf4_dequantises_as_bitsandbytes_bit_for_bit(case):
    meta, parts = nf4_case(case)
    shape = tuple(meta["shape"])
    for dtype, key in (("float32", "dq_f32"), ("float16", "dq_f16"), ("bfloat16", "dq_bf16")):
        if f"{case}_{key}" not in NF4_VECTORS:
            continue
        params = {"block": meta["blocksize"], "nested_block": 256 if meta["nested"] else 0, "dtype": dtype}
        expected = NF4_VECTORS[f"{case}_{key}"].reshape(shape)
        expected = from_bf16(expected) if dtype == "bfloat16" else expected.astype(np.float32)
        assert same_bits(CODECS["nf4"].dequantize(parts, shape, params), expected)


@each_case
def test_nf4_quantises_to_the_bytes_of_bitsandbytes(case):
    meta, expected = nf4_case(case)
    w = NF4_VECTORS[f"{case}_input"]
    w = from_bf16(w) if w.dtype == np.uint16 else w
    nested = 256 if meta["nested"] else 0
    _, parts = CODECS["nf4"].quantize(w, block=meta["blocksize"], nested_block=nested)
    assert same_bits(parts["codes"], expected["codes"])
    if not nested:
        assert same_bits(parts["absmax"], expected["absmax"])
    else:
        params = {"block": meta["blocksize"], "nested_block": nested}
        scales, wanted = nf4.block_scales(parts, params), nf4.block_scales(expected, params)
        assert np.allclose(scales, wanted, rtol=0.02, atol=1e-6)
