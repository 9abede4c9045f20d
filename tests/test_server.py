"""The server as OpenAI's own client sees it: a process on a free port, with a tiny model of random weights."""

from __future__ import annotations

import http.client
import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests import serving
from tests.serving import NO_END, Server

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")

HI: list[Any] = [{"role": "user", "content": "Hi"}]
SCHEMA = {
    "type": "object",
    "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["age", "kind"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.tiny_chat_model(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    with serving.process(model, "--chat-format", "llama3", "-c", "1500", "-np", "2", "--queue", "1") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=serving.PATIENCE)


def chat(client: Any, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": "tiny.trit", "messages": HI, "max_tokens": 12, **options})


# ==== What OpenAI's client can ask ====


def test_models(client: Any) -> None:
    (only,) = client.models.list().data
    assert only.id == "tiny.trit" and only.meta["n_ctx"] == 1500
    assert client.models.retrieve("tiny.trit").id == "tiny.trit"
    with pytest.raises(openai.NotFoundError, match="there is no such model; there is tiny"):
        client.models.retrieve("gpt-9")


def test_a_chat_and_its_stream_say_the_same(client: Any) -> None:
    whole = chat(client, seed=5, logit_bias=NO_END)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 12
    assert whole.seed == 5 and whole.options["max_tokens"] == 12
    assert whole.usage.prompt_tokens + 12 == whole.usage.total_tokens
    stream = list(chat(client, seed=5, logit_bias=NO_END, stream=True, stream_options={"include_usage": True}))
    assert [chunk.choices for chunk in stream][-1] == [] and stream[-1].usage.completion_tokens == 12
    assert all(chunk.usage is None for chunk in stream[:-1]) and len({chunk.id for chunk in stream}) == 1
    deltas = [chunk.choices[0].delta for chunk in stream[:-1]]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    assert stream[-2].choices[0].finish_reason == "length" and stream[-2].seed == 5
    assert not any(chunk.usage for chunk in chat(client, stream=True))


def test_choices_differ_and_count_the_prompt_once(client: Any) -> None:
    answer = chat(client, n=3, seed=1, logit_bias=NO_END)
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) == 3 and [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage.completion_tokens == 36
    assert answer.usage.prompt_tokens == chat(client).usage.prompt_tokens
    streamed = ["", "", ""]
    for chunk in chat(client, n=3, seed=1, logit_bias=NO_END, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_log_probabilities(client: Any) -> None:
    found = chat(client, temperature=0, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in found)
    assert [entry.token for entry in found] == [entry.top_logprobs[0].token for entry in found]
    legacy = client.completions.create(model="tiny.trit", prompt="Hi", max_tokens=3, temperature=0, logprobs=1)
    assert len(legacy.choices[0].logprobs.token_logprobs) == 3


def test_completions_of_several_prompts(client: Any) -> None:
    both = client.completions.create(
        model="tiny.trit", prompt=["One", "Two"], max_tokens=5, temperature=0, logit_bias=NO_END
    )
    alone = client.completions.create(
        model="tiny.trit", prompt="Two", max_tokens=5, temperature=0, logit_bias=NO_END
    )
    assert [choice.index for choice in both.choices] == [0, 1]
    assert both.choices[1].text == alone.choices[0].text and both.usage.completion_tokens == 10


def test_json_of_a_schema(client: Any) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
    for seed in range(5):
        answer = chat(client, seed=seed, max_tokens=60, response_format=wanted)
        found = json.loads(answer.choices[0].message.content)
        assert set(found) == {"age", "kind"} and 0 <= found["age"] <= 99 and found["kind"] in ("cat", "dog")
        assert answer.choices[0].finish_reason == "stop"


def test_tool_calls(client: Any) -> None:
    first = chat(client, max_tokens=80, seed=3, tools=[TOOL], tool_choice="required").choices[0]
    assert first.finish_reason == "tool_calls" and first.message.content is None
    (call,) = first.message.tool_calls
    assert call.function.name == "weather" and json.loads(call.function.arguments)["city"] in ("Rome", "Oslo")
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 20}'}
    second = chat(client, messages=[*HI, first.message.model_dump(exclude_none=True), result], tools=[TOOL])
    assert second.choices[0].finish_reason in ("stop", "length")
    chunks = list(chat(client, max_tokens=80, seed=3, tools=[TOOL], tool_choice="required", stream=True))
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    (streamed,) = chunks[-1].choices[0].delta.tool_calls
    assert streamed.function.arguments == call.function.arguments
    assert not any(chunk.choices[0].delta.content for chunk in chunks)


def test_embeddings(client: Any) -> None:
    plain = client.embeddings.create(model="tiny.trit", input=["One", "Two"], encoding_format="float")
    packed = client.embeddings.create(model="tiny.trit", input=["One", "Two"])  # base64, unpacked by the client
    for a, b in zip(plain.data, packed.data, strict=True):
        assert a.embedding == pytest.approx(b.embedding, abs=1e-7)
        assert sum(x * x for x in a.embedding) == pytest.approx(1, abs=1e-5)
    last = client.embeddings.create(model="tiny.trit", input="Two", extra_body={"pooling": "last"})
    assert last.data[0].embedding != packed.data[1].embedding


def test_tokens_there_and_back(server: Server) -> None:
    status, _, raw = server.ask("POST", "/tokenize", {"content": "Grüße <|eot_id|>"})
    ids = json.loads(raw)["tokens"]
    assert status == 200 and 3 not in ids
    assert json.loads(server.ask("POST", "/detokenize", {"tokens": ids})[2])["content"] == "Grüße <|eot_id|>"
    _, _, raw = server.ask("POST", "/tokenize", {"content": "<|eot_id|>", "parse_special": True, "add_special": True})
    assert json.loads(raw)["tokens"] == [1, 3]


def test_any_model_may_be_asked_for_and_the_real_one_is_told(client: Any) -> None:
    """Clients are set up with a name of OpenAI's; llama.cpp's server takes any, too."""
    assert chat(client, model="gpt-9").model == "tiny.trit"
    assert {chunk.model for chunk in chat(client, model="gpt-9", stream=True)} == {"tiny.trit"}
    assert client.embeddings.create(model="gpt-9", input="a").model == "tiny.trit"


def test_the_properties_that_clients_of_llama_cpp_ask_for(server: Server) -> None:
    status, _, raw = server.ask("GET", "/props")
    found = json.loads(raw)
    assert status == 200 and found["total_slots"] == 2 and found["default_generation_settings"]["n_ctx"] == 1500
    assert found["model_path"] == "tiny.trit" and found["chat_template"]


# ==== Errors ====


def test_errors_are_the_clients_own(client: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature must be a number from 0 to 2"):
        chat(client, temperature=3)
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=[{"role": "user", "content": "x" * 5000}])
    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tfs_z": 1}, "tfs_z"), ({"temperature": -0.1}, "temperature"), ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"), ({"top_p": 1.1}, "top_p"), ({"top_k": 1.5}, "top_k"),
        ({"top_k": -1}, "top_k"), ({"min_p": []}, "min_p"), ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"), ({"frequency_penalty": -9}, "frequency_penalty"),
        ({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 2**40}, "max_tokens"), ({"n": 9}, "n"),
        ({"seed": 2**32}, "seed"), ({"stop": ""}, "stop"), ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"x": 1}}, "logit_bias"), ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"stream": 1}, "stream"), ({"stream_options": {}}, "stream_options"), ({"top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 3}, "max_tokens"), ({"store": True}, "store"), ({"messages": None}, "messages"),
    ],
)  # fmt: skip
def test_wrong_fields_are_named(server: Server, change: dict[str, Any], param: str) -> None:
    status, error = server.error("/v1/chat/completions", {"messages": HI, "max_tokens": 1, **change})
    assert (status, error["type"], error["param"]) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"messages": "hi"}, "messages must be a list"),
        ({"messages": [{"role": "god", "content": ""}]}, "the role must be one of"),
        ({"top_logprobs": 2}, "top_logprobs needs logprobs"),
        ({"logit_bias": {"512": 1}}, "there is no token 512"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "?"}}}}, "JSON schema"),
        ({"tools": [{}]}, r"tools\[0\]"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}}, "not among the tools"),
    ],
)
def test_wrong_contents_are_explained(server: Server, change: dict[str, Any], text: str) -> None:
    status, error = server.error("/v1/chat/completions", {"messages": HI, "max_tokens": 1, **change})
    assert status == 400 and error["type"] == "invalid_request_error"
    assert re.search(text, error["message"]), error["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"messages": NaN}', b'{"temperature": 1e999}', b"[" * 100_000,
     b'{"n": ' + b"9" * 5000 + b"}", b"null", b'"text"'],
)  # fmt: skip
def test_bodies_that_are_no_json_objects(server: Server, body: bytes) -> None:
    status, error = server.error("/v1/chat/completions", body)
    assert status == 400 and "body" in error["message"]


