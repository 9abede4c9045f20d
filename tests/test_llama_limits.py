"""The class Llama where something is wrong, saved, shared between threads or closed."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runtime import BusyError, Llama
from runtime.errors import BackendError, CacheError
from runtime.messages.chat_pieces import ChatFormatError
from runtime.sampler import OptionError
from tests import tiny
from tests.byte_tokenizer import ByteTokenizer

N_CTX = 96
MESSAGES: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]


def text_of(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


# ==== Errors ====


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"n_ctx": 1}, "n_ctx must be a whole number, 2 or more, got 1"),
        ({"n_ctx": "8"}, "n_ctx"),
        ({"n_batch": 0}, "n_batch"),
        ({"n_threads": 0}, "n_threads"),
        ({"keep": N_CTX}, "keep must be less than the context of 96"),
        ({"kv": "q7"}, "kv must be auto, f32, f16, q8, q4 or k=CODEC,v=CODEC, got 'q7'"),
        ({"kv": "k=q8"}, "kv must be auto"),
        ({"kv": "k=auto,v=q8"}, "kv must be auto"),
        ({"kv": 8}, "kv must be auto"),
        ({"seed": -5}, "seed"),
        ({"chat_format": "alpaca"}, "unknown chat format"),
        ({"jinja": True, "chat_format": None}, "no chat template"),
    ],
)
def test_bad_arguments(open_llama: Any, options: dict[str, Any], text: str) -> None:
    with pytest.raises((OptionError, ChatFormatError), match=text):
        open_llama(**options)


def test_codecs_of_the_cache(open_llama: Any) -> None:
    whole, half = open_llama(kv="f32").cache_nbytes, open_llama(kv="k=f16,v=f16").cache_nbytes
    assert open_llama().cache_nbytes == whole == 2 * half  # "auto" with exact activations
    assert open_llama(activations="int8").cache_nbytes == half
    assert half > open_llama(kv="k=f16,v=q4").cache_nbytes > open_llama(kv="q4").cache_nbytes
    assert open_llama(kv="k=q8,v=q8").cache_nbytes == open_llama(kv="q8").cache_nbytes


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


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda llm: llm.tokenize(b"x"), "only a text can be tokenized, got bytes"),
        (lambda llm: llm.detokenize("x"), "only a list of token ids can be detokenized"),
        (lambda llm: llm.detokenize([1.5]), "only a list of token ids"),
        (lambda llm: llm(None), "a text or a list of token ids, got NoneType"),
        (lambda llm: llm("x", stop=5), "stop must be"),
        (lambda llm: llm("x", cancel=True), "cancel must be a threading.Event"),
        (lambda llm: llm("x", progress=5), "progress must be a function"),
        (lambda llm: llm.create_chat_completion(MESSAGES, logprobs=3), "logprobs must be True or False here"),
    ],
)
def test_misuse_is_explained(llm: Llama, call: Any, text: str) -> None:
    with pytest.raises(OptionError, match=text):
        call(llm)


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
    stream: Any = llm.create_completion("ab", max_tokens=5, temperature=0, stream=True)
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
