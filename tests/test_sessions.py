"""Sessions saved, loaded and reused: whatever way a context came about, the tokens that follow are the same."""

from __future__ import annotations

import json
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from runtime import Llama
from runtime.conversation import Conversation
from runtime.errors import CacheError
from runtime.state import FIXED, write_private

KINDS = ("f32", "f16", "q8", "k=q8,v=q4", "q4")
TEXT = "It is a truth universally acknowledged that a ring which is full must be in want of tokens. "
LONG = TEXT * 3  # three windows and more


def ids_of(llm: Llama, prompt: str, max_tokens: int = 12) -> tuple[list[int], int]:
    """What a prompt is continued with, and how many of its tokens were reused."""
    run = llm.prepare(llm.tokenize(prompt), llm.sampler(temperature=0), max_tokens=max_tokens, slide=True)
    run.stop_ids = ()
    ids = [token for piece in llm.pieces(run) for token, _ in piece.tokens]
    return ids, run.stats.reused_tokens


@pytest.mark.parametrize("prompt", [TEXT[:60], LONG], ids=["one window", "three windows"])
@pytest.mark.parametrize("kv", KINDS)
def test_saved_in_the_middle_reused_and_in_any_chunks(open_llama: Any, kv: str, prompt: str) -> None:
    half = prompt[: len(prompt) // 2]
    expected, reused = ids_of(open_llama(kv=kv), prompt)
    assert reused == 0
    for n_batch in (1, 7, 64):
        llm = open_llama(kv=kv, n_batch=n_batch)
        ids_of(llm, half, max_tokens=0)
        state = llm.save_state()
        assert ids_of(llm, prompt) == (expected, len(half))
        other = open_llama(kv=kv, n_batch=n_batch)
        other.load_state(state)
        assert ids_of(other, prompt) == (expected, len(half))


def test_sinks_are_those_that_were_asked_for_though_a_beginning_is_reused(open_llama: Any) -> None:
    """A completion comes first and shares its first token with a chat, whose system message must stay."""
    fresh, used = open_llama(), open_llama()
    used.create_completion([263, 115], max_tokens=1)
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": LONG[:40]}]
    bias = dict.fromkeys(fresh.tokenizer.eos_ids, -100.0)
    answers = [llm.create_chat_completion(messages, max_tokens=40, temperature=0, logit_bias=bias)
               for llm in (fresh, used)]  # fmt: skip
    assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
    assert answers[0]["choices"] == answers[1]["choices"]


def forged(state: bytes, header: bytes, ids: bytes | None = None) -> bytes:
    """A state with another header and right checksums."""
    length = FIXED.unpack_from(state)[2]
    old = json.loads(state[FIXED.size : FIXED.size + length])
    end = FIXED.size + length + 4 * old["tokens"]
    body = struct.pack("<8sII", b"TRITSESS", 2, len(header)) + header
    body += state[FIXED.size + length : end] if ids is None else ids
    return body + struct.pack("<I", zlib.crc32(body)) + state[end + 4 :]


@pytest.mark.parametrize(
    "change",
    [{"tokens": 5}, {"tokens": 7}, {"tokens": -1}, {"tokens": True}, {"tokens": 1e9}, {"tokens": 10**40},
     {"tokens": None}, {"model": "another"}, {"model": ["x"]}, {"model": None}],
    ids=str,
)  # fmt: skip
def test_forged_headers_are_refused_and_change_nothing(llm: Llama, change: dict[str, Any]) -> None:
    ids_of(llm, "abcdef", max_tokens=0)
    state = llm.save_state()
    header = {"model": llm.fingerprint, "tokens": 6, "conversation": None}
    llm.load_state(forged(state, json.dumps(header).encode()))
    with pytest.raises(CacheError):
        llm.load_state(forged(state, json.dumps({**header, **change}).encode()))
    assert llm.save_state() == state


@pytest.mark.parametrize("header", [b"", b"[]", b"{}", b"3", b"\xff", b"[" * 99_999, b"9" * 9999], ids=lambda h: h[:4])
def test_junk_in_place_of_the_header_is_refused(llm: Llama, header: bytes) -> None:
    ids_of(llm, "abcdef", max_tokens=0)
    with pytest.raises(CacheError):
        llm.load_state(forged(llm.save_state(), header))


@pytest.mark.parametrize("first", [-1, 265, 2**31 - 1])
def test_ids_outside_of_the_vocabulary_are_refused(llm: Llama, first: int) -> None:
    ids_of(llm, "abcdef", max_tokens=0)
    state = llm.save_state()
    header = json.dumps({"model": llm.fingerprint, "tokens": 6, "conversation": None}).encode()
    with pytest.raises(CacheError, match="vocabulary"):
        llm.load_state(forged(state, header, struct.pack("<6i", first, 1, 2, 3, 4, 5)))


# ==== Files ====


def test_a_session_file_is_private_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    path.write_bytes(b"old")
    os.chmod(path, 0o644)
    write_private(path, [b"ne", memoryview(b"w")])
    assert path.read_bytes() == b"new"
    if os.name == "posix":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600

    def failing() -> Any:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_private(path, failing())
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_a_session_file_carries_a_conversation(open_llama: Any, tmp_path: Path) -> None:
    llm, path = open_llama(), tmp_path / "a.session"
    told = Conversation(True, "Be kind.")
    told.ask(llm, "Hi")
    ids_of(llm, "abcdef", max_tokens=0)
    told.answered("Hello", [72, 101])
    llm.save_session(path, told.to_json())
    other = open_llama()
    assert other.load_session(path, lambda found: Conversation.from_json(found, 265)) == told
    assert other.save_state() == llm.save_state()


@pytest.mark.parametrize(
    "value",
    [None, [], {}, {"chat": 1, "system": None, "messages": [], "texts": []},
     {"chat": True, "system": 3, "messages": [], "texts": []},
     {"chat": True, "system": None, "messages": [["user"]], "texts": []},
     {"chat": True, "system": None, "messages": [["user", "x", [265]]], "texts": []},
     {"chat": True, "system": None, "messages": [["root", "x", []]], "texts": []},
     {"chat": True, "system": None, "messages": [[["user"], "x", []]], "texts": []},
     {"chat": False, "system": None, "messages": [], "texts": [["1"]]}],
    ids=str,
)  # fmt: skip
def test_what_is_no_conversation_leaves_the_context_as_it_was(open_llama: Any, tmp_path: Path, value: Any) -> None:
    llm, path = open_llama(), tmp_path / "a.session"
    llm.save_session(path, value)
    ids_of(llm, "abc", max_tokens=0)
    before = llm.save_state()
    with pytest.raises(CacheError, match="no conversation"):
        llm.load_session(path, lambda found: Conversation.from_json(found, 265))
    assert llm.save_state() == before
