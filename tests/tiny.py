"""Tiny models for tests: random weights straight into a .trit file, the fixtures, a small tokenizer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formats.codecs import CODECS
from formats.container import dequantize, open_trit
from formats.conversion.convert import convert
from formats.sources.source import expected_tensors, open_source
from formats.writer import TritWriter

FIXTURES = Path(__file__).parent / "data" / "fixtures"
MORE_FIXTURES = os.environ.get("TRITLLAMA_FIXTURES")

# Sizes that no block divides: 16, 32, 64 and 80 all leave a remainder somewhere.
CONFIG: dict[str, Any] = {
    "architecture": "llama", "dim": 72, "hidden_dim": 100, "n_layers": 2, "n_heads": 6, "n_kv_heads": 2,
    "head_dim": 10, "vocab_size": 257, "max_seq_len": 4096, "norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "tied_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
NO_TOKENIZER: dict[str, Any] = {"type": "none", "bos_id": None, "eos_ids": [], "add_bos": False, "special": {}}
MATRICES = (".wq", ".wk", ".wv", ".wo", ".w1", ".w2", ".w3")


def random_weights(config: Mapping[str, Any], seed: int = 1) -> dict[str, np.ndarray]:
    """Make weights whose logits are neither flat nor wild. out: name -> float32 array"""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in expected_tensors(dict(config)).items():
        if len(shape) == 1:
            centre = 1.0 if name.endswith("norm") else 0.0
            weights[name] = (centre + 0.1 * rng.standard_normal(shape)).astype(np.float32)
        else:
            weights[name] = (rng.standard_normal(shape) / np.sqrt(shape[1])).astype(np.float32)
    return weights


def write_trit(
    path: Path,
    config: Mapping[str, Any] | None = None,
    codec: str = "f16",
    embed: str = "f16",
    weights: Mapping[str, np.ndarray] | None = None,
    options: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model without a tokenizer: `codec` for the layers' matrices, `embed` for the other ones."""
    config = {**CONFIG, **(config or {})}
    weights = random_weights(config) if weights is None else weights
    header = {
        "config": config, "tokenizer": NO_TOKENIZER, "generation": {},
        "chat": {"format": None, "template": None, "system": None},
        "licence": {"name": None, "llama": False},
        "source": {"name": "tiny", "files": [], "converter": "tests", "options": codec},
        **(metadata or {}),
    }  # fmt: skip
    with TritWriter(path, header, list(weights)) as writer:
        for name, values in weights.items():
            kind = codec if name.endswith(MATRICES) else embed if values.ndim == 2 else "f32"
            params, parts = CODECS[kind].quantize(values, **(options or {} if kind == codec else {}))
            writer.add(name, kind, values.shape, params, parts)
    return path


def dequantized(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read a .trit file back for the reference model: (config, name -> float64 array)."""
    with open_trit(path) as file:
        tensors = {n: t for n, t in file.tensors.items() if not n.startswith("tokenizer.")}
        return dict(file.config), {n: dequantize(t).astype(np.float64) for n, t in tensors.items()}


def fixture_folder(name: str) -> Path:
    """Find a fixture among the small ones here, or the larger ones elsewhere."""
    here = FIXTURES / name
    return here if here.exists() or MORE_FIXTURES is None else Path(MORE_FIXTURES) / name


def folder_with_tokenizer(target: Path, name: str = "tiny-llama-tied-bf16") -> Path:
    """Copy a fixture and give it a tokenizer, so that it is a whole checkpoint."""
    shutil.copytree(fixture_folder(name), target)
    write_tokenizer(target)
    return target


def write_tokenizer(folder: Path, vocab_size: int = 512, more_special: Sequence[str] = ()) -> None:
    """Write a byte-level BPE tokenizer in Llama 3's style with ids 0..vocab_size-1.

    Ids 0..3 are control tokens (1 is BOS, 2 and 3 end), then those in `more_special`, then the 256 bytes, then merges
    of two letters."""
    byte_chars = _byte_alphabet()
    special = [*_SPECIAL, *more_special]
    table = {char: len(special) + i for i, char in enumerate(byte_chars)}
    letters = "Ġetaoinshrdlu"
    pairs = [(a, b) for a in letters for b in letters if b != "Ġ"] + [(a, b) for a in "ETAOINSH" for b in letters[1:]]
    merges = pairs[: vocab_size - len(special) - len(byte_chars)]
    table |= {a + b: len(special) + len(byte_chars) + i for i, (a, b) in enumerate(merges)}
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    added = [
        {"id": i, "content": text, "special": True,
         "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        for i, text in enumerate(special)
    ]  # fmt: skip
    (folder / "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0", "truncation": None, "padding": None,
                "added_tokens": added, "normalizer": None,
                "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
                "post_processor": _bos_first(special[1]),
                "decoder": {**byte_level, "add_prefix_space": True, "use_regex": True},
                "model": {"type": "BPE", "dropout": None, "unk_token": None,
                          "continuing_subword_prefix": None, "end_of_word_suffix": None,
                          "fuse_unk": False, "byte_fallback": False,
                          "ignore_merges": False, "vocab": table, "merges": [f"{a} {b}" for a, b in merges]},
            },
            ensure_ascii=False,
        ),
        encoding="utf-8",
    )  # fmt: skip
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": special[1], "eos_token": special[2], "chat_template": TEMPLATE,
                    "tokenizer_class": "PreTrainedTokenizerFast"})
    )  # fmt: skip


_SPECIAL = ("<|pad_0|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def _bos_first(bos: str) -> dict[str, Any]:
    one = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing", "single": [one, first], "pair": [one, first, one, second],
        "special_tokens": {bos: {"id": bos, "ids": [1], "tokens": [bos]}},
    }  # fmt: skip


def _byte_alphabet() -> list[str]:
    """Give the printable character that stands for each byte in byte-level BPE, as GPT-2 chose them."""
    kept = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [b for b in range(256) if b not in kept]
    chars = {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(other)}
    return [chars[b] for b in range(256)]


# ---- fixtures as .trit files ------------------------------------------------------------------------------


def expected_logits(name: str) -> dict[str, np.ndarray]:
    """Read what Hugging Face's code computed: input_ids, logits, greedy, perhaps positions."""
    with np.load(fixture_folder(f"logits-{name}.npz")) as stored:
        return {key: stored[key] for key in stored.files}


def convert_fixture(name: str, path: Path, rope: Mapping[str, Any] | None = None) -> Path:
    """Write a fixture as f16, exactly as the converter does; `rope` overrides fields of its scaling."""
    source = open_source(fixture_folder(name))
    config = dict(source.config)
    if rope:
        config["rope_scaling"] = {**config["rope_scaling"], **rope}
    return write_trit(path, config, "f16", "f16", {n: t.read() for n, t in source.tensors.items()})


def carry_nf4(name: str, path: Path) -> Path:
    """Convert a bitsandbytes checkpoint with its packed bytes as they are."""
    return convert(open_source(fixture_folder(name)), path, "keep").path
