"""What shapes an answer: processors, criteria, JSON, functions; and embeddings."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest

from runtime import Llama
from runtime.errors import LogitsError
from runtime.messages.chat_pieces import ChatFormatError, Message
from runtime.messages.tool_calls import read_calls
from runtime.sampler import OptionError
from tests.byte_tokenizer import ByteTokenizer
from tests.test_chat_format import pick

HI: list[Any] = [{"role": "user", "content": "Hi"}]
LETTER = ord("q")
NUMBER = {"n": {"type": "integer"}}
PARAMETERS = {"type": "object", "properties": NUMBER, "required": ["n"], "additionalProperties": False}
COUNT = {"type": "function", "function": {"name": "count", "description": "Counts", "parameters": PARAMETERS}}
STOP = {"type": "function", "function": {"name": "stop"}}


def text(result: Any) -> str:
    return str(result["choices"][0]["text"])


def wanting(letter: int) -> Any:
    """A processor that lets one id through."""

    def only(ids: Any, logits: Any) -> Any:
        logits[np.arange(len(logits)) != letter] = -math.inf
        return logits

    return only


# ==== Processors and criteria ====


def test_a_processor_decides_before_the_sampler(llm: Llama) -> None:
    seen: list[list[int]] = []

    def watch(ids: Any, logits: Any) -> Any:
        seen.append(list(ids))
        return logits

    result: Any = llm.create_completion("ab", max_tokens=3, logprobs=1, logits_processor=[watch, wanting(LETTER)])
    assert text(result) == "qqq"
    assert seen == [list(b"ab"), list(b"abq"), list(b"abqq")]
    free: Any = llm.create_completion("ab", max_tokens=1, temperature=0, logprobs=1)
    chosen, top = (found["choices"][0]["logprobs"] for found in (result, free))
    assert chosen["top_logprobs"][0] == pytest.approx(top["top_logprobs"][0], abs=1e-4)  # the model's own


def test_the_same_seed_with_a_processor_that_does_nothing(llm: Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "seed": 4}
    assert text(llm("ab", **options)) == text(llm("ab", logits_processor=lambda ids, logits: logits, **options))


@pytest.mark.parametrize(
    ("processor", "text"),
    [
        (lambda ids, logits: None, "a logits processor must return 265 floating-point logits"),
        (lambda ids, logits: logits[:-1], "it returned float32 of shape"),
        (lambda ids, logits: np.zeros(265, int), "it returned int64"),
        (lambda ids, logits: np.full(265, -math.inf), "every token is forbidden"),
        ("x", "logits_processor must be a function"),
        ([1], "logits_processor must be a function"),
    ],
)
def test_wrong_processors(llm: Llama, processor: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        llm.create_completion("ab", max_tokens=2, logits_processor=processor)
    assert llm.create_completion("ab", max_tokens=2)


def test_logits_that_are_no_numbers(llm: Llama) -> None:
    with pytest.raises(LogitsError, match="a logit is nan: the model's file is damaged"):
        llm.create_completion("ab", max_tokens=2, logits_processor=lambda ids, logits: logits * math.nan)
    with pytest.raises(LogitsError, match="a logit is inf"):
        llm.create_completion("ab", max_tokens=2, temperature=0, logits_processor=lambda ids, logits: logits + math.inf)


def test_criteria_end_an_answer(llm: Llama) -> None:
    result: Any = llm.create_completion(
        "ab", logits_processor=wanting(LETTER), stopping_criteria=lambda ids, logits: len(ids) == 6
    )
    assert text(result) == "qqqq" and result["choices"][0]["finish_reason"] == "stop"
    with pytest.raises(OptionError, match="stopping_criteria"):
        llm.create_completion("ab", stopping_criteria=3)  # type: ignore[arg-type]


def test_an_error_in_a_callback_leaves_the_context_right(llm: Llama, open_llama: Any) -> None:
    def fail(*_: Any) -> Any:
        raise KeyError("mine")

    for name in ("logits_processor", "stopping_criteria", "progress"):
        with pytest.raises(KeyError, match="mine"):
            llm.create_completion("some words", max_tokens=3, temperature=0, **{name: fail})  # type: ignore[arg-type]
    options: dict[str, Any] = {"max_tokens": 8, "temperature": 0}
    assert text(llm("some words here", **options)) == text(open_llama()("some words here", **options))


def test_a_bias_for_a_token_that_is_not_there_is_found_at_once(llm: Llama) -> None:
    with pytest.raises(OptionError, match="there is no token 265; ids go from 0 to 264"):
        llm.create_completion("ab", logit_bias={265: 1.0}, stream=True)
    with pytest.raises(OptionError, match="from -1e6 to 1e6"):
        llm.create_completion("ab", logit_bias={1: 1e300})


# ==== JSON ====


@pytest.fixture
def speaker(open_llama: Any) -> Any:
    pytest.importorskip("llguidance")
    return open_llama(chat_format="llama3", n_ctx=2048)


def test_answers_are_json_of_the_schema(speaker: Llama) -> None:
    schema = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"enum": [1, 22]}},
              "required": ["name", "n"], "additionalProperties": False}  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for seed in range(20):
        options: dict[str, Any] = {"seed": seed, "max_tokens": 100, "temperature": 1.5, "top_k": 0}
        found: Any = speaker.create_completion("Say", response_format=wanted, **options)
        value = json.loads(text(found))
        assert set(value) == {"name", "n"} and len(value["name"]) <= 5 and value["n"] in (1, 22)
        assert found["choices"][0]["finish_reason"] == "stop"


def test_json_objects_and_plain_text(speaker: Llama) -> None:
    found: Any = speaker.create_chat_completion(HI, max_tokens=6, seed=1, response_format={"type": "json_object"})
    assert found["choices"][0]["message"]["content"].startswith("{")
    plain: Any = speaker.create_chat_completion(HI, max_tokens=6, seed=1, response_format={"type": "text"})
    none: Any = speaker.create_chat_completion(HI, max_tokens=6, seed=1)
    assert plain["choices"][0]["message"] == none["choices"][0]["message"]


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("json", "response_format must be"),
        ({"type": "xml"}, "response_format.type must be"),
        ({"type": "json_object", "schema": {}}, "unknown field 'schema'"),
        ({"type": "json_schema"}, "response_format.json_schema must be"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "stricter": 1}}, "unknown field 'stricter'"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "thing"}}}, "the JSON schema cannot be used"),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "("}}}, "cannot be used"),
        ({"type": "json_schema", "json_schema": {"schema": {"enum": ["x" * 70000]}}}, "at most 65536 are read"),
        ({"type": "json_schema", "json_schema": {"schema": {"enum": [math.nan]}}}, "is not JSON"),
    ],
)
def test_wrong_formats(speaker: Llama, wanted: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        speaker.create_completion("x", max_tokens=3, response_format=wanted)


def test_schemas_without_a_bottom(speaker: Llama) -> None:
    deep: dict[str, Any] = {}
    for _ in range(100_000):
        deep = {"properties": {"a": deep}}
    with pytest.raises(OptionError, match="nested more than 64 deep"):
        speaker.create_completion(
            "x", response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
        )


# ==== Functions ====

SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"id": "1", "type": "function", "function": {"name": "count", "arguments": '{"n": 3}'}}
TOLD = """\
<|begin_of_text|><|start_header_id|>system<|end_header_id|>

