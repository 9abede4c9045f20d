"""Trits recovered from dequantised values give them back bit for bit; other matrices are refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from formats.codecs.base import round_to
from formats.codecs.trit import max_level, quantize_levels
from formats.conversion.recover import Recovery, Refusal, recover

KINDS = ("normal", "heavy tails", "subnormal halves", "far below one half", "sparse and zero groups")


def weights(kind: str, shape: tuple[int, int] = (48, 320)) -> np.ndarray:
    rng = np.random.default_rng(KINDS.index(kind))
    w = rng.standard_normal(shape).astype(np.float32) * np.float32(0.02)
    if kind == "heavy tails":
        w = rng.standard_t(2, shape).astype(np.float32)
    if kind == "subnormal halves":
        w *= np.float32(0.002)
    if kind == "far below one half":
        w *= np.float32(0.00002)
    if kind == "sparse and zero groups":
        groups = w.reshape(-1, 16)
        groups[rng.random(len(groups)) < 0.05] = 0
        groups[rng.random(len(groups)) < 0.05] *= 1e-3
        groups[rng.random(len(groups)) < 0.05, 1:] *= 1e-4
    return w


def released(w: np.ndarray, depth: int, dtype: str, ratio: bool = False) -> np.ndarray:
    """Quantise and dequantise as q * unit, or as (q / L) * scale: float16, or float32 on that grid."""
    levels, codes, units = quantize_levels(w, depth)
    unit = units[codes].repeat(16, axis=1)[:, : w.shape[1]]
    top = np.float32(max_level(depth))
    q = levels.astype(np.float32)
    values = round_to((q / top) * (unit * top) if ratio else q * unit, dtype)
    return values.astype(np.float16) if dtype == "float16" else values


def check(values: np.ndarray, dtype: str) -> Recovery:
    """Recover, and prove the result by arithmetic written out here."""
    found = recover(values, dtype)
    assert isinstance(found, Recovery), found
    assert found.levels.shape == values.shape and found.levels.dtype == np.int8
    assert found.scale_codes.shape == (len(values), -(-values.shape[1] // 16))
    assert np.abs(found.levels).max(initial=0) <= max_level(found.depth)
    assert found.scale_codes.max(initial=0) < 27 and not found.units[27:].any()
    unit = found.units[found.scale_codes].repeat(16, axis=1)[:, : values.shape[1]]
    again = round_to(found.levels.astype(np.float32) * unit, dtype)
    if not len(found.exceptions):
        assert np.array_equal(again.view(np.uint32), (values.astype(np.float32) + 0).view(np.uint32))
    assert np.array_equal(found.dequantize(), values.astype(np.float32))
    return found


@pytest.mark.parametrize("ratio", [False, True], ids=["q*unit", "q/L*scale"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_every_value_comes_back(kind: str, depth: int, dtype: str, ratio: bool) -> None:
    found = check(released(weights(kind), depth, dtype, ratio), dtype)
    assert len(found.exceptions) == 0
    if kind != "far below one half":  # where few bits are left, fewer levels may be enough
        assert found.depth == depth


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_float32_values(depth: int) -> None:
    found = check(released(weights("normal"), depth, "float32"), "float32")
    assert found.depth == depth and len(found.exceptions) == 0


def test_float16_values_in_a_float32_array() -> None:
    values = released(weights("normal"), 3, "float16")
    wide = recover(values.astype(np.float32), "float16")
    assert isinstance(wide, Recovery)
    assert wide.levels.tobytes() == check(values, "float16").levels.tobytes()


@pytest.mark.parametrize("shape", [(5, 83), (1, 16), (3, 1), (17, 100), (2, 15)])
@pytest.mark.parametrize("depth", [1, 4])
def test_odd_shapes(shape: tuple[int, int], depth: int) -> None:
    found = check(released(weights("normal", shape), depth, "float16"), "float16")
    assert found.depth <= depth and len(found.exceptions) == 0


@pytest.mark.parametrize("shape", [(4, 40), (0, 32), (3, 0)])
def test_nothing_but_zeros(shape: tuple[int, int]) -> None:
    found = check(np.zeros(shape, np.float16), "float16")
    assert found.depth == 1 and not found.units.any() and not found.scale_codes.any()


def test_units_in_integer_ratios_take_the_largest_unit() -> None:
    rng = np.random.default_rng(0)
    unit = np.float32(2.0) ** -rng.integers(4, 9, (40, 10))
    q = rng.integers(-4, 5, (40, 160))
    q[:, ::16] = 4  # every group shows its largest level
    found = check((q * unit.repeat(16, axis=1)).astype(np.float16), "float16")
    assert found.depth == 2 and np.count_nonzero(found.units) == 5
    values = found.units[found.scale_codes]
    single = np.zeros((1, 16), np.float16)
    single[0, 3] = 2.0**-6  # alone in its group this is 1, 2 or 4 times a unit
    mixed = check(np.vstack([(q * unit.repeat(16, axis=1))[:, :16].astype(np.float16), single]), "float16")
    assert mixed.levels[-1, 3] == 1
    assert np.array_equal(np.sort(np.unique(values)), found.units[:5])


def test_few_groups_use_few_units() -> None:
    values = released(weights("normal", (2, 48)), 4, "float16")
    found = check(values, "float16")
    assert np.count_nonzero(found.units) <= 6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_an_ordinary_matrix_is_refused(dtype: str) -> None:
    values = round_to(weights("normal", (256, 512)), dtype)
    refusal = recover(values, dtype)
    assert isinstance(refusal, Refusal)
    assert refusal.reason.startswith("not of that form: ")


def test_a_coarser_grid_than_said_is_refused() -> None:
    values = released(weights("normal"), 2, "float16").astype(np.float32)
    refusal = recover(values, "bfloat16")
    assert isinstance(refusal, Refusal) and "not all on the bfloat16 grid" in refusal.reason


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_one_flipped_value_is_one_exception(depth: int, dtype: str) -> None:
    values = released(weights("normal"), depth, dtype)
    one = values[7:8, 35:36]
    one[:] = round_to(one.astype(np.float32) * np.float32(1.07) + np.float32(1e-4), dtype)
    found = check(values, dtype)
    assert found.depth == depth
    assert found.exceptions.tolist() == [7 * 20 + 2]
    assert not found.levels[7, 32:48].any() and found.scale_codes[7, 2] == 0


def test_too_many_flipped_values_are_refused() -> None:
    values = released(weights("normal"), 4, "float16")
    values[:, 5] *= np.float16(1.07)
    assert isinstance(recover(values), Refusal)
    values = released(weights("normal", (5, 83)), 4, "float16")
    values[2, 80] *= np.float16(1.07)
    assert isinstance(recover(values), Refusal)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_numbers_are_exceptions(bad: float) -> None:
    values = released(weights("normal"), 2, "float16")
    values[3, 20] = bad
    found = recover(values)
    assert isinstance(found, Recovery)
    assert found.exceptions.tolist() == [3 * 20 + 1]
    assert found.exception_bits.view(np.float16).tobytes() == values[3, 16:32].tobytes()


def test_negative_zeros_are_counted_and_lose_their_sign() -> None:
    values = released(weights("normal"), 3, "float16")
    plain = check(values, "float16")
    at = np.flatnonzero(values == 0)[::3]
    values.reshape(-1)[at] = np.float16(-0.0)
    found = check(values, "float16")
    assert found.negative_zeros == len(at)
    assert found.levels.tobytes() == plain.levels.tobytes()
    assert not np.signbit(found.dequantize()[values == 0]).any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["normal", "sparse and zero groups"])
def test_the_result_is_canonical(kind: str, dtype: str) -> None:
    first = check(released(weights(kind), 4, dtype), dtype)
    second = check(first.dequantize(), dtype)
    for field in dataclasses.fields(Recovery):
        one, other = getattr(first, field.name), getattr(second, field.name)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), field.name


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="expected a matrix"):
        recover(np.zeros(16, np.float16))
    with pytest.raises(ValueError, match="cannot recover bfloat16 values from a float16 array"):
        recover(np.zeros((1, 16), np.float16), "bfloat16")
    with pytest.raises(ValueError, match="from a int8 array"):
        recover(np.zeros((1, 16), np.int8))
