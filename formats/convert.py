"""A checkpoint becomes a .trit file, one tensor in memory at a time. The same input gives the same bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from .codecs import CODECS, align, payload_nbytes
from .errors import SourceError, UnsupportedError
from .source import Source, SourceTensor, expected_tensors
from .version import __version__
from .writer import TritWriter

Progress = Callable[[int, int, str], None]
Layout = tuple[dict[str, Any], dict[str, np.ndarray]]

KEEP = "keep"
QUANTS = ("trit1", "trit2", "trit3", "trit4", "nf4", "q8", "f16", "bf16", "f32", KEEP)
EMBEDDINGS = frozenset({"tok_embeddings", "output"})
KEPT = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
# What the quantisers are asked for: their parameters, spelt out because the plan needs the sizes beforehand
OPTIONS: dict[str, dict[str, Any]] = {
    **{f"trit{depth}": {"dtype": "float32"} for depth in (1, 2, 3, 4)},
    "nf4": {"block": 64, "nested_block": 256, "dtype": "float32"},
}
# Codecs whose rows do not depend on each other, so that a big matrix is never whole in float32
ROW_WISE = frozenset({"f32", "f16", "bf16", "q8"})
BLOCK_ELEMENTS = 1 << 22
HASH_BYTES = 4 << 20
HEADER_ROOM = 1 << 20


@dataclass(frozen=True)
class Planned:
    """One tensor of the file to be written. source: None for a blob, whose bytes are then in `data`."""

    name: str
    codec: str
    params: dict[str, Any]
    shape: tuple[int, ...]
    nbytes: int
    source: SourceTensor | None = None
    data: bytes = b""


@dataclass(frozen=True)
class Summary:
    """What was written, or with `dry_run` would be. nbytes: of all payloads, with the tokenizer's."""

    path: Path
    plan: list[Planned]
    weights: int
    nbytes: int
    notes: list[str]

    @property
    def bpw(self) -> float:
        """Bits per weight of the whole model, the tokenizer left out."""
        return 8 * sum(row["bytes"] for row in self.by_codec().values()) / max(self.weights, 1)

    def by_codec(self) -> dict[str, dict[str, Any]]:
        """Give {codec: {"tensors", "weights", "bytes", "bpw"}}, the tokenizer's blobs left out."""
        table: dict[str, dict[str, Any]] = {}
        for item in self.plan:
            if item.source is None:
                continue
            row = table.setdefault(item.codec, {"tensors": 0, "weights": 0, "bytes": 0, "bpw": 0.0})
            row["tensors"] += 1
            row["weights"] += prod(item.shape)
            row["bytes"] += item.nbytes
            row["bpw"] = 8 * row["bytes"] / row["weights"]
        return table


