"""Headers that are not what they should be: each rule, its error class, and what it says."""

from __future__ import annotations

import json
import struct

import pytest

from formats import ChecksumError, HeaderError, TensorError, TruncatedFileError, UnsupportedError, open_trit
from tests.trit_bytes import assemble, changed, refuses, two_tensors

# ======== around the text


def test_header_length(tmp_path):
    def with_length(n: int) -> bytes:
        return struct.pack("<4sIQ", b"TRIT", 1, n) + b"{}" + bytes(1000)

    refuses(tmp_path, with_length(0), HeaderError, "header length 0; allowed are 1 to 16777216")
    for n in ((16 << 20) + 1, 1 << 63, (1 << 64) - 1):
        refuses(tmp_path, with_length(n), HeaderError, f"header length {n}; allowed are")
    refuses(tmp_path, with_length(1 << 20), TruncatedFileError, "ends inside the header: have 1018 of at least 1048596")


def test_header_checksum(tmp_path):
    data = bytearray(assemble(two_tensors()))
    data[30] ^= 1
    refuses(tmp_path, bytes(data), ChecksumError, "the header differs from its checksum")


def test_padding_after_the_header(tmp_path):
    data = bytearray(assemble(b'{"tensors":[]}'))
    assert len(data) == 64
    data[63] = 1
    refuses(tmp_path, bytes(data), HeaderError, "padding after the header is not zero")


# ======== JSON


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "not JSON"),
        (b"{} {}", "not JSON"),
        (b"\0\0\0", "not JSON"),
        (b'{"tensors":[],"a":"\xff"}', "not UTF-8"),
        (b'{"tensors":[],"a":"\x01"}', "not JSON"),
        (b"[]", "the header is a JSON list, not an object"),
        (b"12", "a JSON int"),
        (b'{"tensors":[],"a":1,"a":1}', "key 'a' stands twice"),
        (b'{"tensors":[],"config":{"dim":1,"dim":2}}', "key 'dim' stands twice"),
        (b'{"tensors":[],"a":NaN}', "not finite"),
        (b'{"tensors":[],"a":-Infinity}', "not finite"),
        (b'{"tensors":[],"a":1e999}', "not finite"),
        (b'{"tensors":[],"a":9223372036854775808}', "does not fit 64 bits"),
        (b'{"tensors":[],"a":' + b"9" * 100_000 + b"}", "does not fit 64 bits"),
        (b'{"tensors":[],"a":"\\ud800"}', "half of a surrogate pair"),
        (b'{"tensors":[],"\\udc00":1}', "half of a surrogate pair"),
        (b'{"tensors":[],"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper than 32"),
        (b'{"tensors":[],"a":' + b'{"a":' * 40 + b"1" + b"}" * 41, "nested deeper than 32"),
        (b'{"tensors":[' + b"{}," * 260_000 + b"{}]}", "more than 250000 values"),
        (b"[" * (15 << 20), "more than 250000 values"),
        (b"{}", "'tensors' is missing; expected a list"),
        (b'{"tensors":{}}', "'tensors' is a dict; expected a list"),
        (b'{"tensors":[],"config":[]}', "'config' is a list; expected an object"),
        (b'{"tensors":[],"tokenizer":"x"}', "'tokenizer' is a str; expected an object"),
        (b'{"tensors":[],"licence":null}', "'licence' is missing; expected an object"),
        (b'{"tensors":[],"requires":true}', "'requires' is a bool; expected a list"),
    ],
)
def test_header_text(tmp_path, text, message):
    refuses(tmp_path, assemble(text), HeaderError, message)


def test_surrogate_pairs_and_unknown_keys_are_fine(tmp_path):
    (tmp_path / "m.trit").write_bytes(assemble(b'{"tensors":[],"new":"\\ud83d\\ude00","requires":[]}'))
    with open_trit(tmp_path / "m.trit") as file:
        assert file.header["new"] == "\N{GRINNING FACE}"


def test_required_feature(tmp_path):
    data = assemble(b'{"tensors":[],"requires":["sparse"]}')
    refuses(tmp_path, data, UnsupportedError, "it needs feature 'sparse'; update tritllama")


# ======== the tensor table


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (..., "line 1 of the tensor table: the name is missing"),
        (7, "the name is a int; expected a string"),
        ("", "has 0 characters; allowed are 1 to 256"),
        ("x" * 257, "has 257 characters"),
        ("a\nb", "holds '..', a path or a control character"),
        ("a\0b", "control character"),
        ("\x1b[2J", "control character"),
        ("../../etc/passwd", "'../../etc/passwd' holds '..', a path"),
        ("/etc/passwd", "a path"),
        ("c:\\x", "a path"),
        ("\u202egnp", "control character"),
    ],
)
def test_tensor_name(tmp_path, name, message):
    refuses(tmp_path, changed(name=name), TensorError, message)


