"""Sessions saved, loaded and reused: whatever way a context came about, the tokens that follow are the same."""

from __future__ import annotations

import io
import json
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import ContextOverflowError, Llama, budget
from runtime.budget import BY_QUALITY, Memory
from runtime.errors import CacheError
from runtime.generate import Session
from runtime.messages.conversation import Conversation
from runtime.model import Model
from runtime.sampler import OptionError
from runtime.state import FIXED, read_session, session_parts, write_private
from runtime.window import fit
from tests import tiny

KINDS = ("f32", "f16", "q8", "k=q8,v=q4", "q4")
TEXT = "It is a truth universally acknowledged that a ring which is full must be in want of tokens. "
LONG = TEXT * 3  # three windows and more


def ids_of(llm: Llama, prompt: str, max_tokens: int = 12) -> tuple[list[int], int]:
    """What a prompt is continued with, and how many of its tokens were reused."""
    run = llm.prepare(llm.tokenize(prompt), llm.sampler(temperature=0), max_tokens=max_tokens, overflow="slide")
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


MODULES = [{"layer": 0, "side": "k", "rank": 8, "hidden": None, "activation": None, "rope": "after", "biases": []}]


def opened(path: Path, config: dict[str, Any] | None = None, shifted: str = "", rope: str = "after") -> Session:
    """A session of a model with a projection of the keys of layer 0, and facts of those of layer 1.

    shifted: the tensor that has other numbers; rope: when the projection sees its keys
    """
    weights = tiny.random_weights(tiny.CONFIG)
    width = tiny.CONFIG["n_kv_heads"] * tiny.CONFIG["head_dim"]
    weights |= {f"layers.1.kv.k.{name}": np.full(width, 1.5, np.float32) for name in ("mean", "balance")}
    rng = np.random.default_rng(3)
    for name, shape in (("encoder", (8, width)), ("decoder", (width, 8))):
        weights[f"layers.0.kv.k.{name}"] = rng.standard_normal(shape).astype(np.float32)
    if shifted:
        weights[shifted] = weights[shifted] + np.float32(0.25)
    header = {"kv_modules": [{**MODULES[0], "rope": rope}], "requires": ["kv_modules"]}
    return Session(Model.load(tiny.write_trit(path, config, weights=weights, metadata=header), "numpy"), 40, 8, "q4")


