"""A Hugging Face folder as a source: configuration, weights, tokenizer, chat template, licence."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SourceError, shown
from ..kv_modules import describe_modules
from .bnb import PackedTensor, split_packed
from .hf_config import check_quantization, config_from_hf
from .hf_names import HF_NAMES, IGNORED_SUFFIX
from .kv_detect import FoundModules, find_kv_modules
from .kv_map import CONFIG_KEY, KVMap, check_kv_map, read_kv_map
from .licence import licence_of_folder
from .safetensors_reader import StoredTensor, check_readable, open_folder
from .source import Source, SourceTensor, check_tensors, read_json, read_text

MAX_TEMPLATE_BYTES = 1 << 20
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")
TOKENIZER_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# What the names of blobs begin with that hold these files as they are, for an export
CARRIED = "tokenizer.file."
NUMBERS_OF_GENERATION = ("temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty")
EMBEDDING, HEAD = "tok_embeddings", "output"


def open_hf(folder: Path, kv_map: str | os.PathLike[str] | None = None) -> Source:
    """Open a folder with config.json and safetensors; the weights stay where they are.

    kv_map: a file that names the learned KV modules

    Raises SourceError, UnsupportedError: everything that can be known without reading the weights.
    """
    config_path = folder / "config.json"
    raw = read_json(config_path)
    config = config_from_hf(raw, config_path)
    check_quantization(raw, config_path)
    mapping = read_kv_map(kv_map) if kv_map is not None else None
    if mapping is None and CONFIG_KEY in raw:
        mapping = check_kv_map(raw[CONFIG_KEY], config_path)
    notes: list[str] = []
    stored, weight_files = open_folder(folder)
    packed, plain = split_packed(stored)
    found: dict[str, StoredTensor | PackedTensor] = {**packed, **plain}
    modules = _kv_modules(folder, found, config, raw, mapping)
    notes += [f"learned KV modules: {line}" for line in describe_modules(modules.modules)]
    tensors = _tensors(folder, found, modules, config, notes)
    licence, licence_files = licence_of_folder(folder, raw.get("license"))
    generation = generation_from_hf(folder)
    tokenizer, blobs, tokenizer_files = _tokenizer(folder, raw, generation, notes)
    files = [config_path, *weight_files, *tokenizer_files, *licence_files]
    files += [p for p in (folder / "generation_config.json", folder / "chat_template.jinja") if p.is_file()]
    return Source(
        path=folder,
        name=folder.resolve().name,
        config=config,
        tokenizer=tokenizer,
        blobs=blobs,
        chat={"template": chat_template_from_hf(folder)},
        generation=generation,
        licence=licence,
        files=files,
        tensors=tensors,
        notes=notes,
        kv_modules=modules.modules,
    )


# ---- tensors --------------------------------------------------------------------------------------------


def _kv_modules(
    folder: Path,
    found: Mapping[str, StoredTensor | PackedTensor],
    config: dict[str, Any],
    raw: dict[str, Any],
    mapping: KVMap | None,
) -> FoundModules:
    """Look for learned KV modules among the tensors that a plain Llama does not have. Raises SourceError."""
    others = {name: t for name, t in found.items() if HF_NAMES.ours(name) is None and not _is_ignored(name)}
    shapes = {name: tensor.shape for name, tensor in others.items()}
    files = {name: (t.weight if isinstance(t, PackedTensor) else t).path for name, t in others.items()}
    return find_kv_modules(folder, shapes, config, raw, mapping, files)


def _is_ignored(name: str) -> bool:
    return name.endswith(IGNORED_SUFFIX)


def _tensors(
    folder: Path,
    found: Mapping[str, StoredTensor | PackedTensor],
    modules: FoundModules,
    config: dict[str, Any],
    notes: list[str],
) -> dict[str, SourceTensor]:
    """Give the tensors by our names, those of KV modules among them, once all is there that must be."""
    ours = {name: tensor for theirs, tensor in found.items() if (name := HF_NAMES.ours(theirs)) is not None}
    of_modules = {name: found[theirs] for name, theirs in modules.sources.items()}
    known = set(modules.sources.values())
    if ignored := [name for name in found if _is_ignored(name)]:
        notes.append(f"{len(ignored)} tensors {IGNORED_SUFFIX} are left out: the configuration says the same")
    unknown = [n for n in found if HF_NAMES.ours(n) is None and n not in known and not _is_ignored(n)]
    if config["tied_embeddings"]:
        _tie(ours, config, notes)
    check_tensors(folder, {name: t.shape for name, t in ours.items()}, unknown, config, HF_NAMES)
    ours |= of_modules
    for tensor in ours.values():
        if isinstance(tensor, StoredTensor):
            check_readable(tensor)
    return {name: _source_tensor(name, tensor) for name, tensor in sorted(ours.items())}


def _source_tensor(name: str, tensor: StoredTensor | PackedTensor) -> SourceTensor:
    if isinstance(tensor, PackedTensor):
        weight = tensor.weight
        return SourceTensor(name, weight.name, tensor.shape, "NF4", weight.path, tensor.read_rows, tensor.carried)
    return SourceTensor(name, tensor.name, tensor.shape, tensor.dtype, tensor.path, tensor.read_rows)


def _tie(ours: dict[str, StoredTensor | PackedTensor], config: dict[str, Any], notes: list[str]) -> None:
    """Settle tied embeddings as transformers 5 does: one of the two is enough, two must be equal."""
    if HEAD in ours and EMBEDDING not in ours:
        ours[EMBEDDING] = ours.pop(HEAD)
    elif HEAD in ours and _equal(ours[HEAD], ours[EMBEDDING]):
        del ours[HEAD]
    elif HEAD in ours:
        config["tied_embeddings"] = False
        notes.append("config.json ties the embeddings, but lm_head.weight differs from them: both are kept")


def _equal(a: StoredTensor | PackedTensor, b: StoredTensor | PackedTensor, rows: int = 4096) -> bool:
    if isinstance(a, PackedTensor) and isinstance(b, PackedTensor):
        sides = a.sides.keys() == b.sides.keys() and all(_equal(a.sides[key], b.sides[key]) for key in a.sides)
        same = (a.shape, a.params, a.offset) == (b.shape, b.params, b.offset)
        return sides and same and _equal(a.weight, b.weight)
    if isinstance(a, PackedTensor) or isinstance(b, PackedTensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    byte = np.dtype(np.uint8)
    step = rows * 1024
    return all(
        np.array_equal(a.raw(byte, at, min(step, a.nbytes - at)), b.raw(byte, at, min(step, a.nbytes - at)))
        for at in range(0, a.nbytes, step)
    )


# ---- tokenizer, template, generation --------------------------------------------------------------------


def _tokenizer(
    folder: Path, raw: dict[str, Any], generation: dict[str, Any], notes: list[str]
) -> tuple[dict[str, Any], dict[str, bytes], list[Path]]:
    """Read the tokenizer; a folder that has none gives a file that runs on token ids only, and says so."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        notes.append(f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}): the file runs on ids only")
        bos = raw.get("bos_token_id")
        ends = generation.get("eos_token_id") or token_ids(raw.get("eos_token_id"), folder / "config.json")
        return no_tokenizer(bos if type(bos) is int else None, ends), {}, []
    from ..tokenizers.source import tokenizer_from_hf

    tokenizer, blobs = tokenizer_from_hf(folder)
    names = [name for name in (*TOKENIZER_FILES, *TOKENIZER_SIDE_FILES) if (folder / name).is_file()]
    blobs |= {f"{CARRIED}{name}": data for name in names if (data := (folder / name).read_bytes())}
    return tokenizer, blobs, [folder / name for name in names]


