"""A loaded model with one context: what every way of asking it shares."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from . import budget
from .constraint import vocabulary
from .generate import DEFAULT_SINKS, Criterion, Run, Session, Stats, TextPiece, common_length, generate_text
from .messages.chat_format import ChatFormat
from .messages.chat_pieces import ChatFormatError, Message
from .messages.recognise import select_format
from .model import Model, Signal
from .options import (
    DEFAULT_N_BATCH,
    callables,
    check_arguments,
    check_bias,
    check_ids,
    check_known,
    check_max_tokens,
    check_prompt,
    check_signals,
    check_stop,
    defaults_of_file,
    ring_codec,
)
from .sampler import OptionError, Processor, Sampler
from .sharing import BusyError, Turns, Users
from .tokenizer import load_tokenizer
from .window import check_length, fit, overflow_error

logger = logging.getLogger("tritllama")

DEFAULT_N_CTX = 4096
CONTEXT_WARNING = "a context of %d tokens is more than the %d that the model was made for: it may talk nonsense there"

Progress = Callable[[int, int], None]
Self = TypeVar("Self", bound="Engine")


class Engine:
    """A model, its tokenizer and chat format, one context, and a lock that lets one call at a time use it.

    The arguments and errors are those of Llama. Here a run is prepared in one step and done in another,
    which is how interactive programs use it.
    """

    _session: Session
    _closed: bool

    def __init__(
        self,
        model_path: str | os.PathLike[str],
        *,
        n_ctx: int | None = None,
        n_threads: int | None = None,
        n_threads_batch: int | None = None,
        backend: str = "auto",
        kv: str = "auto",
        seed: int | None = None,
        activations: str = "int8",
        n_batch: int = DEFAULT_N_BATCH,
        chat_format: str | None = None,
        jinja: bool = False,
        keep: int | None = None,
        force: bool = False,
    ) -> None:
        check_arguments(
            n_ctx=n_ctx, n_batch=n_batch, n_threads=n_threads, n_threads_batch=n_threads_batch, kv=kv, keep=keep,
            seed=seed,
        )  # fmt: skip
        self._arguments = {
            "n_ctx": n_ctx, "n_threads": n_threads, "n_threads_batch": n_threads_batch,
            "backend": backend, "kv": kv, "seed": seed, "activations": activations, "n_batch": n_batch,
            "chat_format": chat_format, "jinja": jinja, "keep": keep, "force": force,
        }  # fmt: skip
        self.path = Path(os.fsdecode(model_path))
        self.seed, self.keep = seed, keep
        self.model = Model.load(
            self.path, backend=backend, n_threads=n_threads, n_threads_batch=n_threads_batch, activations=activations
        )
        try:
            self.config = self.model.config
            self.tokenizer = load_tokenizer(self.model.file)
            self.n_ctx = n_ctx or min(self.config.max_seq_len, DEFAULT_N_CTX)
            if keep is not None and keep >= self.n_ctx:
                raise OptionError(f"keep must be less than the context of {self.n_ctx} tokens, got {keep}")
            if self.n_ctx > self.config.max_seq_len:
                logger.warning(CONTEXT_WARNING, self.n_ctx, self.config.max_seq_len)
            self.defaults = defaults_of_file(self.model.file.header.get("generation"), str(self.path))
            self._select_chat_format(chat_format, jinja)
            codecs = budget.BY_QUALITY if self.model.kernels.int8 else ("f32",)
            codecs = codecs if kv == "auto" else (ring_codec(kv),)
            plans = budget.plans(self.model.file, self.config, self.n_ctx, n_batch, codecs, self.model.modules)
            self._kv, self.memory = budget.choose(plans, force)
            self._n_batch, self._users = n_batch, Users(self.model)
            self._vocabularies: dict[frozenset[int], Any] = {}
            self._open_session()
        except BaseException:
            self.model.close()
            raise

    def session(self: Self) -> Self:
        """Open another context over the same model: it has its own cache and lock, and shares the weights.

        Each is closed for itself; the model goes with the last of them.
        """
        self._check_open()
        other = object.__new__(type(self))  # copy.copy would open the model again, as unpickling does
        other.__dict__.update(self.__dict__)
        other._open_session()
        return other

    def tokenize(self, text: str, add_bos: bool = True, special: bool = False) -> list[int]:
        """Return the ids of a text. add_bos: a BOS where the model's tokenizer adds one; special: read
        control tokens written in the text as such, where otherwise they are plain text. Raises OptionError."""
        self._check_open()
        if not isinstance(text, str):
            raise OptionError(f"only a text can be tokenized, got {type(text).__name__}")
        return self.tokenizer.encode(text, add_bos=add_bos and self.tokenizer.add_bos, special=special)

    def detokenize(self, ids: Sequence[int], special: bool = False) -> str:
        """Return the text of ids. special: write control tokens out, where otherwise they are left out.

        Raises OptionError for something else than ids of the vocabulary."""
        self._check_open()
        array = check_ids(ids, "only a list of token ids can be detokenized")
        check_known(array, self.config.vocab_size)
        return self.tokenizer.decode(array.tolist(), special=special)

    def sampler(self, seed: int | None = None, **options: Any) -> Sampler:
        """Make a sampler: options that are None come from the model's file. Raises OptionError."""
        self._check_open()
        given = {name: value for name, value in options.items() if value is not None}
        sampler = Sampler(seed=self.seed if seed is None else seed, **{**self.defaults, **given})
        check_bias(sampler.options.logit_bias, self.config.vocab_size)
        return sampler

    def check_fits(self, text: str) -> None:
        """Raise ContextOverflowError if a text alone is longer than the context, soon if it is much longer."""
        check_length(text, self.tokenizer, self.n_ctx)
        if (count := len(self.tokenize(text))) > self.n_ctx:
            raise overflow_error(count, self.n_ctx)

    def prepare_chat(
        self, messages: Sequence[Mapping[str, Any] | Message], sampler: Sampler, tools: str = "", **options: Any
    ) -> Run:
        """Like `prepare`, for messages in the model's chat format. tools: what it is told of functions."""
        chat_format = self.require_chat_format()
        chat_format = chat_format.with_tools(tools) if tools else chat_format
        checked = chat_format.check(messages)
        if options.get("overflow", "error") == "error":
            check_length("".join([tools, *(message.content for message in checked)]), self.tokenizer, self.n_ctx)
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
        cancel: Signal | None = None,
        progress: Progress | None = None,
        processors: Processor | Sequence[Processor] | None = None,
        criteria: Criterion | Sequence[Criterion] | None = None,
        sinks: int = DEFAULT_SINKS,
        overflow: str = "error",
    ) -> Run:
        """Check everything about a run before it starts.

        overflow: what to do with a prompt longer than the context, see window.py; with "slide" and max_tokens None
        an answer may be as long as the context.
        """
        self._check_open()
        check_signals(cancel, progress)
        sinks = min(sinks, self.n_ctx // 2) if self.keep is None else self.keep
        if max_tokens is not None:
            check_max_tokens(max_tokens)
        given = check_prompt(ids, self.config.vocab_size)
        ids = fit(given, overflow, self.n_ctx, sinks, max_tokens)
        if max_tokens is None:
            max_tokens = self.n_ctx if overflow == "slide" else max(1, self.n_ctx - len(ids))
        return Run(
            ids, sampler, self.tokenizer.eos_ids, max_tokens, check_stop(stop),
            sinks=sinks, cancel=cancel, progress=progress,
            processors=callables(processors, "logits_processor"),
            criteria=callables(criteria, "stopping_criteria"), stats=Stats(truncated_tokens=len(given) - len(ids)),
        )  # fmt: skip

    def pieces(self, run: Run) -> Iterator[TextPiece]:
        """Do a run and yield its text as it comes; run.stats tells the rest. Any thread may read on."""
        with self._exclusive():
            for piece in generate_text(self._session, self.tokenizer, run):
                yield piece
                self._turns.hand_over()

    def vocabulary(self, ends: frozenset[int]) -> Any:
        """Return the tokenizer as answers in JSON need it; ends: ids that end an answer. Raises OptionError."""
        if ends not in self._vocabularies:
            self._vocabularies[ends] = vocabulary(self.tokenizer, self.config.vocab_size, ends)
        return self._vocabularies[ends]

    @property
    def is_base(self) -> bool:
        """Whether the model came without a chat template, and no chat format was named."""
        return self.chat_format is None and not (self.model.file.header.get("chat") or {}).get("template")

    def require_chat_format(self) -> ChatFormat:
        """Return the chat format. Raises ChatFormatError if the model has none that can be used."""
        if self.chat_format is None:
            raise ChatFormatError(self._no_chat_format)
        return self.chat_format

    def overlap(self, ids: Sequence[int]) -> int:
        """How many first tokens of a prompt the context holds already; a guess while a call is running."""
        return common_length(self._session.ids, ids)

    @property
    def cache_nbytes(self) -> int:
        """Bytes of the keys and values that the context can hold."""
        return self._session.cache.nbytes

    @property
    def cache_codec(self) -> str:
        """How keys and values are stored."""
        return self._session.cache.codec

    @property
    def fingerprint(self) -> str:
        """Of the model's file: states and results name it."""
        return str(self.model.file.fingerprint)

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
            self._finalizer()

    def __enter__(self: Self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except BusyError:
            if error is None:
                raise
            logger.warning("%s stays open: an answer is still being streamed", self.path)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the way to open it again: the path and the arguments, not what the context holds."""
        return _open, (type(self), os.path.abspath(self.path), self._arguments)

    # ==== Private ====

    def _open_session(self) -> None:
        self._turns = Turns()
        self._closed = False
        self._session = Session(self.model, self.n_ctx, self._n_batch, self._kv)
        self._users.add()
        self._finalizer = weakref.finalize(self, self._users.remove)
        self._finalizer.atexit = False  # at exit threads may still be at work

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

    @contextmanager
    def _exclusive(self) -> Iterator[None]:
        """Hold the session; others wait. A thread that waited for its own stream would never wake."""
        with self._turns.take() as cut_off:
            self._check_open()
            if cut_off:
                self._session.reset()
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this Llama is closed")


def _open(engine: type[Engine], path: str, arguments: dict[str, Any]) -> Engine:
    return engine(path, **arguments)
