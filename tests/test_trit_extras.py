"""Trit matrices with exceptions and negative zeros: exact values, kernels that honour them, damage that is named."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.codecs import CODECS, payload_nbytes
from formats.codecs.base import round_to, to_bf16
from formats.codecs.trit import max_level, pack
from formats.codecs.trit_extras import exception_weights, pack_signs
from formats.container import Tensor, dequantize, dequantize_rows, open_trit
from formats.errors import FormatError, TensorError
from formats.writer import TritWriter
from runtime.kernels.select import get_kernels

SHAPES = [(1, 1), (3, 16), (40, 100), (17, 160), (5, 83)]
DTYPES = ["float16", "bfloat16", "float32"]
Parts = dict[str, np.ndarray]


def made(shape: tuple[int, int], dtype: str, depth: int, seed: int = 0) -> tuple[np.ndarray, dict[str, Any], Parts]:
    """Make a matrix whose groups are exceptions now and then, with negative zeros everywhere.

    returns: values (out, in) float32, params, parts
    """
    rng = np.random.default_rng(seed)
    per_row, top = -(-shape[1] // 16), max_level(depth)
    levels = rng.integers(-top, top + 1, shape).astype(np.int8)
    levels[rng.random(shape) < 0.2] = 0
    codes = rng.integers(0, 27, (shape[0], per_row)).astype(np.uint8)
    units = np.zeros(32, np.float32)
    units[:27] = np.exp(np.linspace(-9, -5, 27))
    exceptions = np.union1d(np.flatnonzero(rng.random(codes.size) < 0.1), [0])
    for group in exceptions:
        row, column = divmod(int(group), per_row)
        levels[row, column * 16 : column * 16 + 16] = 0
        codes[row, column] = 0
    values = round_to(levels * units[codes].repeat(16, axis=1)[:, : shape[1]], dtype)
    negative = (rng.random(shape) < 0.5) & (levels == 0)
    values[negative] = -0.0
    raw = np.zeros((len(exceptions), 16), np.float32)
    for k, group in enumerate(exceptions):
        row, column = divmod(int(group), per_row)
        place = values[row, column * 16 : column * 16 + 16]
        place[:] = round_to(rng.standard_normal(len(place)).astype(np.float32), dtype)
        raw[k, : len(place)] = place
    stored = to_bf16(raw) if dtype == "bfloat16" else raw.astype(dtype)
    parts = {"units": units, "blocks": pack(levels, codes, depth)}
    parts |= {"exception_groups": exceptions.astype("<u8"), "exception_values": stored}
    parts |= pack_signs(iter([(levels[:2] == 0, negative[:2]), (levels[2:] == 0, negative[2:])]))
    params = {"dtype": dtype, "exceptions": len(exceptions), "sign_bytes": len(parts["signs"])}
    return values, params, parts


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Any]:
    """Writes one tensor and opens it."""

    def write(shape: tuple[int, int], params: dict[str, Any], parts: Parts, codec: str = "trit2") -> Tensor:
        with TritWriter(tmp_path / "x.trit", {}, ["x"], overwrite=True) as writer:
            writer.add("x", codec, shape, params, parts)
        return open_trit(tmp_path / "x.trit").tensors["x"]

    yield write


# ---- values ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_comes_back(shape: tuple[int, int], dtype: str, file: Any) -> None:
    for depth in (1, 2, 3, 4):
        values, params, parts = made(shape, dtype, depth)
        codec = f"trit{depth}"
        layout = CODECS[codec].parts(shape, params)
        assert {k: (p.dtype, p.shape) for k, p in parts.items()} == layout
        tensor = file(shape, params, parts, codec)
        assert dequantize(tensor).tobytes() == values.tobytes()
        ids = np.array([shape[0] - 1, 0, shape[0] // 2, 0])
        assert dequantize_rows(tensor, ids).tobytes() == values[ids].tobytes()
        assert list(CODECS[codec].problems(parts, shape, params)) == []
        assert payload_nbytes(codec, shape, params) == tensor.nbytes


@pytest.mark.parametrize("without", [("signs", "sign_starts"), ("exception_groups", "exception_values")])
def test_either_may_be_missing(without: tuple[str, str], file: Any) -> None:
    values, params, parts = made((17, 100), "float16", 2)
    parts = {key: part for key, part in parts.items() if key not in without}
    del params["sign_bytes" if "signs" in without else "exceptions"]
    found = dequantize(file((17, 100), params, parts))
    if "signs" in without:
        np.testing.assert_array_equal(found, values)
    else:
        same = found.view(np.uint32) == values.view(np.uint32)
        assert 0.8 < same.mean() < 1


def test_a_matrix_larger_than_a_chunk(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values, params, parts = made((100, 80), "bfloat16", 3)
    tensor = file((100, 80), params, parts, "trit3")
    monkeypatch.setattr("formats.codecs.base.CHUNK", 500)
    assert dequantize(tensor).tobytes() == values.tobytes()


def test_files_without_extras_are_as_before() -> None:
    params, parts = CODECS["trit2"].quantize(np.ones((2, 2), np.float32))
    assert params == {"dtype": "float32"} and list(parts) == ["units", "blocks"]


# ---- products -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (300, 336)], ids=str)
@pytest.mark.parametrize("int8", [False, True])
def test_kernels_add_the_exceptions(shape: tuple[int, int], int8: bool, file: Any) -> None:
    values, params, parts = made(shape, "float16", 2, seed=1)
    tensor = file(shape, params, parts)
    rng = np.random.default_rng(2)
    for n in (1, 3):
        x = rng.standard_normal((n, shape[1])).astype(np.float32)
        start = rng.standard_normal((n, shape[0])).astype(np.float32)
        outs = []
        for backend in ("numpy", "numba"):
            kernels = get_kernels(backend, 2, int8)
            linear = kernels.linear([tensor], [None])
            for add in (False, True):
                out = start.copy()
                linear(x, [out], add)
                outs.append(out)
            kernels.close()
        limit = 1e-5 * float(np.abs(values).sum(axis=1).max() * np.abs(x).max()) + (1e-3 if int8 else 0)
        np.testing.assert_allclose(outs[2], outs[0], atol=limit, rtol=0)
        np.testing.assert_allclose(outs[3], outs[1], atol=limit, rtol=0)
        if not int8:
            np.testing.assert_allclose(outs[0], x @ values.T, atol=limit, rtol=0)


def test_many_tokens_at_once_are_as_one_by_one(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, params, parts = made((40, 100), "float16", 2)
    tensor = file((40, 100), params, parts)
    linear = get_kernels("numba", 1, True).linear([tensor], [None])
    x = np.random.default_rng(0).standard_normal((9, 100)).astype(np.float32)
    together, alone = np.empty((9, 40), np.float32), np.empty((9, 40), np.float32)
    linear(x, [together])
    for i in range(9):
        linear(x[i : i + 1], [alone[i : i + 1]])
    assert together.tobytes() == alone.tobytes()
    monkeypatch.setattr("runtime.kernels.exceptions._AT_ONCE", 1)
    linear(x, [alone])
    assert together.tobytes() == alone.tobytes()


# ---- damage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["exceptions", "sign_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, None, 10**9])
def test_counts_that_cannot_be(key: str, value: Any, file: Any) -> None:
    _, params, parts = made((17, 100), "float16", 2)
    with pytest.raises(TensorError, match=f"parameter {key} is"):
        file((17, 100), {**params, key: value}, parts)


@pytest.mark.parametrize("groups", [[5, 4], [3, 3], [0, 17 * 7], [0, 2**63]])
def test_groups_that_are_not_there(groups: list[int], file: Any) -> None:
    shape = (17, 100)
    _, params, parts = made(shape, "float16", 2)
    params = {"dtype": "float16", "exceptions": 2}
    parts = {"units": parts["units"], "blocks": parts["blocks"], "exception_groups": np.array(groups, "<u8"),
             "exception_values": np.ones((2, 16), np.float16)}  # fmt: skip
    tensor = file(shape, params, parts)
    assert dequantize(tensor).shape == shape
    assert any("not ascending groups" in p for p in CODECS["trit2"].problems(parts, shape, params))
    with pytest.raises(TensorError, match="not ascending groups") as caught:
        get_kernels("numba", 1).linear([tensor], [None])
    assert caught.value.tensor == "x"
    with pytest.raises(ValueError, match="not ascending groups"):
        exception_weights(parts, shape)


def test_damaged_signs_and_values_are_reported(file: Any) -> None:
    shape = (17, 100)
    _, params, parts = made(shape, "float16", 2)
    for starts in (np.full(17, 2**63, "<u8"), parts["sign_starts"][::-1].copy()):
        broken = {**parts, "sign_starts": starts}
        assert dequantize(file(shape, params, broken)).shape == shape
        assert any("sign_starts" in problem for problem in CODECS["trit2"].problems(broken, shape, params))
    values = parts["exception_values"].copy()
    values[0, 0] = np.nan
    path = file(shape, params, {**parts, "exception_values": values}).path
    with open_trit(path) as opened, pytest.raises(FormatError, match="exception_values holds NaN"):
        opened.verify()
