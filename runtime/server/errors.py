"""What the server answers where something is wrong, in OpenAI's form."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse

from ..messages.chat_pieces import ChatFormatError
from ..sampler import OptionError
from ..tokenizer import TokenizerError
from ..window import ContextOverflowError

logger = logging.getLogger("tritllama")

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class ApiError(Exception):
    """An answer that is an error. param: the field that is wrong; headers: to go with it"""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.headers = status, message, param, code, headers

    @property
    def body(self) -> dict[str, Any]:
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


def as_api_error(error: BaseException) -> ApiError:
    """Turn what a request ran into into its answer; what is our own fault is logged and not told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ClientDisconnect):
        return ApiError(499, "the client has gone")
    if isinstance(error, ContextOverflowError):
        return ApiError(400, str(error), code="context_length_exceeded")
    if isinstance(error, (OptionError, ChatFormatError, TokenizerError)):
        return ApiError(400, str(error))
    logger.error("a request failed", exc_info=error)
    return ApiError(500, "the server failed to answer; its log says why")
