"""uvicorn's server and HTTP protocol, with limits on the time that an end and that headers may take."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 20.0


class Server(uvicorn.Server):
    """Once it is to end, answers have `grace` seconds to come to theirs; then they are cut off, and say so."""

    def __init__(self, app: Starlette, grace: float, **options: Any) -> None:
        """options: of uvicorn.Config"""
        self.shop, self.grace = app.state.shop, grace
        config = uvicorn.Config(
            app, http=PatientProtocol, ws="none", lifespan="on", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_keep_alive=30,
            timeout_graceful_shutdown=int(grace) + 5, **options,
        )  # fmt: skip
        super().__init__(config)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self.grace, self.shop.end_all)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


class PatientProtocol(H11Protocol):
    """Closes a connection on which no whole request has come in time, be it the first or a later one."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE and self._deadline is None:
            self._wait()
        elif self.conn.their_state is not h11.IDLE:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._deadline = self.loop.call_later(HEADER_SECONDS, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        if self.conn.their_state is h11.IDLE:
            self.transport.close()
