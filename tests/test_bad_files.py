"""Files that are not what they should be: each rule of the container, its error class, and what it says."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trit_bytes import assemble, two_tensors, write_all_codecs

from formats import (
    BadMagicError,
    ChecksumError,
    FormatError,
    HeaderError,
    TensorError,
    TritWriter,
    TruncatedFileError,
    UnsupportedError,
    UnsupportedVersionError,
    dequantize,
    open_trit,
)
from formats.errors import shorten, shown

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX file system")


@pytest.fixture
def refuses(tmp_path):
    """Give a function that checks how a file made of some bytes is refused."""
    path = tmp_path / "bad.trit"

    def check(data: bytes, kind: type[FormatError], message: str, tensor: str | None = None) -> None:
        path.write_bytes(data)
        with pytest.raises(FormatError, match=message) as caught:
            open_trit(path)
        assert type(caught.value) is kind
        assert caught.value.path == str(path) and str(caught.value).startswith(f"{path}: ")
        assert caught.value.tensor == tensor
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(path))

    return check


def changed(**fields) -> bytes:
    """A file whose second tensor has other fields; ... takes one away."""
    header = two_tensors()
    header["tensors"][1].update(fields)
    header["tensors"][1] = {k: v for k, v in header["tensors"][1].items() if v is not ...}
    return assemble(header)


def test_the_unbroken_file_opens(tmp_path):
    """Otherwise the tests below would prove nothing."""
    (tmp_path / "m.trit").write_bytes(assemble(two_tensors()))
    with open_trit(tmp_path / "m.trit") as file:
        assert dequantize(file.tensors["b"]).tolist() == [[0, 0]]


# ======== the first bytes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"GGUF\x03\0\0\0" + bytes(60), "a GGUF file; convert it"),
        (struct.pack("<Q", 1000) + b'{"__metadata__":{}}', "a safetensors file; convert its folder"),
        (b"PK\x03\x04" + bytes(60), "a zip archive"),
        (b"\x80\x02}q\x00.", "a Python pickle"),
        (b"<!DOCTYPE html>\n<html>", "a web page; the download went wrong"),
        (b"\n<HTML><body>404", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a git-lfs pointer.*git lfs pull"),
        (b"\x7fELF" + bytes(60), "a program"),
        (b"tirt" + bytes(60), "begins with b'tirt', not b'TRIT'"),
        (bytes(1000), "begins with"),
        (b"\xff" * 1000, "begins with"),
        (b"TX", "begins with"),
    ],
)
def test_something_else(refuses, data, message):
    refuses(data, BadMagicError, f"not a .trit file: this is .*{message}" if data else message)


def test_version(refuses):
    for version, hint in ((0, "convert the model again"), (2, "update tritllama"), (1 << 24, "update")):
        message = f"format version {version}; this program reads version 1; {hint}"
        refuses(assemble(two_tensors(), version=version), UnsupportedVersionError, message)


def test_header_length(refuses):
    def with_length(n: int) -> bytes:
        return struct.pack("<4sIQ", b"TRIT", 1, n) + b"{}" + bytes(1000)

    refuses(with_length(0), HeaderError, "header length 0; allowed are 1 to 16777216")
    for n in ((16 << 20) + 1, 1 << 63, (1 << 64) - 1):
        refuses(with_length(n), HeaderError, f"header length {n}; allowed are")
    refuses(with_length(1 << 20), TruncatedFileError, "ends inside the header: have 1018 of at least 1048596")


def test_header_checksum(refuses):
    data = bytearray(assemble(two_tensors()))
    data[30] ^= 1
    refuses(bytes(data), ChecksumError, "the header differs from its checksum")


def test_padding_after_the_header(refuses):
    data = bytearray(assemble(b'{"tensors":[]}'))
    assert len(data) == 64
    data[63] = 1
    refuses(bytes(data), HeaderError, "padding after the header is not zero")


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
        (b'{"tensors":[],"licence":null}', "'licence' is missing|'licence' is a NoneType"),
        (b'{"tensors":[],"requires":true}', "'requires' is a bool; expected a list"),
    ],
)
def test_header_text(refuses, text, message):
    refuses(assemble(text), HeaderError, message)


def test_surrogate_pairs_and_unknown_keys_are_fine(tmp_path):
    (tmp_path / "m.trit").write_bytes(assemble(b'{"tensors":[],"new":"\\ud83d\\ude00","requires":[]}'))
    with open_trit(tmp_path / "m.trit") as file:
        assert file.header["new"] == "\N{GRINNING FACE}"


def test_required_feature(refuses):
    data = assemble(b'{"tensors":[],"requires":["sparse"]}')
    refuses(data, UnsupportedError, "it needs feature 'sparse'; update tritllama")


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
def test_tensor_name(refuses, name, message):
    refuses(changed(name=name), TensorError, message)


def test_tensor_twice(refuses):
    refuses(changed(name="a"), TensorError, "stands twice in the tensor table", "a")


def test_line_that_is_no_object(refuses):
    for line, kind in (([], "list"), ("b", "str"), (None, "missing")):
        data = assemble(json.dumps({"tensors": [line]}).encode())
        refuses(data, TensorError, f"line 0 of the tensor table is .*{kind}")


@pytest.mark.parametrize("key", ["codec", "shape", "params", "offset", "nbytes", "crc32"])
def test_field_missing_or_of_the_wrong_type(refuses, key):
    refuses(changed(**{key: ...}), TensorError, f"'{key}' is missing; expected", "b")
    kind = {"codec": str, "shape": list, "params": dict}.get(key, int)
    for value in (None, True, 1.0, "64", "0x40", [64], {}, 64):
        if type(value) is not kind:
            refuses(changed(**{key: value}), TensorError, f"'{key}' is .*; expected", "b")


def test_unknown_codec(refuses):
    for codec in ("", "q4_0", "TRIT1", "x" * 10_000):
        refuses(changed(codec=codec), UnsupportedError, r"is not known \(known: f32, f16, bf16, u8, q8", "b")


@pytest.mark.parametrize(
    "shape",
    [[], [1, 1, 1], [1] * 255, [0, 2], [-1, -2], [True, 2], [1.0, 2], ["1", 2], [None, 2], [[1], 2]],
)
def test_shape(refuses, shape):
    refuses(changed(shape=shape), TensorError, "expected one or two positive integers", "b")


def test_shape_too_large(refuses):
    for shape in ([1 << 24, 1 << 24], [1 << 48, 1], [1 << 62, 1 << 62]):
        refuses(changed(shape=shape), TensorError, r"has 2\*\*48 values or more", "b")
    # 2**64 values would be 0 in 64-bit arithmetic.
    refuses(changed(shape=[1 << 32, 1 << 32], nbytes=0), TensorError, r"2\*\*48", "b")


def test_shape_and_parameters_of_the_codec(refuses):
    refuses(changed(shape=[2]), TensorError, "codec q8 takes 2 dimensions", "b")
    refuses(changed(params={"x": 1}), TensorError, "parameter 'x' is not known", "b")
    for codec, params, message in (
        ("trit1", {}, "parameter 'dtype' is missing"),
        ("trit4", {"dtype": "float64"}, "dtype is 'float64'; allowed are"),
        ("nf4", {"dtype": "float16", "block": 0, "nested_block": 0}, "block is 0; allowed are"),
        ("nf4", {"dtype": "float16", "block": 64, "nested_block": "0"}, "nested_block is '0'"),
        ("nf4", {"dtype": "float16", "block": True, "nested_block": 0}, "block is True"),
    ):
        refuses(changed(codec=codec, params=params), TensorError, message, "b")


def test_nbytes(refuses):
    for nbytes in (0, -66, 65, 67, 130, 1 << 62):
        message = rf"nbytes is {nbytes}; codec q8 with shape \[1, 2\] takes 66"
        refuses(changed(nbytes=nbytes), TensorError, message, "b")


def test_offset(refuses):
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
        refuses(changed(offset=offset), TensorError, f"offset {offset} {message}; expected {b}", "b")


def test_tensors_out_of_order(refuses):
    header = two_tensors()
    data = assemble(header)
    header["tensors"].reverse()
    refuses(assemble(header, len(data)), TensorError, "leaves a hole before it", "b")


def test_crc_out_of_range(refuses):
    for crc in (-1, 1 << 32):
        refuses(changed(crc32=crc), TensorError, f"crc32 {crc} is not a 32-bit number", "b")


# ======== the size of the file


def test_truncated_at_every_byte(tmp_path):
    whole = assemble(two_tensors())
    path = tmp_path / "m.trit"
    path.write_bytes(whole)
    for n in reversed(range(len(whole))):
        os.truncate(path, n)
        with pytest.raises(FormatError) as caught:
            open_trit(path)
        assert type(caught.value) is (TruncatedFileError if n else BadMagicError), n
        if n:
            assert f"have {n} of" in str(caught.value)
            assert "download or convert it again" in str(caught.value)


def test_something_after_the_last_tensor(refuses):
    data = assemble(two_tensors())
    refuses(data + b"\0", HeaderError, "1 bytes follow the last tensor")
    refuses(data + b"PK\x03\x04" + bytes(60), HeaderError, "64 bytes follow the last tensor")


def test_table_asks_for_more_than_any_disk_holds(refuses):
    data = changed(codec="f32", shape=[1 << 24, (1 << 24) - 1], nbytes=4 * (1 << 24) * ((1 << 24) - 1))
    refuses(data, TruncatedFileError, "have .* of 1125899[0-9]{9} bytes")


@POSIX
def test_huge_sparse_file(tmp_path):
    path = tmp_path / "m.trit"
    path.write_bytes(assemble(two_tensors()))
    try:
        os.truncate(path, 1 << 42)
    except OSError:
        pytest.skip("the file system has no sparse files of this size")
    with pytest.raises(HeaderError, match="bytes follow the last tensor"):
        open_trit(path)


# ======== every bit


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "m.trit"
    with TritWriter(path, {"config": {"dim": 2}}, ["a", "b"]) as writer:
        writer.add("a", "f32", (2,), {}, {"values": np.array([1, -2], np.float32)})
        parts = {"values": np.full((1, 32), 3, np.int8), "scales": np.ones((1, 1), np.float16)}
        writer.add("b", "q8", (1, 5), {}, parts)
    good = path.read_bytes()
    with open_trit(path) as file:
        file.verify()
    with open(path, "r+b", buffering=0) as writable:
        for i, byte in enumerate(good):
            writable.seek(i)
            writable.write(bytes([byte ^ 1 << (i % 8)]))
            with pytest.raises(FormatError), open_trit(path) as file:
                file.verify()
            writable.seek(i)
            writable.write(bytes([byte]))
    assert path.read_bytes() == good


def test_verify_names_what_no_writer_makes(tmp_path):
    """Payloads with a right checksum and impossible contents."""
    path = tmp_path / "m.trit"
    write_all_codecs(path)
    with open_trit(path) as file:
        original = {n: (t.codec, t.shape, t.params, dict(t.parts)) for n, t in file.tensors.items()}
    spoiled = {
        "a.f32": ("values", np.nan, "NaN"),
        "a.f16": ("values", np.inf, "NaN or infinity"),
        "a.bf16": ("values", 0x7F80, "NaN or infinity"),
        "a.q8": ("scales", np.nan, "scales holds NaN"),
        "a.trit1": ("blocks", 243, "1 bytes above 242"),
        "a.trit4": ("units", -1, "units holds"),
        "a.nf4": ("nested_absmax", np.inf, "none may exceed 65536"),
    }
    for name, (key, value, _) in spoiled.items():
        codec, shape, params, parts = original[name]
        part = parts[key].copy()
        part.flat[-1 if key != "units" else 0] = value
        original[name] = (codec, shape, params, {**parts, key: part})
    with TritWriter(tmp_path / "bad.trit", {}, list(original)) as writer:
        for name, tensor in original.items():
            writer.add(name, *tensor)
    with open_trit(tmp_path / "bad.trit") as file:
        problems = {p.tensor: str(p) for p in file.problems()}
        assert list(problems) == [n for n in original if n in spoiled]
        for name in spoiled:
            assert spoiled[name][2] in problems[name]
        with pytest.raises(ChecksumError, match=r"tensor a\.f32"):
            file.verify()
        for tensor in file.tensors.values():
            with np.errstate(all="ignore"):
                dequantize(tensor)


def test_padding_between_parts_and_tensors(tmp_path):
    path = tmp_path / "m.trit"
    write_all_codecs(path)
    data = bytearray(path.read_bytes())
    with open_trit(path) as file:
        after = file.tensors["a.u8"].offset + file.tensors["a.u8"].nbytes
        inside = file.tensors["a.nf4"].offset + 63
    data[after] = data[inside] = 1
    path.write_bytes(data)
    with open_trit(path) as file:
        messages = [str(p) for p in file.problems()]
    assert any("tensor a.u8: the padding after it is not zero" in m for m in messages)
    assert any("tensor a.nf4: crc32" in m for m in messages)
    assert any("tensor a.nf4: the padding before levels is not zero" in m for m in messages)


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_payload_of_one_byte_only(tmp_path, byte):
    """Whatever the payload, opening and dequantising stay in bounds."""
    path = tmp_path / "m.trit"
    write_all_codecs(path)
    data = bytearray(path.read_bytes())
    with open_trit(path) as file:
        start = min(t.offset for t in file.tensors.values())
    data[start:] = bytes([byte]) * (len(data) - start)
    path.write_bytes(data)
    with open_trit(path) as file, np.errstate(all="ignore"):
        for tensor in file.tensors.values():
            assert dequantize(tensor).shape == tensor.shape
        with pytest.raises(ChecksumError):
            file.verify()


# ======== what is not a regular file


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_trit(tmp_path / "nothing.trit")
    with pytest.raises(IsADirectoryError):
        open_trit(tmp_path)


@POSIX
def test_pipe_device_and_odd_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/null"), Path("/dev/zero")):
        with pytest.raises(FormatError, match="is a pipe or device; expected a regular file"):
            open_trit(path)
    (tmp_path / "loop").symlink_to("loop")
    for path in (str(tmp_path / "loop"), "a\0b", "x" * 5000):
        with pytest.raises(FormatError, match="cannot be opened"):
            open_trit(path)


@POSIX
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    path = tmp_path / "m.trit"
    path.write_bytes(assemble(two_tensors()))
    path.chmod(0)
    with pytest.raises(PermissionError):
        open_trit(path)


def test_errors_survive_pickling():
    error = TensorError("m.trit", "is wrong", "a")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again), again.tensor) == (TensorError, "m.trit: tensor a: is wrong", "a")


def test_names_of_any_length_make_short_errors():
    error = TensorError("m.trit", "is wrong", "a" * 5000)
    assert str(error).endswith("aaa: is wrong") and len(str(error)) < 300 and len(error.tensor) == 5000
    many = TensorError("m.trit", f"misses {shorten(['b' * 5000] * 5000)}; convert it again")
    assert len(str(many)) < 1000 and str(many).endswith("convert it again")


@pytest.mark.parametrize("value", ["a" * 10**6, b"a" * 999, [["a" * 99] * 99] * 99, {"a" * 99: "b" * 999}, 10**4000])
def test_values_of_any_size_are_shown_in_short(value):
    assert len(shown(value)) <= 100


# ======== anything at all

JUNK = (
    None, True, False, 0, 1, -1, 2, 63, 64, 66, 128, 512, 1 << 31, 1 << 32, 1 << 62, (1 << 63) - 1,
    -(1 << 63), 0.5, 64.0, 1e308, "", "a", "1", "64", "<0x-1>", "f32", "f16", "trit1", "nf4", "float16",
    "x" * 10_000, "\0", "\n", "é\u202e", [], [1], [1, 2], [2, 1], [0], [-1, 1], [[1], 2], [64, 64],
    [1 << 40, 1 << 40], [1] * 255, [None, True], [{}], [[]], [{"name": 1}], {}, {"a": 1},
    {"dtype": "float32"}, {"dtype": None},
    {"dtype": "float32", "block": 64, "nested_block": 256},
)  # fmt: skip
FIELDS = ("name", "codec", "shape", "params", "offset", "nbytes", "crc32")


@pytest.mark.parametrize("key", [*FIELDS, "config", "tokenizer", "requires", "tensors"])
def test_any_field_may_hold_anything(tmp_path, key):
    for junk in JUNK:
        header = two_tensors()
        if key in FIELDS:
            header["tensors"][1][key] = junk
        else:
            header[key] = junk
        (tmp_path / "fuzz.trit").write_bytes(assemble(header))
        try_file(tmp_path / "fuzz.trit")


@pytest.mark.parametrize("codec", ["trit1", "trit4", "nf4", "q8", "bf16", "u8"])
@pytest.mark.parametrize("params", [p for p in JUNK if isinstance(p, dict)])
def test_any_codec_may_meet_any_parameters(tmp_path, codec, params):
    for shape in ([1], [64, 64], [1 << 40, 64]):
        header = two_tensors()
        header["tensors"][1].update(codec=codec, params=params, shape=shape)
        (tmp_path / "fuzz.trit").write_bytes(assemble(header))
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


def try_file(path: Path) -> None:
    """A file opens and dequantises, or is refused with a FormatError; nothing else happens."""
    try:
        with open_trit(path) as file, np.errstate(all="ignore"):
            for tensor in file.tensors.values():
                dequantize(tensor)
            list(file.problems())
    except FormatError as e:
        assert str(path) in str(e)
