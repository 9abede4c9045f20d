"""What a converter reads: one description for every kind of checkpoint, and the rules it must satisfy."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SourceError, shorten, shown
from ..kv_modules import KVModule
from ..strict_json import unique

MAX_JSON_BYTES = 256 << 20
MAX_LAYERS = 4096
GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Carried:
    """Packed values that one of our codecs takes over as they are. read: maps the codec's parts."""

    codec: str
    params: dict[str, Any]
    read: Callable[[], dict[str, np.ndarray]]


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of a checkpoint under our name; nothing is read before `read` or `read_rows`.

    dtype: the source's own name ("BF16", "Q4_1"); theirs, file: its name there and where it is, for messages.
    carried: the source's own quantisation, where a codec of ours is the same.
    """

    name: str
    theirs: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    read_rows: Callable[[int, int], np.ndarray]
    carried: Carried | None = None

    def read(self) -> np.ndarray:
        """Read it all.

        returns: `shape` float32, rows are outputs
        """
        return self.read_rows(0, self.shape[0])


@dataclass
class Source:
    """An opened checkpoint: everything that goes into the header, and the tensors by our names.

    kv_modules: learned projections of the KV cache; their tensors are among the others
    """

    path: Path
    name: str
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    blobs: dict[str, bytes]
    chat: dict[str, Any]
    generation: dict[str, Any]
    licence: dict[str, Any]
    files: list[Path]
    tensors: dict[str, SourceTensor]
    notes: list[str] = field(default_factory=list)
    kv_modules: list[KVModule] = field(default_factory=list)


def open_source(path: str | os.PathLike[str], kv_map: str | os.PathLike[str] | None = None) -> Source:
    """Open a checkpoint and check everything that can be checked without reading the weights.

    path: a Hugging Face folder, or a GGUF file; kv_map: a file that names its learned KV modules (see kv_map.py)

    Raises FileNotFoundError; SourceError (damaged, incomplete); UnsupportedError (not a model that we run).
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; convert the file itself: {inside[0]}" if inside else ""
            raise SourceError(path, f"has no config.json, so it is not a Hugging Face model folder{hint}")
        from .hf import open_hf

        return open_hf(path, kv_map)
    if path.exists() and not path.is_file():
        raise SourceError(path, "is a pipe or device; expected a Hugging Face folder or a GGUF file")
    with open(path, "rb") as f:
        magic = f.read(4)
    if magic == GGUF_MAGIC:
        from .gguf_source import open_gguf

        if kv_map is not None:
            raise SourceError(path, "is a GGUF file, which holds no KV modules; --kv-map is for Hugging Face folders")
        return open_gguf(path)
    raise SourceError(path, _what_else(path, magic))


def _what_else(path: Path, magic: bytes) -> str:
    expected = "expected a Hugging Face folder (config.json, *.safetensors) or a GGUF file"
    if magic == b"TRIT":
        return f"is a .trit file already; {expected}"
    if path.suffix == ".safetensors":
        return "is one file of a checkpoint; give the folder that holds it together with config.json"
    if magic == b"vers":
        return "looks like a Git LFS pointer, not the file itself (git lfs pull)"
    return f"starts with {shown(magic)}; {expected}"


# ---- names and shapes -----------------------------------------------------------------------------------


