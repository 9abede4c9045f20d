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

from formats.conversion.convert import convert
from formats.sources.source import open_source
from runtime import evaluate
from runtime.model import Model
from runtime.tokenizer import Tokenizer, load_tokenizer
from tests import tiny

pytestmark = pytest.mark.skipif(not tiny.MORE_FIXTURES, reason="needs TRITLLAMA_FIXTURES")

PPL_TOLERANCE = 0.001  # of the float32 figure, relative
JUMP = 1.02  # perplexity after the wrap, relative to a plain context of the same length
WORST_BLOCK = 0.2  # natural logarithm


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
    """Four windows through a ring: as good as fresh contexts that are as long as the ring at the same places.

    The window is 384, because this model is weak where its context ends, in a plain context too."""
    model = Model.load(kjv, activations="f32")
    tokenizer = load_tokenizer(model.file)
    ctx, step = 384, 16
    bos_id = tokenizer.bos_id
    assert bos_id is not None
    ids = held_out(tokenizer)[: 4 * ctx]
    losses = evaluate.stream_losses(model, ids, ctx)
    fresh = []
    for start in range(ctx, len(ids), step):
        window = [bos_id, *ids[start - ctx + step + 1 : start + step]]
        logits = model.forward(window, model.new_cache(ctx), "all")
        assert logits is not None
        log_p = evaluate.log_softmax(logits[-step - 1 : -1])
        fresh.append(-log_p[np.arange(step), window[-step:]])
    plain = np.concatenate(fresh)
    wrapped = losses[ctx - 1 :]
    assert len(wrapped) == len(plain)
    assert np.exp(wrapped.mean()) <= JUMP * np.exp(plain.mean())
    worse = (wrapped - plain).reshape(-1, 64).mean(axis=1)
    assert worse.max() <= WORST_BLOCK, "a block of 64 tokens is far worse than in a plain context"
