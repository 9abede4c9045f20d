"""A GGUF file as a source: llama.cpp's names, row order and rotary factors translated back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnsupportedError, shown
from .gguf_file import GGUFFile, GGUFTensor, read_gguf
from .hf_config import MAX_CONTEXT, Fields, check_heads
from .licence import licence_record
from .source import MAX_LAYERS, Names, Source, SourceTensor, check_tensors

_MATRICES = {
    "attn_q": "wq",
    "attn_k": "wk",
    "attn_v": "wv",
    "attn_output": "wo",
    "ffn_gate": "w1",
    "ffn_down": "w2",
    "ffn_up": "w3",
}
GGUF_NAMES = Names(
    {
        "token_embd.weight": "tok_embeddings",
        "output_norm.weight": "norm",
        "output.weight": "output",
        "blk.{}.attn_norm.weight": "layers.{}.attention_norm",
        "blk.{}.ffn_norm.weight": "layers.{}.ffn_norm",
        **{f"blk.{{}}.{theirs}.weight": f"layers.{{}}.{ours}" for theirs, ours in _MATRICES.items()},
        **{f"blk.{{}}.{theirs}.bias": f"layers.{{}}.{ours}.bias" for theirs, ours in _MATRICES.items()},
    }
)
ROPE_FACTORS = "rope_freqs.weight"
LLAMA3_LOW, LLAMA3_HIGH = 1.0, 4.0
# Meta's 8192 first; the others are for small models made for tests
ORIGINAL_CONTEXTS = (8192, *(1 << k for k in range(4, 21) if k != 13))
SAMPLING = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
            "penalty_repeat": "repetition_penalty"}  # fmt: skip
# Keys that change the mathematics, with the value that leaves it alone
NEUTRAL = {
    "expert_count": 0, "logit_scale": 1.0, "residual_scale": 1.0, "embedding_scale": 1.0,
    "attention.scale": None, "attention.clamp_kqv": 0.0, "attention.causal": True,
    "attention.max_alibi_bias": 0.0, "attn_logit_softcapping": 0.0, "final_logit_softcapping": 0.0,
    "attention.sliding_window": 0,
}  # fmt: skip


def open_gguf(path: Path) -> Source:
    """Open a GGUF file of a Llama-architecture model.

    Raises SourceError, UnsupportedError: everything that can be known without reading the weights.
    """
    gguf = read_gguf(path)
    config = config_from_gguf(gguf)
    tensors = _tensors(gguf, config)
    from ..tokenizers.source import tokenizer_from_gguf

    fields = gguf.fields
    tokenizer, blobs = tokenizer_from_gguf(fields, path)
    name, template = fields.get("general.name"), fields.get("tokenizer.chat_template")
    licence = fields.get("general.license")
    if licence in (None, "other"):
        licence = fields.get("general.license.name", licence)
    return Source(
        path=path,
        name=name if isinstance(name, str) and name else path.stem,
        config=config,
        tokenizer=tokenizer,
        blobs=blobs,
        chat={"template": template if isinstance(template, str) else None},
        generation=_generation(fields),
        licence=licence_record(licence if isinstance(licence, str) else None),
        files=[path],
        tensors=tensors,
    )


# ---- configuration --------------------------------------------------------------------------------------


def config_from_gguf(gguf: GGUFFile) -> dict[str, Any]:
    """Translate the `llama.*` keys; biases and tied embeddings show in which tensors there are.

    Raises UnsupportedError, SourceError.
    """
    path, tensors = gguf.path, gguf.tensors
    architecture = gguf.fields.get("general.architecture")
    if architecture != "llama":
        raise UnsupportedError(path, f"general.architecture is {shown(architecture)}; supported is 'llama'")
    raw = {key[6:]: _uniform(path, key, v) for key, v in gguf.fields.items() if key.startswith("llama.")}
    _refuse_variants(path, raw)
    fields = Fields(raw, path)
    dim, n_heads = fields.size("embedding_length"), fields.size("attention.head_count")
    head_dim = fields.size("attention.key_length", dim // n_heads if dim % n_heads == 0 else None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.size(key, head_dim) != head_dim:
            raise UnsupportedError(path, f"llama.{key} is {raw[key]}, not the head dimension {head_dim}")
    embedding = tensors.get("token_embd.weight")
    config = {
        "architecture": "llama",
        "dim": dim,
        "hidden_dim": fields.size("feed_forward_length"),
        "n_layers": fields.size("block_count", maximum=MAX_LAYERS),
        "n_heads": n_heads,
        "n_kv_heads": fields.size("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        # The embedding says how many rows there are; the key is missing in old files
        "vocab_size": embedding.shape[0] if embedding else fields.size("vocab_size"),
        "max_seq_len": fields.size("context_length", maximum=MAX_CONTEXT),
        "norm_eps": _short(fields.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(fields.number("rope.freq_base", 10000.0)),
        "rope_scaling": None,
        "tied_embeddings": "output.weight" not in tensors,
        "attention_bias": any(name.endswith(("attn_q.bias", "attn_output.bias")) for name in tensors),
        "mlp_bias": any(name.endswith(("ffn_down.bias", "ffn_up.bias")) for name in tensors),
    }
    check_heads(config, path)
    config["rope_scaling"] = _rope_scaling(gguf, fields, raw, config)
    return config


def _uniform(path: Path, key: str, value: Any) -> Any:
    """Take the one value of a list with an entry for each layer. Raises UnsupportedError if they differ."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise UnsupportedError(path, f"{key} differs from layer to layer, which is not supported")
    return value[0]


