"""The hyperparameters of a model, checked field by field."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NoReturn

from .errors import ConfigError

MAX_DIM = 1 << 20
MAX_LAYERS = 4096
MAX_HEAD_DIM = 512
MAX_CONTEXT = 1 << 31
SMALLEST = 1e-30


@dataclass(frozen=True)
class RopeScaling:
    """How the RoPE frequencies are stretched for long contexts.

    type: "linear" (all frequencies divided by `factor`; Chen et al., 2023) or "llama3" (Llama 3.1: only those whose
    wavelength exceeds `original_max_seq_len / low_freq_factor`, with a smooth passage up to `high_freq_factor`).
    """

    type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Names as in Meta's reference code; every field is in the header of a .trit file under the same name."""

    dim: int
    hidden_dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    max_seq_len: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tied_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    @classmethod
    def from_dict(cls, values: dict[str, Any], path: str) -> ModelConfig:
        """Check the "config" of a header.

        Raises ConfigError naming the file and the field; keys that are not known are ignored.
        """
        reader = _Reader(values, path)
        if values.get("architecture") != "llama":
            reader.fail("architecture", 'the architecture "llama"')
        config = cls(
            dim=reader.integer("dim", MAX_DIM),
            hidden_dim=reader.integer("hidden_dim", MAX_DIM),
            n_layers=reader.integer("n_layers", MAX_LAYERS),
            n_heads=reader.integer("n_heads", MAX_DIM),
            n_kv_heads=reader.integer("n_kv_heads", MAX_DIM),
            head_dim=reader.integer("head_dim", MAX_HEAD_DIM),
            vocab_size=reader.integer("vocab_size", MAX_CONTEXT),
            max_seq_len=reader.integer("max_seq_len", MAX_CONTEXT),
            norm_eps=reader.number("norm_eps"),
            rope_theta=reader.number("rope_theta"),
            rope_scaling=_rope_scaling(values.get("rope_scaling"), path),
            tied_embeddings=reader.flag("tied_embeddings"),
            attention_bias=reader.flag("attention_bias"),
            mlp_bias=reader.flag("mlp_bias"),
        )
        if config.n_heads % config.n_kv_heads:
            reader.fail("n_kv_heads", f"a divisor of n_heads = {config.n_heads}")
        if config.head_dim % 2:
            reader.fail("head_dim", "an even number (RoPE turns pairs)")
        return config

    def to_dict(self) -> dict[str, Any]:
        """The fields as they stand in a header."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.rope_scaling:
            values["rope_scaling"] = dict(vars(self.rope_scaling))
        return {"architecture": "llama", **values}


class _Reader:
    """Typed access to a JSON object, with one way to complain."""

    def __init__(self, values: dict[str, Any], path: str, prefix: str = "") -> None:
        self.values, self.path, self.prefix = values, path, prefix

    def fail(self, name: str, expected: str) -> NoReturn:
        found = self.values.get(name, "missing")
        raise ConfigError(f"{self.path}: config {self.prefix}{name} is {found!r:.80}; expected {expected}")

    def integer(self, name: str, limit: int) -> int:
        value: Any = self.values.get(name)
        if type(value) is not int or not 1 <= value <= limit:
            self.fail(name, f"an integer from 1 to {limit}")
        return int(value)

    def number(self, name: str) -> float:
        value: Any = self.values.get(name)
        # Wider than any model needs, and narrow enough that no angle of RoPE is beyond a number.
        if type(value) not in (int, float) or not SMALLEST <= value <= 1 / SMALLEST:
            self.fail(name, f"a number from {SMALLEST:g} to {1 / SMALLEST:g}")
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if type(value) is not bool:
            self.fail(name, "true or false")
        return bool(value)


def _rope_scaling(values: Any, path: str) -> RopeScaling | None:
    if values is None:
        return None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: config rope_scaling is {values!r:.80}; expected an object or null")
    reader = _Reader(values, path, "rope_scaling ")
    if values.get("type") == "linear":
        return RopeScaling("linear", reader.number("factor"))
    if values.get("type") != "llama3":
        reader.fail("type", '"llama3" or "linear"')
    scaling = RopeScaling(
        "llama3",
        reader.number("factor"),
        reader.number("low_freq_factor"),
        reader.number("high_freq_factor"),
        reader.integer("original_max_seq_len", MAX_CONTEXT),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        reader.fail("high_freq_factor", "more than low_freq_factor")
    return scaling
