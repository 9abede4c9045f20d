"""Requests at work: a context is taken, a thread uses it, and what it finds comes back to the event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from ..llama import Llama
from .errors import ApiError
from .sessions import Sessions

T = TypeVar("T")
Receive = Callable[[], Awaitable[Any]]
Put = Callable[[Any], None]


class Errand:
    """One request's way: it ends when it is finished, when the client goes, or when its time is over.

    stop: set at the end, whatever the reason; gone, late, closing: what the reason was
    """

    def __init__(self, receive: Receive, seconds: float) -> None:
        self.stop = threading.Event()
        self.gone = self.late = self.closing = False
        self.ended = asyncio.get_running_loop().create_future()
        self._watcher = asyncio.create_task(self._watch(receive))
        self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True
        self.finish()

    def _expire(self) -> None:
        self.late = True
        self.finish()

    def finish(self) -> None:
        """End it; what is still going on in its thread stops within a layer."""
        self.stop.set()
        self._timer.cancel()
        self._watcher.cancel()
        if not self.ended.done():
            self.ended.set_result(None)

    def check(self) -> None:
        """Raise ApiError if the request is over before it was answered."""
        if self.late:
            raise ApiError(504, "the answer took longer than the server allows (--timeout)", code="timeout")
        if self.closing:
            raise ApiError(503, "the server is shutting down", code="shutdown")
        if self.gone:
            raise ApiError(499, "the client has gone")


@dataclass
class _End:
    error: BaseException | None


class Workshop:
    """The contexts, the threads that use them, and the errands that are under way."""

    def __init__(self, llm: Llama, parallel: int, queue: int, seconds: float) -> None:
        """seconds: that one request may take, its time in the queue included"""
        self.llm, self.seconds = llm, seconds
        self.sessions = Sessions(llm, parallel, queue)
        # Two pools, so that preparing an answer, which is short, never waits for answers.
        self._answering = ThreadPoolExecutor(parallel, "answer")
        self._preparing = ThreadPoolExecutor(2, "prepare")
        self._errands: set[Errand] = set()

    def errand(self, receive: Receive) -> Errand:
        """Begin an errand; its `finish` must be called."""
        errand = Errand(receive, self.seconds)
        self._errands.add(errand)
        errand.ended.add_done_callback(lambda _: self._errands.discard(errand))
        return errand

    async def prepare(self, function: Callable[[], T]) -> T:
        """Do something short, tokenizing say, outside of the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._preparing, function)

    async def begin(
        self, errand: Errand, prompt: Sequence[int], work: Callable[[Llama, Put], None]
    ) -> AsyncIterator[Any]:
        """Wait for a context, have a thread do `work` with it, and return what yields what the thread puts.

        Raises ApiError if the queue is full, or the errand ends in it; the iterator raises what `work` raises.
        """
        session = await self._take(errand, prompt)
        loop, arriving = asyncio.get_running_loop(), asyncio.Queue[Any]()
        started = time.monotonic()

        def finished(error: BaseException | None) -> None:
            self.sessions.give_back(session, time.monotonic() - started)
            arriving.put_nowait(_End(error))

        def put(item: Any) -> None:
            loop.call_soon_threadsafe(arriving.put_nowait, item)

        def do() -> None:
            error: BaseException | None = None
            try:
                work(session, put)
            except BaseException as exc:
                error = exc
            with suppress(RuntimeError):  # the server has ended meanwhile
                loop.call_soon_threadsafe(finished, error)

        self._answering.submit(do)
        return _arrivals(arriving)

    async def _take(self, errand: Errand, prompt: Sequence[int]) -> Llama:
        taking = asyncio.ensure_future(self.sessions.take(prompt))
        try:
            await asyncio.wait((taking, errand.ended), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._abandon(taking)
            raise
        if errand.ended.done():
            self._abandon(taking)
            errand.check()
        return taking.result()

    def _abandon(self, taking: asyncio.Future[Llama]) -> None:
        if not taking.done():
            taking.cancel()
        elif taking.exception() is None:
            self.sessions.give_back(taking.result())

    def end_all(self) -> None:
        """End all errands: their clients are told that the server is shutting down."""
        for errand in list(self._errands):
            errand.closing = True
            errand.finish()

    def close(self) -> None:
        """End all errands, wait for their threads, and give contexts and model back."""
        self.end_all()
        self._preparing.shutdown()
        self._answering.shutdown()
        for session in self.sessions.all:
            session.close()


async def _arrivals(arriving: asyncio.Queue[Any]) -> AsyncIterator[Any]:
    while not isinstance(item := await arriving.get(), _End):
        yield item
    if item.error is not None:
        raise item.error