def test_tensor_twice(tmp_path):
    refuses(tmp_path, changed(name="a"), TensorError, "stands twice in the tensor table", "a")


def test_line_that_is_no_object(tmp_path):
    for line, kind in (([], "list"), ("b", "str"), (None, "missing")):
        data = assemble(json.dumps({"tensors": [line]}).encode())
        refuses(tmp_path, data, TensorError, f"line 0 of the tensor table is .*{kind}")


@pytest.mark.parametrize("key", ["codec", "shape", "params", "offset", "nbytes", "crc32"])
def test_field_missing_or_of_the_wrong_type(tmp_path, key):
    refuses(tmp_path, changed(**{key: ...}), TensorError, f"'{key}' is missing; expected", "b")
    kind = {"codec": str, "shape": list, "params": dict}.get(key, int)
    for value in (None, True, 1.0, "64", "0x40", [64], {}, 64):
        if type(value) is not kind:
            refuses(tmp_path, changed(**{key: value}), TensorError, f"'{key}' is .*; expected", "b")


def test_unknown_codec(tmp_path):
    for codec in ("", "q4_0", "TRIT1", "x" * 10_000):
        refuses(tmp_path, changed(codec=codec), UnsupportedError, r"is not known \(known: f32, f16, bf16, u8, q8", "b")


@pytest.mark.parametrize(
    "shape",
    [[], [1, 1, 1], [1] * 255, [0, 2], [-1, -2], [True, 2], [1.0, 2], ["1", 2], [None, 2], [[1], 2]],
)
def test_shape(tmp_path, shape):
    refuses(tmp_path, changed(shape=shape), TensorError, "expected one or two positive integers", "b")


def test_shape_too_large(tmp_path):
    for shape in ([1 << 24, 1 << 24], [1 << 48, 1], [1 << 62, 1 << 62]):
        refuses(tmp_path, changed(shape=shape), TensorError, r"has 2\*\*48 values or more", "b")
    # 2**64 values would be 0 in 64-bit arithmetic.
    refuses(tmp_path, changed(shape=[1 << 32, 1 << 32], nbytes=0), TensorError, r"2\*\*48", "b")


def test_shape_and_parameters_of_the_codec(tmp_path):
    refuses(tmp_path, changed(shape=[2]), TensorError, "codec q8 takes 2 dimensions", "b")
    refuses(tmp_path, changed(params={"x": 1}), TensorError, "parameter 'x' is not known", "b")
    for codec, params, message in (
        ("trit1", {}, "parameter 'dtype' is missing"),
        ("trit4", {"dtype": "float64"}, "dtype is 'float64'; allowed are"),
        ("nf4", {"dtype": "float16", "block": 0, "nested_block": 0}, "block is 0; allowed are"),
        ("nf4", {"dtype": "float16", "block": 64, "nested_block": "0"}, "nested_block is '0'"),
        ("nf4", {"dtype": "float16", "block": True, "nested_block": 0}, "block is True"),
    ):
        refuses(tmp_path, changed(codec=codec, params=params), TensorError, message, "b")


def test_nbytes(tmp_path):
    for nbytes in (0, -66, 65, 67, 130, 1 << 62):
        message = rf"nbytes is {nbytes}; codec q8 with shape \[1, 2\] takes 66"
        refuses(tmp_path, changed(nbytes=nbytes), TensorError, message, "b")


def test_offset(tmp_path):
    good = two_tensors()
    assemble(good)
    b = good["tensors"][1]["offset"]
    for offset, message in (
        (b + 1, "is not a multiple of 64"),
        (0, "lies in the header"),
        (-64, "lies in the header"),
        (b - 64, "overlaps the tensor before it"),
        (b + 64, "leaves a hole before it"),
        (1 << 62, "leaves a hole before it"),
    ):
        refuses(tmp_path, changed(offset=offset), TensorError, f"offset {offset} {message}; expected {b}", "b")


def test_tensors_out_of_order(tmp_path):
    header = two_tensors()
    data = assemble(header)
    header["tensors"].reverse()
    refuses(tmp_path, assemble(header, len(data)), TensorError, "leaves a hole before it", "b")


def test_crc_out_of_range(tmp_path):
    for crc in (-1, 1 << 32):
        refuses(tmp_path, changed(crc32=crc), TensorError, f"crc32 {crc} is not a 32-bit number", "b")