def _refuse_variants(path: Path, raw: dict[str, Any]) -> None:
    for key, neutral in NEUTRAL.items():
        if raw.get(key, neutral) != neutral:
            raise UnsupportedError(path, f"llama.{key} is {shown(raw[key])}: a variant that is not supported")


def _short(value: float) -> float:
    """Give the shortest decimal that is the same float32, so that 9.999999747e-06 is 1e-05 again."""
    return float(str(np.float32(value)))


def _rope_scaling(
    gguf: GGUFFile, fields: Fields, raw: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any] | None:
    kind = raw.get("rope.scaling.type", "linear" if "rope.scale_linear" in raw else "none")
    if kind not in ("none", "linear"):
        raise UnsupportedError(gguf.path, f"rope scaling {shown(kind)}; supported are none, linear and llama3")
    scaling = None
    if kind == "linear":
        key = "rope.scaling.factor" if "rope.scaling.factor" in raw else "rope.scale_linear"
        factor = _short(fields.number(key))
        scaling = None if factor == 1.0 else {"type": "linear", "factor": factor}
    factors = gguf.tensors.get(ROPE_FACTORS)
    if factors is None:
        return scaling
    if factors.type != "F32":
        raise UnsupportedError(gguf.path, f"rope factors of type {factors.type}; supported is F32", ROPE_FACTORS)
    values = factors.read(slice(None)).reshape(-1)
    if scaling is not None:
        raise UnsupportedError(gguf.path, "linear rope scaling and rope factors together", ROPE_FACTORS)
    return llama3_from_factors(gguf.path, values, config["head_dim"], config["rope_theta"])


