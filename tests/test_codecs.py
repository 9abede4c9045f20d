"""The codecs: every byte, bytes written by hand, a slow twin of packer and quantiser, random round trips."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from formats import CODECS, TensorError, TritWriter, open_trit
from formats.codecs import beyond_range, nf4, part_spans, payload_nbytes, trit
from formats.codecs.base import from_bf16, round_to, to_bf16

DEPTHS = (1, 2, 3, 4)
SHAPES = ((1, 1), (3, 5), (17, 83), (16, 80), (33, 161))
MATRIX_CODECS = tuple(name for name in CODECS if name != "u8")
# Relative squared error on Gaussian values, with some room for a small sample.
MAX_ERROR = {
    "trit1": 0.19, "trit2": 0.024, "trit3": 0.0026, "trit4": 0.00036, "nf4": 0.0095, "q8": 4e-5, "bf16": 4e-6,
    "f16": 1e-7, "f32": 0.0,
}  # fmt: skip
NF4_VECTORS = np.load(Path(__file__).parent / "data" / "nf4-vectors.npz")
NF4_CASES = sorted({key[:3] for key in NF4_VECTORS.files if key[0] == "c"})


def gaussian(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


# ======== all codecs


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MATRIX_CODECS)
def test_round_trip_of_odd_sizes(name, shape):
    w = gaussian(shape)
    codec = CODECS[name]
    params, parts = codec.quantize(w)
    layout = codec.parts(shape, params)
    assert list(parts) == list(layout)
    assert {k: (p.dtype, p.shape) for k, p in parts.items()} == layout
    back = codec.dequantize(parts, shape, params)
    assert back.shape == shape and back.dtype == np.float32
    ids = np.array([shape[0] - 1, 0, shape[0] // 2, 0])
    assert same_bits(codec.dequantize_rows(parts, shape, params, ids), back[ids])
    assert list(codec.problems(parts, shape, params)) == []


@pytest.mark.parametrize("name", MATRIX_CODECS)
def test_error_budget(name):
    w = gaussian((64, 160))
    params, parts = CODECS[name].quantize(w)
    rest = CODECS[name].dequantize(parts, w.shape, params) - w
    assert (rest**2).sum() / (w**2).sum() <= MAX_ERROR[name]


@pytest.mark.parametrize("name", MATRIX_CODECS)
@settings(max_examples=20)
@given(data=st.data())
def test_any_finite_matrix(name, data):
    shape = data.draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=33))
    limit = 6e4 if name in ("f16", "q8") else 2.0**100
    floats = st.floats(-limit, limit, width=32)
    w = data.draw(hnp.arrays(np.float32, shape, elements=floats, fill=st.just(np.float32(0.5))))
    codec = CODECS[name]
    params, parts = codec.quantize(w)
    back = codec.dequantize(parts, shape, params)
    assert np.isfinite(back).all()
    assert np.abs(back).max() <= np.abs(w).max() * 1.01 + 1e-7
    assert list(codec.problems(parts, shape, params)) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", MATRIX_CODECS)
def test_nan_and_infinity_are_refused(name, value):
    w = gaussian((20, 50))
    w[17, 3] = value
    with pytest.raises(ValueError, match="NaN"):
        CODECS[name].quantize(w)


@pytest.mark.parametrize("name", [n for n in MATRIX_CODECS if n != "nf4"])
def test_refused_value_is_located(name):
    w = gaussian((20, 50))
    w[17, 3] = np.nan
    with pytest.raises(ValueError, match=r"\[17, 3\]"):
        CODECS[name].quantize(w)


@pytest.mark.parametrize("name", MATRIX_CODECS)
def test_zeros_and_constants(name):
    for value in (0.0, 0.75, -0.75):
        w = np.full((18, 90), value, np.float32)
        params, parts = CODECS[name].quantize(w)
        back = CODECS[name].dequantize(parts, w.shape, params)
        assert np.allclose(back, w, rtol=1e-3 if name == "q8" else 1e-6)


@pytest.mark.parametrize("name", MATRIX_CODECS)
def test_subnormal_and_huge_values(name):
    tiny = np.full((2, 40), 1e-45, np.float32)
    params, parts = CODECS[name].quantize(tiny)
    assert np.isfinite(CODECS[name].dequantize(parts, tiny.shape, params)).all()
    huge = gaussian((2, 40)) * np.float32(1e30)
    if name in ("f16", "q8"):
        with pytest.raises(ValueError, match=f"does not fit codec {name}; use f32"):
            CODECS[name].quantize(huge)
    else:
        params, parts = CODECS[name].quantize(huge)
        back = CODECS[name].dequantize(parts, huge.shape, params)
        assert ((back / 1e30 - huge / 1e30) ** 2).mean() < 0.2


@pytest.mark.parametrize("name", ["nf4", "trit1", "trit4"])
def test_values_beyond_the_rounding_type_are_refused(name):
    w = gaussian((4, 64)) * np.float32(1e6)
    with pytest.raises(ValueError, match=f"does not fit codec {name} with dtype float16"):
        CODECS[name].quantize(w, dtype="float16")
    CODECS[name].quantize(w, dtype="bfloat16")


def test_chunks_change_nothing(monkeypatch):
    w = gaussian((70, 170))

    def everything():
        for name in MATRIX_CODECS:
            params, parts = CODECS[name].quantize(w)
            yield from parts.values()
            yield CODECS[name].dequantize(parts, w.shape, params)

    whole = list(everything())
    monkeypatch.setattr("formats.codecs.base.CHUNK", 4096)
    monkeypatch.setattr("formats.codecs.nf4.CHUNK", 4096)
    assert all(same_bits(a, b) for a, b in zip(whole, everything(), strict=True))


@pytest.mark.parametrize("name", MATRIX_CODECS)
@pytest.mark.parametrize("bad", [-1, 20])
def test_rows_out_of_range(name, bad):
    w = gaussian((20, 50))
    params, parts = CODECS[name].quantize(w)
    with pytest.raises(IndexError, match=f"row {bad} "):
        CODECS[name].dequantize_rows(parts, w.shape, params, np.array([0, bad]))


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("f32", {"dtype": "float32"}, "'dtype' is not known"),
        ("q8", {"block": 32}, "'block' is not known"),
        ("trit2", {}, "'dtype' is missing"),
        ("trit2", {"dtype": "float64"}, "dtype is 'float64'"),
        ("trit2", {"dtype": ["float32"]}, "dtype is"),
        ("nf4", {"block": 64, "nested_block": 256}, "'dtype' is missing"),
        ("nf4", {"block": 48, "nested_block": 256, "dtype": "float16"}, "block is 48; allowed are 32, 64"),
        ("nf4", {"block": 64.0, "nested_block": 256, "dtype": "float16"}, "block is 64.0"),
        ("nf4", {"block": 64, "nested_block": False, "dtype": "float16"}, "nested_block is False"),
    ],
)
def test_parameters_are_strict(name, params, message):
    with pytest.raises(ValueError, match=message):
        CODECS[name].parts((4, 64), params)


@pytest.mark.parametrize(
    ("name", "shape"), [("u8", (2, 2)), ("q8", (4,)), ("trit1", (4,)), ("f32", (1, 2, 3))]
)
def test_dimensions_are_strict(name, shape):
    params = {"dtype": "float32"} if name == "trit1" else {}
    with pytest.raises(ValueError, match="dimensions"):
        CODECS[name].parts(shape, params)


def test_payload_sizes():
    assert part_spans("q8", (3, 33), {}) == {"values": (0, 192), "scales": (192, 12)}
    dtype = {"dtype": "float32"}
    assert part_spans("trit4", (17, 81), dtype) == {"units": (0, 128), "blocks": (128, 4 * 1072)}
    params = {"block": 64, "nested_block": 256, **dtype}
    assert part_spans("nf4", (3, 5), params) == {
        "codes": (0, 8), "levels": (64, 64), "absmax": (128, 1), "nested_absmax": (192, 4),
        "nested_levels": (256, 1024), "offset": (1280, 4),
    }  # fmt: skip
    assert payload_nbytes("nf4", (3, 5), params) == 1284
    bits = [payload_nbytes(f"trit{d}", (4000, 4000), dtype) * 8 / 4000**2 for d in DEPTHS]
    assert np.allclose(bits, [1.9, 3.5, 5.1, 6.7], atol=1e-3)


# ======== dense


def test_dense_bytes():
    w = np.array([[1.0, -2.0], [0.5, 3.140625]], np.float32)
    assert CODECS["f32"].quantize(w)[1]["values"].tobytes().hex() == "0000803f000000c00000003f00004940"
    assert CODECS["f16"].quantize(w)[1]["values"].tobytes().hex() == "003c00c000384842"
    assert CODECS["bf16"].quantize(w)[1]["values"].tobytes().hex() == "803f00c0003f4940"
    blob = np.frombuffer(b"\x00\xff trit", np.uint8)
    assert CODECS["u8"].quantize(blob)[1]["values"].tobytes() == b"\x00\xff trit"
    with pytest.raises(ValueError, match="uint8"):
        CODECS["u8"].quantize(np.zeros(3, np.int64))


def test_every_bf16_value():
    bits = np.arange(1 << 16, dtype=np.uint16)
    values = from_bf16(bits)
    finite = np.isfinite(values)
    assert (to_bf16(values)[finite] == bits[finite]).all()
    assert np.isnan(from_bf16(to_bf16(values[np.isnan(values)]))).all()
    # Halfway to the next value: ties go to the even one, a little more goes up, a little less down.
    positive = np.arange(0x7F00, dtype=np.uint32)
    half = (positive << 16) + 0x8000
    assert (to_bf16(half.view(np.float32)) == positive + (positive & 1)).all()
    assert (to_bf16((half + 1).view(np.float32)) == positive + 1).all()
    assert (to_bf16((half - 1).view(np.float32)) == positive).all()


def test_q8_bytes_and_padding():
    w = np.zeros((1, 33), np.float32)
    w[0, :4] = [127.0, -127.0, 0.5, 1.5]
    w[0, 32] = -2.0
    parts = CODECS["q8"].quantize(w)[1]
    assert parts["values"].shape == (1, 64)
    assert parts["values"][0, :4].tolist() == [127, -127, 0, 2]
    assert parts["values"][0, 32] == -127 and not parts["values"][0, 33:].any()
    assert parts["scales"].tobytes() == np.array([1.0, 2 / 127], "<f2").tobytes()


# ======== trits


def slow_pack(levels, codes, depth):
    """SPEC.md word for word, one weight at a time."""
    top = (3**depth - 1) // 2
    out, width = levels.shape
    blocks = np.zeros((math.ceil(out / 16), math.ceil(width / 80), 256 * depth + 48), int)
    for s, b in np.ndindex(blocks.shape[:2]):

        def level(g, j, row, k, s=s, b=b):
            r, c = s * 16 + row, b * 80 + g * 16 + j * 4 + k
            return int(levels[r, c]) + top if r < out and c < width else top

        for j, row, k in np.ndindex(4, 16, 4):
            q = [level(g, j, row, k) for g in range(5)]
            for v, byte in enumerate(slow_bytes(q, depth)):
                blocks[s, b, (j * depth + v) * 64 + row * 4 + k] = byte
        for row in range(16):
            r = s * 16 + row
            c = [int(codes[r, b * 5 + g]) if r < out and b * 5 + g < codes.shape[1] else 0 for g in range(5)]
            h = [c[3] % 9, c[4] % 9, c[3] // 9 + 3 * (c[4] // 9)]
            for k in range(3):
                blocks[s, b, 256 * depth + 16 * k + row] = c[k] + 27 * h[k]
    return blocks.astype(np.uint8)


def slow_bytes(q, depth):
    if depth == 4:
        t = [q[4] // 27, q[4] // 9 % 3, q[4] // 3 % 3, q[4] % 3]
        return [q[i] + 81 * t[i] for i in range(4)]
    if depth == 3:
        return [q[0] + 27 * (q[3] % 9), q[1] + 27 * (q[4] % 9), q[2] + 27 * (3 * (q[3] // 9) + q[4] // 9)]
    if depth == 2:
        return [q[0] + 9 * q[1] + 81 * (q[4] // 3), q[2] + 9 * q[3] + 81 * (q[4] % 3)]
    return [81 * q[0] + 27 * q[1] + 9 * q[2] + 3 * q[3] + q[4]]


def random_levels(shape, depth, seed=0):
    rng = np.random.default_rng(seed)
    top = trit.max_level(depth)
    codes = rng.integers(0, 27, (shape[0], math.ceil(shape[1] / 16)), np.uint8)
    return rng.integers(-top, top + 1, shape, np.int8), codes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("depth", DEPTHS)
def test_packer_agrees_with_the_specification(depth, shape):
    levels, codes = random_levels(shape, depth)
    blocks = trit.pack(levels, codes, depth)
    assert same_bits(blocks, slow_pack(levels, codes, depth))
    again = trit.unpack(blocks, shape, depth)
    assert same_bits(again[0], levels) and same_bits(again[1], codes)


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_valid_trit_byte(depth):
    """Whatever valid bytes a superblock holds, unpacking and packing gives them back."""
    bytes_ = np.arange(243, dtype=np.uint8)
    rng = np.random.default_rng(depth)
    columns = [rng.permutation(bytes_) for _ in range(trit.block_bytes(depth))]
    blocks = np.stack(columns, axis=1).reshape(243, 1, -1)
    shape = (243 * 16, 80)
    levels, codes = trit.unpack(blocks, shape, depth)
    top = trit.max_level(depth)
    assert set(np.unique(levels)) == set(range(-top, top + 1))
    assert set(np.unique(codes)) == set(range(27))
    assert same_bits(trit.pack(levels, codes, depth), blocks)


@pytest.mark.parametrize("depth", DEPTHS)
def test_invalid_trit_bytes_stay_in_bounds_and_are_reported(depth):
    codec = CODECS[f"trit{depth}"]
    shape, params = (16, 80), {"dtype": "float32"}
    units = np.zeros(32, np.float32)
    units[:27] = 1
    for byte in range(243, 256):
        blocks = np.full((1, 1, trit.block_bytes(depth)), byte, np.uint8)
        parts = {"units": units, "blocks": blocks}
        assert np.isfinite(codec.dequantize(parts, shape, params)).all()
        assert trit.unpack(blocks, shape, depth)[1].max() < 32
        assert list(codec.problems(parts, shape, params)) == [
            f"blocks holds {blocks.size} bytes above 242, which stand for no trits"
        ]


@pytest.mark.parametrize(
    ("depth", "zeros", "expected"),
    [
        # Group 0 at its highest, group 4 at its lowest level; all others zero (q = L).
        (1, [121], [2 * 81 + 27 + 9 + 3 + 0]),
        (2, [4 + 36 + 81, 4 + 36 + 81], [8 + 36 + 0, 4 + 36 + 0]),
        (3, [13 + 27 * 4, 13 + 27 * 4, 13 + 27 * 4], [26 + 27 * 4, 13 + 27 * 0, 13 + 27 * 3]),
        (4, [40 + 81] * 4, [80 + 0, 40, 40, 40]),
    ],
)
def test_trit_bytes_by_hand(depth, zeros, expected):
    levels = np.zeros((16, 80), np.int8)
    row, j, k = 3, 2, 1
    levels[row, 0 * 16 + j * 4 + k] = trit.max_level(depth)
    levels[row, 4 * 16 + j * 4 + k] = -trit.max_level(depth)
    codes = np.zeros((16, 5), np.uint8)
    codes[5] = [1, 2, 3, 13, 26]
    block = trit.pack(levels, codes, depth)[0, 0]
    for v in range(depth):
        vector = block[(j * depth + v) * 64 :][:64].copy()
        assert vector[row * 4 + k] == expected[v]
        vector[row * 4 + k] = zeros[v]
        assert (vector == zeros[v]).all()
    scales = block[256 * depth :].reshape(3, 16)
    assert scales[:, 5].tolist() == [1 + 27 * 4, 2 + 27 * 8, 3 + 27 * (1 + 3 * 2)]
    assert not np.delete(scales, 5, axis=1).any()


@pytest.mark.parametrize("depth", DEPTHS)
def test_packer_refuses_what_does_not_fit(depth):
    levels, codes = random_levels((4, 20), depth)
    with pytest.raises(ValueError, match="level lies outside"):
        trit.pack(np.where(levels == levels[0, 0], trit.max_level(depth) + 1, levels), codes, depth)
    with pytest.raises(ValueError, match="scale code lies outside"):
        trit.pack(levels, codes + 27, depth)
    with pytest.raises(ValueError, match="do not belong"):
        trit.pack(levels, codes[:, :1], depth)


def slow_quantize(w, depth):
    """The quantiser of tritllm v2, one group at a time, in NumPy scalars."""
    top = np.float32(trit.max_level(depth))
    padded = np.pad(w, ((0, 0), (0, -w.shape[1] % 16)))
    groups = padded.reshape(-1, 16)

    def levels(group, unit):
        return np.clip(np.rint(group / unit), -top, top) if unit > 0 else np.zeros(16, np.float32)

    scales = []
    for group in groups:
        ordered = np.sort(np.abs(group))
        errors = {}
        for i in (10, 12, 14, 15):
            if ordered[i] > 0:
                rest = group - levels(group, ordered[i] / top) * (ordered[i] / top)
                errors.setdefault(sum(float(r) ** 2 for r in rest), ordered[i])
        scales.append(errors[min(errors)] if errors else np.float32(0))
    positive = [math.log(s) for s in scales if s > 0]
    grid = np.linspace(min(positive), max(positive), 27)
    units = np.exp(grid).astype(np.float32) / top
    codes = [int(np.abs(grid - math.log(s)).argmin()) if s > 0 else 0 for s in scales]
    q = np.array([levels(g, units[c]) for g, c in zip(groups, codes, strict=True)])
    return q.reshape(padded.shape)[:, : w.shape[1]], np.array(codes).reshape(len(w), -1), units


@pytest.mark.parametrize("shape", [(5, 16), (6, 50), (2, 3)])
@pytest.mark.parametrize("depth", DEPTHS)
def test_quantiser_agrees_with_its_slow_twin(depth, shape):
    w = gaussian(shape, seed=depth) * np.float32(0.02)
    w[1] = 0
    levels, codes, units = trit.quantize_levels(w, depth)
    expected = slow_quantize(w, depth)
    assert (levels == expected[0]).all()
    assert (codes == expected[1]).all()
    assert np.allclose(units[:27], expected[2], rtol=1e-6) and not units[27:].any()


def test_quantiser_golden():
    """A literal result, so that a change of one rounding step anywhere is seen."""
    w = np.array([[((i * 37) % 101 - 50) / 64 * (1 + i // 16) for i in range(40)]], np.float32)
    levels, codes, units = trit.quantize_levels(w, 2)
    assert levels[0, :20].tolist() == [-4, -1, 2, -3, 0, 3, -3, 1, 4, -2, 1, -4, -1, 2, -3, 0, 3, -2, 1, 4]
    assert levels[0, 20:].tolist() == [-1, 2, -4, -1, 3, -3, 0, 3, -2, 1, 4, -1, 2, -4, 0, 3, -3, 1, 4, -2]
    assert codes.tolist() == [[0, 18, 26]]
    some = [float(u).hex().replace("0000000p", "p") for u in units[[0, 1, 13, 26]]]
    assert some == ["0x1.780000p-3", "0x1.86e376p-3", "0x1.377608p-2", "0x1.020000p-1"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_trit_values_are_level_times_unit(depth, dtype):
    levels, codes = random_levels((17, 83), depth)
    units = np.zeros(32, np.float32)
    units[:27] = np.exp(np.linspace(-6, -3, 27))
    parts = {"units": units, "blocks": trit.pack(levels, codes, depth)}
    expected = round_to(levels * units[np.repeat(codes, 16, axis=1)[:, :83]], dtype)
    back = CODECS[f"trit{depth}"].dequantize(parts, (17, 83), {"dtype": dtype})
    assert same_bits(back, expected.astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_bad_units_are_reported(value):
    params, parts = CODECS["trit1"].quantize(gaussian((3, 20)))
    units = parts["units"].copy()
    units[4] = value
    problems = list(CODECS["trit1"].problems({**parts, "units": units}, (3, 20), params))
    assert problems == ["units holds NaN, infinity or a negative number"]
    units[4], units[31] = 1, 1
    problems = list(CODECS["trit1"].problems({**parts, "units": units}, (3, 20), params))
    assert problems == ["units has more than 27 entries"]


# ======== NF4


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


@pytest.mark.parametrize("case", NF4_CASES)
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


@pytest.mark.parametrize("case", NF4_CASES)
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


HUGE = 1e30


def test_values_beyond_the_largest_are_refused_before_they_are_computed_with(tmp_path):
    """Where float32 overflows, the order of a sum decides what comes out: no two backends would agree."""
    w = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    plain = {"nested_block": 0}
    cases = [("trit3", {}, "units"), ("nf4", plain, "absmax"), ("nf4", {}, "offset"), ("nf4", {}, "levels")]
    with TritWriter(tmp_path / "m.trit", {}, [str(i) for i in range(len(cases) + 2)]) as writer:
        for i, (codec, options, key) in enumerate(cases):
            params, parts = CODECS[codec].quantize(w, **options)
            assert not list(beyond_range(codec, w.shape, params, parts))
            broken = parts[key].copy()
            broken[0] = (HUGE, np.nan, -HUGE)[i % 3] if key != "units" else HUGE
            writer.add(str(i), codec, w.shape, params, {**parts, key: broken})
        writer.add(str(len(cases)), "f32", (2,), {}, {"values": np.array([1, -65537], np.float32)})
        writer.add(str(len(cases) + 1), "f32", (2,), {}, {"values": np.array([65536, -65536], np.float32)})
    with open_trit(tmp_path / "m.trit") as file:
        *bad, good = file.tensors.values()
        for tensor in bad:
            with pytest.raises(TensorError, match=f"tensor {tensor.name}: has values up to .*none may exceed 65536"):
                tensor.check_range()
        good.check_range()
