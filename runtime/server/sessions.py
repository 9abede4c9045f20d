"""Contexts over one model, given to requests in the order in which they came."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from ..llama import Llama
from .errors import ApiError

LONGEST_RETRY = 60


class Sessions:
    """`parallel` contexts, and a queue of at most `queue` requests for one. For the event loop's thread alone."""

    def __init__(self, llm: Llama, parallel: int, queue: int) -> None:
        self.all = [llm, *(llm.session() for _ in range(parallel - 1))]
        self._free = list(self.all)
        self._waiting: deque[asyncio.Future[Llama]] = deque()
        self._queue = queue
        self._seconds = 1.0  # that an answer takes, roughly

    @property
    def running(self) -> int:
        return len(self.all) - len(self._free)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def take(self, prompt: Sequence[int]) -> Llama:
        """Wait for a context; of several the one that has most of the prompt already.

        Raises ApiError at once if the queue is full.
        """
        if self._free:
            best = max(self._free, key=lambda session: session.overlap(prompt))
            self._free.remove(best)
            return best
        if len(self._waiting) >= self._queue:
            rounds = (len(self._waiting) + 1) / len(self.all)
            seconds = min(LONGEST_RETRY, max(1, math.ceil(rounds * self._seconds)))
            message = f"{len(self.all)} answers are being made and {len(self._waiting)} requests wait; try again later"
            raise ApiError(503, message, code="overloaded", headers={"retry-after": str(seconds)})
        turn: asyncio.Future[Llama] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back(turn.result())
            with suppress(ValueError):
                self._waiting.remove(turn)
            raise

    def give_back(self, session: Llama, seconds: float | None = None) -> None:
        """seconds: how long it was in use"""
        if seconds is not None:
            self._seconds += (seconds - self._seconds) / 8
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(session)
                return
        self._free.append(session)