def convert(
    source: Source,
    path: str | os.PathLike[str],
    quant: str,
    embed: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Write a source as a .trit file; on any failure nothing is left behind.

    quant: codec of the matrices in the layers, or "keep"
    embed: codec of the embeddings and the output matrix (default "f16", with "keep" their own)
    progress: called with (done, total, what)

    Raises SourceError (NaN, infinity, a value that does not fit), UnsupportedError, FileExistsError, OSError;
    ValueError for an unknown codec.
    """
    path = Path(path)
    embed = check_codecs(quant, embed)
    plan = make_plan(source, quant, embed)
    weights = sum(prod(item.shape) for item in plan if item.source is not None)
    nbytes = sum(align(item.nbytes) for item in plan)
    summary = Summary(path, plan, weights, nbytes, [*source.notes, *_notes(plan)])
    if dry_run:
        return summary
    _check_output(source, path, nbytes, overwrite)
    metadata = _metadata(source, f"--quant {quant} --embed {embed}", progress)
    done = 0
    try:
        with TritWriter(path, metadata, [item.name for item in plan], overwrite=overwrite) as writer:
            for item in plan:
                if progress:
                    progress(done, nbytes, item.name)
                params, parts = _quantize(item)
                writer.add(item.name, item.codec, item.shape, params, parts)
                done += align(item.nbytes)
            if progress:
                progress(nbytes, nbytes, "closing")
    except OSError as exc:
        raise _name_output(exc, path) from exc
    return summary


def check_codecs(quant: str, embed: str | None) -> str:
    """Check the two options and give the second its default.

    Raises ValueError.
    """
    if embed is None:
        embed = KEEP if quant == KEEP else "f16"
    for option, value in (("quant", quant), ("embed", embed)):
        if value not in QUANTS:
            raise ValueError(f"{option} is {value!r}; supported are {', '.join(QUANTS)}")
    return embed


# ---- the plan -------------------------------------------------------------------------------------------


def make_plan(source: Source, quant: str, embed: str) -> list[Planned]:
    """Decide the codec of every tensor, in the order of the file: the tokenizer, then as the model runs.

    Raises SourceError, UnsupportedError.
    """
    plan = [
        Planned(name, "u8", {}, (len(data),), len(data), None, data)
        for name, data in sorted(source.blobs.items())
    ]
    for name in expected_tensors(source.config):
        tensor = source.tensors[name]
        codec, params = _codec_of(tensor, embed if name in EMBEDDINGS else quant)
        nbytes = payload_nbytes(codec, tensor.shape, params)
        plan.append(Planned(name, codec, params, tensor.shape, nbytes, tensor))
    return plan


def _notes(plan: list[Planned]) -> list[str]:
    """Say so where a source's own quantisation is thrown away."""
    again = [i.source.dtype for i in plan if i.source and i.source.carried and i.source.carried.codec != i.codec]
    if not again:
        return []
    return [f"{len(again)} tensors are dequantised from {again[0]} and quantised again; --quant keep loses nothing"]


def _codec_of(tensor: SourceTensor, wanted: str) -> tuple[str, dict[str, Any]]:
    if tensor.carried and wanted in (KEEP, tensor.carried.codec):
        return tensor.carried.codec, tensor.carried.params
    if len(tensor.shape) == 1:
        return _vector_codec(tensor), {}
    if wanted != KEEP:
        return wanted, OPTIONS.get(wanted, {})
    if tensor.dtype not in KEPT:
        raise UnsupportedError(
            tensor.file,
            f"has type {tensor.dtype}, which cannot be kept ({', '.join(KEPT)} can); choose another --quant",
            tensor.theirs,
        )
    return KEPT[tensor.dtype], {}


def _vector_codec(tensor: SourceTensor) -> str:
    """Norms and biases lose nothing: float16 where it holds every value exactly, else float32."""
    values = _read_checked(tensor, 0, tensor.shape[0])
    with np.errstate(over="ignore"):
        return "f16" if np.array_equal(values.astype(np.float16).astype(np.float32), values) else "f32"


# ---- one tensor -----------------------------------------------------------------------------------------


def _quantize(item: Planned) -> Layout:
    if item.source is None:
        return {}, {"values": np.frombuffer(item.data, np.uint8)}
    if item.source.carried and item.source.carried.codec == item.codec:
        return item.params, item.source.carried.read()
    try:
        if item.codec in ROW_WISE:
            return _quantize_by_rows(item.codec, item.source)
        values = _read_checked(item.source, 0, item.shape[0])
        return CODECS[item.codec].quantize(values, **item.params)
    except SourceError:
        raise
    except ValueError as exc:
        hint = " or bf16 (--quant, --embed)" if item.codec in ("f16", "q8") else ""
        raise SourceError(item.source.file, f"{exc}{hint}", item.source.theirs) from exc


def _quantize_by_rows(codec_name: str, tensor: SourceTensor) -> Layout:
    codec = CODECS[codec_name]
    parts = {key: np.empty(shape, dtype) for key, (dtype, shape) in codec.parts(tensor.shape, {}).items()}
    for start, stop in _row_blocks(tensor.shape):
        _, block = codec.quantize(_read_checked(tensor, start, stop))
        for key, part in block.items():
            parts[key][start:stop] = part
    return {}, parts


def _row_blocks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK_ELEMENTS // prod(shape[1:]))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def _read_checked(tensor: SourceTensor, start: int, stop: int) -> np.ndarray:
    """Read rows start..stop as float32. Raises SourceError at a value that is not finite."""
    values = tensor.read_rows(start, stop)
    finite = np.isfinite(values)
    if not finite.all():
        where = np.argwhere(~finite)[0]
        bad = values[tuple(where)]
        where[0] += start
        raise SourceError(
            tensor.file, f"holds {bad} at {where.tolist()}: the checkpoint is broken", tensor.theirs
        )
    return values


# ---- header and output ----------------------------------------------------------------------------------


def _metadata(source: Source, options: str, progress: Progress | None) -> dict[str, Any]:
    root = source.path if source.path.is_dir() else source.path.parent
    return {
        "config": source.config,
        "tokenizer": source.tokenizer,
        "chat": source.chat,
        "generation": source.generation,
        "licence": source.licence,
        "source": {
            "name": source.name,
            "files": [_provenance(path, root, progress) for path in source.files],
            "converter": f"tritllama {__version__}",
            "options": options,
        },
    }


def _provenance(path: Path, root: Path, progress: Progress | None) -> dict[str, Any]:
    digest, size, done = hashlib.sha256(), os.path.getsize(path), 0
    with open(path, "rb") as f:
        while chunk := f.read(HASH_BYTES):
            digest.update(chunk)
            done += len(chunk)
            if progress:
                progress(done, max(size, done), f"hashing {path.name}")
    return {"name": path.relative_to(root).as_posix(), "bytes": done, "sha256": digest.hexdigest()}


def _check_output(source: Source, path: Path, nbytes: int, overwrite: bool) -> None:
    """Refuse an output that cannot be, before the source is hashed."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected the name of a file to write", str(path))
    if path.exists():
        if any(path.samefile(file) for file in source.files):
            raise FileExistsError(errno.EEXIST, "is a file of the source itself", str(path))
        if not overwrite:
            raise FileExistsError(errno.EEXIST, "exists already (--overwrite replaces it)", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    free = shutil.disk_usage(path.parent).free
    if free < nbytes + HEADER_ROOM:
        raise OSError(errno.ENOSPC, f"needs {nbytes:,} bytes, but only {free:,} are free", str(path))


def _name_output(exc: OSError, path: Path) -> OSError:
    """Say which file could not be written: a full disk gives an error without a name."""
    if exc.filename is not None or exc.errno is None:
        return exc
    return OSError(exc.errno, f"{exc.strerror} (nothing was left behind)", str(path))
