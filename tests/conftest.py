"""What all tests share."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import tiny
from tests.byte_tokenizer import ByteTokenizer
from tests.checkpoints import write_hf

# The same examples on every run, and no time limit per example on a busy machine.
settings.register_profile("house", derandomize=True, deadline=None, max_examples=60)
settings.load_profile("house")

# Started in the background or by nohup, the tests would hand ignored signals on to the programs that they stop.
for _name, _action in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, _name) and signal.getsignal(getattr(signal, _name)) is signal.SIG_IGN:
        signal.signal(getattr(signal, _name), _action)


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights over bytes, without a tokenizer of its own."""
    config = {"vocab_size": ByteTokenizer().vocab_size, "max_seq_len": 256}
    return tiny.write_trit(tmp_path_factory.mktemp("llama") / "tiny.trit", config)


@pytest.fixture
def open_llama(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that opens the tiny model, with bytes as tokens; all are closed at the end."""
    monkeypatch.setattr("runtime.engine.load_tokenizer", lambda file: ByteTokenizer(eos=["<|im_end|>"]))
    from runtime import Llama

    opened: list[Any] = []

    def open_one(**options: Any) -> Any:
        defaults = {"backend": "numpy", "n_ctx": 96, "activations": "f32", "chat_format": "chatml"}
        opened.append(Llama(tiny_path, **{**defaults, **options}))
        return opened[-1]

    yield open_one
    for llm in opened:
        llm.close()


@pytest.fixture
def llm(open_llama: Any) -> Any:
    """The tiny model with 96 tokens of context, exact, speaking ChatML."""
    return open_llama()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Hugging Face checkpoint; what is made of it can lie beside it, in a folder of the test's own."""
    write_hf(tmp_path / "source")
    return tmp_path / "source"
