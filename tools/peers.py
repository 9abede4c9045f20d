"""Other runtimes as subjects of the benchmark, run in the same process and in turn with ours."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from runtime.cli import UserError
from runtime.ring.codecs import side_codecs

PIECE = 512  # tokens that are read to fill a context; all others are their copies
_CACHE_TYPES = {"f32": 0, "f16": 1, "q8": 8, "q4": 3}  # GGML's; q4_1 has a scale and a base, as our q4
_QUIET: list[Any] = []  # what the library calls with a line to log, at any time: it must never go


class LlamaCpp:
    """A GGUF model under llama.cpp, called below the Python class of llama-cpp-python: what is timed is its own code.

    As many tokens as `before` has are in the context when the measuring begins: its first PIECE are read, and what is
    cached of them is copied behind. To read all would take long, and speed does not depend on what keys and values are.
    kv: the ring's codec, whose like the cache then has.
    Raises UserError if llama-cpp-python is not there, the file cannot be loaded, or it has no such cache.
    """

    def __init__(self, path: str, threads: int, n_ctx: int, before: Sequence[int], kv: str = "f16") -> None:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        self._api: Any = _library(f"{path}: running it")
        self._model: Any = None
        self._context: Any = None
        self._depth = 0
        try:
            params = self._load(path, threads, n_ctx, kv)
            if before:
                self._decode(before[:PIECE])
            if len(before) > PIECE:
                self._repeat(len(before), params)
        except BaseException:  # nobody else can close what was never handed out
            self.close()
            raise

    def _load(self, path: str, threads: int, n_ctx: int, kv: str) -> Any:
        """Make the model and its context, and return this one's parameters. Raises UserError."""
        api = self._api
        self._model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self._model:
            raise UserError(f"{path}: llama.cpp cannot load this file")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, max(512, n_ctx), 512
        params.n_threads = params.n_threads_batch = threads
        params.n_seq_max, params.kv_unified = 2, True
        params.type_k, params.type_v = (_CACHE_TYPES[codec] for codec in side_codecs(kv))
        self._context = api.llama_init_from_model(self._model, params)
        if not self._context:
            raise UserError(f"{path}: llama.cpp cannot make a context of {n_ctx} tokens with a cache of {kv}")
        self.bits_per_weight = 8 * api.llama_model_size(self._model) / api.llama_model_n_params(self._model)
        return params

    def _repeat(self, depth: int, params: Any) -> None:
        """Append what is cached of the first PIECE tokens, again and again, until there are `depth`.

        Copies get positions of their own, but keys stay as they are. They are moved in a small context that never
        decodes: one that does would first rotate them, and the library crashes there where the cache is quantised and
        heads are not multiples of 64 numbers (github.com/ggml-org/llama.cpp/pull/25636).
        """
        api, memory = self._api, self._api.llama_get_memory(self._context)
        params.n_ctx = PIECE
        mover = api.llama_init_from_model(self._model, params)
        if not mover:
            raise RuntimeError(f"llama.cpp cannot make a second context, of {PIECE} tokens")
        try:
            moved = api.llama_get_memory(mover)
            if not api.llama_memory_can_shift(moved):
                raise RuntimeError("llama.cpp cannot move the tokens of this model")
            self._copy(self._context, mover, 0)
            for _ in range(PIECE, depth, PIECE):
                api.llama_memory_seq_add(moved, 0, 0, -1, PIECE)
                api.llama_memory_seq_rm(moved, 0, depth, -1)  # the last piece may be shorter
                self._copy(mover, self._context, 1)  # a state replaces a sequence, it adds nothing to one
                api.llama_memory_seq_cp(memory, 1, 0, -1, -1)  # in a unified cache a mark, no copy
                api.llama_memory_seq_rm(memory, 1, -1, -1)
        finally:
            api.llama_free(mover)
        self._depth = depth

    def _copy(self, source: Any, target: Any, sequence: int) -> None:
        """Replace a sequence of a context by sequence 0 of another one."""
        size = self._api.llama_state_seq_get_size(source, 0)
        state = (ctypes.c_uint8 * size)()
        found = self._api.llama_state_seq_get_data(source, state, size, 0)
        if not found or self._api.llama_state_seq_set_data(target, state, found, sequence) != found:
            raise RuntimeError("llama.cpp could not copy the tokens that it has cached")

    def _decode(self, ids: Sequence[int] | np.ndarray, scores: bool = False) -> None:
        """Append tokens. scores: compute those of all tokens"""
        batch = self._api.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = int(token), self._depth + i, 1
                batch.seq_id[i][0], batch.logits[i] = 0, scores
            if self._api.llama_decode(self._context, batch):
                raise RuntimeError("llama.cpp could not evaluate the tokens")
        finally:
            self._api.llama_batch_free(batch)
        self._depth += len(ids)

    def read(self, ids: Sequence[int]) -> None:
        tokens = (self._api.llama_token * len(ids))(*ids)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp could not evaluate the tokens")

    def rewind(self) -> None:
        self._api.llama_memory_seq_rm(self._api.llama_get_memory(self._context), -1, self._depth, -1)

    def close(self) -> None:
        """Give its memory back. It can be called again."""
        context, model, self._context, self._model = self._context, self._model, None, None
        if context:
            self._api.llama_free(context)
        if model:
            self._api.llama_model_free(model)


