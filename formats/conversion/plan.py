"""What a conversion will write: the codec and the size of every tensor, before any of them is converted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..codecs import align, payload_nbytes
from ..codecs.base import LARGEST, Rows, magnitude, round_to, row_chunks
from ..codecs.trit_codec import Encode
from ..errors import OptionError, SourceError, UnsupportedError, shown
from ..kv_modules import module_tensors
from ..sources.source import Source, SourceTensor, expected_tensors
from .mixed import SENSITIVITY, Measured, allocate, measure
from .recovered import guess_trits

Progress = Callable[[int, int, str], None]

KEEP = "keep"
TRITS = ("trit1", "trit2", "trit3", "trit4")
PLAIN = (*TRITS, "nf4", "q8", "f16", "bf16", "f32")
MIXED = "trit-mixed"
QUANTS = (*PLAIN, KEEP, MIXED)
MAX_REMARKS = 20
EMBEDDINGS = frozenset({"tok_embeddings", "output"})
MATRICES = frozenset(SENSITIVITY)
KEPT = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
# What the quantisers are asked for: their parameters, spelt out because the plan needs the sizes beforehand
OPTIONS: dict[str, dict[str, Any]] = {
    **{codec: {"dtype": "float32"} for codec in TRITS},
    "nf4": {"block": 64, "nested_block": 256, "dtype": "float32"},
}


@dataclass(frozen=True)
class Planned:
    """One tensor of the file to be written. source: None for a blob, whose bytes are then in `data`.

    recover: whether its values seem to be dequantised trits, which then are looked for
    remark: what a person should know about it; facts: more of it, for the report
    """

    name: str
    codec: str
    params: dict[str, Any]
    shape: tuple[int, ...]
    source: SourceTensor | None = None
    data: bytes = b""
    recover: bool = False
    remark: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        return payload_nbytes(self.codec, self.shape, self.params)

    @property
    def weights(self) -> int:
        return prod(self.shape) if self.source else 0

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix of a layer: what --quant is about."""
        return self.name.rsplit(".", 1)[-1] in MATRICES


@dataclass(frozen=True)
class Summary:
    """What was written, or with `dry_run` would be."""

    path: Path
    plan: list[Planned]
    notes: list[str]

    @property
    def nbytes(self) -> int:
        """Bytes of all payloads, the tokenizer's among them."""
        return sum(align(item.nbytes) for item in self.plan)

    @property
    def weights(self) -> int:
        return sum(item.weights for item in self.plan)

    @property
    def bpw(self) -> float:
        """Bits per weight of the whole model, the tokenizer left out."""
        return bits_per_weight([item for item in self.plan if item.source])

    @property
    def matrix_bpw(self) -> float:
        """Bits per weight of the layers' matrices, which are what --quant is about."""
        return bits_per_weight([item for item in self.plan if item.is_matrix])

    def by_codec(self) -> dict[str, dict[str, Any]]:
        """Give {codec: {"tensors", "weights", "bytes", "bpw"}}, the tokenizer's blobs left out."""
        groups: dict[str, list[Planned]] = {}
        for item in self.plan:
            if item.source:
                groups.setdefault(item.codec, []).append(item)
        return {
            codec: {
                "tensors": len(items),
                "weights": sum(i.weights for i in items),
                "bytes": sum(i.nbytes for i in items),
                "bpw": bits_per_weight(items),
            }
            for codec, items in groups.items()
        }


def bits_per_weight(items: list[Planned]) -> float:
    return 8 * sum(item.nbytes for item in items) / max(sum(item.weights for item in items), 1)


def check_codecs(quant: str, embed: str | None, bpw: float | None) -> str:
    """Check the options and give `embed` its default.

    Raises OptionError.
    """
    if embed is None:
        embed = KEEP if quant == KEEP else "f16"
    for option, value, allowed in (("quant", quant, QUANTS), ("embed", embed, (*PLAIN, KEEP))):
        if value not in allowed:
            raise OptionError(f"{option} is {shown(value)}; supported are {', '.join(allowed)}")
    if (bpw is not None) != (quant == MIXED):
        raise OptionError(f"{MIXED} needs a number of bits per weight (--bpw), and nothing else does")
    if bpw is not None and not 0 < bpw < 100:
        raise OptionError(f"bpw is {bpw}; expected bits per weight, such as 3.0")
    return embed


def make_plan(
    source: Source,
    quant: str,
    embed: str,
    bpw: float | None,
    encode: Encode,
    progress: Progress | None,
    codecs: Mapping[str, str] | None = None,
) -> list[Planned]:
    """Decide the codec of every tensor, in the order of the file: the tokenizer, then as the model runs.

    codecs: of matrices of the layers, by name, where it is decided already

    Raises SourceError, UnsupportedError; OptionError if `bpw` is too small.
    """
    plan = [Planned(name, "u8", {}, (len(data),), None, data) for name, data in sorted(source.blobs.items())]
    if codecs is None:
        codecs = _mixed(source, bpw, encode, progress) if bpw is not None else {}
    of_modules = module_tensors(source.kv_modules, source.config)
    for name in [*expected_tensors(source.config), *of_modules]:
        tensor = source.tensors[name]
        wanted = embed if name in EMBEDDINGS else codecs.get(name, quant)
        codec, params = (_exact_codec(tensor), {}) if name in of_modules else _codec_of(tensor, wanted)
        item = Planned(name, codec, params, tensor.shape, tensor)
        if wanted == KEEP and item.is_matrix and codec in KEPT.values():
            if progress:
                progress(len(plan), len(source.tensors), f"looking at {name}")
            item = _look_for_trits(item, tensor)
        plan.append(item)
    return plan


