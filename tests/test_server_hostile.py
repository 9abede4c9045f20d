"""Requests that are made to hurt: each is refused at once with an error of the client's own, and none fills the log."""

from __future__ import annotations

import json
import logging
import socket
from typing import Any

import pytest

from tests import serving
from tests.serving import Server

pytest.importorskip("uvicorn")

CHAT = "/v1/chat/completions"
HI: list[Any] = [{"role": "user", "content": "Hi"}]


def tool(parameters: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


def wanted(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def refused(server: Server, path: str, body: Any, text: str, status: int = 400) -> None:
    found, error = server.error(path, body)
    assert found == status and text in error["message"] and len(error["message"]) < 1000, (found, error)


def test_bodies_of_a_million_values_are_not_made_into_objects(open_llama: Any) -> None:
    with serving.in_thread(open_llama()) as server:
        for path, start in ((CHAT, b'{"messages": ['), ("/v1/completions", b'{"prompt": ['), ("/tokenize", b'{"a": [')):
            for part in (b"{},", b"[0],", b"0,"):
                body = start + part * 600_000 + b"0]}"
                refused(server, path, body, "holds more than 524288 values")
        refused(server, CHAT, b"[" * 400_000 + b"]" * 400_000, "is not JSON")


@pytest.mark.parametrize("half", ["\ud800", "a\udfffb"])
def test_half_a_surrogate_pair_is_no_text_wherever_it_stands(half: str, open_llama: Any) -> None:
    good = {"messages": HI, "max_tokens": 1}
    with serving.in_thread(open_llama()) as server:
        for change in ({half: 1}, {"user": half}, {"stop": [half]}, {"messages": [{"role": "user", "content": half}]},
                       {"tools": tool({"properties": {half: {}}})}):  # fmt: skip
            refused(server, CHAT, {**good, **change}, "half of a surrogate pair")
        assert server.ask("POST", CHAT, {**good, "user": "\U0001f600"})[0] == 200


def test_tools_that_fill_the_context_are_not_tokenised(open_llama: Any) -> None:
    llm = open_llama(chat_format="llama3")

    def encode(text: str, *_: Any, **__: Any) -> list[int]:
        assert len(text) < 1 << 17, "a megabyte was tokenised"
        return [5] * len(text)

    llm.tokenizer.encode = encode
    with serving.in_thread(llm) as server:
        body = {"messages": HI, "max_tokens": 1, "tools": tool({"enum": ["v" * 1000] * 1000})}
        refused(server, CHAT, body, "tokens, the context holds")


def test_schemas_that_cannot_be_used(open_llama: Any) -> None:
    pytest.importorskip("llguidance")
    deep: Any = {}
    for _ in range(100):
        deep = {"items": deep}
    with serving.in_thread(open_llama()) as server:
        for schema in (deep, {"type": "integer", "maximum": 10**400}, {"$ref": "http://127.0.0.1:1/x"},
                       {"pattern": "(?=a)b"}, {"enum": ["v" * 100] * 1000}, {"type": "string", "format": "nonsense"},
                       {"type": "array", "minItems": -1}):  # fmt: skip
            refused(server, CHAT, {"messages": HI, "max_tokens": 1, "response_format": wanted(schema)}, "JSON schema")


def test_texts_and_ids_have_a_limit(open_llama: Any) -> None:
    with serving.in_thread(open_llama()) as server:
        refused(server, "/tokenize", {"content": "a" * ((1 << 20) + 1)}, "at most 1048576 characters")
        refused(server, "/detokenize", {"tokens": [5] * ((1 << 18) + 1)}, "at most 262144 token ids")
        refused(server, "/detokenize", {"tokens": [5, 2**31 - 1]}, "there is no token 2147483647")


def test_those_who_go_in_the_middle_leave_nothing_in_the_log(open_llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A log that anybody can fill from outside fills the disk; a pipe that nobody reads would even stop the server."""
    body = json.dumps({"messages": HI, "max_tokens": 30}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    whole = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    with caplog.at_level(logging.WARNING, "tritllama"), serving.in_thread(open_llama()) as server:
        for end in (10, 60, len(whole) - len(body), len(whole) - 5, len(whole)):
            with socket.create_connection((server.host, server.port), serving.PATIENCE) as gone:
                gone.sendall(whole[:end])
        server.wait_for("trit_running", 0)
        assert server.ask("GET", "/health")[0] == 200
    assert not [record for record in caplog.records if record.name == "tritllama"]
