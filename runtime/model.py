"""The forward pass of Llama (Touvron et al., 2023; Llama 3.1: Dubey et al., 2024) over packed weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import numpy as np

from formats import Tensor, TensorError, TritFile, dequantize, dequantize_rows, open_trit
from formats.kv_modules import KVModule, read_kv_modules
from formats.source import expected_tensors, shorten

from .cache import KVRing
from .config import ModelConfig
from .errors import CacheError
from .fair_lock import FairLock
from .kernels import Kernels, get_kernels
from .projections import Projections
from .rope import angles, frequencies

Logits = Literal["last", "all", "states"] | None


class Signal(Protocol):
    """What says that the caller wants to stop: a threading.Event, say."""

    def is_set(self) -> bool: ...


class Cancelled(Exception):
    """The caller asked to stop; the cache holds the chunks that were finished before."""


class Layer:
    """The weights of one transformer block, prepared for a backend."""

    def __init__(self, file: TritFile, kernels: Kernels, i: int, modules: Sequence[KVModule] = ()) -> None:
        def matrices(*names: str) -> tuple[Sequence[Tensor], Sequence[np.ndarray | None]]:
            full = [f"layers.{i}.{name}" for name in names]
            biases = [file.tensors.get(f"{name}.bias") for name in full]
            return [file.tensors[name] for name in full], [None if b is None else dequantize(b) for b in biases]

        self.attention_norm = dequantize(file.tensors[f"layers.{i}.attention_norm"])
        self.ffn_norm = dequantize(file.tensors[f"layers.{i}.ffn_norm"])
        self.wqkv = kernels.linear(*matrices("wq", "wk", "wv"))
        self.wo = kernels.linear(*matrices("wo"))
        self.w13 = kernels.linear(*matrices("w1", "w3"))
        self.w2 = kernels.linear(*matrices("w2"))
        own = [module for module in modules if module.layer == i]
        self.projections = Projections(own, file, kernels) if own else None


class RunState:
    """Buffers for a chunk of up to n tokens, allocated once. xb is x inside a residual branch."""

    def __init__(self, config: ModelConfig, n: int) -> None:
        def buffer(width: int) -> np.ndarray:
            return np.zeros((n, width), np.float32)

        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.n = n
        self.x, self.xb = buffer(config.dim), buffer(config.dim)
        self.q, self.q_sink, self.attended = buffer(q_dim), buffer(q_dim), buffer(q_dim)
        self.k, self.v = buffer(kv_dim), buffer(kv_dim)
        self.gate, self.up = buffer(config.hidden_dim), buffer(config.hidden_dim)


class Model:
    """A packed model and the backend that runs it. Weights stay in the mapped file.

    Calls take turns, chunk by chunk: a long prompt does not hold up the others. Sessions differ in their
    `KVRing` alone.
    """

    def __init__(self, file: TritFile, config: ModelConfig, kernels: Kernels, kv: str = "auto") -> None:
        check_tensors(file, config)
        self.file, self.config, self.kernels, self.kv = file, config, kernels, kv
        self.modules = tuple(read_kv_modules(file))
        self.layers = [Layer(file, kernels, i, self.modules) for i in range(config.n_layers)]
        self.norm = dequantize(file.tensors["norm"])
        self.embeddings = file.tensors["tok_embeddings"]
        head = self.embeddings if config.tied_embeddings else file.tensors["output"]
        self.output = kernels.linear([head], [None])
        self.nbytes = sum(t.nbytes for t in file.tensors.values())
        self._freqs = frequencies(config)
        self._state = RunState(config, 1)
        self._lock = FairLock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        n_threads: int | None = None,
        activations: str = "int8",
        kv: str = "auto",
    ) -> Model:
        """Open a .trit file and check all that the forward pass will need.

        activations: "int8" rounds what trit matrices are multiplied with to int8 blocks; "f32" is exact
        kv: the codec of contexts that are asked for without one
        Raises FormatError, ConfigError or BackendError, each in one line that says what to do.
        """
        if activations not in ("int8", "f32"):
            raise ValueError(f"activations is {activations!r}; it can be 'int8' or 'f32'")
        file = open_trit(path)
        try:
            config = ModelConfig.from_dict(file.config, file.path)
            return cls(file, config, get_kernels(backend, n_threads, int8=activations == "int8"), kv)
        except BaseException:
            file.close()
            raise

    def new_cache(self, n_ctx: int, sinks: int = 4, n_batch: int = 256, kv: str = "auto") -> KVRing:
        """An empty context of n_ctx tokens; prompts are read in chunks of n_batch.

        kv: the ring's codec; "auto" is the model's own `kv`, else f16, or f32 where activations are exact
        Raises CacheError if the numbers do not fit together.
        """
        kv = self.kv if kv == "auto" else kv
        codec = ("f16" if self.kernels.int8 else "f32") if kv == "auto" else kv
        return KVRing(self.config, n_ctx, min(n_batch, n_ctx), min(sinks, n_ctx - 1), codec, self.modules)

    def forward(
        self,
        ids: Sequence[int] | np.ndarray,
        cache: KVRing,
        logits: Logits = "last",
        progress: Callable[[int, int], None] | None = None,
        cancel: Signal | None = None,
    ) -> np.ndarray | None:
        """Append tokens to the context and return the scores of what may follow.

        ids: (n,) integers; logits: which positions are wanted, or "states" for what scores are computed from
        returns: (vocab_size,) float32 for "last", (n, vocab_size) for "all", (n, dim) for "states", else None
        progress is called with (tokens done, tokens in all) after each chunk.
        Raises ValueError for ids outside the vocabulary or none at all, Cancelled between layers.
        """
        tokens = np.asarray(ids, np.int64)
        if tokens.ndim != 1 or not len(tokens):
            raise ValueError(f"forward needs one or more token ids, not an array of shape {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= self.config.vocab_size:
            raise ValueError(f"a token id lies outside 0..{self.config.vocab_size - 1}")
        if (cache.config, cache.modules) != (self.config, self.modules):
            raise CacheError("this context belongs to another model")
        finish: Callable[[np.ndarray, np.ndarray], None] = self._classify
        width = self.config.vocab_size
        if logits == "states":
            finish, width = self._normalize, self.config.dim
        wanted = len(tokens) if logits in ("all", "states") else 1 if logits == "last" else 0
        out = np.empty((wanted, width), np.float32)
        for start in range(0, len(tokens), cache.chunk):
            chunk = tokens[start : start + cache.chunk]
            done = start + len(chunk)
            with self._lock:
                hidden = self._blocks(chunk, cache, cancel)
                if wanted == len(tokens):
                    finish(hidden, out[start:done])
                elif wanted and done == len(tokens):
                    finish(hidden[-1:], out)
            if progress is not None:
                progress(done, len(tokens))
        if logits is None:
            return None
        return out[0] if logits == "last" else out

    def _blocks(self, ids: np.ndarray, cache: KVRing, cancel: Signal | None = None) -> np.ndarray:
        """Run the transformer blocks on one chunk and add it to the context.

        returns: (n, dim) float32, a buffer that the next chunk overwrites
        """
        n, ops, eps = len(ids), self.kernels, self.config.norm_eps
        if n > self._state.n:
            self._state = RunState(self.config, n)
        s = self._state
        x, xb, q, q_sink, k, v = s.x[:n], s.xb[:n], s.q[:n], s.q_sink[:n], s.k[:n], s.v[:n]
        attended, gate, up = s.attended[:n], s.gate[:n], s.up[:n]
        turns = self._turns(cache, n)

        x[:] = dequantize_rows(self.embeddings, ids)
        for i, layer in enumerate(self.layers):
            if cancel is not None and cancel.is_set():
                cache.advance(n)  # so that the ring knows what this chunk has written over
                cache.trim(cache.length - n)
                raise Cancelled
            ops.rmsnorm(x, layer.attention_norm, eps, xb)
            layer.wqkv(xb, (q, k, v))
            if layer.projections is None:
                ops.rope_append(q, q_sink, k, v, turns, cache, i)
                ops.attention(q, q_sink, cache, i, attended)
            else:
                layer.projections.rope_append(q, q_sink, k, v, turns, cache, i)
                ops.attention(q, q_sink, cache, i, attended, layer.projections.decoders)
            layer.wo(attended, (x,), add=True)

            ops.rmsnorm(x, layer.ffn_norm, eps, xb)
            layer.w13(xb, (gate, up))
            ops.swiglu(gate, up)
            layer.w2(gate, (x,), add=True)
        cache.advance(n)
        return x

    def _turns(self, cache: KVRing, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Cosines and sines for n new tokens: at their positions, and as seen from the sinks."""
        positions = np.arange(cache.length, cache.length + n)
        window = angles(self._freqs, positions)
        cache.note_turns(*window)
        if cache.length + n <= cache.capacity:  # nothing has slid out
            return window + window
        return window + angles(self._freqs, np.minimum(positions, cache.capacity - 1))

    def _classify(self, hidden: np.ndarray, scores: np.ndarray) -> None:
        """hidden: (n, dim) float32; scores: (n, vocab_size) float32, written in place"""
        xb = np.empty_like(hidden)
        self._normalize(hidden, xb)
        self.output(xb, (scores,))

    def _normalize(self, hidden: np.ndarray, out: np.ndarray) -> None:
        """hidden: (n, dim) float32; out: (n, dim) float32, written in place"""
        self.kernels.rmsnorm(hidden, self.norm, self.config.norm_eps, out)

    def close(self) -> None:
        """Give back threads and the mapped file."""
        self.kernels.close()
        self.layers = []
        self.file.close()


def check_tensors(file: TritFile, config: ModelConfig) -> None:
    """Compare the file's tensors with what the configuration calls for.

    Raises TensorError that lists the missing ones, or names the first that is unknown or of a wrong shape.
    """
    expected = expected_tensors(config.to_dict())
    missing = [name for name in expected if name not in file.tensors]
    if missing:
        raise TensorError(file.path, f"misses {len(missing)} tensors: {shorten(missing)}; convert it again")
    for name in file.tensors:
        if name not in expected and not name.startswith("tokenizer.") and ".kv." not in name:  # see read_kv_modules
            raise TensorError(file.path, "is not part of a model of this configuration", name)
    for name, shape in expected.items():
        found = file.tensors[name]
        if found.shape != shape:
            raise TensorError(file.path, f"has shape {list(found.shape)}, the config calls for {list(shape)}", name)
        if found.codec == "u8":
            raise TensorError(file.path, "has codec u8, which holds bytes and no weights", name)
