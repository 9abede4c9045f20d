"""What the server does not let happen: strangers, odd names, endless requests, and options that would allow them."""

from __future__ import annotations

import http.client
import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests import serving
from tests.byte_tokenizer import ByteTokenizer
from tests.serving import Server

pytest.importorskip("uvicorn")
from runtime.server.__main__ import main
from runtime.server.guard import is_loopback

HI: list[Any] = [{"role": "user", "content": "Hi"}]
NO_END = {"264": -100}  # <|im_end|> of the byte tokenizer
KEY = "a key of no use".replace(" ", "-")


def ask(server: Server, **options: Any) -> tuple[int, dict[str, str], Any]:
    status, headers, raw = server.ask("POST", "/v1/chat/completions", {"messages": HI, "max_tokens": 3, **options})
    return status, headers, json.loads(raw)


# ==== Who may ask ====


def test_names_that_the_server_does_not_go_by(open_llama: Any) -> None:
    with serving.in_thread(open_llama(), hosts=["model.lan"]) as server:
        for host, expected in (
            ("localhost:1", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("192.168.0.7", 200), ("MODEL.lan:5", 200),
            ("evil.example", 403), ("localhost.evil.example", 403), ("127.0.0.1.evil.example", 403), ("", 403),
            ("[::1", 403), ("a b", 403),
        ):  # fmt: skip
            assert server.ask("GET", "/health", headers={"host": host})[0] == expected, host


def test_pages_of_other_sites(open_llama: Any) -> None:
    body = {"messages": HI, "max_tokens": 1}
    with serving.in_thread(open_llama(), origins=["https://good.example"]) as server:
        for origin, expected in ((server.url, 200), ("https://good.example", 200), ("https://evil.example", 403),
                                 ("null", 403)):  # fmt: skip
            status, headers, _ = server.ask("POST", "/v1/chat/completions", body, {"origin": origin})
            assert status == expected, origin
            allowed = headers.get("access-control-allow-origin")
            assert allowed == (origin if origin == "https://good.example" else None)
        status, _ = server.error("/v1/chat/completions", body, **{"content-type": "text/plain"})
        assert status == 415


def test_without_a_key_nothing_but_health_and_page(open_llama: Any) -> None:
    with serving.in_thread(open_llama(), api_key=KEY) as server:
        for path in ("/v1/models", "/metrics", "/v1/models/x", "/nowhere"):
            for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": "Bearer "}):
                status, headers, raw = server.ask("GET", path, headers=given)
                assert status == 401 and headers["www-authenticate"] == "Bearer", (path, given)
                assert json.loads(raw)["error"]["code"] == "invalid_api_key"
        assert server.ask("GET", "/v1/models", headers={"authorization": f"Bearer {KEY}"})[0] == 200
        for path in ("/health", "/", "/static/chat.js"):
            assert server.ask("GET", path)[0] == 200


def test_the_page_may_load_nothing_from_elsewhere(open_llama: Any) -> None:
    with serving.in_thread(open_llama()) as server:
        kinds = {"/": "text/html", "/static/chat.js": "text/javascript", "/static/chat.css": "text/css"}
        for path, kind in kinds.items():
            status, headers, raw = server.ask("GET", path)
            assert status == 200 and headers["content-type"].startswith(kind) and b"://" not in raw
            assert headers["content-security-policy"].startswith("default-src 'none'")
            assert headers["x-content-type-options"] == "nosniff" and headers["x-frame-options"] == "DENY"
        for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/app.py"):
            assert server.ask("GET", path)[0] == 404


# ==== How much and how long ====


def test_bodies_have_a_limit(open_llama: Any) -> None:
    with serving.in_thread(open_llama(), largest_body=500) as server:
        status, error = server.error("/tokenize", {"content": "x" * 600})
        assert status == 413 and "--max-body" in error["message"]
        connection = http.client.HTTPConnection(server.host, server.port)
        pieces = iter([b'{"content": "'] + [b"x" * 100] * 9 + [b'"}'])
        connection.request("POST", "/tokenize", pieces, {"content-type": "application/json"}, encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()
        assert server.ask("POST", "/tokenize", {"content": "x" * 100})[0] == 200


def test_slow_clients_are_let_go(open_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.connection.HEADER_SECONDS", 0.05)
    monkeypatch.setattr("runtime.server.routes.BODY_SECONDS", 0.05)
    start = b"POST /tokenize HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with serving.in_thread(open_llama()) as server:
        with socket.create_connection((server.host, server.port), serving.PATIENCE) as slow:
            slow.sendall(start)
            assert slow.recv(1000) == b""
        with socket.create_connection((server.host, server.port), serving.PATIENCE) as slow:
            slow.sendall(start + b"content-length: 100\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        for broken in (b"content-length: -1\r\n\r\n", b"content-length: x\r\n\r\n", b"x" * 70_000):
            with socket.create_connection((server.host, server.port), serving.PATIENCE) as bad:
                bad.sendall(start + broken)
                assert bad.recv(1000).startswith(b"HTTP/1.1 400")


def test_the_time_of_an_answer_has_a_limit(open_llama: Any) -> None:
    with serving.in_thread(open_llama(), seconds=0.1) as server:
        status, _, found = ask(server, max_tokens=10_000_000, logit_bias=NO_END)
        assert status == 504 and found["error"]["code"] == "timeout"
        body = {"messages": HI, "max_tokens": 10_000_000, "logit_bias": NO_END, "stream": True}
        events = server.ask("POST", "/v1/chat/completions", body)[2].decode().split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        server.wait_for("trit_running", 0)


def test_a_client_that_goes_while_its_prompt_is_read(open_llama: Any) -> None:
    llm = open_llama(n_ctx=64, n_batch=1)
    reading, forward = threading.Event(), llm.model.forward

    def slow_forward(*args: Any, cancel: Any = None, **options: Any) -> Any:
        reading.set()
        serving.wait_until(cancel.is_set, "nobody cancelled")
        return forward(*args, cancel=cancel, **options)

    llm.model.forward = slow_forward
    with serving.in_thread(llm, parallel=1) as server:
        connection = http.client.HTTPConnection(server.host, server.port)
        body = json.dumps({"prompt": "x" * 40, "max_tokens": 5})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        assert reading.wait(serving.PATIENCE)
        connection.close()
        server.wait_for("trit_running", 0)
        assert server.metric('trit_answers_total{reason="cancelled"}') == 1
        llm.model.forward = forward
        assert server.ask("POST", "/v1/completions", {"prompt": "x", "max_tokens": 2})[0] == 200


def test_a_long_silence_is_filled(open_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.server.streaming.QUIET", 0.01)
    llm = open_llama()
    forward, go_on = llm.model.forward, threading.Event()

    def wait_and_forward(*args: Any, **options: Any) -> Any:
        go_on.wait(serving.PATIENCE)
        return forward(*args, **options)

    llm.model.forward = wait_and_forward
    with serving.in_thread(llm, parallel=1) as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=serving.PATIENCE)
        body = json.dumps({"prompt": "x", "max_tokens": 2, "stream": True})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.readline() == b": waiting\n"
        go_on.set()
        assert response.read().endswith(b"data: [DONE]\n\n")
        connection.close()


def test_an_answer_without_an_end_is_cut_off_at_the_servers(open_llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    body = json.dumps({"messages": HI, "max_tokens": 10_000_000, "logit_bias": NO_END, "stream": True})
    with serving.in_thread(open_llama()) as server:
        connection = http.client.HTTPConnection(server.host, server.port, timeout=serving.PATIENCE)
        connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.readline().startswith(b"data: ")
    last = response.read().decode().split("\n\n")[-2]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutdown"
    assert not [record for record in caplog.records if record.exc_info]
    connection.close()


def test_our_own_faults_are_logged_and_not_told(open_llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    llm = open_llama()
    with serving.in_thread(llm) as server:
        forward = llm.model.forward
        llm.model.forward = lambda *args, **options: np.full(llm.config.vocab_size, np.nan, np.float32)
        status, _, found = ask(server)
        assert status == 500 and found["error"]["type"] == "server_error" and "log" in found["error"]["message"]
        assert "a logit is nan" in caplog.text
        llm.model.forward = forward
        assert ask(server)[0] == 200


# ==== Options ====


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--host", "0.0.0.0"], "0.0.0.0 can be reached from other machines: give an API key"),
        (["--host", "::"], "give an API key"),
        (["--api-key", "short"], "an API key is 8 or more"),
        (["--api-key", "long enough but spaced"], "without spaces"),
        (["--port", "65536"], "--port must be from 0 to 65535"),
        (["--parallel", "0"], "--parallel must be from 1 to 64"),
        (["--queue", "-1"], "--queue"),
        (["--timeout", "nan"], "--timeout"),
        (["--cors-origin", "*"], "--cors-origin must name one site"),
        (["--api-key-file", "no such file"], "no such file: No such file"),
        (["no such.trit", "--port", "0"], "no such.trit: No such file"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options) == 2
    out, err = capsys.readouterr()
    assert out == "" and text in err and err.count("\n") == 1


def test_keys_from_a_file_and_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "key").write_text("bad\n")
    assert main(["--api-key-file", str(tmp_path / "key")]) == 2 and "an API key is" in capsys.readouterr().err
    monkeypatch.setenv("TRIT_API_KEY", "bad")
    assert main([]) == 2 and "an API key is" in capsys.readouterr().err


def test_without_the_extra_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main([]) == 2
    assert capsys.readouterr().err.endswith("install it with: pip install 'tritllama[server]'\n")


def test_a_port_in_use_is_told_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["no such.trit", "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"error: --host 127.0.0.1 --port {port}: Address already in use\n"
    assert main(["no such.trit", "--host", "no.such.host.invalid", "--api-key", "12345678"]) == 2
    assert capsys.readouterr().err.startswith("error: --host no.such.host.invalid --port 8080: ")


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "")))


# ==== Anything at all ====

FIELDS = ("messages", "prompt", "input", "model", "n", "stream", "stream_options", "temperature", "top_p", "top_k",
          "min_p", "seed", "stop", "logit_bias", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice",
          "repeat_penalty", "presence_penalty", "max_completion_tokens", "content", "tokens", "overflow", "user",
          "encoding_format", "pooling", "echo", "\ud800")  # fmt: skip
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=8), st.sampled_from(["", "user", "json_object", "auto", "required", "\ud800", "\0"]),
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["type", "function", "name", "role", "content", "json_schema", "schema", "1", "x"]), inner,
        max_size=3,
    ),
    max_leaves=6,
)  # fmt: skip
GOOD: dict[str, Any] = {"messages": HI, "prompt": "x", "input": "x", "content": "x", "tokens": [1]}


