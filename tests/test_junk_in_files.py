"""Anything in any place of a file: it opens, or is refused with a FormatError; nothing else happens."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats import FormatError, dequantize, open_trit
from tests.trit_bytes import assemble, changed, two_tensors

JUNK = (
    None, True, False, 0, 1, -1, 2, 63, 64, 66, 128, 512, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1,
    -(1 << 63), 0.5, 64.0, 1e308, "", "a", "1", "64", "<0x-1>", "f32", "f16", "trit1", "nf4", "float16",
    "x" * 10_000, "\0", "\n", "é\u202e", [], [1], [1, 2], [2, 1], [0], [-1, 1], [[1], 2], [64, 64],
    [1 << 40, 1 << 40], [1] * 255, [None, True], [{}], [[]], [{"name": 1}], {}, {"a": 1},
    {"dtype": "float32"}, {"dtype": None},
    {"dtype": "float32", "block": 64, "nested_block": 256},
)  # fmt: skip
FIELDS = ("name", "codec", "shape", "params", "offset", "nbytes", "crc32")


def try_file(path: Path) -> None:
    """A file opens and dequantises, or is refused with a FormatError; nothing else happens."""
    try:
        with open_trit(path) as file, np.errstate(all="ignore"):
            for tensor in file.tensors.values():
                dequantize(tensor)
            list(file.problems())
    except FormatError as e:
        assert str(path) in str(e)


@pytest.mark.parametrize("key", [*FIELDS, "config", "tokenizer", "requires", "tensors"])
def test_any_field_may_hold_anything(tmp_path, key):
    for junk in JUNK:
        data = changed(**{key: junk}) if key in FIELDS else assemble({**two_tensors(), key: junk})
        (tmp_path / "fuzz.trit").write_bytes(data)
        try_file(tmp_path / "fuzz.trit")


@pytest.mark.parametrize("codec", ["trit1", "trit4", "nf4", "q8", "bf16", "u8"])
@pytest.mark.parametrize("params", [p for p in JUNK if isinstance(p, dict)])
def test_any_codec_may_meet_any_parameters(tmp_path, codec, params):
    for shape in ([1], [64, 64], [1 << 40, 64]):
        (tmp_path / "fuzz.trit").write_bytes(changed(codec=codec, params=params, shape=shape))
        try_file(tmp_path / "fuzz.trit")


@given(st.data())
def test_any_bytes_in_any_place(tmp_path_factory, data):
    """Overwrite a piece of the file and repair the checksum, so that the checks behind it are reached."""
    path = tmp_path_factory.getbasetemp() / "fuzz.trit"
    whole = bytearray(assemble(two_tensors()))
    start = data.draw(st.integers(0, len(whole) - 1))
    pieces = st.sampled_from([b"[[", b"-", b'"', b"1e9", b"}]}", b"  "])
    piece = data.draw(st.binary(min_size=1, max_size=8) | pieces)
    whole[start : start + len(piece)] = piece
    length = int.from_bytes(whole[8:16], "little")
    if length < len(whole):
        whole[16 + length : 20 + length] = zlib.crc32(whole[: 16 + length]).to_bytes(4, "little")
    path.write_bytes(whole)
    try_file(path)
