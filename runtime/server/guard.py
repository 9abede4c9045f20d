"""Who may ask: checks before any request is read, and headers on every answer."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection, Sequence
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .metrics import Metrics

OPEN_PATHS = ("/health", "/")  # without a key; and what the page is made of
STATIC = "/static/"
SAFE_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Guard:
    """Middleware: the Host and Origin headers, the API key, and the content type; counts the answers.

    A page of another site may point its own name at this machine (DNS rebinding): then Host carries that name,
    so only addresses, localhost and names that were allowed pass. Without a key, it may also post blindly: so
    Origin must be ours or allowed, and JSON must be said to be JSON, which a browser asks leave for.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, api_key: str | None, hosts: Collection[str], origins: Sequence[str]
    ) -> None:
        self.app, self.metrics, self.origins = app, metrics, origins
        self._key = None if api_key is None else api_key.encode()
        self._hosts = {"localhost", *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
                route = scope.get("route")
                path = getattr(route, "path", "other")
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error.response(scope, receive, counted)
            return
        await self.app(scope, receive, counted)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        host = headers.get("host", "")
        if not self._known(host):
            raise ApiError(403, f"the server does not go by the name {host!r:.80} (--allowed-host)", code="host")
        origin = headers.get("origin")
        if origin is not None and origin not in self.origins and urlsplit(origin).netloc != host:
            raise ApiError(403, f"pages of {origin!r:.80} may not ask this server (--cors-origin)", code="origin")
        if self._key is not None and path not in OPEN_PATHS and not path.startswith(STATIC):
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, b"Bearer " + self._key):
                raise ApiError(
                    401, "the API key is missing or wrong", code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )  # fmt: skip
        if method == "POST" and headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the body must be JSON, with the header Content-Type: application/json")

    def _known(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self._hosts or is_address(name)


def is_address(name: str) -> bool:
    """Whether a host is given as an IP address, which no other site can claim for its own."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to this host."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
