"""The class Llama over a tiny random model: shapes of results, options, state, threads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from formats.errors import HeaderError
from runtime import ContextOverflowError, Llama
from runtime.options import defaults_of_file

N_CTX = 96
MESSAGES: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


# ==== Results ====


def test_a_completion_has_openais_shape(llm: Llama) -> None:
    result: Any = llm.create_completion("Hello", max_tokens=5, seed=7)
    assert result["object"] == "text_completion" and result["id"].startswith("cmpl-")
    assert result["model"] == "tiny.trit" and isinstance(result["created"], int)
    choice = result["choices"][0]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert choice["index"] == 0 and choice["finish_reason"] == "length" and choice["logprobs"] is None
    assert result["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert result["seed"] == 7 and result["options"]["temperature"] == 0.8
    assert result["timings"]["prompt_n"] == 5 and result["timings"]["predicted_n"] == 5


def test_a_chat_completion_has_openais_shape(llm: Llama) -> None:
    result: Any = llm.create_chat_completion(MESSAGES, max_tokens=4, temperature=0)
    assert result["object"] == "chat.completion" and result["id"].startswith("chatcmpl-")
    choice = result["choices"][0]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert choice["message"]["role"] == "assistant" and isinstance(choice["message"]["content"], str)
    prompt = llm.require_chat_format().encode(llm.tokenizer, MESSAGES)
    assert result["usage"]["prompt_tokens"] == len(prompt)


def test_chunks_add_up_to_the_whole(llm: Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "seed": 3, "temperature": 1.5}
    whole: Any = llm.create_completion("Once", **options)
    chunks: Any = list(llm.create_completion("Once", stream=True, **options))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text_of(whole)
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert chunks[-1]["seed"] == 3 and chunks[-1]["usage"]["completion_tokens"] == 20
    assert not any("usage" in chunk for chunk in chunks[:-1])


def test_chat_chunks(llm: Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 20, "seed": 3}
    whole: Any = llm.create_chat_completion(MESSAGES, **options)
    chunks: Any = list(llm.create_chat_completion(MESSAGES, stream=True, **options))
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {}
    text = "".join(delta.get("content", "") for delta in deltas)
    assert text == whole["choices"][0]["message"]["content"]


def test_calling_the_object_completes(llm: Llama) -> None:
    assert text_of(llm("ab", max_tokens=6, temperature=0)) == text_of(
        llm.create_completion("ab", max_tokens=6, temperature=0)
    )


# ==== Log probabilities and logits ====


def test_logits_are_those_of_a_fresh_context(llm: Llama) -> None:
    ids = llm.tokenize("some text")
    first = llm.logits(ids)
    assert first.shape == (len(ids), llm.config.vocab_size) and first.dtype == np.float32
    llm.create_completion("other things first", max_tokens=3)
    assert np.array_equal(llm.logits(ids), first)
    assert llm.logits(ids[:1]).shape == (1, llm.config.vocab_size)


def test_logprobs_are_those_of_the_logits(llm: Llama) -> None:
    result: Any = llm.create_completion("abc", max_tokens=4, temperature=0, logprobs=2)
    found = result["choices"][0]["logprobs"]
    ids = llm.tokenize("abc")
    for own, best in zip(found["token_logprobs"], found["top_logprobs"], strict=True):
        row = llm.logits(ids)[-1].astype(np.float64)
        expected = row - row.max() - math.log(np.exp(row - row.max()).sum())
        assert own == pytest.approx(expected.max(), abs=1e-4)
        assert sorted(best.values()) == pytest.approx(np.sort(expected)[-2:], abs=1e-4)
        ids.append(int(expected.argmax()))
    assert len(found["tokens"]) == len(found["text_offset"]) == 4


def test_chat_logprobs(llm: Llama) -> None:
    options: dict[str, Any] = {"max_tokens": 5, "seed": 1, "logprobs": True, "top_logprobs": 3}
    result: Any = llm.create_chat_completion(MESSAGES, **options)
    content = result["choices"][0]["logprobs"]["content"]
    assert len(content) == 5
    for entry in content:
        assert set(entry) == {"token", "logprob", "bytes", "top_logprobs"} and len(entry["top_logprobs"]) == 3
        assert entry["logprob"] <= entry["top_logprobs"][0]["logprob"] + 1e-9
    llm.reset()  # so that the prompt is read in the same steps, and rounds in the same way
    chunks: Any = list(llm.create_chat_completion(MESSAGES, stream=True, **options))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert [entry for found in streamed if found for entry in found["content"]] == content


# ==== Reuse, limits, seeds ====


def test_the_context_is_reused_and_changes_nothing(llm: Llama, open_llama: Any) -> None:
    llm.create_completion("abcdef", max_tokens=8, temperature=0)
    again: Any = llm.create_completion("abcdefgh", max_tokens=8, temperature=0)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 6
    fresh: Any = open_llama().create_completion("abcdefgh", max_tokens=8, temperature=0)
    assert text_of(again) == text_of(fresh)


def test_a_prompt_longer_than_the_context(llm: Llama) -> None:
    with pytest.raises(ContextOverflowError, match="the prompt has 97 tokens, the context holds 96"):
        llm.create_completion("x" * (N_CTX + 1))
    with pytest.raises(ContextOverflowError):
        llm.create_completion("x" * (N_CTX + 1), stream=True)  # before the first chunk is asked for
    with pytest.raises(ContextOverflowError):
        llm.logits([1] * (N_CTX + 1))


def test_generation_ends_with_the_context_or_slides(llm: Llama) -> None:
    bias = dict.fromkeys(llm.tokenizer.eos_ids, -math.inf)
    full: Any = llm.create_completion("x" * 90, temperature=0, logit_bias=bias)
    assert full["usage"]["completion_tokens"] == 6 and full["choices"][0]["finish_reason"] == "length"
    exact: Any = llm.create_completion("x" * N_CTX, temperature=0, logit_bias=bias)
    assert exact["usage"]["completion_tokens"] == 1
    slid: Any = llm.create_completion("x" * 90, max_tokens=50, temperature=0, logit_bias=bias)
    assert slid["usage"]["completion_tokens"] == 50


def test_the_system_message_stays_when_the_context_slides(llm: Llama, open_llama: Any) -> None:
    def sinks(model: Llama) -> int:
        return model.prepare_chat(MESSAGES, model.sampler()).sinks

    assert sinks(llm) >= len("<system\nBe kind.>\n<user\n")
    assert sinks(open_llama(keep=9)) == 9
    assert llm.prepare([1, 2], llm.sampler()).sinks == 4


def test_seeds(llm: Llama, open_llama: Any) -> None:
    def draw(model: Llama, **options: Any) -> tuple[str, int]:
        wild: dict[str, Any] = {"max_tokens": 12, "temperature": 2.0, "top_k": 0, "top_p": 1.0}
        result: Any = model.create_completion("ab", **wild, **options)
        return text_of(result), result["seed"]

    text, seed = draw(llm)
    assert draw(llm, seed=seed) == (text, seed)
    assert draw(llm)[1] != seed
    fixed = open_llama(seed=11)
    assert draw(fixed) == draw(fixed) and draw(fixed)[1] == 11 and draw(fixed, seed=12)[1] == 12


def test_stop_ids_and_stop_strings(llm: Llama) -> None:
    token = llm.tokenizer.special["<|im_end|>"]
    ended: Any = llm.create_completion("ab", temperature=0, logit_bias={token: 1000.0})
    assert text_of(ended) == "" and ended["choices"][0]["finish_reason"] == "stop"
    letter = ord("q")
    stopped: Any = llm.create_completion("ab", temperature=0, logit_bias={letter: 1000.0}, stop="qqq")
    assert text_of(stopped) == "" and stopped["usage"]["completion_tokens"] == 3


def test_the_files_generation_settings_are_the_defaults() -> None:
    generation = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1, "top_k": None, "do_sample": True}
    expected = {"temperature": 0.6, "top_p": 0.9, "repeat_penalty": 1.1}
    assert defaults_of_file(generation, "x.trit") == expected and defaults_of_file(None, "x.trit") == {}
    for wrong in ({"temperature": -1}, {"top_k": "many"}, [1]):
        with pytest.raises(HeaderError, match=r"^x\.trit: generation"):
            defaults_of_file(wrong, "x.trit")


def test_options_that_are_given_go_before_the_defaults(llm: Llama) -> None:
    llm.defaults = {"temperature": 0.0}
    assert llm.sampler().options.temperature == 0 and llm.sampler(temperature=0.5).options.temperature == 0.5


