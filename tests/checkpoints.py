"""Small checkpoints for tests of the converter: Hugging Face folders and GGUF files with random weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from formats.codecs.base import from_bf16, to_bf16
from formats.errors import SourceError
from formats.sources.gguf_source import GGUF_NAMES
from formats.sources.hf_config import config_from_hf
from formats.sources.hf_names import HF_NAMES
from formats.sources.source import Source, expected_tensors, open_source
from tests import tiny

# Rows of 64 and 96 are whole blocks of GGUF's simple types
HF_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": 64,
    "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 512, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA3_OURS = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_seq_len": 8192}  # fmt: skip
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8", "uint16": "BF16"}
Weights = dict[str, np.ndarray]


def weights_for(hf_config: Mapping[str, Any], dtype: str = "float16", seed: int = 1) -> Weights:
    """Make weights by our names that `dtype` holds exactly. out: name -> float32 array"""
    config = config_from_hf(dict(hf_config), Path("config.json"))
    weights = tiny.random_weights(config, seed)
    return {name: _rounded(values, dtype) for name, values in weights.items()}


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return from_bf16(to_bf16(values))
    return values.astype(dtype).astype(np.float32)


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str = "float16") -> None:
    """Write float32 arrays as `dtype`, uint16 as the bits of bf16, int8 as it is."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, values in tensors.items():
        kind = dtype if values.dtype.kind == "f" else str(values.dtype)
        raw = (to_bf16(values) if kind == "bfloat16" else values.astype(kind)).tobytes()
        span = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": DTYPES[kind], "shape": list(values.shape), "data_offsets": span}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def write_hf(
    folder: Path,
    changes: Mapping[str, Any] | None = None,
    dtype: str = "float16",
    shards: int = 1,
    weights: Weights | None = None,
    tokenizer: bool = True,
) -> Weights:
    """Write a Hugging Face folder. changes: keys of config.json. returns: the weights by our names."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = {key: v for key, v in {**HF_CONFIG, **(changes or {})}.items() if v != "absent"}
    (folder / "config.json").write_text(json.dumps(raw))
    weights = weights_for(raw, dtype) if weights is None else weights
    theirs = {HF_NAMES.theirs(name): values for name, values in weights.items()}
    if shards == 1:
        write_safetensors(folder / "model.safetensors", theirs, dtype)
    else:
        write_shards(folder, theirs, shards, dtype)
    if tokenizer:
        tiny.write_tokenizer(folder)
    return weights


def write_shards(folder: Path, theirs: Mapping[str, np.ndarray], shards: int, dtype: str) -> None:
    """Write shards and their index; tensor i goes into shard i modulo `shards`."""
    weight_map = {}
    for k in range(shards):
        file = f"model-{k + 1:05}-of-{shards:05}.safetensors"
        part = {name: values for i, (name, values) in enumerate(theirs.items()) if i % shards == k}
        write_safetensors(folder / file, part, dtype)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


# ---- GGUF -------------------------------------------------------------------------------------------------


def write_gguf(
    path: Path,
    changes: Mapping[str, Any] | None = None,
    kind: str = "F32",
    keys: Mapping[str, Any] | None = None,
    drop: Sequence[str] = (),
    extra: Mapping[str, np.ndarray] | None = None,
) -> Weights:
    """Write a GGUF file as llama.cpp's converter does, with permuted query and key rows.

    changes: as for `write_hf`; kind: type of the matrices; keys: `llama.*` values to add or replace;
    drop, extra: tensors by GGUF's names. returns: the weights by our names, in Hugging Face's row order
    """
    raw = {**HF_CONFIG, **(changes or {})}
    weights = weights_for(raw, "float32")
    config = config_from_hf(dict(raw), Path("config.json"))
    writer = gguf.GGUFWriter(path, "llama")
    _write_keys(writer, raw, keys or {})
    _write_gguf_tokenizer(writer)
    qtype = GGMLQuantizationType[kind]
    for name in expected_tensors(config):
        theirs = GGUF_NAMES.theirs(name)
        if theirs in drop:
            continue
        values = weights[name]
        if ".wq" in name or ".wk" in name:
            values = permute(values, config["n_heads" if ".wq" in name else "n_kv_heads"])
        if values.ndim == 2 and kind != "F32":
            writer.add_tensor(theirs, gguf.quants.quantize(values, qtype), raw_dtype=qtype)
        else:
            writer.add_tensor(theirs, values)
    for theirs, values in (extra or {}).items():
        writer.add_tensor(theirs, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def permute(w: np.ndarray, heads: int) -> np.ndarray:
    """Interleave the two halves of each head's rows: what llama.cpp does to wq and wk."""
    out = np.empty_like(w)
    head_dim = w.shape[0] // heads
    for h in range(heads):
        for i in range(head_dim // 2):
            out[h * head_dim + 2 * i] = w[h * head_dim + i]
            out[h * head_dim + 2 * i + 1] = w[h * head_dim + head_dim // 2 + i]
    return out


def _write_keys(writer: gguf.GGUFWriter, raw: Mapping[str, Any], keys: Mapping[str, Any]) -> None:
    writer.add_name("Tiny Test")
    writer.add_license("apache-2.0")
    values = {
        "block_count": raw["num_hidden_layers"], "context_length": raw["max_position_embeddings"],
        "embedding_length": raw["hidden_size"], "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": raw["rms_norm_eps"], "rope.freq_base": raw["rope_theta"],
        **keys,
    }  # fmt: skip
    for key, value in values.items():
        if value is None:
            continue
        name = f"llama.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        else:
            writer.add_array(name, value)


def _write_gguf_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Write a byte-level vocabulary of 512: four control tokens, the bytes, one merge, unused ids."""
    special = ["<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    chars = tiny._byte_alphabet()
    unused = [f"<|reserved_{i}|>" for i in range(512 - 4 - 256 - 1)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([*special, *chars, "th", *unused])
    writer.add_token_types([3] * 4 + [1] * 257 + [3] * len(unused))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny.TEMPLATE)


# ---- what the tests of all sources say ---------------------------------------------------------------------


def same(source: Source, weights: Weights) -> None:
    """Every tensor holds the expected values exactly, whole and in parts."""
    assert set(source.tensors) == set(weights)
    for name, expected in weights.items():
        tensor = source.tensors[name]
        values = tensor.read()
        assert values.dtype == np.float32 and values.shape == tensor.shape == expected.shape
        np.testing.assert_array_equal(values, expected, err_msg=name)
        np.testing.assert_array_equal(tensor.read_rows(1, 3), expected[1:3], err_msg=name)


def refused(path: Path, *texts: str, kind: type[Exception] = SourceError) -> None:
    with pytest.raises(kind) as caught:
        open_source(path)
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def config_of(**changes: Any) -> dict[str, Any]:
    raw = {**HF_CONFIG, **changes}
    return config_from_hf({key: v for key, v in raw.items() if v != "absent"}, Path("config.json"))
