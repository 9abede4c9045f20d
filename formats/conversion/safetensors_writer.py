"""Write safetensors files piece by piece: what is in memory is one block of one tensor."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..sources.safetensors_reader import INDEX_FILE, SINGLE_FILE

SHARD_BYTES = 5_000_000_000
# safetensors' names -> the arrays that hold them; bf16 is written from its bits
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I8": "i1", "U8": "u1",
}  # fmt: skip
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Piece:
    """One tensor to be written. blocks: makes its values in order, as arrays of the dtype, in blocks of any size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * np.dtype(DTYPES[self.dtype]).itemsize

    @classmethod
    def of(cls, name: str, values: np.ndarray, dtype: str | None = None) -> Piece:
        """Describe an array that is there as a whole. dtype: needed for the bits of bf16."""
        kind = dtype or next(key for key, text in DTYPES.items() if np.dtype(text) == values.dtype and key != "BF16")
        return cls(name, kind, values.shape, lambda: [values])


def write_safetensors(
    path: Path, pieces: Iterable[Piece], progress: Callable[[int, str], None] | None = None, in_order: bool = False
) -> None:
    """Write one file. progress: called with (bytes just written, name); in_order: as the pieces come.

    Raises OSError; ValueError if a piece's blocks are not what it says.
    """
    ordered = list(pieces)
    if not in_order:  # Larger items first, as the format's own writer does: every tensor is aligned to its items.
        ordered.sort(key=lambda p: (-np.dtype(DTYPES[p.dtype]).itemsize, p.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for piece in ordered:
        span = [end, end + piece.nbytes]
        header[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for piece in ordered:
            for data in _blocks(piece):
                f.write(data)
                if progress:
                    progress(len(data), piece.name)
        f.flush()
        os.fsync(f.fileno())


def _blocks(piece: Piece) -> Iterator[memoryview]:
    dtype, left = np.dtype(DTYPES[piece.dtype]), piece.nbytes
    for block in piece.blocks():
        if block.dtype != dtype:
            raise ValueError(f"{piece.name}: a block of {block.dtype}, expected {dtype}")
        left -= block.nbytes
        yield np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
    if left:
        raise ValueError(f"{piece.name}: blocks of {piece.nbytes - left} bytes, expected {piece.nbytes}")


def write_folder(
    folder: Path,
    pieces: Sequence[Piece],
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
    in_order: bool = False,
) -> list[Path]:
    """Write model.safetensors, or shards of at most `shard_bytes` (or one tensor) and their index.

    returns: the files that hold weights
    """
    shards: list[list[Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    done, total = 0, sum(piece.nbytes for piece in pieces)

    def report(nbytes: int, name: str) -> None:
        nonlocal done
        done += nbytes
        if progress:
            progress(done, total, name)

    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else [SINGLE_FILE]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(folder / name, shard, report, in_order)
    if len(shards) > 1:
        weight_map = {piece.name: name for name, shard in zip(names, shards, strict=True) for piece in shard}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [folder / name for name in names]
