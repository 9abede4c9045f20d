"""The loop of generation: a prompt read into the ring, then one token after another, as ids or as text.

What the ring already holds is not read again: the longest common beginning of the last run and the new prompt
stays. A run that was cancelled, or whose iterator was closed, leaves ids and ring in step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import CacheError
from .model import Cancelled, Signal
from .sampler import Processor, Sampler, process
from .stops import StopStrings
from .tokenizer import StreamDecoder

if TYPE_CHECKING:
    from .model import Model
    from .ring.cache import KVRing
    from .tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]
Criterion = Callable[[Sequence[int], Floats], bool]

DEFAULT_SINKS = 4


@dataclass
class Stats:
    """What a run did. finish_reason: "stop", "length", or "cancelled" also for a closed iterator; "" before.

    seconds: in choosing and evaluating tokens, not in the caller's hands; decoded: evaluations behind it,
    one less than the tokens generated, because the first comes from the prompt's logits;
    truncated_tokens: cut out of the prompt before it was read; dropped_tokens: those that the answer no longer saw
    when it ended, because they had slid out of the ring.
    """

    prompt_tokens: int = 0
    reused_tokens: int = 0
    truncated_tokens: int = 0
    dropped_tokens: int = 0
    prompt_seconds: float = 0.0
    generated_tokens: int = 0
    decoded: int = 0
    seconds: float = 0.0
    finish_reason: str = ""
    seed: int = 0

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second, of those that were really read."""
        read = self.prompt_tokens - self.reused_tokens
        return read / self.prompt_seconds if self.prompt_seconds > 0 else 0.0

    @property
    def rate(self) -> float:
        """Tokens per second of the decoding loop."""
        return self.decoded / self.seconds if self.seconds > 0 else 0.0


class Session:
    """A ring and the ids that were read into it.

    ids: everything since the last reset, also what has slid out of the ring; len(ids) == cache.length.
    """

    def __init__(self, model: Model, n_ctx: int, n_batch: int = 256, kv: str = "auto") -> None:
        self.model = model
        self.cache: KVRing = model.new_cache(n_ctx, n_batch=n_batch, kv=kv)
        self.ids: list[int] = []

    def reset(self) -> None:
        self.cache.reset()
        self.ids = []

    def keep_common(self, prompt: Sequence[int], sinks: int) -> int:
        """Keep what the ring and a prompt have in common, at most all but the prompt's last token.

        sinks: how many first tokens never slide out; where tokens have slid out under another number, nothing is kept.
        Returns the number of tokens kept.
        """
        common = common_length(self.ids, prompt[:-1])
        if common == 0 or not self._trim(common) or not self._set_sinks(sinks):
            self.reset()
            self.cache.sinks = sinks
        return len(self.ids)

    def forward(
        self,
        ids: Sequence[int],
        cancel: Signal | None = None,
        progress: Progress | None = None,
    ) -> Floats | None:
        """Read ids into the ring; returns the logits after the last, (vocab_size,) float32.

        None if `cancel` was set before all were read. Whatever happens, ids and ring stay in step.
        """
        before = len(self.ids)
        try:
            return self.model.forward(ids, self.cache, "last", progress=progress, cancel=cancel)
        except Cancelled:
            return None
        finally:
            self.ids += ids[: self.cache.length - before]

    def _trim(self, count: int) -> bool:
        if count < len(self.ids):
            try:
                self.cache.trim(count)
            except CacheError:  # it needs tokens that have slid out
                return False
            del self.ids[count:]
        return True

    def _set_sinks(self, sinks: int) -> bool:
        if sinks != self.cache.sinks:
            try:
                self.cache.sinks = sinks
            except CacheError:  # tokens have slid out
                return False
        return True


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning of two lists of ids."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