@pytest.mark.parametrize(
    "change",
    [{"config": {"rope_theta": 20000.0}}, {"config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
     {"shifted": "layers.1.kv.k.mean"}, {"shifted": "layers.1.kv.k.balance"}, {"shifted": "layers.0.kv.k.encoder"},
     {"shifted": "layers.0.kv.k.decoder"}, {"rope": "before"}, {"shifted": "layers.0.wk"}],
    ids=str,
)  # fmt: skip
def test_whatever_the_stored_keys_depend_on_is_another_model(tmp_path: Path, change: dict[str, Any]) -> None:
    mine, same, other = opened(tmp_path / "a"), opened(tmp_path / "b"), opened(tmp_path / "c", **change)
    mine.forward([1, 2, 3])
    state = b"".join(session_parts(mine, mine.model.file.fingerprint))
    assert read_session(same, same.model.file.fingerprint, io.BytesIO(state)).ids == [1, 2, 3]
    with pytest.raises(CacheError, match=r"belongs to another model \('\w{64}'\); this one is \w{64}; open the one"):
        read_session(other, other.model.file.fingerprint, io.BytesIO(state))
    for session in (mine, same, other):
        session.model.close()


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


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a pipe with a name")
def test_a_session_takes_no_place_of_a_pipe_or_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, message in (("pipe", "is a device or a pipe"), ("folder", "is a folder"), ("x/y", "no such folder")):
        with pytest.raises(OSError, match=message):
            write_private(tmp_path / name, [b"new"])
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_session_file_carries_a_conversation(open_llama: Any, tmp_path: Path) -> None:
    llm, path = open_llama(), tmp_path / "a.session"
    told = Conversation(True, "Be kind.")
    told.ask(llm, "Hi")
    ids_of(llm, "abcdef", max_tokens=0)
    told.answered("Hello", [72, 101])
    whole = Conversation(told.chat, told.system, list(told.messages))
    told.ask(llm, "a question that was interrupted")
    llm.save_session(path, told.to_json())
    other = open_llama()
    assert other.load_session(path, lambda found: Conversation.from_json(found, 265)) == whole
    assert open_llama().load_session(path) == told.to_json()
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


# ==== Prompts longer than the context ====


def test_a_prompt_may_slide_or_lose_its_middle(llm: Llama) -> None:
    prompt = llm.tokenize(LONG)
    bias = dict.fromkeys(llm.tokenizer.eos_ids, -99.0)
    options: dict[str, Any] = {"max_tokens": 10, "temperature": 0, "logit_bias": bias}
    slid: Any = llm.create_completion(prompt, overflow="slide", **options)
    assert slid["context"] == {"truncated_tokens": 0, "dropped_tokens": len(prompt) + 9 - 96}
    assert slid["usage"]["prompt_tokens"] == len(prompt)
    cut: Any = llm.create_completion(prompt, overflow="truncate-middle", **options)
    assert cut["context"] == {"truncated_tokens": len(prompt) - 86, "dropped_tokens": 0}
    same: Any = llm.create_completion(prompt[:4] + prompt[-82:], **options)
    assert same["choices"] == cut["choices"] and same["context"] == {"truncated_tokens": 0, "dropped_tokens": 0}
    short: Any = llm.create_completion("short", overflow="truncate-middle", **options)
    assert short["context"]["truncated_tokens"] == 0


def test_what_is_left_of_a_cut_prompt() -> None:
    ids = list(range(100))
    assert fit(ids, "truncate-middle", 20, 4, None) == [0, 1, 2, 3, *range(89, 100)]
    assert fit(ids, "truncate-middle", 20, 4, 0) == [0, 1, 2, 3, *range(84, 100)]
    assert fit(ids, "truncate-middle", 20, 4, 1000) == [0, 1, 2, 3, *range(94, 100)]
    assert fit(ids, "truncate-middle", 20, 19, -1) == [*range(14), 99]
    assert fit(ids, "slide", 20, 4, None) == fit(ids, "error", 100, 4, None) == ids
    with pytest.raises(OptionError, match="error, slide or truncate-middle, got 'wrap'"):
        fit(ids, "wrap", 20, 4, None)


def test_ten_megabytes_are_refused_before_they_are_tokenised(llm: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("tokenised")

    monkeypatch.setattr(llm.tokenizer, "encode", never)
    text = "é" * 5_000_000
    for ask in (
        lambda: llm.create_completion(text),
        lambda: llm.create_chat_completion([{"role": "user", "content": text}]),
        lambda: llm.check_fits(text),
    ):
        with pytest.raises(ContextOverflowError, match="at least 10000000 tokens, the context holds 96"):
            ask()


# ==== Memory ====


def test_memory_is_told_and_refused_with_numbers(open_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = open_llama(activations="int8", kv="q8")
    assert llm.memory.cache == llm.cache_nbytes and llm.memory.total > llm.memory.cache + llm.memory.weights
    monkeypatch.setattr("runtime.budget.machine_memory", lambda: (llm.memory.total - 1, 10**12))
    with pytest.raises(OptionError, match=r"kv q8.*MB of memory; take a smaller context.*--force"):
        open_llama(activations="int8", kv="q8")
    assert open_llama(activations="int8", kv="q8", force=True).memory == llm.memory


def test_auto_takes_the_best_codec_for_which_memory_is_free(open_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {codec: Memory(1000, cache, 10) for codec, cache in zip(BY_QUALITY, (400, 300, 200, 100), strict=True)}
    for codec, memory in plans.items():
        monkeypatch.setattr("runtime.budget.machine_memory", lambda free=memory.total: (10**12, free))
        assert budget.choose(plans) == (codec, memory)
    monkeypatch.setattr("runtime.budget.machine_memory", lambda: (1110, 1))
    assert budget.choose(plans)[0] == "q4"  # the machine could hold it
    assert open_llama(activations="int8", force=True).cache_codec == "q4"
    monkeypatch.setattr("runtime.budget.machine_memory", lambda: (1109, 1))
    with pytest.raises(OptionError, match="kv q4"):
        budget.choose(plans)
    monkeypatch.setattr("runtime.budget.machine_memory", lambda: (None, None))
    assert budget.choose(plans)[0] == "f16"


def test_limits_of_control_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("a/b/memory.max", "max\n")
    write("a/memory.max", "5000\n")
    write("a/memory.current", "3000\n")
    write("a/memory.stat", "anon 900\nactive_file 100\ninactive_file 1000\n")
    write("memory/memory.limit_in_bytes", "7000\n")
    write("memory/memory.usage_in_bytes", "10\n")
    write("groups", "4:memory:/elsewhere\n3:cpu:/x\n0::/a/b\n")
    monkeypatch.setattr(budget, "_CGROUPS", tmp_path)
    monkeypatch.setattr(budget, "_GROUPS_OF_PROCESS", tmp_path / "groups")
    assert sorted(budget._cgroup_limits()) == [(5000, 1900), (7000, 10)]
    assert budget.machine_memory() == (5000, 3100)
