"""A .trit file becomes a Hugging Face folder again: config.json, safetensors, the tokenizer's own files."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..codecs import CODECS
from ..codecs.base import from_bf16, row_chunks, to_bf16
from ..container import Tensor, TritFile
from ..errors import HeaderError, TensorError, shorten, shown
from ..kv_modules import KVModule, module_tensors, read_kv_modules
from ..sources.hf import CARRIED, TOKENIZER_FILES, TOKENIZER_SIDE_FILES
from ..sources.hf_names import HF_NAMES
from ..sources.kv_map import CONFIG_KEY, map_of, names_for
from ..sources.licence import LICENCE_FILES
from ..sources.source import MAX_LAYERS, expected_tensors
from ..unfinished import unfinished
from ..version import __version__
from .safetensors_writer import SHARD_BYTES, Piece, Progress, write_folder

DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
ROOM = 64 << 20
_CONFIG = {
    "hidden_size": "dim",
    "intermediate_size": "hidden_dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "tie_word_embeddings": "tied_embeddings",
    "attention_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}


@dataclass
class Exported:
    """What was written. files: relative to the folder; notes: what a person should know"""

    dtype: str
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export_hf(
    file: TritFile,
    folder: str | os.PathLike[str],
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Exported:
    """Write a model as a folder that transformers loads; it appears under its name as a whole or not at all.

    dtype: "float16", "bfloat16" or "float32"; default is what most of the source's tensors were
    progress: called with (done, total, tensor)

    Raises FileExistsError, OSError; HeaderError, TensorError (something is missing, or beyond the dtype).
    """
    target = Path(folder)
    made = Exported(dtype or default_dtype(file))
    pieces, rounded = _pieces(file, made)
    modules = read_kv_modules(file)
    names = _kv_names(file, modules, {piece.name for piece in pieces})
    pieces += [_kv_piece(file, name, theirs) for name, theirs in names.items()]
    _check_target(target, sum(piece.nbytes for piece in pieces))
    with unfinished(target, folder=True) as temporary:
        inside = Path(temporary)
        write_folder(inside, pieces, shard_bytes, progress)
        about_modules = {CONFIG_KEY: map_of(modules, names)} if modules else {}
        _write_json(inside / "config.json", {**hf_config(file, made.dtype), **about_modules})
        _write_json(inside / "generation_config.json", _generation(file))
        _write_tokenizer(file, inside, made)
        _write_about(file, inside)
    if modules:
        made.notes.append(
            f"the learned KV modules are in the folder, and config.json names them ({CONFIG_KEY!r}) for tools.convert; "
            "transformers leaves them out"
        )
    made.files = sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file())
    if rounded:
        made.notes.append(f"the values of {len(rounded)} tensors were rounded to {made.dtype}, {rounded[0]} first")
    return made


def default_dtype(file: TritFile) -> str:
    """Give the type of most of the source's tensors; a packed source was most likely made from float16."""
    dtypes = (file.header.get("source") or {}).get("dtypes")
    counts = {key: n for key, n in dtypes.items() if type(n) is int} if isinstance(dtypes, dict) else {}
    halves = {"float16": counts.get("F16", 0), "bfloat16": counts.get("BF16", 0)}
    if any(halves.values()):
        return max(halves, key=lambda key: halves[key])
    return "float32" if set(counts) == {"F32"} else "float16"


# ---- tensors --------------------------------------------------------------------------------------------


def _pieces(file: TritFile, made: Exported) -> tuple[list[Piece], list[str]]:
    """Describe the tensors. returns: them, and a list that fills with the names of those that lose something"""
    if file.config.get("architecture") != "llama":
        raise HeaderError(file.path, f"architecture {shown(file.config.get('architecture'))}; can export 'llama'")
    try:
        if not 0 < file.config["n_layers"] <= MAX_LAYERS:
            raise TypeError(f"n_layers {shown(file.config['n_layers'])}")
        expected = expected_tensors(file.config)
        hf_config(file, made.dtype)
    except (KeyError, TypeError, AttributeError) as exc:
        raise HeaderError(file.path, f"config lacks or misstates something: {exc}; convert the model again") from exc
    rounded: list[str] = []
    pieces = []
    for name, shape in expected.items():
        if name not in file.tensors:
            raise TensorError(file.path, "is missing; convert the model again", name)
        tensor = file.tensors[name]
        if tensor.shape != shape:
            found = f"has shape {list(tensor.shape)}, the config calls for {list(shape)}"
            raise TensorError(file.path, f"{found}; convert the model again", name)
        blocks = _reader(file, tensor, HF_NAMES.theirs(name), made.dtype, rounded)
        pieces.append(Piece(HF_NAMES.theirs(name), DTYPES[made.dtype], shape, blocks))
    left = [n for n in file.tensors if n not in expected and not n.startswith("tokenizer.") and ".kv." not in n]
    if left:
        made.notes.append(f"{len(left)} tensors have no place in a Llama model and stay behind: {shorten(left)}")
    return pieces, rounded


