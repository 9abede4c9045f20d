"""The class Llama over a tiny random model: shapes of results, options, state, threads."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import BusyError, ContextOverflowError, Llama
from runtime.chat_format import ChatFormatError
from runtime.errors import BackendError, CacheError
from runtime.sampler import OptionError
from tests import tiny
from tests.byte_tokenizer import ByteTokenizer

N_CTX = 96
MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = {"vocab_size": ByteTokenizer().vocab_size, "max_seq_len": 256}
    return tiny.write_trit(tmp_path_factory.mktemp("llama") / "tiny.trit", config)


@pytest.fixture
def open_llama(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that opens the tiny model, with bytes as tokens; all are closed at the end."""
    monkeypatch.setattr("runtime.llama.load_tokenizer", lambda file: ByteTokenizer(eos=["<|im_end|>"]))
    opened: list[Llama] = []

    def open_one(**options: Any) -> Llama:
        defaults = {"backend": "numpy", "n_ctx": N_CTX, "activations": "f32", "chat_format": "chatml"}
        opened.append(Llama(path, **{**defaults, **options}))
        return opened[-1]

    yield open_one
    for llm in opened:
        llm.close()


@pytest.fixture
def llm(open_llama: Any) -> Llama:
    return open_llama()  # type: ignore[no-any-return]


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


def test_the_files_generation_settings_are_the_defaults(path: Path, tmp_path: Path, open_llama: Any) -> None:
    llm = open_llama()
    assert llm.defaults == {}
    llm.defaults = {"temperature": 0.0}
    assert llm.sampler().options.temperature == 0 and llm.sampler(temperature=0.5).options.temperature == 0.5


# ==== Errors ====


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_ctx": 1}, "n_ctx must be a whole number, 2 or more, got 1"),
        ({"n_ctx": "8"}, "n_ctx"),
        ({"n_batch": 0}, "n_batch"),
        ({"n_threads": 0}, "n_threads"),
        ({"keep": N_CTX}, "keep must be less than the context of 96"),
        ({"kv": "q8"}, "q8 is not available yet; use f16 or auto"),
        ({"kv": "k=q4,v=q8"}, "q4 and q8 is not available yet"),
        ({"kv": "q7"}, "kv must be auto, f16"),
        ({"seed": -5}, "seed"),
        ({"chat_format": "alpaca"}, "unknown chat format"),
        ({"jinja": True, "chat_format": None}, "no chat template"),
    ],
)
def test_bad_arguments(open_llama: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises((OptionError, ChatFormatError), match=text):
        open_llama(**options)


def test_a_backend_that_cannot_be_had(open_llama: Any) -> None:
    with pytest.raises(BackendError):
        open_llama(backend="gpu")
    with pytest.raises(FileNotFoundError):
        Llama("no such file.trit")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"temperature": -1}, "temperature must be 0 or more"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"stop": ""}, "stop must be"),
        ({"stop": [3]}, "stop must be"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20, got 21"),
        ({"seed": 2**32}, "seed"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": [265]}, "there is no token 265; ids go from 0 to 264"),
        ({"prompt": [-1]}, "there is no token -1"),
        ({"prompt": [1.5]}, "a text or a list of token ids"),
        ({"prompt": [[1]]}, "a text or a list of token ids"),
    ],
)
def test_bad_options(llm: Llama, options: dict[str, Any], text: str) -> None:
    with pytest.raises(OptionError, match=text):
        llm.create_completion(**{"prompt": "x", **options})


def test_unknown_options_are_type_errors(llm: Llama) -> None:
    with pytest.raises(TypeError, match="tfs_z"):
        llm.create_completion("x", tfs_z=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="n"):
        llm.create_chat_completion(MESSAGES, n=2)  # type: ignore[call-arg]
    with pytest.raises(OptionError, match="top_logprobs needs logprobs"):
        llm.create_chat_completion(MESSAGES, top_logprobs=2)


def test_a_base_model_completes_but_does_not_chat(open_llama: Any) -> None:
    base = open_llama(chat_format=None)
    assert base.is_base
    assert isinstance(text_of(base.create_completion("x", max_tokens=2)), str)
    with pytest.raises(ChatFormatError, match="no chat template"):
        base.create_chat_completion(MESSAGES)


# ==== State ====


def test_a_saved_state_goes_on_where_it_was(llm: Llama, open_llama: Any) -> None:
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 0}
    llm.create_completion("a prompt of some length", **options)
    state = llm.save_state()
    expected = text_of(llm.create_completion("a prompt of some length, and more", **options))
    other = open_llama()
    other.load_state(state)
    result: Any = other.create_completion("a prompt of some length, and more", **options)
    assert result["usage"]["prompt_tokens_details"]["cached_tokens"] == len("a prompt of some length")
    assert text_of(result) == expected
    llm.reset()
    fresh: Any = llm.create_completion("a prompt of some length, and more", **options)
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0 and text_of(fresh) == expected


def test_damaged_and_foreign_states_change_nothing(llm: Llama, open_llama: Any, tmp_path: Path) -> None:
    llm.create_completion("abcdef", max_tokens=2, temperature=0)
    state = llm.save_state()
    for cut in range(0, len(state), max(1, len(state) // 50)):
        with pytest.raises(CacheError):
            llm.load_state(state[:cut])
        flipped = bytearray(state)
        flipped[cut] ^= 1
        with pytest.raises(CacheError):
            llm.load_state(bytes(flipped))
    assert llm.save_state() == state
    with pytest.raises(CacheError, match="capacity"):
        open_llama(n_ctx=N_CTX // 2).load_state(state)
    with pytest.raises(CacheError, match="got str"):
        llm.load_state("state")  # type: ignore[arg-type]
    config = {"vocab_size": ByteTokenizer().vocab_size, "n_layers": 1}
    with (
        Llama(tiny.write_trit(tmp_path / "other.trit", config), backend="numpy") as stranger,
        pytest.raises(CacheError, match="another model"),
    ):
        stranger.load_state(state)


# ==== Threads, cancelling, closing ====


def test_calls_from_several_threads_queue(llm: Llama) -> None:
    prompts = [f"thread {i}" for i in range(4)]

    def complete(prompt: str) -> str:
        return text_of(llm.create_completion(prompt, max_tokens=8, temperature=0))

    expected = [complete(prompt) for prompt in prompts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(complete, prompts * 2)) == expected * 2


def test_a_stream_in_the_same_thread_must_end_first(llm: Llama) -> None:
    stream: Any = llm.create_completion("ab", max_tokens=5, stream=True)
    next(stream)
    with pytest.raises(BusyError, match="still being streamed"):
        llm.create_completion("cd", max_tokens=1)
    stream.close()
    llm.create_completion("cd", max_tokens=1)


def test_cancelling(llm: Llama) -> None:
    cancel = threading.Event()
    cancel.set()
    result: Any = llm.create_completion("abc", cancel=cancel)
    assert result["choices"][0]["finish_reason"] == "cancelled" and text_of(result) == ""
    seen: list[tuple[int, int]] = []
    llm.create_completion("abc", max_tokens=0, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(3, 3)]


def test_a_closed_llama_says_so(open_llama: Any) -> None:
    llm = open_llama()
    with llm as same:
        assert same is llm
    llm.close()
    for call in (llm.save_state, llm.reset, lambda: llm("x"), lambda: llm.logits([1])):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_nothing_is_printed(llm: Llama, capfd: pytest.CaptureFixture[str]) -> None:
    llm.create_completion("abc", max_tokens=3)
    assert capfd.readouterr() == ("", "")
