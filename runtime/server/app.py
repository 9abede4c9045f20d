"""The application: routes, guard and workshop put together."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from ..llama import Llama
from .guard import Guard
from .metrics import Metrics
from .routes import Api, on_http_error
from .work import Workshop


@dataclass(frozen=True)
class Settings:
    """How a server behaves.

    parallel: answers made at a time; queue: requests that may wait for their turn, the next is sent away;
    seconds: that one request may take; largest_body: bytes; alias: the model's name instead of its file's;
    hosts: names that the server goes by; origins: of pages on other sites that may ask it
    """

    parallel: int = 4
    queue: int = 32
    seconds: float = 600.0
    largest_body: int = 8 << 20
    api_key: str | None = None
    alias: str | None = None
    hosts: Sequence[str] = ()
    origins: Sequence[str] = ()


def make_app(llm: Llama, settings: Settings) -> Starlette:
    """Make the application that serves a model. At its end it closes the model."""
    shop = Workshop(llm, settings.parallel, settings.queue, settings.seconds)
    metrics = Metrics(shop.sessions)
    api = Api(shop, metrics, settings.alias or llm.path.name, settings.largest_body)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        try:
            yield
        finally:
            shop.close()

    guard = Middleware(
        Guard, metrics=metrics, api_key=settings.api_key, hosts=settings.hosts, origins=settings.origins
    )
    cors = Middleware(
        CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"],
        allow_headers=["authorization", "content-type"],
    )  # fmt: skip
    app = Starlette(
        routes=api.routes,
        middleware=[*([cors] if settings.origins else []), guard],
        exception_handlers={HTTPException: on_http_error},
        lifespan=lifespan,
    )
    app.state.shop, app.state.name = shop, api.name
    return app