def llama3_from_factors(path: Path, values: np.ndarray, head_dim: int, theta: float) -> dict[str, Any] | None:
    """Find the llama3 parameters whose factors are those that the file holds.

    values: (head_dim / 2,) float32, what the wavelengths are multiplied by
    returns: the entry `rope_scaling`, or None if all factors are 1

    Raises UnsupportedError if they are not of the llama3 form.
    """
    if values.shape != (head_dim // 2,) or not np.isfinite(values).all() or values.min(initial=1.0) < 1.0:
        raise UnsupportedError(path, f"{values.size} rope factors that are not llama3's", ROPE_FACTORS)
    factor = _short(float(values.max()))
    if factor == 1.0:
        return None
    for original in ORIGINAL_CONTEXTS:
        scaling = {
            "type": "llama3",
            "factor": factor,
            "low_freq_factor": LLAMA3_LOW,
            "high_freq_factor": LLAMA3_HIGH,
            "original_max_seq_len": original,
        }
        if np.allclose(llama3_factors(scaling, head_dim, theta), values, rtol=1e-4):
            return scaling
    known = "llama3's (low 1, high 4) for any known context"
    raise UnsupportedError(path, f"rope factors up to {factor:g} are not {known}", ROPE_FACTORS)


def llama3_factors(scaling: dict[str, Any], head_dim: int, theta: float) -> np.ndarray:
    """Compute what llama3 scaling multiplies each wavelength by.

    returns: (head_dim / 2,) float64, from 1 (short waves) to the factor (long waves)
    """
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((scaling["original_max_seq_len"] / wavelengths - low) / (high - low), 0.0, 1.0)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


# ---- tensors --------------------------------------------------------------------------------------------


def _tensors(gguf: GGUFFile, config: dict[str, Any]) -> dict[str, SourceTensor]:
    ours: dict[str, GGUFTensor] = {}
    unknown: list[str] = []
    for theirs, tensor in gguf.tensors.items():
        name = GGUF_NAMES.ours(theirs)
        if name is not None:
            ours[name] = tensor
        elif theirs != ROPE_FACTORS:
            unknown.append(theirs)
    check_tensors(gguf.path, {name: t.shape for name, t in ours.items()}, unknown, config, GGUF_NAMES)
    _check_types(gguf, ours)
    return {
        name: SourceTensor(name, t.name, t.shape, t.type, gguf.path, _reader(t, _heads(name, config)))
        for name, t in sorted(ours.items())
    }


def _heads(name: str, config: dict[str, Any]) -> int | None:
    """Give the number of heads of a tensor whose rows llama.cpp has permuted, None for all others."""
    by_name = {"wq": config["n_heads"], "wk": config["n_kv_heads"]}
    return by_name.get(name.removesuffix(".bias").split(".")[-1])


def _check_types(gguf: GGUFFile, ours: dict[str, GGUFTensor]) -> None:
    """Try one block of each type, so that an unsupported one is named before anything is written."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    first = {tensor.type: tensor for tensor in reversed(list(ours.values()))}
    for name, tensor in first.items():
        kind = GGMLQuantizationType[name]
        try:
            dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
        except NotImplementedError as exc:
            raise UnsupportedError(
                gguf.path, f"has type {name}, which the package gguf cannot dequantise", tensor.name
            ) from exc


def _reader(tensor: GGUFTensor, heads: int | None) -> Callable[[int, int], np.ndarray]:
    """Make `read_rows`. heads: number of heads if llama.cpp has permuted the rows, else None."""
    order = None if heads is None else source_rows(tensor.shape[0], heads)

    def read_rows(start: int, stop: int) -> np.ndarray:
        rows = slice(start, stop) if order is None else order[start:stop]
        if len(tensor.shape) == 1:
            return tensor.read(slice(None)).reshape(-1)[rows]
        return tensor.read(rows)

    return read_rows


def source_rows(n_rows: int, heads: int) -> np.ndarray:
    """Undo llama.cpp's order, which puts the two halves of each head next to each other.

    returns: (n_rows,) int: row i of Hugging Face's order is row [i] of the file

    >>> source_rows(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return np.arange(n_rows).reshape(heads, n_rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def _generation(fields: dict[str, Any]) -> dict[str, Any]:
    """Read the recommended sampling of newer files, under Hugging Face's names."""
    found: dict[str, Any] = {}
    for theirs, ours in SAMPLING.items():
        value = fields.get(f"general.sampling.{theirs}")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9:
            found[ours] = _short(value) if isinstance(value, float) else value
    return found
