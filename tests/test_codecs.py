"""What holds for all codecs, with random round trips, and the bytes of the dense ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from formats import CODECS, TensorError, TritWriter, open_trit
from formats.codecs import beyond_range, part_spans, payload_nbytes
from formats.codecs.base import from_bf16, to_bf16
from tests.matrices import DEPTHS, SHAPES, gaussian, same_bits

MATRIX_CODECS = tuple(name for name in CODECS if name != "u8")
# Relative squared error on Gaussian values, with some room for a small sample.
MAX_ERROR = {
    "trit1": 0.19, "trit2": 0.024, "trit3": 0.0026, "trit4": 0.00036, "nf4": 0.0095, "q8": 4e-5, "bf16": 4e-6,
    "f16": 1e-7, "f32": 0.0,
}  # fmt: skip
HUGE = 1e30
each_codec = pytest.mark.parametrize("name", MATRIX_CODECS)


# ======== all codecs


@pytest.mark.parametrize("shape", SHAPES)
@each_codec
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


@each_codec
def test_error_budget(name):
    w = gaussian((64, 160))
    params, parts = CODECS[name].quantize(w)
    rest = CODECS[name].dequantize(parts, w.shape, params) - w
    assert (rest**2).sum() / (w**2).sum() <= MAX_ERROR[name]


@each_codec
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
@each_codec
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


@each_codec
def test_zeros_and_constants(name):
    for value in (0.0, 0.75, -0.75):
        w = np.full((18, 90), value, np.float32)
        params, parts = CODECS[name].quantize(w)
        back = CODECS[name].dequantize(parts, w.shape, params)
        assert np.allclose(back, w, rtol=1e-3 if name == "q8" else 1e-6)


@each_codec
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


@each_codec
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


def test_values_beyond_the_largest_are_refused_before_they_are_computed_with(tmp_path):
    """Where float32 overflows, the order of a sum decides what comes out: no two backends would agree."""
    w = gaussian((4, 64))
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