@pytest.fixture(scope="module")
def fuzzed(tiny_path: Path) -> Iterator[Server]:
    from runtime import Llama

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("runtime.engine.load_tokenizer", lambda file: ByteTokenizer(eos=["<|im_end|>"]))
        llm = Llama(tiny_path, backend="numpy", n_ctx=64, activations="f32", chat_format="llama3")
        with serving.in_thread(llm, parallel=1) as server:
            yield server


@pytest.mark.parametrize(
    ("path", "own"),
    [("/v1/chat/completions", "messages"), ("/v1/completions", "prompt"), ("/v1/embeddings", "input"),
     ("/tokenize", "content"), ("/detokenize", "tokens")],
)  # fmt: skip
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=3))
def test_no_request_makes_the_server_fail(fuzzed: Server, path: str, own: str, changes: dict[str, Any]) -> None:
    limit = {"max_tokens": 2} if path.endswith("completions") and "max_completion_tokens" not in changes else {}
    if isinstance(changes.get("max_completion_tokens"), int):
        changes["max_completion_tokens"] = min(changes["max_completion_tokens"], 2)
    status, headers, raw = fuzzed.ask("POST", path, {own: GOOD[own], **limit, **changes})
    assert status in (200, 400, 404), raw
    if status != 200:
        assert json.loads(raw)["error"]["message"]
    elif headers["content-type"].startswith("text/event-stream"):
        assert raw.endswith(b"data: [DONE]\n\n")
