"""Other runtimes as subjects of the benchmark."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.checkpoints import write_gguf
from tools.peers import PIECE, LlamaCpp

api = pytest.importorskip("llama_cpp")

DEPTH = 2 * PIECE + 276  # not whole pieces
IDS = [int(i) for i in np.random.default_rng(0).integers(512, size=DEPTH)]
Load = Callable[[Sequence[int], str], LlamaCpp]


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Give what loads a small model with some tokens in its context. Its heads of 32 are blocks of GGML's types."""
    path, loaded = tmp_path / "m.gguf", []
    write_gguf(path, {"hidden_size": 128})

    def one(before: Sequence[int], kv: str) -> LlamaCpp:
        loaded.append(LlamaCpp(str(path), 1, DEPTH + 8, before, kv))
        return loaded[-1]

    yield one
    for peer in loaded:
        peer.close()


def scores_after(peer: LlamaCpp, token: int) -> np.ndarray:
    """Read a token; returns: (512,) float32, the scores of what follows"""
    peer.read([token])
    return np.ctypeslib.as_array(api.llama_get_logits(peer._context), (512,)).copy()


def cached(peer: LlamaCpp, start: int, end: int) -> np.ndarray:
    """What the library has of some positions. returns: (bytes,) uint8, positions, keys and values"""
    memory = api.llama_get_memory(peer._context)
    api.llama_memory_seq_cp(memory, 0, 1, start, end)
    state = (ctypes.c_uint8 * api.llama_state_seq_get_size(peer._context, 1))()
    assert api.llama_state_seq_get_data(peer._context, state, len(state), 1) == len(state)
    api.llama_memory_seq_rm(memory, 1, -1, -1)
    return np.ctypeslib.as_array(state)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8", "q4"])
def test_a_context_is_filled_to_the_token(load: Load, kv: str) -> None:
    """Each position is there, once, as if all had been read, and none in the sequence that helps."""
    filled, read = load(IDS, kv), load([], kv)
    read._decode(IDS)
    assert filled._depth == DEPTH
    memory = api.llama_get_memory(filled._context)
    assert api.llama_memory_seq_pos_max(memory, 1) == -1
    assert len(cached(filled, 0, DEPTH)) == len(cached(read, 0, DEPTH)) > DEPTH
    for position in range(DEPTH):
        assert api.llama_memory_seq_pos_min(memory, 0) == position
        api.llama_memory_seq_rm(memory, 0, position, position + 1)
    assert api.llama_memory_seq_pos_max(memory, 0) == -1


def test_what_is_filled_are_copies_of_what_was_read(load: Load) -> None:
    filled, read = load(IDS, "f16"), load(IDS[:PIECE], "f16")
    first = cached(read, 0, PIECE)
    np.testing.assert_array_equal(cached(filled, 0, PIECE), first)
    differ = cached(filled, PIECE, 2 * PIECE) != first
    assert 0 < differ.sum() <= 4 * PIECE  # positions have four bytes
    assert (cached(filled, 2 * PIECE, DEPTH) != cached(read, 0, DEPTH - 2 * PIECE)).sum() <= 4 * (DEPTH - 2 * PIECE)


@pytest.mark.parametrize("kv", ["f32", "f16", "q8", "q4"])
def test_a_filled_context_is_read_again_and_again(load: Load, kv: str) -> None:
    peer = load(IDS, kv)
    memory = api.llama_get_memory(peer._context)
    first = scores_after(peer, 7)
    assert np.isfinite(first).all() and first.std() > 0.1
    assert api.llama_memory_seq_pos_max(memory, 0) == DEPTH
    peer.rewind()
    assert api.llama_memory_seq_pos_max(memory, 0) == DEPTH - 1
    np.testing.assert_array_equal(scores_after(peer, 7), first)


def test_the_library_still_logs_nowhere_when_a_peer_has_gone(load: Load, tmp_path: Path) -> None:
    """It keeps the address that it was given: nothing else may come to lie there."""
    load([], "f16")
    LlamaCpp(str(tmp_path / "m.gguf"), 1, 8, []).close()
    gc.collect()
    heard: list[object] = []
    others = [api.llama_log_callback(lambda *line: heard.append(line)) for _ in range(99)]
    assert not api.llama_model_load_from_file(b"nowhere.gguf", api.llama_model_default_params())
    assert len(others) == 99 and heard == []


@pytest.mark.parametrize(
    ("name", "made"),
    [("llama_init_from_model", 1), ("llama_model_size", 2), ("llama_decode", 2), ("llama_memory_can_shift", 3)],
)
def test_what_was_made_is_given_back_if_the_rest_fails(
    load: Load, monkeypatch: pytest.MonkeyPatch, name: str, made: int
) -> None:
    """Model, context, and the context that tokens are moved in: each is freed once."""
    alive: list[int] = []
    freed: list[int] = []

    def note(function: str, what: Callable[[int | None, int], None]) -> None:
        real = getattr(api, function)

        def noted(argument: int, *others: object) -> int | None:
            found: int | None = real(argument, *others)
            what(found, argument)
            return found

        monkeypatch.setattr(api, function, noted)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    for function in ("llama_model_load_from_file", "llama_init_from_model"):
        note(function, lambda found, _: alive.append(found or 0))
    for function in ("llama_free", "llama_model_free"):
        note(function, lambda _, argument: freed.append(argument))
    monkeypatch.setattr(api, name, fail)
    with pytest.raises(KeyboardInterrupt):
        load(IDS, "f32")
    assert len(alive) == made and sorted(freed) == sorted(alive)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("llama_state_seq_get_data", "could not copy"),
        ("llama_state_seq_set_data", "could not copy"),
        ("llama_memory_can_shift", "cannot move"),
    ],
)
def test_what_the_library_refuses_is_told(load: Load, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    monkeypatch.setattr(api, name, lambda *_: 0)
    with pytest.raises(RuntimeError, match=message):
        load(IDS, "f32")