@pytest.mark.parametrize("prompt", [[], [1.5], [-1], [512], [1, True], [[1], [2, "x"]], [[[1]]], {"a": 1}, [2**70], 3])
def test_wrong_prompts(server: Server, prompt: Any) -> None:
    status, error = server.error("/v1/completions", {"prompt": prompt, "max_tokens": 1})
    assert status == 400 and error["type"] == "invalid_request_error"
    status, _ = server.error("/v1/embeddings", {"input": prompt})
    assert status == 400


def test_paths_and_methods_that_are_not_there(server: Server) -> None:
    for method, path, expected in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("GET", "/static/x.py", 404)):
        status, _, raw = server.ask(method, path)
        assert status == expected and json.loads(raw)["error"]["message"]


# ==== Several clients ====


def test_a_full_queue_and_clients_that_go(server: Server, client: Any) -> None:
    """Two contexts and a queue of one: the fourth client is sent away, and each that goes frees its place."""

    def endless() -> Any:
        stream = chat(client, max_tokens=1_000_000, logit_bias=NO_END, stream=True)
        next(iter(stream))
        return stream

    running = [endless(), endless()]
    server.wait_for("trit_running", 2)
    waiting = http.client.HTTPConnection(server.host, server.port)
    body = json.dumps({"messages": HI, "max_tokens": 1})
    waiting.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
    server.wait_for("trit_waiting", 1)
    with pytest.raises(openai.InternalServerError) as caught:
        chat(client)
    assert caught.value.status_code == 503 and caught.value.code == "overloaded"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    waiting.close()
    server.wait_for("trit_waiting", 0)
    before = server.metric('trit_answers_total{reason="cancelled"}')
    for stream in running:
        stream.close()
    server.wait_for("trit_running", 0)
    assert server.metric('trit_answers_total{reason="cancelled"}') == before + 2
    assert chat(client).choices[0].message.content is not None


def test_answers_beside_others_are_those_given_alone(client: Any) -> None:
    def ask(seed: int) -> str:
        messages = [{"role": "user", "content": f"Number {seed % 3}"}]
        return str(chat(client, messages=messages, seed=seed, max_tokens=30).choices[0].message.content)

    alone = [ask(seed) for seed in range(6)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, range(6))) == alone


# ==== The process ====


def test_a_signal_lets_answers_end_and_stdout_stays_empty(model: Path) -> None:
    with serving.process(model, "--chat-format", "llama3", "-c", "600") as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        stream = iter(chat(client, max_tokens=400, logit_bias=NO_END, stream=True))
        first = next(stream)
        assert server.process is not None
        server.process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert first.choices[0].delta.role == "assistant" and rest[-1].choices[0].finish_reason == "length"
        stdout, stderr = server.process.communicate(timeout=serving.PATIENCE)
        assert server.process.returncode == 143 and stdout == "" and "Traceback" not in stderr