Environment: ipython
Cutting Knowledge Date: December 2023
Today Date: 26 Jul 2024

Be brief.<|eot_id|><|start_header_id|>user<|end_header_id|>

Given the following functions, please respond with a JSON for a function call with its proper arguments that best \
answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\
Do not use variables.

{
    "type": "function",
    "function": {
        "name": "stop"
    }
}

Hi<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{"name": "count", "parameters": {"n": 3}}<|eot_id|><|start_header_id|>ipython<|end_header_id|>

"{\\"is\\": \\"drei\\"}"<|eot_id|><|start_header_id|>assistant<|end_header_id|>

"""


def test_functions_are_told_of_as_llama_31_has_it() -> None:
    """The text that the makers' template renders for these messages and tools."""
    from runtime.messages.chat_format import Llama3Format
    from runtime.messages.tool_calls import read_tools

    tokenizer: Any = ByteTokenizer("<|begin_of_text|>", ["<|eot_id|>"])
    found = read_tools([STOP], None)
    assert found is not None and found.schema is None
    dates = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    messages = [SYSTEM, *HI, {"role": "assistant", "tool_calls": [CALL], "content": None},
                {"role": "tool", "tool_call_id": "1", "content": '{"is": "drei"}'}]  # fmt: skip
    ids = Llama3Format(dates=dates).with_tools(found.text).encode(tokenizer, messages)
    assert tokenizer.decode(ids, special=True) == TOLD


def test_other_formats_have_no_functions(llm: Llama) -> None:
    with pytest.raises(ChatFormatError, match="chatml has no functions to call"):
        llm.create_chat_completion(HI, tools=[STOP])
    with pytest.raises(ChatFormatError, match="has no functions"):
        llm.create_chat_completion([*HI, {"role": "tool", "content": "x"}])
    with pytest.raises(ChatFormatError, match="and there is none"):
        pick({}, "llama3").with_tools("x").encode(ByteTokenizer(), [Message("system", "x")])


