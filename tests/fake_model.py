"""A model that says what it is told: the interface of runtime.model.Model without weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from runtime.errors import CacheError
from runtime.model import Cancelled


class FakeRing:
    """Remembers ids where a ring remembers keys and values; forgets what slides out in the same way."""

    def __init__(self, capacity: int, chunk: int) -> None:
        self.capacity, self.chunk, self._sinks = capacity, chunk, 4
        self.seen: list[int] = []

    @property
    def sinks(self) -> int:
        return self._sinks

    @sinks.setter
    def sinks(self, value: int) -> None:
        if self.length > self.capacity and value != self._sinks:
            raise CacheError("slid out")
        self._sinks = value

    @property
    def dropped(self) -> int:
        return max(0, self.length - self.capacity)

    @property
    def length(self) -> int:
        return len(self.seen)

    def trim(self, n: int) -> None:
        if self.length > self.capacity and n > self.sinks:
            raise CacheError("slid out")
        del self.seen[n:]

    def reset(self) -> None:
        self.seen = []


class FakeModel:
    """speak: from all ids that were read to the id that must come next."""

    def __init__(self, speak: Callable[[list[int]], int], vocab_size: int = 265) -> None:
        self.speak, self.config = speak, SimpleNamespace(vocab_size=vocab_size)
        self.calls: list[int] = []  # how many ids each call was given
        self.fail = False

    def new_cache(self, n_ctx: int, sinks: int = 4, n_batch: int = 256, kv: str = "auto") -> FakeRing:
        return FakeRing(n_ctx, n_batch)

    def forward(
        self,
        ids: Sequence[int],
        cache: FakeRing,
        logits: str | None = "last",
        progress: Callable[[int, int], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> Any:
        self.calls.append(len(ids))
        for start in range(0, len(ids), cache.chunk):
            if cancel is not None and cancel.is_set():
                raise Cancelled
            if self.fail:
                raise KeyboardInterrupt
            cache.seen += ids[start : start + cache.chunk]
            if progress is not None:
                progress(min(start + cache.chunk, len(ids)), len(ids))
        scores = np.zeros(self.config.vocab_size, np.float32)
        scores[self.speak(cache.seen)] = 10.0
        return scores


def says(prompt: Sequence[int], answer: Sequence[int], then: int) -> Callable[[list[int]], int]:
    """Say `answer` after `prompt`, then `then` for ever."""

    def speak(seen: list[int]) -> int:
        at = len(seen) - len(prompt)
        return answer[at] if 0 <= at < len(answer) else then

    return speak
