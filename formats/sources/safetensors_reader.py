"""Read safetensors files: the package validates them, the bytes are mapped here, so that bf16 works too."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SourceError, UnsupportedError, shorten, shown
from .source import parse_json, read_json

MAX_HEADER_BYTES = 100_000_000
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies. offset: absolute, in bytes; dtype: safetensors' name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int

    def raw(self, dtype: np.dtype[Any], start: int, count: int) -> np.ndarray:
        """Map `count` items from item `start`. A map of its own: its pages go when the array goes.

        returns: (count,) dtype, read-only
        """
        if count == 0:
            return np.empty(0, dtype)
        where = self.offset + start * dtype.itemsize
        try:
            return np.asarray(np.memmap(self.path, dtype, mode="r", offset=where, shape=(count,)))
        except ValueError as exc:  # shorter than when it was opened
            raise SourceError(self.path, f"changed while it was read: {exc}", self.name) from exc

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows start..stop (items of a 1-D tensor).

        returns: (stop - start, ...) float32; bf16 widened bit by bit, so NaNs stay what they are
        """
        row = prod(self.shape[1:])
        dtype, widen = READABLE[self.dtype]
        values = widen(self.raw(np.dtype(dtype), start * row, (stop - start) * row))
        return values.reshape(stop - start, *self.shape[1:])


def _widen_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype("<u4") << np.uint32(16)).view("<f4").astype(np.float32, copy=False)


def _widen(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32, copy=False)


# dtype name -> how the bytes are viewed, how they become float32
READABLE: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "F32": ("<f4", _widen),
    "F16": ("<f2", _widen),
    "BF16": ("<u2", _widen_bf16),
}


def check_readable(tensor: StoredTensor) -> None:
    """Refuse a tensor of a dtype that is not a plain float. Raises UnsupportedError."""
    if tensor.dtype not in READABLE:
        raise UnsupportedError(
            tensor.path, f"has dtype {tensor.dtype}; supported are {', '.join(READABLE)}", tensor.name
        )


def open_folder(folder: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    """Find a folder's weights as transformers does: model.safetensors, else the shards of the index.

    returns: tensors by the source's names, and the files that hold them

    Raises SourceError (nothing usable, damaged, index and shards disagree).
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.is_file():
        return read_file(single), [single]
    if index.is_file():
        return _open_shards(index)
    present = sorted(p.name for p in folder.glob("*.safetensors"))
    pickles = sorted(p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in folder.glob(pattern))
    if present:
        found = f"{shorten(present)} but no {INDEX_FILE}"
    elif pickles:
        found = f"only {shorten(pickles)}, which are pickles and are not read (save it as safetensors)"
    else:
        found = "no weights at all"
    raise SourceError(folder, f"has {found}; expected {SINGLE_FILE}, or shards with {INDEX_FILE}")


def _open_shards(index: Path) -> tuple[dict[str, StoredTensor], list[Path]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(index, 'has no "weight_map" object with the tensors\' files')
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise SourceError(index, f"names {shown(shard)} as its file, expected a plain file name", name)
    tensors: dict[str, StoredTensor] = {}
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        path = index.parent / shard
        if not path.is_file():
            name = next(name for name, where in weight_map.items() if where == shard)
            raise SourceError(path, f"is missing (a shard that {index.name} names); download it again", name)
        for name, tensor in read_file(path).items():
            if name in tensors:
                raise SourceError(path, f"is also in {tensors[name].path.name}; one must go", name)
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise SourceError(index.parent / shard, f"is not in this file, but {index.name} says so", name)
    return tensors, [index.parent / shard for shard in shards]


def read_file(path: Path) -> dict[str, StoredTensor]:
    """Read one file's header and validate the whole file's layout.

    Raises SourceError naming the file, and the tensor that is cut off when the file is too short.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as f:
        start = f.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if length < 2 or length > min(MAX_HEADER_BYTES, size - 8):
            raise SourceError(path, _bad_start(start, length, size))
        header = parse_json(path, f.read(length))
    if not isinstance(header, dict):
        raise SourceError(path, "has a header that is not a JSON object")
    header.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in header.items()}
    for tensor in sorted(tensors.values(), key=lambda t: t.offset + t.nbytes):
        if tensor.offset + tensor.nbytes > size:
            raise SourceError(
                path,
                f"ends at byte {tensor.offset + tensor.nbytes}, but the file has only {size} bytes: "
                "it was cut short, download it again",
                tensor.name,
            )
    _validate(path)
    return tensors


def _bad_start(start: bytes, length: int, size: int) -> str:
    if start == b"version ":
        return "is a Git LFS pointer, not the weights (git lfs pull)"
    if len(start) < 8:
        return f"has only {size} bytes; expected a safetensors file, download it again"
    return f"announces a header of {length} bytes in a file of {size}: cut short, or not a safetensors file"


def _entry(path: Path, name: str, entry: object, data_start: int) -> StoredTensor:
    def integers(value: object, count: int | None = None) -> list[int]:
        good = isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
        if not good or (count is not None and len(value) != count):  # type: ignore[arg-type]
            raise SourceError(path, f"has the header entry {shown(entry)}", name)
        return value  # type: ignore[return-value]

    fields = entry if isinstance(entry, dict) else {}
    shape = tuple(integers(fields.get("shape")))
    begin, end = integers(fields.get("data_offsets"), 2)
    if end < begin:
        raise SourceError(path, f"has the header entry {shown(entry)}", name)
    return StoredTensor(name, str(fields.get("dtype")), shape, path, data_start + begin, end - begin)


def _validate(path: Path) -> None:
    """Let the package check the rest: overlaps, holes, shape against size, unknown dtypes."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, ValueError, OSError) as exc:
        raise SourceError(path, f"is not a valid safetensors file: {exc}") from exc