def _look_for_trits(item: Planned, tensor: SourceTensor) -> Planned:
    found = guess_trits(rows_of(tensor), tensor.dtype)
    if isinstance(found, str):
        return replace(item, remark=f"is kept as {item.codec}: {found}")
    codec, params = found
    return replace(item, codec=codec, params=params, recover=True)


def _mixed(source: Source, bpw: float, encode: Encode, progress: Progress | None) -> dict[str, str]:
    """Give the codec of each matrix of the layers, none of them below what others of the budget allow."""
    return {name: f"trit{depth}" for name, depth in allocate(measure_all(source, encode, progress), bpw).items()}


def measure_all(source: Source, encode: Encode, progress: Progress | None) -> list[Measured]:
    """Measure what quantising does to the values of each matrix of the layers, in their order."""
    names = [name for name in expected_tensors(source.config) if name.rsplit(".", 1)[-1] in MATRICES]
    measured = []
    for i, name in enumerate(names):
        if progress:
            progress(i, len(names), f"measuring {name}")
        measured.append(measure(name, rows_of(source.tensors[name]), encode))
    return measured


def notes_on(plan: list[Planned], done: bool) -> list[str]:
    """Say what was found in the source and what became of it. done: whether the plan has been carried out"""
    notes = []
    again = [i.source.dtype for i in plan if i.source and i.source.carried and i.source.carried.codec != i.codec]
    if again:
        notes.append(
            f"{len(again)} tensors are dequantised from {again[0]} and quantised again; --quant keep loses nothing"
        )
    looked = [item for item in plan if item.recover or item.remark]
    if not any(item.recover for item in looked):
        return [*notes, f"none of {len(looked)} matrices holds trits: they are kept as they are"] if looked else notes
    codecs = Counter(item.codec for item in looked if item.recover)
    depths = ", ".join(f"{count} {codec}" for codec, count in sorted(codecs.items()))
    if not done:
        return [*notes, f"trits seem to be in {depths} of {len(looked)} matrices", *_remarks(looked)]
    sums = [sum(item.facts[key] for item in looked if item.recover) for key in ("exceptions", "negative_zeros")]
    notes.append(
        f"trits recovered without loss from {sum(codecs.values())} of {len(looked)} matrices ({depths}); "
        f"{sums[0]} exceptions, {sums[1]} negative zeros"
    )
    return [*notes, *_remarks(looked)]


def _remarks(items: list[Planned]) -> list[str]:
    """Name the matrices of which something is to be said."""
    lines = [f"{item.source.theirs} {item.remark}" for item in items if item.source and item.remark]
    more = len(lines) - MAX_REMARKS
    return [*lines[:MAX_REMARKS], f"and {more} more such matrices"] if more > 0 else lines


def _codec_of(tensor: SourceTensor, wanted: str) -> tuple[str, dict[str, Any]]:
    if tensor.carried and wanted in (KEEP, tensor.carried.codec):
        return tensor.carried.codec, tensor.carried.params
    if len(tensor.shape) == 1:
        return _exact_codec(tensor), {}
    if wanted != KEEP:
        return wanted, OPTIONS.get(wanted, {})
    if tensor.dtype not in KEPT:
        raise UnsupportedError(
            tensor.file,
            f"has type {tensor.dtype}, which cannot be kept ({', '.join(KEPT)} can); choose another --quant",
            tensor.theirs,
        )
    return KEPT[tensor.dtype], {}


def _exact_codec(tensor: SourceTensor) -> str:
    """Norms, biases and KV modules lose nothing: float16 or bfloat16 where it holds every value, else float32."""
    left = {"f16": "float16", "bf16": "bfloat16"}
    for start, stop in row_chunks(tensor.shape):
        values = read_checked(tensor, start, stop)
        if magnitude(values) > LARGEST:
            message = f"holds {magnitude(values):g}; no value of a .trit file may exceed {LARGEST:g}"
            raise SourceError(tensor.file, message, tensor.theirs)
        left = {codec: dtype for codec, dtype in left.items() if np.array_equal(round_to(values, dtype), values)}
    return next(iter(left), "f32")


def rows_of(tensor: SourceTensor) -> Rows:
    """Give a matrix that is read, and checked, as it is used."""
    return Rows(tensor.shape, lambda start, stop: read_checked(tensor, start, stop))


def read_checked(tensor: SourceTensor, start: int, stop: int) -> np.ndarray:
    """Read rows start..stop as float32. Raises SourceError at a value that is not finite."""
    values = tensor.read_rows(start, stop)
    finite = np.isfinite(values)
    if not finite.all():
        where = np.argwhere(~finite)[0]
        bad = values[tuple(where)]
        where[0] += start
        raise SourceError(tensor.file, f"holds {bad} at {where.tolist()}: the checkpoint is broken", tensor.theirs)
    return values
