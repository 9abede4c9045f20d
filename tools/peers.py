"""Other runtimes as subjects of the benchmark, run in the same process and in turn with ours."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.cli import UserError


class LlamaCpp:
    """A GGUF model under llama.cpp, called below the Python class of llama-cpp-python: what is timed is its own code.

    ids of `before` are in the context when the measuring begins; the cache is f16, llama.cpp's default.
    Raises UserError if llama-cpp-python is not there, or the file cannot be loaded.
    """

    def __init__(self, path: str, threads: int, n_ctx: int, before: Sequence[int]) -> None:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such file")
        try:
            import llama_cpp as api
        except ImportError:
            raise UserError("--against needs llama.cpp: pip install llama-cpp-python") from None
        self._api: Any = api
        self._quiet = api.llama_log_callback(lambda *_: None)  # kept alive: the library calls it at any time
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(path.encode(), api.llama_model_default_params())
        if not self._model:
            raise UserError(f"{path}: llama.cpp cannot load this file")
        params = api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, max(512, n_ctx), 512
        params.n_threads = params.n_threads_batch = threads
        self._context = api.llama_init_from_model(self._model, params)
        self._depth = len(before)
        if before:
            self.read(before)

    def read(self, ids: Sequence[int]) -> None:
        tokens = (self._api.llama_token * len(ids))(*ids)
        if self._api.llama_decode(self._context, self._api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama.cpp could not evaluate the tokens")

    def rewind(self) -> None:
        self._api.llama_memory_seq_rm(self._api.llama_get_memory(self._context), -1, self._depth, -1)

    def close(self) -> None:
        """Give its memory back."""
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)