def test_calls_of_functions(speaker: Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 90, "seed": 2, "tools": [COUNT, STOP]}
    result: Any = speaker.create_chat_completion(HI, tool_choice="required", **options)
    choice = result["choices"][0]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    one = {"type": "function", "function": {"name": "stop"}}
    named: Any = speaker.create_chat_completion(HI, tool_choice=one, **options)
    (call,) = named["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "stop", "arguments": "{}"} and call["id"].startswith("call_")
    chunks: Any = list(speaker.create_chat_completion(HI, tool_choice=one, stream=True, logprobs=True, **options))
    assert chunks[-1]["choices"][0]["delta"]["tool_calls"][0]["function"] == call["function"]
    assert all(chunk["choices"][0]["delta"].get("content", "") == "" for chunk in chunks)
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert sum(len(found["content"]) for found in told if found) == named["usage"]["completion_tokens"]


def test_text_is_streamed_though_functions_might_be_called(speaker: Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 5, "tools": [STOP], "logits_processor": wanting(LETTER)}
    chunks: Any = list(speaker.create_chat_completion(HI, stream=True, **options))
    assert [chunk["choices"][0]["delta"].get("content") for chunk in chunks] == ["", *"qqqqq", None]
    options["logits_processor"] = wanting(ord("{"))
    cut: Any = list(speaker.create_chat_completion(HI, stream=True, **options))
    assert cut[-2]["choices"][0]["delta"]["content"] == "{{{{{" and cut[-1]["choices"][0]["finish_reason"] == "length"
    unasked: Any = speaker.create_chat_completion(HI, tool_choice="none", **options)
    assert unasked["usage"]["prompt_tokens"] < 100


@pytest.mark.parametrize(
    "answer",
    ["", "count", '{"name": "other", "parameters": {}}', '{"name": "count", "parameters": [1]}', '["count"]',
     '{"name": ["count"]}', '{"name": "count", "parameters": {}} and more', "[" * 100_000],
)  # fmt: skip
def test_what_is_no_call(answer: str) -> None:
    assert read_calls(answer, ["count"]) == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"tools": {}}, "tools must be a list"),
        ({"tools": [{"type": "function"}]}, r"tools\[0\] must be"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "a function's name"),
        ({"tools": [{"type": "function", "function": {"name": "a", "x": 1}}]}, "unknown field 'x'"),
        ({"tools": [STOP, STOP]}, "two functions of the same name"),
        ({"tools": [STOP], "tool_choice": "must"}, "tool_choice must be"),
        ({"tools": [STOP], "tool_choice": {}}, "tool_choice must be"),
        ({"tool_choice": "required"}, "tool_choice needs tools"),
        ({"tools": [STOP], "tool_choice": "required", "response_format": {"type": "json_object"}}, "exclude"),
    ],
)
def test_wrong_functions(speaker: Llama, options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        speaker.create_chat_completion(HI, max_tokens=2, **options)


# ==== Embeddings ====


def test_embeddings_are_the_states_that_logits_come_from(llm: Llama) -> None:
    from formats import dequantize

    ids = llm.tokenize("some words")
    weights = dequantize(llm.model.file.tensors["output"])
    last = llm.embed(ids, pooling="last", normalize=False)
    assert weights @ last == pytest.approx(llm.logits(ids)[-1], abs=1e-4)
    states = [llm.embed(ids[: i + 1], pooling="last", normalize=False) for i in range(len(ids))]
    assert llm.embed(ids, normalize=False) == pytest.approx(np.mean(states, axis=0), abs=1e-4)
    assert np.linalg.norm(llm.embed("some words")) == pytest.approx(1)


def test_embedding_leaves_the_context_alone(llm: Llama) -> None:
    llm.create_completion("abcdef", max_tokens=1)
    llm.embed("something else")
    again: Any = llm.create_completion("abcdefgh", max_tokens=1)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 6


def test_embeddings_have_openais_shape(llm: Llama) -> None:
    found = llm.create_embedding(["ab", "cde"])
    assert [item["index"] for item in found["data"]] == [0, 1] and found["usage"]["prompt_tokens"] == 5
    assert found["data"][1]["embedding"] == pytest.approx(llm.embed("cde").tolist())
    assert len(llm.create_embedding([1, 2, 3])["data"]) == 1
    for wrong in ([], [""] * 2, 3, [[1], 2], [1.5], {"a": 1}):
        with pytest.raises(OptionError):
            llm.create_embedding(wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="pooling must be mean or last"):
        llm.embed("x", pooling="max")
