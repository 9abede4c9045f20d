"""The class for other programs: a model, its context, and completions in OpenAI's shape."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from .chat_format import ChatFormat, ChatFormatError, select_format
from .chat_pieces import Message, check_messages
from .generate import DEFAULT_SINKS, Run, Session, TextPiece, common_length, generate_text
from .model import Model
from .openai_shapes import ChatShape, CompletionShape, LogProbs, Shape
from .options import check_arguments, check_max_tokens, check_prompt, check_stop, defaults_of_file, log_probs
from .sampler import OptionError, Sampler
from .state import pack_session, unpack_session
from .tokenizer import load_tokenizer

logger = logging.getLogger("tritllama")

DEFAULT_N_CTX = 4096
DEFAULT_N_BATCH = 256

Answer = dict[str, Any] | Iterator[dict[str, Any]]
Progress = Callable[[int, int], None]


class BusyError(RuntimeError):
    """The thread that asks is itself in the middle of an answer: waiting for it would never end."""


class Llama:
    """A model ready to generate.

    >>> with Llama("model.trit", n_ctx=8192) as llm:
    ...     llm.create_completion("The capital of France is", max_tokens=8)["choices"][0]["text"]
    ' Paris.'

    n_ctx: tokens of context, default the model's own up to 4096; n_batch: prompt tokens read in one step;
    kv: codec of the cache, "auto" is f16; seed: of every call that names none, None draws one each time;
    activations: "int8", or "f32" for exactness; chat_format: one of llama3, chatml, llama2 instead of the
    file's own; jinja: run the file's chat template in a sandbox; keep: first tokens that never slide out of
    a full context, default the system message.

    What was read stays in the context: the next call re-reads only where its prompt departs from it. Calls
    from several threads queue. Nothing is printed; messages go to the logger "tritllama".

    Raises FormatError or ConfigError for a bad file, BackendError, OptionError or ChatFormatError for a bad
    argument, OSError if the file cannot be opened.
    """

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        backend: str = "auto",
        kv: str = "auto",
        seed: int | None = None,
        activations: str = "int8",
        n_batch: int = DEFAULT_N_BATCH,
        chat_format: str | None = None,
        jinja: bool = False,
        keep: int | None = None,
    ) -> None:
        check_arguments(n_ctx=n_ctx, n_batch=n_batch, n_threads=n_threads, kv=kv, keep=keep, seed=seed)
        self.path = Path(model_path)
        self.seed, self.keep = seed, keep
        self._lock = threading.Lock()
        self._owner: int | None = None
        self._closed = False
        self.model = Model.load(self.path, backend=backend, n_threads=n_threads, activations=activations)
        try:
            self.config = self.model.config
            self.tokenizer = load_tokenizer(self.model.file)
            self.n_ctx = n_ctx or min(self.config.max_seq_len, DEFAULT_N_CTX)
            if keep is not None and keep >= self.n_ctx:
                raise OptionError(f"keep must be less than the context of {self.n_ctx} tokens, got {keep}")
            if self.n_ctx > self.config.max_seq_len:
                logger.warning("n_ctx is %d, the model was made for %d", self.n_ctx, self.config.max_seq_len)
            self.defaults = defaults_of_file(self.model.file.header.get("generation"), str(self.path))
            self._select_chat_format(chat_format, jinja)
            self._session = Session(self.model, self.n_ctx, n_batch)
        except BaseException:
            self.model.close()
            raise

    # ==== Text and ids ====

    def tokenize(self, text: str, add_bos: bool = True, special: bool = False) -> list[int]:
        """Return the ids of a text. add_bos: a BOS where the model's tokenizer adds one; special: read
        control tokens written in the text as such, where otherwise they are plain text."""
        self._check_open()
        return self.tokenizer.encode(text, add_bos=add_bos and self.tokenizer.add_bos, special=special)

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of ids. special: write control tokens out, where otherwise they are left out."""
        self._check_open()
        return self.tokenizer.decode(ids, special=special)

    def logits(self, ids: Sequence[int]) -> npt.NDArray[np.float32]:
        """Return the logits after each of the ids, read into a fresh context: (n, vocab_size) float32.

        Raises ContextOverflowError for more ids than n_ctx, OptionError for an id that does not exist.
        """
        self._check_open()
        ids = check_prompt(ids, self.config.vocab_size, self.n_ctx)
        with self._exclusive():
            cache = self.model.new_cache(max(2, len(ids)), n_batch=self._session.cache.chunk)
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
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> Answer:
        """Continue a text; returns OpenAI's text_completion, or an iterator of its chunks with `stream`.

        prompt: text in which control tokens are plain text, or ids; max_tokens: None goes on until a stop or
        until the context is full, -1 until a stop, for which the oldest tokens slide out; logprobs: how many
        of the likeliest tokens to tell at each place, up to 20; cancel: an event that ends the run, with
        finish_reason "cancelled"; progress: called with (done, total) while the prompt is read.
        Options left at None are those of the model's file, else llama.cpp's (see SamplingOptions).

        Raises ContextOverflowError for a prompt longer than n_ctx, OptionError for a bad value.
        """
        sampler = self.sampler(
            seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repeat_penalty=repeat_penalty, repeat_last_n=repeat_last_n, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias,
        )  # fmt: skip
        collector = log_probs(logprobs, "logprobs")
        ids = self.tokenize(prompt) if isinstance(prompt, str) else prompt
        run = self.prepare(ids, sampler, max_tokens=max_tokens, stop=stop, cancel=cancel, progress=progress)
        return self._answer(CompletionShape, run, collector, stream)

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
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
    ) -> Answer:
        """Answer a conversation; returns OpenAI's chat.completion, or an iterator of its chunks.

        messages: [{"role": "system" | "user" | "assistant", "content": text}, ...]; the rest as in
        create_completion, but for OpenAI's way of asking for logprobs here.

        Raises ChatFormatError for bad messages or a model without a chat format, and what
        create_completion raises.
        """
        sampler = self.sampler(
            seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
            repeat_penalty=repeat_penalty, repeat_last_n=repeat_last_n, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias,
        )  # fmt: skip
        if top_logprobs is not None and not logprobs:
            raise OptionError("top_logprobs needs logprobs=True")
        collector = log_probs(top_logprobs or 0, "top_logprobs") if logprobs else None
        run = self.prepare_chat(
            messages, sampler, max_tokens=max_tokens, stop=stop, cancel=cancel, progress=progress
        )
        return self._answer(ChatShape, run, collector, stream)

    # ==== The same in steps, for interactive programs ====

    def sampler(self, seed: int | None = None, **options: Any) -> Sampler:
        """Make a sampler: options that are None come from the model's file. Raises OptionError."""
        self._check_open()
        given = {name: value for name, value in options.items() if value is not None}
        return Sampler(seed=self.seed if seed is None else seed, **{**self.defaults, **given})

    def prepare_chat(
        self, messages: Sequence[Mapping[str, Any] | Message], sampler: Sampler, **options: Any
    ) -> Run:
        """Like `prepare`, for messages in the model's chat format."""
        chat_format, checked = self.require_chat_format(), check_messages(messages)
        ids = chat_format.encode(self.tokenizer, checked)
        sinks = DEFAULT_SINKS
        if self.keep is None:
            system = [message for message in checked[:1] if message.role == "system"]
            bare = chat_format.encode(self.tokenizer, [*system, Message("user", "")])
            sinks = max(sinks, common_length(ids, bare))
        run = self.prepare(ids, sampler, sinks=sinks, **options)
        run.stop_ids = self.tokenizer.eos_ids | chat_format.stop_ids(self.tokenizer)
        run.continuation = False
        return run

    def prepare(
        self,
        ids: Sequence[int],
        sampler: Sampler,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        cancel: threading.Event | None = None,
        progress: Progress | None = None,
        sinks: int = DEFAULT_SINKS,
        slide: bool = False,
    ) -> Run:
        """Check everything about a run before it starts.

        slide: take a prompt longer than the context too, whose oldest tokens slide out, and with
        max_tokens None let an answer be as long as the context.
        """
        self._check_open()
        ids = check_prompt(ids, self.config.vocab_size, None if slide else self.n_ctx)
        if max_tokens is None:
            max_tokens = self.n_ctx if slide else max(1, self.n_ctx - len(ids))
        check_max_tokens(max_tokens)
        sinks = min(sinks, self.n_ctx // 2) if self.keep is None else self.keep
        return Run(
            ids, sampler, self.tokenizer.eos_ids, max_tokens, check_stop(stop),
            sinks=sinks, cancel=cancel, progress=progress,
        )  # fmt: skip

    def pieces(self, run: Run) -> Iterator[TextPiece]:
        """Do a run and yield its text as it comes; run.stats tells the rest."""
        with self._exclusive():
            yield from generate_text(self._session, self.tokenizer, run)

    @property
    def is_base(self) -> bool:
        """Whether the model came without a chat template, and no chat format was named."""
        return self.chat_format is None and not (self.model.file.header.get("chat") or {}).get("template")

    def require_chat_format(self) -> ChatFormat:
        """Return the chat format. Raises ChatFormatError if the model has none that can be used."""
        if self.chat_format is None:
            raise ChatFormatError(self._no_chat_format)
        return self.chat_format

    # ==== State ====

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the keys and values that the context can hold."""
        return self._session.cache.nbytes

    @property
    def fingerprint(self) -> str:
        """Of the model's file: states and results name it."""
        return str(self.model.file.fingerprint)

    def save_state(self) -> bytes:
        """Return the context as bytes; load_state goes on from there without reading anything again."""
        with self._exclusive():
            return pack_session(self._session, self.fingerprint)

    def load_state(self, state: bytes) -> None:
        """Put back a context that save_state returned.

        Raises CacheError if it is damaged, or comes from another model or another n_ctx or n_batch.
        """
        with self._exclusive():
            unpack_session(self._session, self.fingerprint, state)

    def reset(self) -> None:
        """Empty the context."""
        with self._exclusive():
            self._session.reset()

    def close(self) -> None:
        """Give the memory back, once a running call has ended. Further calls raise ValueError."""
        if self._closed:
            return
        with self._exclusive():
            self._closed = True
            del self._session
            self.model.close()

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ==== Private ====

    def _select_chat_format(self, name: str | None, jinja: bool) -> None:
        """Choose the chat format; that a file has none to use matters only once a chat is asked for."""
        self.chat_format: ChatFormat | None = None
        self._no_chat_format = (
            "the model has no chat template: complete plain text, or name a chat format (--chat-format)"
        )
        try:
            self.chat_format = select_format(self.model.file.header.get("chat") or {}, name, jinja)
        except ChatFormatError as exc:
            if name is not None or jinja:
                raise
            self._no_chat_format = str(exc)

    def _answer(self, shape_class: type[Shape], run: Run, collector: LogProbs | None, stream: bool) -> Answer:
        run.watch = None if collector is None else collector.watch
        shape = shape_class(self.path.name, self.fingerprint, self.tokenizer, collector)
        pieces = self.pieces(run)
        return shape.stream(run, pieces) if stream else shape.whole(run, pieces)

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the session; others wait. A thread that waited for its own stream would never wake."""
        me = threading.get_ident()
        if self._owner == me:
            raise BusyError("an answer is still being streamed: read it to its end or close its iterator")
        with self._lock:
            self._check_open()
            self._owner = me
            try:
                yield
            finally:
                self._owner = None

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this Llama is closed")
