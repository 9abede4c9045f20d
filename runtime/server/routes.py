"""The paths of the server, in OpenAI's terms and llama.cpp's."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from formats.version import __version__

from ..llama import Llama
from ..model import Cancelled
from .errors import ApiError, as_api_error
from .fields import parse, read
from .metrics import Metrics
from .schema import DETOKENIZE, TOKENIZE, Asked, chat, completion, embedding
from .streaming import EventStream
from .work import Put, Workshop

STATIC = Path(__file__).parent / "static"
PAGE_FILES = {
    "index.html": "text/html; charset=utf-8",
    "chat.js": "text/javascript; charset=utf-8",
    "chat.css": "text/css; charset=utf-8",
}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
BODY_SECONDS = 30.0  # that a client may take to send a body
Reader = Callable[..., Asked]
Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """What the server answers. name: of the model"""

    def __init__(self, shop: Workshop, metrics: Metrics, name: str, largest_body: int) -> None:
        self.shop, self.metrics, self.name, self.largest_body = shop, metrics, name, largest_body

    @property
    def routes(self) -> list[Route]:
        post = {
            "/v1/chat/completions": self.chat_completions,
            "/v1/completions": self.completions,
            "/v1/embeddings": self.embeddings,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        get = {
            "/v1/models": self.models,
            "/v1/models/{name:path}": self.model,
            "/health": self.health,
            "/props": self.props,
            "/metrics": self.measured,
            "/": self.page,
            "/static/{name}": self.page,
        }
        return [
            *(Route(path, _answering_errors(function), methods=["POST"]) for path, function in post.items()),
            *(Route(path, _answering_errors(function), methods=["GET"]) for path, function in get.items()),
        ]

    # ==== Answers ====

    async def chat_completions(self, request: Request) -> Response:
        return await self._answer(request, chat)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, completion)

    async def embeddings(self, request: Request) -> Response:
        options = embedding(await self._body(request))
        encoding = options.pop("encoding_format", "float")
        errand = self.shop.errand(request.receive)

        def work(session: Llama, put: Put) -> None:
            put(session.create_embedding(**options, cancel=errand.stop))

        try:
            (result,) = [item async for item in await self.shop.begin(errand, (), work)]
        except Cancelled:
            errand.check()
            raise
        finally:
            errand.finish()
        if encoding == "base64":
            for item in result["data"]:
                item["embedding"] = base64.b64encode(np.array(item["embedding"], "<f4").tobytes()).decode()
        return JSONResponse({**result, "model": self.name})

    async def _answer(self, request: Request, reader: Reader) -> Response:
        body = await self._body(request)
        errand = self.shop.errand(request.receive)
        try:
            asked = await self.shop.prepare(lambda: reader(self.shop.llm, body, errand.stop))

            def work(session: Llama, put: Put) -> None:
                for i, job in enumerate(asked.jobs):
                    try:
                        for result in job.stream(session) if asked.stream else [job.whole(session)]:
                            put((i, result))
                    finally:
                        self.metrics.answered(job.run.stats)

            found = await self.shop.begin(errand, asked.jobs[0].run.prompt, work)
            if asked.stream:
                return EventStream(errand, self._chunks(asked, found))
            results = [result async for _, result in found]
            errand.check()
        except BaseException:
            errand.finish()
            raise
        errand.finish()
        return JSONResponse(self._merged(asked, results))

    async def _chunks(self, asked: Asked, found: AsyncIterator[tuple[int, dict[str, Any]]]) -> AsyncIterator[Any]:
        """The chunks of all choices as those of one answer; usage comes at the end if it was asked for."""
        usages = []
        head: dict[str, Any] = {}
        async for i, chunk in found:
            head = head or {key: chunk[key] for key in ("id", "object", "created", "system_fingerprint")}
            head["model"] = self.name
            if "usage" in chunk:
                usages.append(chunk.pop("usage"))
            choice = {**chunk["choices"][0], "index": i}
            yield {**chunk, **head, "choices": [choice], **({"usage": None} if asked.usage else {})}
        if asked.usage:
            yield {**head, "choices": [], "usage": asked.total(usages)}

    def _merged(self, asked: Asked, results: list[dict[str, Any]]) -> dict[str, Any]:
        choices = [{**result["choices"][0], "index": i} for i, result in enumerate(results)]
        usage = asked.total([result["usage"] for result in results])
        return {**results[0], "model": self.name, "choices": choices, "usage": usage}

    # ==== The rest ====

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self.name:
            raise ApiError(404, f"there is no such model; there is {self.name}", code="model_not_found")
        return JSONResponse(self._about())

    def _about(self) -> dict[str, Any]:
        llm = self.shop.llm
        about = {"n_ctx": llm.n_ctx, "n_vocab": llm.config.vocab_size, "fingerprint": llm.fingerprint}
        about["chat_format"] = llm.chat_format.name if llm.chat_format else None
        created = int(llm.path.stat().st_mtime) if llm.path.exists() else 0
        return {"id": self.name, "object": "model", "created": created, "owned_by": "tritllama", "meta": about}

    async def tokenize(self, request: Request) -> Response:
        found = read(await self._body(request), TOKENIZE, ("content",))
        bos, special = found.get("add_special", False), found.get("parse_special", False)
        llm = self.shop.llm
        return JSONResponse({"tokens": await self.shop.prepare(lambda: llm.tokenize(found["content"], bos, special))})

    async def detokenize(self, request: Request) -> Response:
        found = read(await self._body(request), DETOKENIZE, ("tokens",))
        return JSONResponse({"content": await self.shop.prepare(lambda: self.shop.llm.detokenize(found["tokens"]))})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def props(self, request: Request) -> Response:
        """What clients of llama.cpp's server ask for before they begin."""
        llm = self.shop.llm
        found = {
            "default_generation_settings": {"n_ctx": llm.n_ctx, "params": asdict(llm.sampler().options)},
            "total_slots": len(self.shop.sessions.all),
            "model_alias": self.name,
            "model_path": llm.path.name,
            "chat_template": (llm.model.file.header.get("chat") or {}).get("template") or "",
            "build_info": f"tritllama {__version__}",
        }
        return JSONResponse(found)

    async def measured(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def page(self, request: Request) -> Response:
        name = request.path_params.get("name", "index.html")
        if name not in PAGE_FILES:
            raise ApiError(404, "there is no such file")
        headers = {"content-security-policy": PAGE_POLICY, "cache-control": "no-cache"}
        return Response((STATIC / name).read_bytes(), headers=headers, media_type=PAGE_FILES[name])

    async def _body(self, request: Request) -> dict[str, Any]:
        """Read a body of limited size in limited time. Raises ApiError."""
        try:
            raw = await asyncio.wait_for(self._raw_body(request), BODY_SECONDS)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body did not come in time", headers={"connection": "close"}) from None
        return await self.shop.prepare(lambda: parse(raw))

    async def _raw_body(self, request: Request) -> bytes:
        announced = request.headers.get("content-length", "")
        found = bytearray()
        too_large = announced.isdigit() and int(announced[:20]) > self.largest_body
        async for part in request.stream():
            found += b"" if too_large else part
            if too_large or len(found) > self.largest_body:
                message = f"the body has more than {self.largest_body} bytes (--max-body)"
                raise ApiError(413, message, headers={"connection": "close"})
        return bytes(found)


def _answering_errors(function: Handler) -> Handler:
    """Have errors answered in OpenAI's form; Starlette would raise them once more, for the log."""

    async def endpoint(request: Request) -> Response:
        try:
            return await function(request)
        except Exception as error:
            return as_api_error(error).response

    return endpoint


async def on_http_error(request: Request, error: Any) -> Response:
    """Answer what Starlette itself refuses: unknown paths and methods."""
    message = f"{request.method} {request.url.path:.100}: {error.detail}"
    return ApiError(error.status_code, message, headers=error.headers).response