def expected_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """List the tensors that a model of this configuration has, in the order in which they are written."""
    dim, hidden = config["dim"], config["hidden_dim"]
    q_dim = config["n_heads"] * config["head_dim"]
    kv_dim = config["n_kv_heads"] * config["head_dim"]
    attention = {"wq": (q_dim, dim), "wk": (kv_dim, dim), "wv": (kv_dim, dim), "wo": (dim, q_dim)}
    mlp = {"w1": (hidden, dim), "w3": (hidden, dim), "w2": (dim, hidden)}
    out: dict[str, tuple[int, ...]] = {"tok_embeddings": (config["vocab_size"], dim)}

    def add(layer: str, matrices: dict[str, tuple[int, int]], biases: bool) -> None:
        for name, shape in matrices.items():
            out[f"{layer}.{name}"] = shape
            if biases:
                out[f"{layer}.{name}.bias"] = shape[:1]

    for i in range(config["n_layers"]):
        layer = f"layers.{i}"
        out[f"{layer}.attention_norm"] = (dim,)
        add(layer, attention, config["attention_bias"])
        out[f"{layer}.ffn_norm"] = (dim,)
        add(layer, mlp, config["mlp_bias"])
    out["norm"] = (dim,)
    if not config["tied_embeddings"]:
        out["output"] = (config["vocab_size"], dim)
    return out


class Names:
    """Two-way renaming by a table with one `{}` for the layer number."""

    def __init__(self, theirs_to_ours: dict[str, str]) -> None:
        self._to_ours = theirs_to_ours
        self._to_theirs = {ours: theirs for theirs, ours in theirs_to_ours.items()}

    def ours(self, theirs: str) -> str | None:
        """Give our name, or None for a tensor that the table does not know."""
        return self._rename(theirs, self._to_ours)

    def theirs(self, ours: str) -> str:
        """Give the source's name of one of our tensors."""
        name = self._rename(ours, self._to_theirs)
        assert name is not None, ours
        return name

    @staticmethod
    def _rename(name: str, table: dict[str, str]) -> str | None:
        layer = re.search(r"(?<=\.)(?:0|[1-9][0-9]{0,5})(?=\.)", name)
        if layer is None:
            return table.get(name)
        target = table.get(f"{name[: layer.start()]}{{}}{name[layer.end() :]}")
        return None if target is None else target.format(layer.group())


def check_tensors(
    path: Path,
    found: dict[str, tuple[int, ...]],
    unknown: Iterable[str],
    config: dict[str, Any],
    names: Names,
) -> None:
    """Compare the tensors that are there with those that the configuration asks for.

    found: our name -> shape; unknown: the source's names that have no name of ours.

    Raises SourceError that lists every missing tensor, or every unknown one, or every wrong shape.
    """
    expected = expected_tensors(config)
    missing = [names.theirs(name) for name in expected if name not in found]
    if missing:
        raise SourceError(path, f"misses {len(missing)} of {len(expected)} tensors: {shorten(missing)}")
    extra = [*unknown, *(names.theirs(name) for name in found if name not in expected)]
    if extra:
        raise SourceError(
            path,
            f"holds {len(extra)} tensors that a Llama model of {config['n_layers']} layers does not have, "
            f"and nothing is dropped silently: {shorten(extra)}",
        )
    wrong = [
        f"{names.theirs(name)} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if found[name] != shape
    ]
    if wrong:
        raise SourceError(path, f"tensors of the wrong shape: {shorten(wrong)}")


# ---- small readers that several sources share -----------------------------------------------------------


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises SourceError when it is not one; FileNotFoundError.
    """
    value = parse_json(path, read_text(path, MAX_JSON_BYTES))
    if not isinstance(value, dict):
        raise SourceError(path, f"holds a JSON {type(value).__name__}, expected an object")
    return value


def parse_json(path: Path, text: str | bytes, tensor: str | None = None) -> Any:
    """Parse JSON that was found in a file; a key that stands twice is an error. Raises SourceError."""
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        return json.loads(decoded, object_pairs_hook=unique)
    except (ValueError, RecursionError) as exc:
        raise SourceError(path, f"is not valid JSON: {exc}", tensor) from exc


def read_text(path: Path, limit: int) -> str:
    """Read a UTF-8 text of at most `limit` bytes. Raises SourceError, FileNotFoundError."""
    if os.path.getsize(path) > limit:
        raise SourceError(path, f"is larger than {limit} bytes, which no file of this kind is")
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as exc:
        raise SourceError(path, f"is not UTF-8 text: {exc}") from exc