@dataclass
class Run:
    """One generation: what to read, how to choose, when to stop.

    max_tokens: -1 goes on until a stop; sinks: first tokens that never slide out of the ring;
    continuation: the text goes on from the prompt's, so that a space in front of its first word counts;
    processors: change the logits before the sampler sees them; criteria: called with (ids so far, the logits
    that the last was chosen from), True ends the run after it, which is a "stop";
    watch: called with (id, logits) for each token before it is yielded, logits (vocab_size,) float32;
    closed: set to end the run as `cancel` does, by whoever holds its iterator.
    """

    prompt: Sequence[int]
    sampler: Sampler
    stop_ids: Collection[int] = ()
    max_tokens: int = -1
    stop: Sequence[str] = ()
    sinks: int = DEFAULT_SINKS
    continuation: bool = True
    cancel: Signal | None = None
    progress: Progress | None = None
    processors: Sequence[Processor] = ()
    criteria: Sequence[Criterion] = ()
    watch: Callable[[int, Floats], None] | None = None
    closed: threading.Event = field(default_factory=threading.Event)
    stats: Stats = field(default_factory=Stats)

    def is_set(self) -> bool:
        """Whether the run is to end now: a run is its own signal to the forward pass."""
        return self.closed.is_set() or (self.cancel is not None and self.cancel.is_set())


def generate(session: Session, run: Run) -> Iterator[int]:
    """Yield ids until a stop id, max_tokens or a cancellation; run.stats says which and how fast.

    A stop id is not yielded. Past the capacity of the ring the oldest tokens but the sinks slide out.
    """
    stats = run.stats
    stats.seed = run.sampler.seed
    stats.prompt_tokens = len(run.prompt)
    started = time.perf_counter()
    stats.reused_tokens = session.keep_common(run.prompt, run.sinks)
    logits = session.forward(list(run.prompt[stats.reused_tokens :]), run, run.progress)
    stats.prompt_seconds = time.perf_counter() - started
    stats.dropped_tokens = session.cache.dropped
    history = list(run.prompt)
    while True:
        if logits is None or run.is_set():
            stats.finish_reason = "cancelled"
            return
        if stats.generated_tokens == run.max_tokens:
            stats.finish_reason = "length"
            return
        started = time.perf_counter()
        token = run.sampler(process(logits, history, run.processors), history)
        if token in run.stop_ids:
            stats.finish_reason = "stop"
            return
        if run.watch is not None:
            run.watch(token, logits)
        stats.generated_tokens += 1
        history.append(token)
        stats.seconds += time.perf_counter() - started
        yield token
        if any(criterion(history, logits) for criterion in run.criteria):
            stats.finish_reason = "stop"
            return
        if stats.generated_tokens == run.max_tokens:
            continue  # the last token's successor is not wanted, so it is not evaluated
        started = time.perf_counter()
        logits = session.forward([token], run)
        stats.decoded += 1
        stats.dropped_tokens = session.cache.dropped
        stats.seconds += time.perf_counter() - started


# ==== Text ====


@dataclass(frozen=True)
class TextPiece:
    """Text that may be shown, and the tokens that begin in it: (id, offset in the whole text)."""

    text: str
    tokens: list[tuple[int, int]]


def generate_text(session: Session, tokenizer: Tokenizer, run: Run) -> Iterator[TextPiece]:
    """Yield the text of a run as it becomes certain: whole characters, nothing of a stop string.

    Every token of the text is in exactly one piece, so the last piece may have tokens and no text.
    """
    decoder = StreamDecoder(tokenizer, continuation=run.continuation)
    stops = StopStrings(run.stop)
    pending: list[tuple[int, int]] = []
    decoded = shown = 0
    ids = generate(session, run)
    try:
        for token in ids:
            pending.append((token, decoded))
            new = decoder.push(token)
            decoded += len(new)
            text = stops.push(new)
            shown += len(text)
            if stops.found:
                run.stats.finish_reason = "stop"
                break
            if text:
                yield TextPiece(text, _take(pending, shown))
        else:
            text = stops.push(decoder.flush())
            text += "" if stops.found else stops.flush()
            shown += len(text)
            if stops.found:
                run.stats.finish_reason = "stop"
    finally:
        ids.close()  # type: ignore[attr-defined]
        run.stats.finish_reason = run.stats.finish_reason or "cancelled"
    if text or pending:
        yield TextPiece(text, _take(pending, shown + (not stops.found)))


def _take(pending: list[tuple[int, int]], before: int) -> list[tuple[int, int]]:
    """Take the tokens whose text begins before the given offset."""
    taken = [item for item in pending if item[1] < before]
    del pending[: len(taken)]
    return taken
