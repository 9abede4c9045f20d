"""The compiled quantiser writes the reference's bytes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from formats.trit_codec import TritCodec
from runtime.kernels import numba_encode
from runtime.kernels.numba_encode import encode

DEPTHS = (1, 2, 3, 4)
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


def assert_same(w: np.ndarray, encoded: numba_encode.Encoded, dtype: str = "float32") -> None:
    for depth, (params, parts) in encoded.items():
        expected_params, expected = TritCodec(depth).quantize(w, dtype=dtype)
        assert params == expected_params
        assert list(parts) == list(expected)
        for key, part in parts.items():
            assert part.dtype == expected[key].dtype and part.shape == expected[key].shape
            assert part.tobytes() == expected[key].tobytes(), (depth, key)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bytes_are_those_of_the_reference(shape: tuple[int, int]) -> None:
    w = weights(shape)
    encoded = encode(w, DEPTHS)
    assert list(encoded) == list(DEPTHS)
    assert_same(w, encoded)


@pytest.mark.parametrize("depth", DEPTHS)
def test_one_depth_alone(depth: int) -> None:
    w = weights((20, 100))
    assert_same(w, encode(w, [depth], dtype="float16"), "float16")


@pytest.mark.parametrize("factor", [0.0, 1e-42, 1e-37, 1e30])
def test_extreme_values(factor: float) -> None:
    w = weights((17, 96)) * np.float32(factor)
    assert_same(w, encode(w, DEPTHS))


def test_float16_and_read_only_weights() -> None:
    w = weights((20, 100)).astype(np.float16)
    assert_same(w, encode(w, DEPTHS))
    w = w.astype(np.float32)
    w.flags.writeable = False
    assert_same(w, encode(w, DEPTHS))


def test_threads_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights((130, 200))
    monkeypatch.setattr("formats.codec_base.CHUNK", 5000)
    with ThreadPoolExecutor(3) as pool:
        encoded = encode(w, DEPTHS, run=pool.map)
    monkeypatch.undo()
    assert_same(w, encoded)


def test_values_that_are_not_numbers_are_named() -> None:
    w = weights((40, 64))
    w[33, 7] = np.nan
    with pytest.raises(ValueError, match=r"the value at \[33, 7\] is NaN"):
        encode(w, [2])
    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match="NaN"):
        encode(w, [2], run=pool.map)


def test_a_unit_that_does_not_fit_the_dtype_is_refused() -> None:
    w = np.full((1, 16), 1e6, np.float32)
    with pytest.raises(ValueError, match="does not fit codec trit2 with dtype float16"):
        encode(w, [2], dtype="float16")
