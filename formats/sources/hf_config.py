"""config.json of a Hugging Face Llama, in the form of transformers 4 or 5 -> the header's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import SourceError, UnsupportedError, shorten, shown
from .source import MAX_LAYERS

ARCHITECTURES = ("LlamaForCausalLM", "LeanLlamaForCausalLM")
ROPE_TYPES = ("default", "llama3", "linear")
MAX_SIZE = 1 << 24
MAX_CONTEXT = 1 << 31


def config_from_hf(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Translate and check a configuration; what transformers fills in by default is filled in here too.

    Raises UnsupportedError (another architecture, activation or rope type), SourceError (a bad field).
    """
    check_architecture(raw, path)
    fields = Fields(raw, path)
    dim = fields.size("hidden_size")
    n_heads = fields.size("num_attention_heads")
    config = {
        "architecture": "llama",
        "dim": dim,
        "hidden_dim": fields.size("intermediate_size"),
        "n_layers": fields.size("num_hidden_layers", maximum=MAX_LAYERS),
        "n_heads": n_heads,
        "n_kv_heads": fields.size("num_key_value_heads", n_heads),
        "head_dim": fields.size("head_dim", dim // n_heads if dim % n_heads == 0 else None),
        "vocab_size": fields.size("vocab_size"),
        "max_seq_len": fields.size("max_position_embeddings", 2048, maximum=MAX_CONTEXT),
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        **rope_from_hf(raw, path),
        "tied_embeddings": fields.flag("tie_word_embeddings"),
        "attention_bias": fields.flag("attention_bias"),
        "mlp_bias": fields.flag("mlp_bias"),
    }
    check_heads(config, path)
    activation = raw.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise UnsupportedError(path, f'"hidden_act" is {shown(activation)}; supported is silu')
    return config


def check_heads(config: dict[str, Any], path: Path) -> None:
    """Check that the heads fit each other. Raises SourceError."""
    n_heads, n_kv_heads, head_dim = config["n_heads"], config["n_kv_heads"], config["head_dim"]
    if n_heads % n_kv_heads:
        raise SourceError(path, f"{n_heads} heads are not a multiple of {n_kv_heads} key-value heads")
    if head_dim % 2:
        raise SourceError(path, f"the head dimension {head_dim} is odd; rotary embeddings need pairs")


def check_architecture(raw: dict[str, Any], path: Path) -> None:
    """Refuse what is not a Llama. Raises UnsupportedError."""
    model_type = raw.get("model_type")
    architectures = raw.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    good = model_type in (None, "llama") and all(name in ARCHITECTURES for name in names)
    if not good or (model_type is None and not names):
        found = f"model_type {shown(model_type)}, architectures {shorten(names, 3)}"
        raise UnsupportedError(path, f"is for {found}; supported are model_type 'llama', {ARCHITECTURES[0]}")


def check_quantization(raw: dict[str, Any], path: Path) -> None:
    """Refuse a quantisation that is not bitsandbytes', whose tensors say themselves what they are.

    Raises UnsupportedError naming the method.
    """
    quantization = raw.get("quantization_config")
    if not quantization:
        return
    found = quantization if isinstance(quantization, dict) else {}
    method = found.get("quant_method")
    if method is None and {"load_in_4bit", "load_in_8bit"} & found.keys():
        method = "bitsandbytes"  # as its first versions wrote it
    if method != "bitsandbytes":
        raise UnsupportedError(
            path,
            f"the checkpoint is quantised (quant_method {shown(method)}), which is not read; "
            "supported are bitsandbytes NF4, and weights in float32, float16 or bfloat16",
        )


def rope_from_hf(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """Read rope_theta and the scaling from `rope_parameters` (5) or `rope_theta` and `rope_scaling` (4).

    returns: {"rope_theta", "rope_scaling"}
    """
    merged: dict[str, Any] = {"rope_theta": raw.get("rope_theta")}
    for key in ("rope_scaling", "rope_parameters"):
        part = raw.get(key)
        if part is not None and not isinstance(part, dict):
            raise SourceError(path, f'"{key}" is {shown(part)}, expected an object or null')
        if any(isinstance(value, dict) for value in (part or {}).values()):
            raise UnsupportedError(path, f'"{key}" differs from layer to layer, which is not supported')
        merged.update({name: value for name, value in (part or {}).items() if value is not None})
    if merged["rope_theta"] is None:
        merged["rope_theta"] = 10000.0
    kind = merged.get("rope_type", merged.get("type", "default"))
    fields = Fields(merged, path)
    theta = fields.number("rope_theta")
    if merged.get("partial_rotary_factor", 1.0) != 1.0 or raw.get("partial_rotary_factor") not in (None, 1.0):
        raise UnsupportedError(path, "rotates only a part of each head (partial_rotary_factor)")
    scaling: dict[str, Any] | None = None
    if kind == "linear":
        scaling = {"type": "linear", "factor": fields.number("factor")}
    elif kind == "llama3":
        low, high = fields.number("low_freq_factor"), fields.number("high_freq_factor")
        if high <= low:
            raise SourceError(path, "rope high_freq_factor is not larger than low_freq_factor")
        scaling = {
            "type": "llama3",
            "factor": fields.number("factor"),
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_seq_len": fields.size("original_max_position_embeddings", maximum=MAX_CONTEXT),
        }
    elif kind != "default":
        raise UnsupportedError(path, f"rope type {shown(kind)}; supported are {', '.join(ROPE_TYPES)}")
    return {"rope_theta": theta, "rope_scaling": scaling}


class Fields:
    """Typed access to a configuration; every refusal names the file, the key and the value."""

    def __init__(self, raw: dict[str, Any], path: Path) -> None:
        self._raw = raw
        self._path = path

    def size(self, key: str, default: int | None = None, maximum: int = MAX_SIZE) -> int:
        """Read an integer from 1 to `maximum`; null counts as absent."""
        value = self._value(key, default)
        if type(value) is not int or not 1 <= value <= maximum:
            raise SourceError(self._path, f'"{key}" is {shown(value)}, expected an integer from 1 to {maximum}')
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Read a positive finite number; null counts as absent."""
        value = self._value(key, default)
        if type(value) not in (int, float) or not 0 < value < 1e300:
            raise SourceError(self._path, f'"{key}" is {shown(value)}, expected a positive number')
        return float(value)

    def flag(self, key: str) -> bool:
        """Read true or false; absent or null is false."""
        value = self._value(key, False)
        if not isinstance(value, bool):
            raise SourceError(self._path, f'"{key}" is {shown(value)}, expected true or false')
        return value

    def _value(self, key: str, default: Any) -> Any:
        value = self._raw.get(key)
        if value is None:
            value = default
        if value is None:
            raise SourceError(self._path, f'has no "{key}"')
        return value
