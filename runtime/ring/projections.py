"""Learned projections of keys and values (LeanLlama): encoders ready to run, decoders as backends need them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from formats import TritFile, dequantize
from formats.kv_modules import KVModule

if TYPE_CHECKING:
    from ..kernels import Kernels
    from .cache import KVRing

Turns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Decoder:
    """Turns codes into features, and features into keys or values. For a linear decoder features are the codes.

    hidden: None, or the first of two layers, (features, rank), hidden_bias: (features,)
    output: (n_kv_heads, head_dim, features), output_bias: (n_kv_heads, head_dim); all float32
    activation: "gelu" or "gelu_tanh" after the first of two layers
    rotated: what comes out are keys that are still to be rotated for their positions
    """

    hidden: np.ndarray | None
    hidden_bias: np.ndarray | None
    activation: str | None
    output: np.ndarray
    output_bias: np.ndarray
    rotated: bool

    def features(self, codes: np.ndarray) -> np.ndarray:
        """codes: (n, rank) float32; returns: (n, features) float32"""
        if self.hidden is None or self.hidden_bias is None:
            return codes
        x = codes @ self.hidden.T + self.hidden_bias
        return gelu(x) if self.activation == "gelu" else gelu_tanh(x)

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        """codes: (n, rank) float32; returns: (n_kv_heads, n, head_dim) float32"""
        return self.features(codes) @ self.output.transpose(0, 2, 1) + self.output_bias[:, None]


class Side:
    """The projection of the keys, or of the values, of one layer."""

    def __init__(self, module: KVModule, file: TritFile, kernels: Kernels) -> None:
        def values(name: str) -> np.ndarray | None:
            tensor = file.tensors.get(f"{module.prefix}.{name}")
            return None if tensor is None else dequantize(tensor)

        last = module.matrices[-1]
        output, bias = values(last), values(f"{last}.bias")
        assert output is not None
        if bias is None:
            bias = np.zeros(len(output), np.float32)
        hidden, hidden_bias = (None, None) if module.hidden is None else (values("decoder"), values("decoder.bias"))
        if module.hidden is not None and hidden_bias is None:
            hidden_bias = np.zeros(module.hidden, np.float32)
        heads = file.config["n_kv_heads"]
        self.module = module
        self.decoder = Decoder(
            hidden,
            hidden_bias,
            module.activation,
            output.reshape(heads, -1, output.shape[1]),
            bias.reshape(heads, -1),
            module.rope == "before",
        )
        self._encoder = kernels.linear([file.tensors[f"{module.prefix}.encoder"]], [values("encoder.bias")])
        self._codes = np.empty((0, module.rank), np.float32)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """x: (n, width) float32; returns: (n, rank) float32, a buffer that the next call overwrites"""
        if len(x) > len(self._codes):
            self._codes = np.empty((len(x), self.module.rank), np.float32)
        codes = self._codes[: len(x)]
        self._encoder(x, (codes,))
        return codes


class Projections:
    """The learned projections of one layer: of its keys, its values, or both."""

    def __init__(self, modules: Sequence[KVModule], file: TritFile, kernels: Kernels) -> None:
        sides = {module.side: Side(module, file, kernels) for module in modules}
        self.keys, self.values = sides.get("k"), sides.get("v")
        self._kernels = kernels

    @property
    def decoders(self) -> tuple[Decoder | None, Decoder | None]:
        """Of keys and values; None where vectors are stored as they are."""
        return self.keys.decoder if self.keys else None, self.values.decoder if self.values else None

    def rope_append(
        self,
        q: np.ndarray,
        q_sink: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        turns: Turns,
        ring: KVRing,
        layer: int,
    ) -> None:
        """Do what Kernels.rope_append does, but put codes into the ring."""
        before = self.keys is not None and self.keys.decoder.rotated
        stored = self.keys.encode(k) if self.keys and before else k
        self._kernels.rope(q, q_sink, k, turns, ring)
        if self.keys and not before:
            stored = self.keys.encode(k)
        self._kernels.append(stored, self.values.encode(v) if self.values else v, ring, layer)


def gelu(x: np.ndarray) -> np.ndarray:
    """x Phi(x), within 1e-6; erf by Abramowitz and Stegun, 7.1.26. x: float32"""
    z = np.abs(x) * np.float32(np.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    p = np.float32(1.061405429)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = p * t + np.float32(coefficient)
    tail = p * t * np.exp(-z * z) / 2  # 1 - Phi(|x|)
    return x * np.where(x < 0, tail, 1 - tail)


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    """GELU with a hyperbolic tangent for erf (Hendrycks and Gimpel, 2016). x: float32"""
    inner = np.float32(np.sqrt(8 / np.pi)) * (x + np.float32(0.044715) * x**3)
    return x / (1 + np.exp(np.minimum(-inner, 88)))
