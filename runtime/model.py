"""The forward pass of Llama (Touvron et al., 2023; Llama 3.1: Dubey et al., 2024) over packed weights."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple, Protocol

import numpy as np

from formats import Tensor, TensorError, TritFile, dequantize, dequantize_rows, open_trit
from formats.kv_modules import KVModule, read_key_facts, read_kv_modules
from formats.sources.source import expected_tensors, shorten

from .config import ModelConfig
from .errors import CacheError
from .fair_lock import FairLock
from .kernels import Kernels, check_threads, get_kernels
from .ring.cache import KVRing
from .ring.projections import Projections
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


class RunState(NamedTuple):
    """Buffers for n tokens, one row each, allocated once. xb is x inside a residual branch."""

    x: np.ndarray
    xb: np.ndarray
    q: np.ndarray
    q_sink: np.ndarray
    attended: np.ndarray
    k: np.ndarray
    v: np.ndarray
    gate: np.ndarray
    up: np.ndarray
    cos: np.ndarray
    sin: np.ndarray
    cos_sink: np.ndarray
    sin_sink: np.ndarray

    @classmethod
    def allocate(cls, config: ModelConfig, n: int) -> RunState:
        dim, hidden_dim, half = config.dim, config.hidden_dim, config.head_dim // 2
        q_dim, kv_dim = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        widths = dim, dim, q_dim, q_dim, q_dim, kv_dim, kv_dim, hidden_dim, hidden_dim, half, half, half, half
        return cls(*(np.zeros((n, width), np.float32) for width in widths))

    def first(self, n: int) -> RunState:
        """The rows of the first n tokens."""
        return RunState(*(buffer[:n] for buffer in self))

    @property
    def turns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """What queries and keys are rotated by: at their positions, and as seen from the sinks."""
        return self.cos, self.sin, self.cos_sink, self.sin_sink


class Model:
    """A packed model and the backend that runs it. Weights stay in the mapped file.

    Calls take turns, chunk by chunk: a long prompt does not hold up the others. Sessions differ in their
    `KVRing` alone.
    """

    def __init__(
        self,
        file: TritFile,
        config: ModelConfig,
        kernels: Kernels,
        kv: str = "auto",
        n_threads_batch: int | None = None,
    ) -> None:
        check_tensors(file, config)
        self._threads, self._threads_batch = kernels.n_threads, n_threads_batch or kernels.n_threads
        self.file, self.config, self.kernels, self.kv = file, config, kernels, kv
        self.modules, self.key_facts = tuple(read_kv_modules(file)), read_key_facts(file)
        self.layers = [Layer(file, kernels, i, self.modules) for i in range(config.n_layers)]
        self.norm = dequantize(file.tensors["norm"])
        self.embeddings = file.tensors["tok_embeddings"]
        head = self.embeddings if config.tied_embeddings else file.tensors["output"]
        self.output = kernels.linear([head], [None])
        self.nbytes = sum(t.nbytes for t in file.tensors.values())
        self._freqs = frequencies(config)
        self._one = RunState.allocate(config, 1)  # apart from the others: backends record what is done to it
        self._scores = np.zeros((1, config.vocab_size), np.float32)
        self._many = self._one
        self._lock = FairLock()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        backend: str = "auto",
        n_threads: int | None = None,
        activations: str = "int8",
        kv: str = "auto",
        n_threads_batch: int | None = None,
    ) -> Model:
        """Open a .trit file and check all that the forward pass will need.

        activations: "int8" rounds what trit, nf4 and q8 matrices are multiplied with to groups of int8; "f32" is exact
        kv: the codec of contexts that are asked for without one
        n_threads_batch: threads for chunks of several tokens, as prompts are; default n_threads
        Raises FormatError, ConfigError or BackendError, each in one line that says what to do.
        """
        if activations not in ("int8", "f32"):
            raise ValueError(f"activations is {activations!r}; it can be 'int8' or 'f32'")
        check_threads("n_threads_batch", n_threads_batch)
        file = open_trit(path)
        try:
            config = ModelConfig.from_dict(file.config, file.path)
            kernels = get_kernels(backend, n_threads, int8=activations == "int8")
            return cls(file, config, kernels, kv, n_threads_batch)
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
        chunk, sinks = min(n_batch, n_ctx), min(sinks, n_ctx - 1)
        return KVRing(self.config, n_ctx, chunk, sinks, codec, self.modules, self.key_facts)

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
        finish: Callable[[RunState, np.ndarray], None] = self._classify
        width = self.config.vocab_size
        if logits == "states":
            finish, width = self._normalize, self.config.dim
        wanted = len(tokens) if logits in ("all", "states") else 1 if logits == "last" else 0
        out = np.empty((wanted, width), np.float32)
        for start in range(0, len(tokens), cache.chunk):
            chunk = tokens[start : start + cache.chunk]
            done = start + len(chunk)
            with self._lock:
                _check(cancel)
                self.kernels.use_threads(self._threads if len(chunk) == 1 else self._threads_batch)
                s = self._begin(chunk, cache)
                rows = out[start:done] if wanted == len(tokens) else out if done == len(tokens) else out[:0]
                if len(chunk) == 1 and len(rows) and logits != "states":
                    self.kernels.repeat(partial(self._one_token, cache), cache)
                    rows[:] = self._scores
                else:
                    self._blocks(s, cache, cancel)
                    if len(rows):
                        finish(s, rows)
                cache.advance(len(chunk))
            if progress is not None:
                progress(done, len(tokens))
        if logits is None:
            return None
        return out[0] if logits == "last" else out

    def embed(self, ids: np.ndarray) -> np.ndarray:
        """What the first block is given. ids: (n,) integers; returns: (n, dim) float32"""
        return dequantize_rows(self.embeddings, ids)

    def run_blocks(self, x: np.ndarray, cache: KVRing, blocks: range) -> None:
        """Run some of the transformer blocks alone, from an empty context. x: (n, dim) float32, changed in place

        Their keys and values are written into the ring, which stays empty nevertheless."""
        with self._lock:
            self.kernels.use_threads(self._threads_batch)
            s = self._begin(np.zeros(len(x), np.int64), cache)
            s.x[:] = x
            self._blocks(s, cache, blocks=blocks)
            x[:] = s.x

    def scores(self, x: np.ndarray) -> np.ndarray:
        """Score what may follow, given what the last block gave. x: (n, dim) float32; returns: (n, vocab_size)"""
        scores, normed = np.empty((len(x), self.config.vocab_size), np.float32), np.empty_like(x)
        with self._lock:
            self.kernels.rmsnorm(x, self.norm, self.config.norm_eps, normed)
            self.output(normed, (scores,))
        return scores

    def _begin(self, ids: np.ndarray, cache: KVRing) -> RunState:
        """Fill the buffers for one chunk: embeddings, and the turns of its positions."""
        n = len(ids)
        if n > len(self._many.x):
            self._many = RunState.allocate(self.config, n)
        s = self._one if n == 1 else self._many.first(n)
        s.x[:] = dequantize_rows(self.embeddings, ids)
        positions = np.arange(cache.length, cache.length + n)
        s.cos[:], s.sin[:] = angles(self._freqs, positions)
        cache.note_turns(s.cos, s.sin)
        s.cos_sink[:], s.sin_sink[:] = s.cos, s.sin
        if positions[-1] >= cache.capacity:  # tokens have slid out
            s.cos_sink[:], s.sin_sink[:] = angles(self._freqs, np.minimum(positions, cache.capacity - 1))
        return s

    def _one_token(self, cache: KVRing) -> None:
        """From the embedding of one token to the scores of the next, on buffers that are always the same."""
        self._blocks(self._one, cache)
        self._classify(self._one, self._scores)

    def _blocks(self, s: RunState, cache: KVRing, cancel: Signal | None = None, blocks: range | None = None) -> None:
        """Run the transformer blocks, or some, on one chunk; its keys and values go into the ring."""
        ops, eps = self.kernels, self.config.norm_eps
        for i in range(len(self.layers)) if blocks is None else blocks:
            layer = self.layers[i]
            _check(cancel)
            ops.rmsnorm(s.x, layer.attention_norm, eps, s.xb)
            layer.wqkv(s.xb, (s.q, s.k, s.v))
            if layer.projections is None:
                ops.rope_append(s.q, s.q_sink, s.k, s.v, s.turns, cache, i)
                ops.attention(s.q, s.q_sink, cache, i, s.attended)
            else:
                layer.projections.rope_append(s.q, s.q_sink, s.k, s.v, s.turns, cache, i)
                ops.attention(s.q, s.q_sink, cache, i, s.attended, layer.projections.decoders)
            layer.wo(s.attended, (s.x,), add=True)

            ops.rmsnorm(s.x, layer.ffn_norm, eps, s.xb)
            layer.w13(s.xb, (s.gate, s.up))
            ops.swiglu(s.gate, s.up)
            layer.w2(s.gate, (s.x,), add=True)

    def _classify(self, s: RunState, scores: np.ndarray) -> None:
        """Score what may follow the last m tokens of a chunk. scores: (m, vocab_size) float32, written in place"""
        xb = s.xb[-len(scores) :]
        self._normalize(s, xb)
        self.output(xb, (scores,))

    def _normalize(self, s: RunState, out: np.ndarray) -> None:
        """Give the states of the last m tokens of a chunk. out: (m, dim) float32, written in place"""
        self.kernels.rmsnorm(s.x[-len(out) :], self.norm, self.config.norm_eps, out)

    def close(self) -> None:
        """Give back threads and the mapped file."""
        self.kernels.close()
        self.layers = []
        self.file.close()


def _check(cancel: Signal | None) -> None:
    if cancel is not None and cancel.is_set():
        raise Cancelled


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
        found.check_range()
