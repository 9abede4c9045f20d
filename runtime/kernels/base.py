"""What a backend offers the forward pass. Every backend computes the same function; they differ in speed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from formats import Tensor

from ..ring.cache import KVRing
from ..ring.codecs import Plane
from ..ring.projections import Decoder

GROUP = 16  # inputs that share one scale when activations are int8
TRITS = ("trit1", "trit2", "trit3", "trit4")

Turns = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
Decoders = tuple[Decoder | None, Decoder | None]


def takes_int8(tensor: Tensor) -> bool:
    """Whether products with a matrix use int8 activations when those are wanted: its weights are small integers too.

    NF4 rows must be made of whole blocks of 64, which the kernels take at a time; all models that we know are."""
    if tensor.codec == "nf4":
        return tensor.shape[1] % 64 == 0 and int(tensor.params["block"]) == 64
    return tensor.codec in (*TRITS, "q8")


def stays_codes(plane: Plane, decoder: Decoder | None, is_keys: bool) -> bool:
    """Whether attention multiplies with a side's codes as they are when int8 activations are wanted."""
    linear = decoder is None or (decoder.hidden is None and not is_keys)
    return plane.codec in ("q8", "q4") and linear


def weight_bits(plane: Plane, decoder: Decoder | None) -> int:
    """Bits that attention's weights keep when they are multiplied with values that stay codes: q8 codes are fine enough
    for 14 to matter; beside the errors of 4-bit codes, or of a projection, those of one byte are small. Instructions
    multiply bytes of 8 bits with small numbers only, as q4 codes are."""
    if plane.codec == "q4":
        return 8
    return 14 if decoder is None else 7


class Linear(Protocol):
    """One or more matrices that multiply the same activations."""

    nbytes: int

    def __call__(self, x: np.ndarray, outs: Sequence[np.ndarray], add: bool = False) -> None:
        """outs[i] = x @ W[i].T + bias[i], or added to outs[i].

        x: (n, in) float32; outs[i]: (n, out_i) float32; all C-contiguous
        """


class Kernels(Protocol):
    """A backend: packed products, and the steps between them."""

    name: str
    int8: bool
    n_threads: int  # that it was made with

    def describe(self) -> str:
        """One line: the backend, its threads, and what the CPU offers it."""

    def use_threads(self, n_threads: int) -> None:
        """Run what follows on so many threads."""

    def linear(self, tensors: Sequence[Tensor], biases: Sequence[np.ndarray | None]) -> Linear:
        """Prepare matrices of equal width. biases: (out,) float32 or None, one for each matrix."""

    def repeat(self, work: Callable[[], object], ring: KVRing) -> None:
        """Do `work`: the steps of one more token of a ring, always the same, on buffers that are always the same.

        A backend may record the first time, and from then on do what it has recorded.
        """

    def rmsnorm(self, x: np.ndarray, gain: np.ndarray, eps: float, out: np.ndarray) -> None:
        """out = x / sqrt(mean(x^2) + eps) * gain. x, out: (n, dim) float32; gain: (dim,) float32"""

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> None:
        """gate = silu(gate) * up, in place. Both (n, hidden_dim) float32"""

    def rope(self, q: np.ndarray, q_sink: np.ndarray, k: np.ndarray, turns: Turns, ring: KVRing) -> None:
        """Rotate q and k in place, and fill q_sink with q rotated for the sinks if tokens have slid out of the ring.

        q, q_sink: (n, n_heads * head_dim) float32; k: (n, n_kv_heads * head_dim) float32
        turns: cosine and sine for the window, cosine and sine for the sinks, each (n, head_dim / 2) float32
        """

    def append(self, k: np.ndarray, v: np.ndarray, ring: KVRing, layer: int) -> None:
        """Put n new tokens into the ring, at positions ring.length .. + n - 1, as its codecs store them.

        k, v: (n, n_kv_heads * head_dim) float32, or (n, rank) codes of a learned projection
        """

    def rope_append(
        self, q: np.ndarray, q_sink: np.ndarray, k: np.ndarray, v: np.ndarray, turns: Turns, ring: KVRing, layer: int
    ) -> None:
        """Do both: rope, then append."""

    def attention(
        self,
        q: np.ndarray,
        q_sink: np.ndarray,
        ring: KVRing,
        layer: int,
        out: np.ndarray,
        decoders: Decoders = (None, None),
    ) -> None:
        """Softmax attention of n new tokens, at positions ring.length .. + n - 1, over what each may see.

        q, q_sink, out: (n, n_heads * head_dim) float32
        decoders: of keys and of values, where the ring stores codes
        """

    def close(self) -> None:
        """Give threads back."""
