"""A small model trained on real text: its perplexity, what it writes, and the wrap of the ring.

It is too large for the repository: the folder named by TRITLLAMA_FIXTURES has it (see tests/data/README.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.convert import convert
from formats.source import open_source
from runtime import evaluate
from runtime.model import Model
from runtime.tokenizer import Tokenizer, load_tokenizer
from tests import tiny

pytestmark = pytest.mark.skipif(not tiny.MORE_FIXTURES, reason="needs TRITLLAMA_FIXTURES")

PPL_TOLERANCE = 0.001  # of the float32 figure, relative
JUMP = 1.05  # perplexity after the wrap, relative to a plain context of the same length


@pytest.fixture(scope="module")
def kjv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kjv") / "kjv.trit"
    convert(open_source(tiny.fixture_folder("kjv-5m")), path, "f16")
    return path


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tiny.fixture_folder("kjv-golden.json").read_text())
    return found


def held_out(tokenizer: Tokenizer) -> list[int]:
    text = (tiny.fixture_folder("kjv-5m") / "held-out.txt").read_text(encoding="utf-8")
    return tokenizer.encode(text, add_bos=True)


@pytest.mark.parametrize("activations", ["f32", "int8"])
def test_perplexity_is_that_of_float32(activations: str, kjv: Path, golden: dict[str, Any]) -> None:
    model = Model.load(kjv, activations=activations)
    tokenizer = load_tokenizer(model.file)
    windows = evaluate.cut_windows(held_out(tokenizer), golden["ctx"], tokenizer.bos_id)
    found = evaluate.perplexity(model, windows)
    assert found.tokens == golden["tokens"] and found.windows == golden["windows"]
    assert found.ppl == pytest.approx(golden["perplexity"], rel=PPL_TOLERANCE)
    assert found.stderr == pytest.approx(golden["stderr"], rel=PPL_TOLERANCE)


def test_greedy_continuations_are_those_of_float32(kjv: Path, golden: dict[str, Any]) -> None:
    model = Model.load(kjv, activations="f32")
    tokenizer = load_tokenizer(model.file)
    for prompt, expected in golden["greedy"].items():
        assert tokenizer.encode(prompt, add_bos=True) == expected["ids"]
        assert greedy(model, expected["ids"], len(expected["greedy"])) == expected["greedy"]


def greedy(model: Model, ids: Sequence[int], count: int) -> list[int]:
    cache = model.new_cache(len(ids) + count)
    out, given = [], list(ids)
    for _ in range(count):
        logits = model.forward(given, cache, "last")
        assert logits is not None
        given = [int(logits.argmax())]
        out += given
    return out


def test_no_jump_of_perplexity_at_the_wrap(kjv: Path) -> None:
    """Six windows through a ring: as good as a fresh context of 256 to 512 tokens at the same places."""
    model = Model.load(kjv, activations="f32")
    tokenizer = load_tokenizer(model.file)
    ctx = 512
    ids = held_out(tokenizer)[: 6 * ctx]
    losses = evaluate.stream_losses(model, ids, ctx)
    fresh = []
    for start in range(ctx, len(ids) - ctx // 2, ctx // 2):
        window = [tokenizer.bos_id, *ids[start - ctx // 2 + 1 : start + ctx // 2]]
        logits = model.forward(window, model.new_cache(ctx), "all")
        assert logits is not None
        log_p = evaluate.log_softmax(logits[ctx // 2 - 1 : -1])
        fresh.append(-log_p[np.arange(ctx // 2), window[ctx // 2 :]])
    plain = np.concatenate(fresh)
    wrapped = losses[ctx - 1 : ctx - 1 + len(plain)]
    assert np.exp(wrapped.mean()) <= JUMP * np.exp(plain.mean())
    blocks = wrapped[: len(wrapped) // 64 * 64].reshape(-1, 64).mean(axis=1)
    same = plain[: len(plain) // 64 * 64].reshape(-1, 64).mean(axis=1)
    assert (blocks - same).max() <= 0.5, "a block of 64 tokens is far worse than with a plain context"
