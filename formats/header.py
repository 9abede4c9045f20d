"""The header of a .trit file: its limits, and the checks that every reader and the writer share."""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

from .codecs import ALIGNMENT, CODECS, align, payload_nbytes
from .errors import (
    BadMagicError,
    ChecksumError,
    HeaderError,
    TensorError,
    TruncatedFileError,
    UnsupportedError,
    UnsupportedVersionError,
    shown,
)
from .strict_json import parse_json

MAGIC = b"TRIT"
VERSION = 1
PREFIX = struct.Struct("<4sIQ")
MAX_HEADER = 16 << 20
MAX_NAME = 256
MAX_WEIGHTS = 1 << 48
FEATURES = ("kv_modules",)
SECTIONS = ("config", "tokenizer", "chat", "generation", "licence", "source")

_OTHER_FORMATS = (
    (b"GGUF", "a GGUF file; convert it with tools.convert"),
    (b"PK\x03\x04", "a zip archive (perhaps a PyTorch checkpoint)"),
    (b"\x80\x02", "a Python pickle"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"\x7fELF", "a program"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"TIRT", "a .trit file with swapped bytes"),
)


@dataclass(frozen=True)
class Entry:
    """One line of the tensor table, checked."""

    name: str
    codec: str
    shape: tuple[int, ...]
    params: dict[str, Any]
    offset: int
    nbytes: int
    crc32: int


def checked_span(path: str, offset: int, nbytes: int, size: int, what: str) -> int:
    """Give the end of a span; every read and every view of a file passes here first.

    Raises TruncatedFileError if the span does not lie within `size` bytes.
    """
    if not (offset >= 0 and nbytes >= 0 and offset + nbytes <= size):
        raise TruncatedFileError(
            path,
            f"the file ends inside {what}: have {size} of at least {offset + nbytes} bytes; "
            "download or convert it again",
        )
    return offset + nbytes


# ======== reading


def read_header(file: BinaryIO, size: int, path: str) -> tuple[dict[str, Any], bytes, list[Entry]]:
    """Read and check everything before the payloads, and that the file is as long as the table says.

    returns: the header, its bytes with prefix and checksum, the tensor table
    Raises a FormatError of the class that fits.
    """
    raw = _read_checked(file, size, path)
    header = parse_json(raw[PREFIX.size : -4], path)
    if not isinstance(header, dict):
        raise HeaderError(path, f"the header is a JSON {type(header).__name__}, not an object")
    check_sections(header, path)
    start = align(len(raw))
    entries = _check_table(header.get("tensors"), start, path)
    end = align(entries[-1].offset + entries[-1].nbytes) if entries else start
    if size < end:
        raise TruncatedFileError(path, f"have {size} of {end} bytes; download or convert it again")
    if size > end:
        raise HeaderError(path, f"{size - end} bytes follow the last tensor; nothing may follow it")
    if any(file.read(start - len(raw))):
        raise HeaderError(path, "the padding after the header is not zero")
    return header, raw, entries


def _read_checked(file: BinaryIO, size: int, path: str) -> bytes:
    """Read prefix, header and checksum, and check magic, version, length and checksum."""
    prefix = file.read(PREFIX.size)
    if prefix[:4] != MAGIC[: len(prefix)] or not prefix:
        raise BadMagicError(path, _what_it_is(prefix + file.read(64)))
    checked_span(path, 0, PREFIX.size, len(prefix), "the first 16 bytes")
    _, version, length = PREFIX.unpack(prefix)
    if version != VERSION:
        hint = "update tritllama" if version > VERSION else "convert the model again"
        raise UnsupportedVersionError(path, f"format version {version}; this program reads version {VERSION}; {hint}")
    if not 0 < length <= MAX_HEADER:
        raise HeaderError(path, f"header length {length}; allowed are 1 to {MAX_HEADER} bytes")
    checked_span(path, PREFIX.size, length + 4, size, "the header")
    rest = file.read(length + 4)
    checked_span(path, PREFIX.size, length + 4, PREFIX.size + len(rest), "the header")
    raw = prefix + rest
    if zlib.crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        raise ChecksumError(path, "the header differs from its checksum; download or convert the file again")
    return raw


def _what_it_is(start: bytes) -> str:
    if not start:
        return "the file is empty; expected a .trit file"
    found = next((text for magic, text in _OTHER_FORMATS if start.startswith(magic)), "")
    if not found and start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        found = "a web page; the download went wrong"
    if not found and start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 1 << 32:
        found = "a safetensors file; convert its folder with tools.convert"
    if not found:
        found = f"a file that begins with {shown(start[:4])}, not {MAGIC!r}"
    return f"not a .trit file: this is {found}"


# ======== checking


