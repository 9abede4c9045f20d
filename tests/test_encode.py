"""The compiled quantisers write the references' bytes, and the fitted units are better than the log-spaced ones."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from formats.codecs.best_units import encode_best_reference
from formats.codecs.trit_codec import Encode, Encoded, TritCodec, encode_reference
from runtime.kernels.numba_best import encode_best
from runtime.kernels.numba_encode import encode

DEPTHS = (1, 2, 3, 4)
ENCODERS = [
    pytest.param(encode, encode_reference, id="v2"),
    pytest.param(encode_best, encode_best_reference, id="best"),
]
each_encoder = pytest.mark.parametrize(("encoder", "reference"), ENCODERS)
SHAPES = [(1, 1), (5, 83), (16, 80), (17, 16), (33, 15), (31, 161), (3, 1050), (64, 1024)]


def weights(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """Heavy-tailed weights with groups of zeros, tiny groups, equal values and values on rounding ties."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_t(3, shape) * 0.02).astype(np.float32)
    flat = w.reshape(-1)
    for start in range(0, flat.size, 16):
        group = flat[start : start + 16]
        kind = rng.integers(8)
        if kind == 0:
            group[:] = 0
        elif kind == 1:
            group *= np.float32(1e-3)
        elif kind == 2:
            group[:] = group[0]
        elif kind == 3:
            group[:] = rng.integers(-8, 9, len(group)) / np.float32(64)
    return w


def assert_same(encoded: Encoded, expected: Encoded) -> None:
    assert list(encoded) == list(expected)
    for depth, (params, parts) in expected.items():
        assert encoded[depth][0] == params
        found = encoded[depth][1]
        assert list(found) == list(parts)
        for key, part in parts.items():
            assert found[key].dtype == part.dtype and found[key].shape == part.shape
            assert found[key].tobytes() == part.tobytes(), (depth, key)


def squared_error(w: np.ndarray, encoded: Encoded, depth: int) -> float:
    params, parts = encoded[depth]
    return float(np.square(TritCodec(depth).dequantize(parts, w.shape, params) - w, dtype=np.float64).sum())


@each_encoder
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bytes_are_those_of_the_reference(encoder: Encode, reference: Encode, shape: tuple[int, int]) -> None:
    w = weights(shape)
    assert_same(encoder(w, DEPTHS), reference(w, DEPTHS))


@each_encoder
@pytest.mark.parametrize("depth", DEPTHS)
def test_one_depth_alone(encoder: Encode, reference: Encode, depth: int) -> None:
    w = weights((20, 100))
    assert_same(encoder(w, [depth], dtype="float16"), reference(w, [depth], dtype="float16"))


@each_encoder
@pytest.mark.parametrize("factor", [0.0, 1e-42, 1e-37, 1e30])
def test_extreme_values(encoder: Encode, reference: Encode, factor: float) -> None:
    w = weights((17, 96)) * np.float32(factor)
    assert_same(encoder(w, DEPTHS), reference(w, DEPTHS))


@each_encoder
def test_float16_and_read_only_weights(encoder: Encode, reference: Encode) -> None:
    w = weights((20, 100)).astype(np.float16)
    expected = reference(w, DEPTHS)
    assert_same(encoder(w, DEPTHS), expected)
    w = w.astype(np.float32)
    w.flags.writeable = False
    assert_same(encoder(w, DEPTHS), expected)


@each_encoder
def test_threads_and_chunks_do_not_matter(encoder: Encode, reference: Encode, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights((130, 200))
    monkeypatch.setattr("formats.codecs.base.CHUNK", 5000)
    monkeypatch.setattr("runtime.kernels.numba_best.CHUNK", 5000)
    with ThreadPoolExecutor(3) as pool:
        encoded = encoder(w, DEPTHS, run=pool.map)  # type: ignore[call-arg]
    monkeypatch.undo()
    assert_same(encoded, reference(w, DEPTHS))


# ==== Fitted units ====


def test_units_fitted_to_a_sample_of_the_rows_are_the_references(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("formats.codecs.best_units.SAMPLE", 100)
    w = weights((60, 150))
    assert_same(encode_best(w, DEPTHS), encode_best_reference(w, DEPTHS))


@pytest.mark.parametrize("depth", DEPTHS)
def test_fitted_units_make_a_smaller_error(depth: int) -> None:
    w = (np.random.default_rng(3).standard_t(5, (128, 320)) * 0.02).astype(np.float32)
    limit = 0.75 if depth == 4 else 0.97
    assert squared_error(w, encode_best(w, [depth]), depth) < limit * squared_error(w, encode(w, [depth]), depth)


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_largest_weights_are_never_cut_off(depth: int, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight in 40,000 is a hundred times the rest: a fit that is fair to all groups would clip it."""
    w = (np.random.default_rng(4).standard_normal((128, 320)) * 0.02).astype(np.float32)
    w[77, 131] = -8.0
    if sampled:
        monkeypatch.setattr("formats.codecs.best_units.SAMPLE", 200)  # rows without the large weight
    params, parts = encode_best(w, [depth])[depth]
    assert TritCodec(depth).dequantize(parts, w.shape, params)[77, 131] == pytest.approx(-8.0, rel=1e-6)


# ==== Refusals ====


def test_values_that_are_not_numbers_are_named() -> None:
    w = weights((40, 64))
    w[33, 7] = np.nan
    for encoder in (encode, encode_best):
        with pytest.raises(ValueError, match=r"the value at \[33, 7\] is NaN"):
            encoder(w, [2])
        with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="NaN"):
            encoder(w, [2], run=pool.map)


def test_a_unit_that_does_not_fit_the_dtype_is_refused() -> None:
    w = np.full((1, 16), 1e6, np.float32)
    for encoder in (encode, encode_best):
        with pytest.raises(ValueError, match="does not fit codec trit2 with dtype float16"):
            encoder(w, [2], dtype="float16")
