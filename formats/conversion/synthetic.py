"""Checkpoints of true size with random weights, to rehearse a conversion without the real ones.

The same shape, form and seed give the same bytes. Little is in memory at a time, whatever the size.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from ..codecs import CODECS
from ..codecs.base import Rows, row_chunks, to_bf16
from ..codecs.trit_codec import Encode, encode_reference
from ..kv_modules import KVModule, kv_width, module_tensors
from ..sources.bnb import bnb_pieces
from ..sources.hf import TOKENIZER_FILES, TOKENIZER_SIDE_FILES
from ..sources.hf_config import config_from_hf
from ..sources.hf_names import HF_NAMES
from ..sources.kv_map import names_for
from ..sources.source import expected_tensors
from .plan import EMBEDDINGS
from .safetensors_writer import SHARD_BYTES, Piece, Progress, write_folder

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_COMMON = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "attention_bias": False, "mlp_bias": False,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "vocab_size": 128256,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama3.1-8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **_LLAMA3},
    },
    "llama3.2-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "llama3", "factor": 32.0, **_LLAMA3},
    },
    "tiny": {
        "hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 40, "tie_word_embeddings": False, "vocab_size": 512,
        "bos_token_id": 1, "eos_token_id": 2,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, **_LLAMA3},
    },
}  # fmt: skip
RELEASED = tuple(f"released-trit{depth}" for depth in (1, 2, 3, 4))
FORMS = ("f16", "bf16", "f32", "nf4", *RELEASED)
_STORED = {"f16": ("F16", "float16"), "bf16": ("BF16", "bfloat16"), "f32": ("F32", "float32")}
# As LeanLlama-8B compresses values (half their width is a guess), and LeanLlama-70B keys and values
KV_FORMS = ("v", "k+v")
NF4_PARAMS: dict[str, Any] = {"block": 64, "nested_block": 256, "dtype": "float16"}
CHUNK_ROWS = 16  # rows that come from one generator


def make_checkpoint(
    folder: Path,
    shape: str,
    form: str,
    layers: int | None = None,
    seed: int = 0,
    tokenizer: Path | None = None,
    kv_modules: str | None = None,
    encode: Encode = encode_reference,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
    kv_rank: int | None = None,
) -> None:
    """Write a Hugging Face folder; it must not exist, and nothing is left of it if the writing fails.

    shape, form: keys of SHAPES, one of FORMS; layers: instead of the shape's own number
    tokenizer: a folder whose tokenizer files are copied; kv_modules: one of KV_FORMS, in float16 always
    kv_rank: numbers that linear ones keep of a token's values, below their width; half of it if None

    Raises OSError.
    """
    raw = {**_COMMON, **SHAPES[shape], "torch_dtype": "float16"}
    raw["torch_dtype"] = _STORED.get(form, _STORED["f16"])[1]
    if layers is not None:
        raw["num_hidden_layers"] = layers
    if form == "nf4":
        raw["quantization_config"] = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float16",
        }  # fmt: skip
    if kv_modules is not None:
        raw |= {"architectures": ["LeanLlamaForCausalLM"], "kv_rope": "before"}
    folder.mkdir()
    try:
        if tokenizer:
            for name in (*TOKENIZER_FILES, *TOKENIZER_SIDE_FILES):
                if (tokenizer / name).is_file() and "/" not in name:
                    shutil.copyfile(tokenizer / name, folder / name)
        config = config_from_hf(raw, folder / "config.json")
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
        pieces = [p for name, size in expected_tensors(config).items() for p in _tensor(name, size, form, seed, encode)]
        pieces += _kv_pieces(kv_modules, config, kv_rank, seed) if kv_modules is not None else []
        write_folder(folder, pieces, shard_bytes, progress, in_order=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _kv_pieces(form: str, config: dict[str, Any], rank: int | None, seed: int) -> list[Piece]:
    """Describe the tensors of KV modules, of the second half of the layers."""
    layers = range(config["n_layers"] // 2, config["n_layers"])
    both: dict[str, Any] = {"rank": 4, "hidden": 128, "activation": "gelu"}
    linear = {"rank": rank or kv_width(config) // 2}
    modules = [KVModule(i, "v", **both if form == "k+v" else linear) for i in layers]
    modules += [KVModule(i, "k", rope="before", **both) for i in layers if form == "k+v"]
    shapes = module_tensors(modules, config)
    rows = {name: random_rows(name, shape, seed) for name, shape in shapes.items()}
    return [Piece(theirs, "F16", shapes[n], _cast("F16", shapes[n], rows[n])) for n, theirs in names_for(rows).items()]


def random_rows(name: str, shape: tuple[int, ...], seed: int) -> Rows:
    """Give normal weights of the size that keeps activations about 1; norms are close to 1."""
    key = [seed, zlib.crc32(name.encode())]
    scale = np.float32(shape[1] ** -0.5 if len(shape) == 2 else 0.1)
    centre = np.float32(1.0 if name.endswith("norm") else 0.0)

    def read(start: int, stop: int) -> np.ndarray:
        first, last = start // CHUNK_ROWS, -(-stop // CHUNK_ROWS)
        parts = []
        for chunk in range(first, last):
            size = (min(CHUNK_ROWS, shape[0] - chunk * CHUNK_ROWS), *shape[1:])
            parts.append(np.random.default_rng([*key, chunk]).standard_normal(size, np.float32) * scale + centre)
        return np.concatenate(parts)[start - first * CHUNK_ROWS : stop - first * CHUNK_ROWS]

    return Rows(shape, read)


def _tensor(name: str, shape: tuple[int, ...], form: str, seed: int, encode: Encode) -> list[Piece]:
    """Describe one tensor in the form that it has in such a checkpoint."""
    rows, theirs = random_rows(name, shape, seed), HF_NAMES.theirs(name)
    if len(shape) == 1 or name in EMBEDDINGS or form in _STORED:
        kind = _STORED.get(form, _STORED["f16"])[0]
        return [Piece(theirs, kind, shape, _cast(kind, shape, rows))]
    if form == "nf4":
        return _nf4(theirs, rows)
    depth, key = int(form[-1]), cast(Any, encode)

    def values(start: int, stop: int) -> np.ndarray:
        params, parts = _encoded(key, rows, depth)
        return CODECS[f"trit{depth}"].dequantize_range(parts, shape, params, start, stop)

    return [Piece(theirs, "F16", shape, _cast("F16", shape, Rows(shape, values)))]


@lru_cache(maxsize=1)
def _encoded(encode: Any, rows: Rows, depth: int) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    found: tuple[dict[str, Any], dict[str, np.ndarray]] = encode(rows, [depth], "float16")[depth]
    return found


def _cast(kind: str, shape: tuple[int, ...], rows: Rows) -> Callable[[], Iterator[np.ndarray]]:
    def blocks() -> Iterator[np.ndarray]:
        for start, stop in row_chunks(shape, CHUNK_ROWS):
            values = rows[start:stop]
            yield to_bf16(values) if kind == "BF16" else values.astype("<f2" if kind == "F16" else "<f4")

    return blocks


def _nf4(theirs: str, rows: Rows) -> list[Piece]:
    """Describe the tensors of one packed weight: sizes are known at once, values are made when they are asked for."""
    layout = CODECS["nf4"].parts(rows.shape, NF4_PARAMS)
    empty = {key: np.broadcast_to(np.zeros((), dtype), shape) for key, (dtype, shape) in layout.items()}

    def late(piece: Piece) -> Piece:
        return Piece(piece.name, piece.dtype, piece.shape, lambda: _packed(theirs, rows)[piece.name].blocks())

    # Wider items first: everything stays aligned
    return sorted(map(late, bnb_pieces(theirs, rows.shape, NF4_PARAMS, empty)), key=lambda piece: piece.dtype)


@lru_cache(maxsize=1)
def _packed(theirs: str, rows: Rows) -> dict[str, Piece]:
    _, parts = CODECS["nf4"].quantize(rows, **NF4_PARAMS)
    return {piece.name: piece for piece in bnb_pieces(theirs, rows.shape, NF4_PARAMS, parts)}
