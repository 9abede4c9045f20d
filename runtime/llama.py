"""The class for other programs: a model, its context, and completions in OpenAI's shape."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from formats.container import open_regular
from formats.errors import FormatError, shown

from .engine import Engine, Progress
from .errors import CacheError, LogitsError
from .generate import Criterion
from .jobs import chat_job, completion_job, prompts_of
from .model import Signal
from .options import check_prompt
from .sampler import OptionError, Processor
from .state import read_session, restore_session, session_parts, write_private
from .stream import Stream
from .window import check_length

T = TypeVar("T")
Answer = dict[str, Any] | Stream
POOLINGS = ("mean", "last")


class Llama(Engine):
    """A model ready to generate.

    >>> with Llama("model.trit", n_ctx=8192) as llm:
    ...     llm.create_completion("The capital of France is", max_tokens=8)["choices"][0]["text"]
    ' Paris.'

    n_ctx: tokens of context, default the model's own up to 4096; n_batch: prompt tokens read in one step; kv:
    codec of the cache, "auto" is the best of f16, q8, k=q8,v=q4 and q4 for which memory is free, or f32 with
    activations "f32"; force: go on though the machine has too little memory (`memory` tells what it takes); seed:
    of every call that names none, None draws one each time; activations: "int8", or "f32" for exactness;
    chat_format: one of llama3, chatml, llama2 instead of the file's own; jinja: run the file's chat template in a
    sandbox; keep: first tokens that never slide out of a full context, default the system message.

    What was read stays in the context: the next call re-reads only where its prompt departs from it. Calls
    from several threads queue; `session()` opens another context over the same weights, and then they run side
    by side. Nothing is printed; messages go to the logger "tritllama". Pickled by its path and arguments.

    Raises FormatError or ConfigError for a bad file, BackendError, OptionError or ChatFormatError for a bad
    argument, OSError if the file cannot be opened.
    """

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after each of the ids, read into a fresh context: (n, vocab_size) float32.

        Raises ContextOverflowError for more ids than n_ctx, OptionError for an id that does not exist.
        """
        self._check_open()
        ids = check_prompt(ids, self.config.vocab_size, self.n_ctx)
        with self._exclusive():
            cache = self.model.new_cache(max(2, len(ids)), n_batch=self._session.cache.chunk, kv=self._kv)
            logits = self.model.forward(ids, cache, "all")
        assert logits is not None
        return logits

    # ==== Completions ====

    def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        repeat_last_n: int | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        logprobs: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        logits_processor: Processor | Sequence[Processor] | None = None,
        stopping_criteria: Criterion | Sequence[Criterion] | None = None,
        cancel: Signal | None = None,
        progress: Progress | None = None,
        overflow: str = "error",
    ) -> Answer:
        """Continue a text; returns OpenAI's text_completion, or a Stream of its chunks with `stream`.

        prompt: text in which control tokens are plain text, or ids; max_tokens: None goes on until a stop or
        until the context is full, -1 until a stop, for which the oldest tokens slide out; logprobs: how many
        of the likeliest tokens to tell at each place, up to 20; response_format: {"type": "json_object"}, or
        "json_schema" as OpenAI has it (extra "json"); logits_processor: (ids, logits) -> logits, before all
        other steps; stopping_criteria: (ids, logits) -> bool, True ends the answer after the last of the ids;
        cancel: an event that ends the run, in the prompt too, with finish_reason "cancelled"; progress: called
        with (done, total) while the prompt is read; overflow: what to do with a prompt longer than n_ctx, "error",
        "slide" or "truncate-middle" (see window.py); the result counts under "context" what was cut or slid out.
        Options left at None are those of the model's file, else llama.cpp's (see SamplingOptions).

        Raises ContextOverflowError for a prompt longer than n_ctx, OptionError for a bad value, LogitsError
        where the model computes no numbers, BusyError in the middle of this thread's own stream.
        """
        job = completion_job(
            self, prompt, logprobs=logprobs, response_format=response_format,
            seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repeat_penalty=repeat_penalty, repeat_last_n=repeat_last_n, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias, max_tokens=max_tokens, stop=stop,
            processors=logits_processor, criteria=stopping_criteria, cancel=cancel, progress=progress,
            overflow=overflow,
        )  # fmt: skip
        return job.stream(self) if stream else job.whole(self)

    __call__ = create_completion

    def create_chat_completion(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repeat_penalty: float | None = None,
        repeat_last_n: int | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] | None = None,
        stream: bool = False,
        logprobs: bool = False,
        top_logprobs: int | None = None,
        response_format: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] | None = None,
        logits_processor: Processor | Sequence[Processor] | None = None,
        stopping_criteria: Criterion | Sequence[Criterion] | None = None,
        cancel: Signal | None = None,
        progress: Progress | None = None,
        overflow: str = "error",
    ) -> Answer:
        """Answer a conversation; returns OpenAI's chat.completion, or a Stream of its chunks.

        messages: [{"role": "system" | "user" | "assistant" | "tool", "content": text}, ...]; tools: functions
        that the model may call, for models with the chat format llama3; tool_choice: "auto", "none",
        "required" or one function; the rest as in create_completion, but for OpenAI's way of asking for
        logprobs here.

        Raises ChatFormatError for bad messages or a model without a chat format, and what
        create_completion raises.
        """
        job = chat_job(
            self, messages, logprobs=logprobs, top_logprobs=top_logprobs, response_format=response_format,
            tools=tools, tool_choice=tool_choice,
            seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repeat_penalty=repeat_penalty, repeat_last_n=repeat_last_n, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias, max_tokens=max_tokens, stop=stop,
            processors=logits_processor, criteria=stopping_criteria, cancel=cancel, progress=progress,
            overflow=overflow,
        )  # fmt: skip
        return job.stream(self) if stream else job.whole(self)

    # ==== Embeddings ====

    def embed(
        self,
        prompt: str | Sequence[int],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        cancel: Signal | None = None,
    ) -> npt.NDArray[np.float32]:
        """Return one vector for a text or ids: (dim,) float32, of length 1 with `normalize`.

        pooling: "mean" of the final states of all tokens, or the "last" token's
        Raises ContextOverflowError for more tokens than n_ctx, OptionError, Cancelled once `cancel` is set.
        """
        self._check_open()
        if pooling not in POOLINGS:
            raise OptionError(f"pooling must be {' or '.join(POOLINGS)}, got {shown(pooling)}")
        ids = check_prompt(self._ids(prompt), self.config.vocab_size, self.n_ctx)
        with self._exclusive():
            cache = self.model.new_cache(max(2, len(ids)), n_batch=self._n_batch, kv=self._kv)
            states = self.model.forward(ids, cache, "states", cancel=cancel)
        assert states is not None
        vector = states.mean(axis=0) if pooling == "mean" else states[-1].copy()
        length = float(np.linalg.norm(vector))
        if not np.isfinite(length):
            raise LogitsError("the model computes states that are no numbers: its file is damaged")
        return vector / np.float32(length) if normalize and length > 0 else vector

    def create_embedding(
        self,
        input: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        *,
        pooling: str = "mean",
        normalize: bool = True,
        cancel: Signal | None = None,
    ) -> dict[str, Any]:
        """Return OpenAI's list of embeddings, one for each text or list of ids. Raises what `embed` raises."""
        prompts = [self._ids(item) for item in prompts_of(input, "input")]
        vectors = [self.embed(ids, pooling=pooling, normalize=normalize, cancel=cancel) for ids in prompts]
        data = [{"object": "embedding", "index": i, "embedding": v.tolist()} for i, v in enumerate(vectors)]
        count = sum(map(len, prompts))
        usage = {"prompt_tokens": count, "total_tokens": count}
        return {"object": "list", "data": data, "model": self.path.name, "usage": usage}

    # ==== State ====

    def save_state(self) -> bytes:
        """Return the context as bytes; load_state goes on from there without reading anything again."""
        with self._exclusive():
            return b"".join(session_parts(self._session, self.fingerprint))

    def load_state(self, state: bytes) -> None:
        """Put back a context that save_state returned.

        Raises CacheError, and changes nothing, if it is damaged, or comes from another model, n_ctx, n_batch or kv.
        """
        if not isinstance(state, (bytes, bytearray, memoryview)):
            raise CacheError(f"a state is bytes, as save_state returns them; got {type(state).__name__}")
        self._load(io.BytesIO(state), lambda conversation: None)

    def save_session(self, path: str | os.PathLike[str], conversation: Any = None) -> None:
        """Write the context to a file that only its owner may read, and a JSON value beside it.

        The file appears whole or not at all. Raises OSError.
        """
        with self._exclusive():
            write_private(path, session_parts(self._session, self.fingerprint, conversation))

    def load_session(self, path: str | os.PathLike[str], read: Callable[[Any], Any] = lambda found: found) -> Any:
        """Put back a context that save_session wrote, and return what `read` makes of the JSON value beside it.

        Raises what load_state and `read` raise, naming the file, and OSError; the context is as it was then.
        """
        try:
            descriptor = open_regular(path)
        except FormatError as e:
            raise CacheError(str(e)) from e
        with open(descriptor, "rb") as stream:
            try:
                return self._load(stream, read)
            except CacheError as e:
                raise CacheError(f"{os.fspath(path)}: {e}") from e

    # ==== Private ====

    def _ids(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        check_length(prompt, self.tokenizer, self.n_ctx)
        return self.tokenize(prompt)

    def _load(self, stream: io.BufferedIOBase, read: Callable[[Any], T]) -> T:
        with self._exclusive():
            saved = read_session(self._session, self.fingerprint, stream)
            result = read(saved.conversation)
            restore_session(self._session, saved, stream)
        return result