def check_sections(header: dict[str, Any], path: str) -> None:
    """Raise HeaderError unless known sections are objects, UnsupportedError if a feature is required."""
    for key in SECTIONS:
        if not isinstance(header.get(key, {}), dict):
            raise HeaderError(path, f"{shown(key)} is {_kind(header[key])}; expected an object")
    required = header.get("requires", [])
    if not isinstance(required, list):
        raise HeaderError(path, f"'requires' is {_kind(required)}; expected a list")
    if unknown := [feature for feature in required if feature not in FEATURES]:
        raise UnsupportedError(path, f"it needs feature {shown(unknown[0])}; update tritllama")
    for feature in FEATURES:
        _check_feature(header, feature, path)


def _check_feature(header: dict[str, Any], feature: str, path: str) -> None:
    """A feature has a section of its name, a list; the one is there exactly when the other is."""
    section, required = header.get(feature), feature in header.get("requires", [])
    if section is not None and not (isinstance(section, list) and section):
        raise HeaderError(path, f"{shown(feature)} is {shown(section)}; expected a list that is not empty")
    if required != (section is not None):
        what = "is required, but missing" if required else "is there, but 'requires' does not name it"
        raise HeaderError(path, f"the section {shown(feature)} {what}; convert the model again")


def _check_table(table: Any, start: int, path: str) -> list[Entry]:
    """Check the tensor table line by line; payloads must follow each other with only padding between.

    start: where the first payload must lie
    """
    if not isinstance(table, list):
        raise HeaderError(path, f"'tensors' is {_kind(table)}; expected a list")
    entries: list[Entry] = []
    seen: set[str] = set()
    expected = start
    for i, line in enumerate(table):
        entry = _check_entry(line, i, path)
        if entry.name in seen:
            raise TensorError(path, "stands twice in the tensor table", entry.name)
        seen.add(entry.name)
        if entry.offset != expected:
            raise TensorError(path, _misplaced(entry.offset, expected, start), entry.name)
        expected = align(entry.offset + entry.nbytes)
        entries.append(entry)
    return entries


def _misplaced(offset: int, expected: int, start: int) -> str:
    if offset % ALIGNMENT:
        problem = f"is not a multiple of {ALIGNMENT}"
    elif offset < start:
        problem = "lies in the header"
    elif offset < expected:
        problem = "overlaps the tensor before it"
    else:
        problem = "leaves a hole before it"
    return f"offset {offset} {problem}; expected {expected}"


def _check_entry(line: Any, index: int, path: str) -> Entry:
    if not isinstance(line, dict):
        raise TensorError(path, f"line {index} of the tensor table is {_kind(line)}; expected an object")
    name = line.get("name")
    check_name(name, path, f"line {index} of the tensor table")
    assert isinstance(name, str)
    fields = {"codec": str, "shape": list, "params": dict, "offset": int, "nbytes": int, "crc32": int}
    for key, kind in fields.items():
        # `type() is`, because a bool is an int to isinstance.
        if type(line.get(key)) is not kind:
            raise TensorError(path, f"{shown(key)} is {_kind(line.get(key))}; expected {kind.__name__}", name)
    if not 0 <= line["crc32"] < 1 << 32:
        raise TensorError(path, f"crc32 {line['crc32']} is not a 32-bit number", name)
    nbytes = check_layout(line["codec"], line["shape"], line["params"], path, name)
    if line["nbytes"] != nbytes:
        raise TensorError(
            path,
            f"nbytes is {line['nbytes']}; codec {line['codec']} with shape {line['shape']} takes {nbytes}",
            name,
        )
    return Entry(name, line["codec"], tuple(line["shape"]), line["params"], line["offset"], nbytes, line["crc32"])


def check_layout(codec: str, shape: list[int], params: dict[str, Any], path: str, name: str) -> int:
    """Check codec, shape and parameters of a tensor, and give the size of its payload.

    Raises UnsupportedError or TensorError.
    """
    if codec not in CODECS:
        raise UnsupportedError(path, f"codec {shown(codec)} is not known (known: {', '.join(CODECS)})", name)
    if not 1 <= len(shape) <= 2 or not all(type(n) is int and n > 0 for n in shape):
        raise TensorError(path, f"shape {shown(shape)}; expected one or two positive integers", name)
    if math.prod(shape) >= MAX_WEIGHTS:
        raise TensorError(path, f"shape {shape} has 2**48 values or more", name)
    try:
        return payload_nbytes(codec, tuple(shape), params)
    except ValueError as e:
        raise TensorError(path, f"{e!s:.200}", name) from e


def check_name(name: Any, path: str, where: str) -> None:
    """Raise TensorError unless `name` is short, printable and no path out of a folder."""
    if not isinstance(name, str):
        raise TensorError(path, f"{where}: the name is {_kind(name)}; expected a string")
    if not 1 <= len(name) <= MAX_NAME:
        raise TensorError(path, f"{where}: the name has {len(name)} characters; allowed are 1 to {MAX_NAME}")
    if not name.isprintable() or ".." in name or name.startswith("/") or "\\" in name:
        raise TensorError(path, f"{where}: name {ascii(name)[:80]} holds '..', a path or a control character")


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
