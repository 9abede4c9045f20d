"""Files that are no whole .trit files: something else, cut short, too long, no regular file; and errors themselves."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import pytest

from formats import (
    BadMagicError,
    FormatError,
    HeaderError,
    TensorError,
    TruncatedFileError,
    UnsupportedVersionError,
    dequantize,
    open_trit,
)
from formats.errors import shorten, shown
from tests.trit_bytes import assemble, changed, refuses, two_tensors

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX file system")


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
def test_something_else(tmp_path, data, message):
    refuses(tmp_path, data, BadMagicError, f"not a .trit file: this is .*{message}" if data else message)


def test_version(tmp_path):
    for version, hint in ((0, "convert the model again"), (2, "update tritllama"), (1 << 24, "update")):
        message = f"format version {version}; this program reads version 1; {hint}"
        refuses(tmp_path, assemble(two_tensors(), version=version), UnsupportedVersionError, message)


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


def test_something_after_the_last_tensor(tmp_path):
    data = assemble(two_tensors())
    refuses(tmp_path, data + b"\0", HeaderError, "1 bytes follow the last tensor")
    refuses(tmp_path, data + b"PK\x03\x04" + bytes(60), HeaderError, "64 bytes follow the last tensor")


def test_table_asks_for_more_than_any_disk_holds(tmp_path):
    data = changed(codec="f32", shape=[1 << 24, (1 << 24) - 1], nbytes=4 * (1 << 24) * ((1 << 24) - 1))
    refuses(tmp_path, data, TruncatedFileError, "have .* of 1125899[0-9]{9} bytes")


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


# ======== what errors say


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