class LlamaCppModel(LlamaCpp):
    """A GGUF model as `runtime.evaluate` takes one: it gives the scores of windows."""

    def __init__(self, path: str, threads: int, n_ctx: int) -> None:
        super().__init__(path, threads, n_ctx, [])
        vocab = self._api.llama_model_get_vocab(self._model)
        self.config = SimpleNamespace(vocab_size=self._api.llama_vocab_n_tokens(vocab))
        self._n_ctx = n_ctx

    def new_cache(self, n_ctx: int) -> LlamaCppModel:
        """There is one context, the model's own."""
        assert n_ctx <= self._n_ctx
        return self

    def reset(self) -> None:
        """Forget all tokens."""
        self._depth = 0
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)

    def forward(self, ids: np.ndarray, cache: LlamaCppModel, logits: str | None = None) -> np.ndarray | None:
        """Append tokens. ids: (n,) integer; returns: (n, vocab_size) float32 for "all", else None"""
        n = len(ids)
        self._decode(ids, scores=logits == "all")
        if logits != "all":
            return None
        return np.ctypeslib.as_array(self._api.llama_get_logits(self._context), (n, self.config.vocab_size)).copy()


def gguf_bits(path: Path) -> float:
    """Give the bits per weight of the matrices of a GGUF file's layers."""
    from gguf import GGUFReader

    matrices = [t for t in GGUFReader(path).tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    return 8 * sum(int(t.n_bytes) for t in matrices) / max(sum(int(t.n_elements) for t in matrices), 1)


def k_quant(source: Path, name: str, target: Path) -> None:
    """Have llama.cpp quantise a GGUF file. name: one of its types, such as Q4_K_M

    Raises UserError if there is no such type, llama.cpp is not installed, or it fails.
    """
    api = _library("--k-quants")
    kind = getattr(api, f"LLAMA_FTYPE_MOSTLY_{name.upper()}", None)
    if kind is None:
        raise UserError(f"llama.cpp has no quantisation {name!r}; it has Q2_K, Q3_K_M, Q4_K_M, IQ4_XS and others")
    params = api.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize, params.quantize_output_tensor = kind, True, False
    if api.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        raise UserError(f"{source}: llama.cpp could not make {name} of it")


def _library(what: str) -> Any:
    """Give llama.cpp's functions, which then log nothing. what: needs them. Raises UserError."""
    try:
        import llama_cpp as api
    except ImportError:
        raise UserError(f"{what} needs llama.cpp: pip install llama-cpp-python") from None
    if not _QUIET:
        _QUIET.append(api.llama_log_callback(lambda *_: None))
    api.llama_log_set(_QUIET[0], ctypes.c_void_p(0))
    api.llama_backend_init()
    return api
