"""The header of a GGUF file, read with every length checked against the file before it is used.

gguf's own reader makes an object for each of a tokenizer's entries (seconds, and hundreds of megabytes, for
Llama 3) and answers a file that was cut short with errors about array shapes; here that is one clear line.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SourceError, UnsupportedError, shown

VERSIONS = (2, 3)
MAX_DIMS = 4
DEFAULT_ALIGNMENT = 32
MAX_VALUES = 1 << 21  # Llama 3 has half a million
MAX_STRING = 1 << 24
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
    10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor. shape: NumPy's order, (out, in); type: ggml's name; offset: absolute."""

    name: str
    path: Path
    type: str
    shape: tuple[int, ...]
    offset: int
    row_bytes: int

    def read(self, rows: np.ndarray | slice) -> np.ndarray:
        """Dequantise some rows (of a 1-D tensor: all of it, as one row).

        returns: (n, in) float32
        """
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        n_rows = self.shape[0] if len(self.shape) == 2 else 1
        try:
            raw = np.memmap(self.path, np.uint8, mode="r", offset=self.offset, shape=(n_rows, self.row_bytes))
        except ValueError as exc:  # shorter than when it was opened
            raise SourceError(self.path, f"changed while it was read: {exc}", self.name) from exc
        packed = np.ascontiguousarray(np.asarray(raw)[rows])
        with np.errstate(all="ignore"):  # the converter names what is not finite itself
            values = dequantize(packed, GGMLQuantizationType[self.type])
        return values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class GGUFFile:
    """A GGUF file's metadata as plain Python values, and its tensors by name."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Read and check the header, and that every tensor lies inside the file.

    Raises SourceError (damaged, cut short), UnsupportedError (version, byte order, tensor type, split file).
    """
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        if size < 24:
            raise SourceError(path, f"has only {size} bytes; expected a GGUF file, download it again")
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data, size)
            n_tensors, n_fields = _start(cursor)
            cursor.expect(n_tensors + n_fields)
            fields = _fields(cursor, n_fields)
            _refuse_split(path, fields)
            infos = [_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = fields.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise SourceError(path, f"general.alignment is {shown(alignment)}, expected a power of two")
    start = -(-cursor.at // alignment) * alignment
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, kind, offset in infos:
        if name in tensors:
            raise SourceError(path, "is there twice", name)
        tensors[name] = _place(path, name, shape, kind, start + offset)
    _check_inside(path, tensors, size)
    return GGUFFile(path, fields, tensors)


class _Cursor:
    """Reads one thing after another and never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0
        self._values = 0

    def expect(self, count: int) -> None:
        """Refuse more values than are read in a second, before any of them is."""
        self._values += count
        if self._values > MAX_VALUES:
            raise SourceError(self.path, f"announces {self._values} values in its header; the limit is {MAX_VALUES}")

    def need(self, count: int) -> None:
        if count > self.size - self.at:
            raise SourceError(
                self.path,
                f"ends inside its header, at byte {self.size}: it was cut short, download it again",
            )

    def take(self, form: str) -> Any:
        width = struct.calcsize(form)
        self.need(width)
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += width
        return value

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        found, raw, data, length_at, at = [], b"", self.data, struct.Struct("<Q").unpack_from, self.at
        try:
            for _ in range(count):
                (length,) = length_at(data, at)
                if length > MAX_STRING:
                    self.need(at + 8 + length - self.at)
                    raise SourceError(self.path, f"holds a string of {length} bytes; the limit is {MAX_STRING}")
                raw = data[at + 8 : at + 8 + length]
                at += 8 + length
                found.append(raw.decode("utf-8"))
        except struct.error:
            self.need(self.size)  # less than a length is left
        except UnicodeDecodeError as exc:
            self.need(at - self.at)
            raise SourceError(self.path, f"holds a string that is not UTF-8: {shown(raw[:40])}") from exc
        self.need(at - self.at)
        self.at = at
        return found

    def numbers(self, dtype: str, count: int) -> list[Any]:
        width = np.dtype(dtype).itemsize
        self.need(count * width)
        values = np.frombuffer(self.data[self.at : self.at + count * width], dtype)
        self.at += count * width
        return values.tolist()


def _start(cursor: _Cursor) -> tuple[int, int]:
    cursor.at = 4
    version = cursor.take("<I")
    if version & 0xFFFF == 0 and version:
        raise UnsupportedError(cursor.path, "is a big-endian GGUF file; only little-endian ones are read")
    if version not in VERSIONS:
        raise UnsupportedError(cursor.path, f"is GGUF version {version}; supported are 2 and 3")
    return cursor.take("<Q"), cursor.take("<Q")


def _fields(cursor: _Cursor, count: int) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.string()
        if key in fields:
            raise SourceError(cursor.path, f"has the key {shown(key)} twice")
        fields[key] = _value(cursor, key)
    return fields


def _value(cursor: _Cursor, key: str) -> Any:
    kind = cursor.take("<I")
    if kind == STRING:
        return cursor.string()
    if kind in SCALARS:
        return cursor.numbers(SCALARS[kind], 1)[0]
    if kind == ARRAY:
        of, count = cursor.take("<I"), cursor.take("<Q")
        cursor.expect(count)
        if of == STRING:
            return cursor.strings(count)
        if of in SCALARS:
            return cursor.numbers(SCALARS[of], count)
        kind = of
    raise SourceError(cursor.path, f"the key {shown(key)} has a value of unknown type {kind}")


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Read (name, shape in NumPy's order, type number, offset in the data)."""
    name = cursor.string()
    n_dims = cursor.take("<I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise SourceError(cursor.path, f"has {n_dims} dimensions, expected 1 to {MAX_DIMS}", name)
    dims = cursor.numbers("<u8", n_dims)
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    return name, tuple(reversed(dims)), cursor.take("<I"), cursor.take("<Q")


def _place(path: Path, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GGUFTensor:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        type_ = GGMLQuantizationType(kind)
    except ValueError as exc:
        raise UnsupportedError(path, f"has type {kind}, which the package gguf does not know", name) from exc
    block, block_bytes = GGML_QUANT_SIZES[type_]
    if shape[-1] % block:
        raise SourceError(path, f"has rows of {shape[-1]}, not a multiple of {block} ({type_.name})", name)
    return GGUFTensor(name, path, type_.name, shape, offset, shape[-1] // block * block_bytes)


def _check_inside(path: Path, tensors: dict[str, GGUFTensor], size: int) -> None:
    """Raise SourceError unless every tensor lies in the file, and none in another."""
    start, before = 0, ""
    for tensor in sorted(tensors.values(), key=lambda t: t.offset):
        end = tensor.offset + math.prod(tensor.shape[:-1]) * tensor.row_bytes
        if tensor.offset < start:
            message = f"begins at byte {tensor.offset}, inside of {before}: the file is damaged, download it again"
            raise SourceError(path, message, tensor.name)
        start, before = end, tensor.name
        if end > size:
            raise SourceError(
                path,
                f"ends at byte {end}, but the file has only {size} bytes: "
                "it was cut short, download it again",
                tensor.name,
            )


def _refuse_split(path: Path, fields: dict[str, Any]) -> None:
    parts = fields.get("split.count", 0)
    if parts not in (0, 1):
        raise UnsupportedError(path, f"is one of {parts} parts; join them first (llama-gguf-split --merge)")
