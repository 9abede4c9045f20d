"""Answers in chunks: server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError, as_api_error
from .work import Errand

SLOWEST_READER = 60.0  # seconds that one chunk may take to be read


class EventStream(Response):
    """Sends each object as an event, then [DONE], or the error that ended them; finishes the errand."""

    def __init__(self, errand: Errand, chunks: AsyncIterator[dict[str, Any]]) -> None:
        self.errand, self.chunks = errand, chunks
        self.background = None
        self.status_code = 200
        self.init_headers({"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def event(data: str) -> None:
            body = f"data: {data}\n\n".encode()
            message = {"type": "http.response.body", "body": body, "more_body": True}
            await asyncio.wait_for(send(message), SLOWEST_READER)

        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                async for chunk in self.chunks:
                    await event(json.dumps(chunk, ensure_ascii=False))
                self.errand.check()
                await event("[DONE]")
            except asyncio.TimeoutError:
                return  # without the end of the body: the connection is closed
            except Exception as error:
                failure = as_api_error(error)
                if not (isinstance(failure, ApiError) and self.errand.gone):
                    await event(json.dumps(failure.body))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.errand.finish()