def no_tokenizer(bos_id: int | None, eos_ids: list[int]) -> dict[str, Any]:
    """Make the header entry of a model whose checkpoint carries no tokenizer."""
    return {"type": "none", "bos_id": bos_id, "eos_ids": eos_ids, "add_bos": False, "special": {}}


def token_ids(value: object, path: Path) -> list[int]:
    """Read an id, a list of ids, or null. Raises SourceError."""
    ids: list[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise SourceError(path, f'"eos_token_id" is {shown(value)}, expected a token id or a list of them')
    return ids


def generation_from_hf(folder: Path) -> dict[str, Any]:
    """Read what generation_config.json says about sampling, under its own names; {} without the file.

    Raises SourceError.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    raw = read_json(path)
    found: dict[str, Any] = {}
    for key in NUMBERS_OF_GENERATION:
        value = raw.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
            raise SourceError(path, f'"{key}" is {shown(value)}, expected a number that is not negative')
        found[key] = value
    if isinstance(raw.get("do_sample"), bool):
        found["do_sample"] = raw["do_sample"]
    ends = token_ids(raw.get("eos_token_id"), path)
    return {**found, "eos_token_id": ends} if ends else found


def chat_template_from_hf(folder: Path) -> str | None:
    """Find the chat template as transformers does: chat_template.jinja, else tokenizer_config.json."""
    alone = folder / "chat_template.jinja"
    if alone.is_file():
        return read_text(alone, MAX_TEMPLATE_BYTES)
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return None
    template = read_json(path).get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default", next(iter(named.values()), None))
    if template is not None and not isinstance(template, str):
        raise SourceError(path, f'"chat_template" is a {type(template).__name__}, expected text')
    return template
