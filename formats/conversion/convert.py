"""A checkpoint becomes a .trit file, one tensor in memory at a time. The same input gives the same bytes."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..codecs import align
from ..codecs.trit_codec import Encode, encode_reference
from ..errors import HeaderError, SourceError
from ..kv_modules import FEATURE, module_tensors
from ..sources.source import Source
from ..unfinished import naming
from ..version import __version__
from ..writer import TritWriter, close_all
from .pack import pack
from .plan import (
    KEEP,
    PLAIN,
    QUANTS,
    Planned,
    Progress,
    Summary,
    check_codecs,
    make_plan,
    notes_on,
    rows_of,
)
from .report import errors_of

__all__ = ["KEEP", "PLAIN", "QUANTS", "Planned", "Progress", "Summary", "convert", "convert_several", "several_paths"]

HASH_BYTES = 4 << 20
HEADER_ROOM = 1 << 20


def convert(
    source: Source,
    path: str | os.PathLike[str],
    quant: str,
    embed: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    encode: Encode | None = None,
    bpw: float | None = None,
    report: bool = False,
    codecs: Mapping[str, str] | None = None,
    record: str = "",
) -> Summary:
    """Write a source as a .trit file; on any failure nothing is left behind.

    quant: codec of the matrices in the layers, "keep", or "trit-mixed" with at most `bpw` bits for each weight of them
    embed: codec of the embeddings and the output matrix (default "f16", with "keep" their own)
    progress: called with (done, total, what)
    encode: what quantises to trits; default is the reference, in NumPy
    report: measure the error of every tensor, which takes another pass over each: `facts` in the summary's plan
    codecs: those of matrices, by name, where they are not what `quant` says
    record: what else the header should say about the options

    Raises SourceError (NaN, infinity, a value that does not fit), UnsupportedError, FileExistsError, OSError;
    OptionError for an unknown codec, or for a `bpw` that cannot be had.
    """
    paths = {quant: path}
    return convert_several(source, paths, embed, overwrite, dry_run, progress, encode, bpw, report, codecs, record)[0]


def convert_several(
    source: Source,
    paths: Mapping[str, str | os.PathLike[str]],
    embed: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
    encode: Encode | None = None,
    bpw: float | None = None,
    report: bool = False,
    codecs: Mapping[str, str] | None = None,
    record: str = "",
) -> list[Summary]:
    """Write several files from one pass over the source, which appear together or not at all.

    paths: the file for each codec of the layers' matrices; each is what `convert` writes, byte for byte

    Raises as `convert`.
    """
    encode = encode or encode_reference
    jobs = []
    for quant, path in paths.items():
        own = check_codecs(quant, embed, bpw)
        plan = make_plan(source, quant, own, bpw, encode, progress, codecs)
        options = f"--quant {quant} --embed {own}" + (f" --bpw {bpw:g}" if bpw else "")
        options += f" {record}" if record else ""
        jobs.append((Summary(Path(path), plan, [*source.notes, *notes_on(plan, done=False)]), options))
    summaries = [summary for summary, _ in jobs]
    if dry_run:
        return summaries
    check_outputs(source, summaries, overwrite)
    before = _stamps(source)
    metadata = _metadata(source, progress)
    with ExitStack() as stack:
        writers = []
        for summary, options in jobs:
            header = {**metadata, "source": {**metadata["source"], "options": options}}
            names = [item.name for item in summary.plan]
            try:
                with naming(summary.path):
                    writers.append(stack.enter_context(TritWriter(summary.path, header, names, overwrite)))
            except HeaderError as exc:
                raise SourceError(source.path, f"does not fit into the header of a file: {exc.message}") from exc
        plans = _write(summaries, writers, encode, progress, report)
        for path, stamp in _stamps(source).items():
            if stamp != before[path]:
                raise SourceError(path, "changed while it was converted; convert it again")
        with naming(summaries[0].path):
            close_all(writers)
    return [
        Summary(summary.path, plan, [*source.notes, *notes_on(plan, done=True)])
        for summary, plan in zip(summaries, plans, strict=True)
    ]


def _write(
    summaries: Sequence[Summary],
    writers: Sequence[TritWriter],
    encode: Encode,
    progress: Progress | None,
    report: bool,
) -> list[list[Planned]]:
    """Write every tensor to every file. returns: the plans as they were carried out"""
    done, total = 0, sum(summary.nbytes for summary in summaries)
    written: list[list[Planned]] = [[] for _ in summaries]
    for items in zip(*(summary.plan for summary in summaries), strict=True):
        if progress:
            progress(done, total, items[0].name)
        for plan, writer, (item, parts) in zip(written, writers, pack(items, encode), strict=True):
            with naming(Path(writer.path)):
                writer.add(item.name, item.codec, item.shape, item.params, parts)
            if report and item.source:
                item = replace(item, facts={**item.facts, **errors_of(item, parts, rows_of(item.source))})
            plan.append(item)
        done += sum(align(item.nbytes) for item in items)
    if progress:
        progress(total, total, "closing")
    return written


def several_paths(source: Source, folder: Path, quants: Sequence[str]) -> dict[str, Path]:
    """Name the files that come from one pass: FOLDER/NAME-CODEC.trit."""
    name = re.sub(r"[^\w.-]+", "-", source.name, flags=re.ASCII).strip(".-") or "model"
    return {quant: folder / f"{name}-{quant}.trit" for quant in quants}


def _stamps(source: Source) -> dict[Path, tuple[int, int, int]]:
    """What tells whether a file of the source is still the same one."""
    found = {path: os.stat(path) for path in source.files}
    return {path: (about.st_ino, about.st_size, about.st_mtime_ns) for path, about in found.items()}


# ---- header and output ----------------------------------------------------------------------------------


def _metadata(source: Source, progress: Progress | None) -> dict[str, Any]:
    root = source.path if source.path.is_dir() else source.path.parent
    dtypes = Counter(t.dtype for t in source.tensors.values())
    modules, names = source.kv_modules, module_tensors(source.kv_modules, source.config)
    about_modules = {FEATURE: [m.to_dict() for m in modules], "requires": [FEATURE]} if modules else {}
    return {
        **about_modules,
        "config": source.config,
        "tokenizer": source.tokenizer,
        "chat": source.chat,
        "generation": source.generation,
        "licence": source.licence,
        "source": {
            "name": source.name,
            "dtypes": dict(sorted(dtypes.items())),
            "files": [_provenance(path, root, progress) for path in source.files],
            "converter": f"tritllama {__version__}",
            **({"kv_names": {name: source.tensors[name].theirs for name in names}} if names else {}),
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


def check_outputs(source: Source, summaries: Sequence[Summary], overwrite: bool) -> None:
    """Refuse outputs that cannot be, before any work is done. Raises FileExistsError, OSError."""
    for summary in summaries:
        path = summary.path
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a folder, expected the name of a file to write", str(path))
        if path.exists():
            if any(path.samefile(file) for file in source.files):
                raise FileExistsError(errno.EEXIST, "is a file of the source itself", str(path))
            if not overwrite:
                raise FileExistsError(errno.EEXIST, "exists already (--overwrite replaces it)", str(path))
        if not path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such folder", str(path.parent))
    folder = summaries[0].path.parent
    needed, free = sum(s.nbytes + HEADER_ROOM for s in summaries), shutil.disk_usage(folder).free
    if free < needed:
        where = str(summaries[0].path if len(summaries) == 1 else folder)
        raise OSError(errno.ENOSPC, f"needs {needed:,} bytes, but only {free:,} are free", where)
