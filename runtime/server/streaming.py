"""Answers in chunks: server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import as_api_error
from .work import Errand

T = TypeVar("T")

SLOWEST_READER = 60.0  # seconds that one chunk may take to be read
QUIET = 15.0  # seconds after which a comment tells clients, and proxies in between, that a prompt is still being read


class EventStream(Response):
    """Sends each object as an event, then [DONE], or the error that ended them; finishes the errand."""

    def __init__(self, errand: Errand, chunks: AsyncIterator[dict[str, Any]]) -> None:
        self.errand, self.chunks = errand, chunks
        self.background = None
        self.status_code = 200
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def line(text: str) -> None:
            message = {"type": "http.response.body", "body": f"{text}\n\n".encode(), "more_body": True}
            await asyncio.wait_for(send(message), SLOWEST_READER)

        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for chunk in _or_none(self.chunks, QUIET):
                    await line(": waiting" if chunk is None else f"data: {json.dumps(chunk, ensure_ascii=False)}")
                self.errand.check()
                await line("data: [DONE]")
            except asyncio.TimeoutError:
                return  # without the end of the body: the connection is closed
            except Exception as error:
                if not self.errand.gone:
                    await line(f"data: {json.dumps(as_api_error(error).body)}")
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.errand.finish()


async def _or_none(items: AsyncIterator[T], seconds: float) -> AsyncIterator[T | None]:
    """Yield the items, and None each time that the next does not come for so long."""
    while True:
        coming: asyncio.Future[T] = asyncio.ensure_future(anext(items))  # type: ignore[arg-type]
        try:
            while not (await asyncio.wait((coming,), timeout=seconds))[0]:
                yield None
            yield coming.result()
        except StopAsyncIteration:
            return
        finally:
            coming.cancel()