def _kv_names(file: TritFile, modules: Sequence[KVModule], taken: set[str]) -> dict[str, str]:
    """Give the modules' tensors the names that they had, or some where the file does not know. Raises HeaderError."""
    ours = list(module_tensors(modules, file.config)) if modules else []
    names = (file.header.get("source") or {}).get("kv_names", names_for(ours))
    good = isinstance(names, dict) and all(isinstance(names.get(name), str) for name in ours)
    if not good or len({names[name] for name in ours} - taken - {"__metadata__"}) < len(ours):
        raise HeaderError(file.path, "source kv_names does not give each tensor of the KV modules a name of its own")
    return {name: names[name] for name in ours}


def _kv_piece(file: TritFile, name: str, theirs: str) -> Piece:
    """Describe a tensor of a KV module: it keeps its type."""
    tensor, dtypes = file.tensors[name], {"f16": "float16", "bf16": "bfloat16", "f32": "float32"}
    dtype = dtypes[tensor.codec]
    return Piece(theirs, DTYPES[dtype], tensor.shape, _reader(file, tensor, theirs, dtype, []))


def _reader(
    file: TritFile, tensor: Tensor, theirs: str, dtype: str, rounded: list[str]
) -> Callable[[], Iterator[np.ndarray]]:
    """Make the function that gives a tensor's values in blocks of rows, of the dtype or as bits of bfloat16."""

    def blocks() -> Iterator[np.ndarray]:
        codec, exact = CODECS[tensor.codec], True
        for start, stop in row_chunks(tensor.shape):
            values = codec.dequantize_range(tensor.parts, tensor.shape, tensor.params, start, stop)
            with np.errstate(over="ignore"):
                out = to_bf16(values) if dtype == "bfloat16" else values.astype(np.dtype(dtype))
            again = from_bf16(out) if dtype == "bfloat16" else out.astype(np.float32)
            if not np.isfinite(again).all():
                message = f"holds {np.abs(values).max():g}, which {dtype} cannot; choose another --dtype"
                raise TensorError(tensor.path, message, tensor.name)
            exact = exact and np.array_equal(again, values)
            yield out
        file.release(tensor.name)
        if not exact:
            rounded.append(theirs)

    return blocks


# ---- the small files ------------------------------------------------------------------------------------


def hf_config(file: TritFile, dtype: str) -> dict[str, Any]:
    """Give config.json in the form of transformers 4, which version 5 reads, too."""
    ours, tokenizer = file.config, file.tokenizer
    raw = {theirs: ours[name] for theirs, name in _CONFIG.items()}
    scaling = ours.get("rope_scaling")
    if scaling is not None:
        scaling = {"rope_type": scaling["type"], **{k: v for k, v in scaling.items() if k != "type"}}
        if "original_max_seq_len" in scaling:
            scaling["original_max_position_embeddings"] = scaling.pop("original_max_seq_len")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        **raw,
        "rope_scaling": scaling,
        "bos_token_id": tokenizer.get("bos_id"),
        "eos_token_id": _ends(file),
        "torch_dtype": dtype,
        "use_cache": True,
    }


def _ends(file: TritFile) -> Any:
    """The ids that end a text: one as a number, several as a list, none as null."""
    ends = (file.header.get("generation") or {}).get("eos_token_id") or file.tokenizer.get("eos_ids") or []
    return ends[0] if len(ends) == 1 else ends or None


def _generation(file: TritFile) -> dict[str, Any]:
    known = {"bos_token_id": file.tokenizer.get("bos_id"), "eos_token_id": _ends(file)}
    return {**(file.header.get("generation") or {}), **{k: v for k, v in known.items() if v is not None}}


def _write_tokenizer(file: TritFile, folder: Path, made: Exported) -> None:
    """Write the files that the checkpoint brought along, and the chat template where they do not hold it."""
    carried = [name for name in (*TOKENIZER_FILES, *TOKENIZER_SIDE_FILES) if f"{CARRIED}{name}" in file.tensors]
    for name in carried:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(file.blob(f"{CARRIED}{name}"))
    if not any(name in TOKENIZER_FILES for name in carried):
        made.notes.append("the file does not carry its source's tokenizer files: there are none in the folder")
    template = (file.header.get("chat") or {}).get("template")
    beside: Any = {}
    with suppress(OSError, ValueError):
        beside = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    if isinstance(template, str) and not (isinstance(beside, dict) and beside.get("chat_template")):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")


def _write_about(file: TritFile, folder: Path) -> None:
    """Hand on the licence, and say what the folder was made from."""
    licence, source = file.header.get("licence") or {}, file.header.get("source") or {}
    if isinstance(licence.get("text"), str):
        (folder / LICENCE_FILES[0]).write_text(licence["text"], encoding="utf-8", newline="")
    lines = [f"Exported by tritllama {__version__} from a .trit file made with `{source.get('options')}`."]
    if licence.get("llama"):
        lines.append("Built with Llama.")
    front = ["---", f"license: {licence['name']}", "---", ""] if isinstance(licence.get("name"), str) else []
    text = "\n".join([*front, f"# {source.get('name')}", "", *lines, ""])
    (folder / "README.md").write_text(text, encoding="utf-8", newline="")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_target(target: Path, nbytes: int) -> None:
    if target.exists() or target.is_symlink():
        raise FileExistsError(errno.EEXIST, "exists already; name a folder that does not", str(target))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "no such folder", str(target.parent))
    free = shutil.disk_usage(target.parent).free
    if free < nbytes + ROOM:
        raise OSError(errno.ENOSPC, f"needs {nbytes:,} bytes, but only {free:,} are free", str(target))
