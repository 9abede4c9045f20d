"""Perplexity and divergence against sums done by hand, with a model that is a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from runtime import evaluate

VOCAB = 11


class TableCache:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0

    def reset(self) -> None:
        self.length = 0


class TableModel:
    """Predicts from the last token alone: logits are rows of a table. It records what it was asked."""

    def __init__(self, seed: int = 0, vocab: int = VOCAB) -> None:
        self.table = np.random.default_rng(seed).normal(size=(vocab, vocab)).astype(np.float32)
        self.config = SimpleNamespace(vocab_size=vocab)
        self.read: list[list[int]] = []

    def new_cache(self, n_ctx: int) -> TableCache:
        return TableCache(n_ctx)

    def forward(self, ids: Sequence[int], cache: TableCache, logits: str | None) -> Any:
        if cache.length == 0:
            self.read.append([])
        self.read[-1].extend(int(i) for i in ids)
        cache.length += len(ids)
        return self.table[list(ids)] if logits == "all" else None

    def probabilities(self) -> np.ndarray:
        exp = np.exp(self.table.astype(np.float64))
        return exp / exp.sum(axis=1, keepdims=True)


def some_ids(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(7).integers(VOCAB, size=count)]


def losses_by_hand(model: TableModel, window: np.ndarray) -> list[float]:
    """Score llama.cpp's way: position p predicts p + 1, for p in ctx/2 .. ctx-2."""
    p, ctx = model.probabilities(), len(window)
    return [-math.log(p[window[i], window[i + 1]]) for i in range(ctx // 2, ctx - 1)]


def test_windows_are_whole_and_start_with_bos() -> None:
    ids = list(range(10)) * 5
    windows = evaluate.cut_windows(ids, 16, bos_id=99)
    assert [w.tolist() for w in windows] == [[99, *ids[16 * i + 1 : 16 * i + 16]] for i in range(3)]
    assert evaluate.cut_windows(ids, 16, bos_id=None)[1].tolist() == ids[16:32]
    assert len(evaluate.cut_windows(ids, 16, None, limit=2)) == 2


@pytest.mark.parametrize(("count", "ctx"), [(31, 16), (0, 512), (100, 7)])
def test_too_little_text_is_an_error(count: int, ctx: int) -> None:
    with pytest.raises(evaluate.EvaluationError, match="tokens"):
        evaluate.cut_windows([1] * count, ctx, None)


@pytest.mark.parametrize("logits_at_once", [VOCAB, 3 * VOCAB, 1 << 20])
@pytest.mark.parametrize("ctx", [8, 9, 16])
def test_perplexity_is_the_sum_by_hand(ctx: int, logits_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", logits_at_once)
    monkeypatch.setattr(evaluate, "ROWS_AT_ONCE", 2 * VOCAB)
    model = TableModel()
    windows = evaluate.cut_windows(some_ids(70), ctx, bos_id=1)
    result = evaluate.perplexity(model, windows)  # type: ignore[arg-type]
    losses = np.array([loss for window in windows for loss in losses_by_hand(model, window)])
    assert result.tokens == len(losses) == len(windows) * (ctx - ctx // 2 - 1)
    assert result.ppl == pytest.approx(math.exp(losses.mean()), rel=1e-6)
    assert result.stderr == pytest.approx(result.ppl * losses.std(ddof=1) / math.sqrt(len(losses)), rel=1e-6)
    assert result.kl is None
    assert [r[:-1] for r in model.read] != [] and all(len(r) == ctx - 1 for r in model.read)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity() -> None:
    model = TableModel()
    model.table[:] = 3.0
    result = evaluate.perplexity(model, evaluate.cut_windows(some_ids(64), 16, None))  # type: ignore[arg-type]
    assert result.ppl == pytest.approx(VOCAB) and result.stderr == pytest.approx(0.0, abs=1e-9)


def test_divergence_is_the_sum_by_hand() -> None:
    model, base = TableModel(1), TableModel(2)
    windows = evaluate.cut_windows(some_ids(80), 16, bos_id=0)
    found = evaluate.perplexity(model, windows, base).kl  # type: ignore[arg-type]
    assert found is not None
    q, p = model.probabilities(), base.probabilities()
    places = [window[i] for window in windows for i in range(8, 15)]
    kl = np.array([sum(p[t] * np.log(p[t] / q[t])) for t in places])
    assert found.mean == pytest.approx(kl.mean(), rel=1e-5)
    assert found.median == pytest.approx(np.median(kl), rel=1e-5)
    assert found.p999 == pytest.approx(np.quantile(kl, 0.999), rel=1e-5)
    assert found.maximum == pytest.approx(kl.max(), rel=1e-5)
    assert found.same_top1 == pytest.approx(np.mean([p[t].argmax() == q[t].argmax() for t in places]))
    assert found.base_ppl == pytest.approx(evaluate.perplexity(base, windows).ppl)  # type: ignore[arg-type]


def test_a_model_does_not_diverge_from_itself() -> None:
    windows = evaluate.cut_windows(some_ids(80), 16, None)
    found = evaluate.perplexity(TableModel(1), windows, TableModel(1)).kl  # type: ignore[arg-type]
    assert found is not None and found.mean == 0.0 and found.maximum == 0.0 and found.same_top1 == 1.0


def test_models_of_different_vocabularies_are_refused() -> None:
    windows = evaluate.cut_windows(some_ids(80), 16, None)
    with pytest.raises(evaluate.EvaluationError, match="11 and 12"):
        evaluate.perplexity(TableModel(), windows, TableModel(vocab=12))  # type: ignore[arg-type]


def test_broken_logits_are_an_error_not_a_figure() -> None:
    model = TableModel()
    model.table[3, 4] = np.nan
    with pytest.raises(evaluate.EvaluationError, match="not finite"):
        evaluate.perplexity(model, evaluate.cut_windows(some_ids(80), 16, None))  # type: ignore[arg-type]


@pytest.mark.parametrize("count", [2, 9, 33, 64])
def test_stream_scores_every_token_but_the_first(count: int) -> None:
    model, ids = TableModel(), some_ids(count)
    losses = evaluate.stream_losses(model, ids, 16)  # type: ignore[arg-type]
    p = model.probabilities()
    assert losses == pytest.approx([-math.log(p[a, b]) for a, b in pairwise(ids)], rel=1e-5)
    assert model.read == [ids[:-1]]


def test_progress_tells_the_perplexity_so_far() -> None:
    told: list[tuple[int, int, str]] = []
    windows = evaluate.cut_windows(some_ids(50), 16, None)
    result = evaluate.perplexity(TableModel(), windows, progress=lambda *a: told.append(a))  # type: ignore[arg-type]
    assert [(done, total) for done, total, _ in told] == [(1, 3), (2, 3), (3, 3)]
    assert told[-1][2] == f"ppl {result.ppl:.4f}"


@pytest.mark.parametrize("logits_at_once", [VOCAB, 5 * VOCAB, 1 << 20])
def test_streams_are_read_one_after_the_other(logits_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "LOGITS_AT_ONCE", logits_at_once)
    model, base, count, length = TableModel(1), TableModel(2), 3, 20
    streams = list(np.array(some_ids(count * length)).reshape(count, length))
    told: list[tuple[int, int, str]] = []
    progress = told.append
    scores = evaluate.stream_scores(model, streams, 8, base, lambda *a: progress(a))  # type: ignore[arg-type]
    assert model.read == base.read == [[int(i) for i in ids[:-1]] for ids in streams]
    assert told[-1] == (count * (length - 1), count * (length - 1), "") and told == sorted(told)
    p, b = model.probabilities(), base.probabilities()
    for first, stop in ((0, None), (8, None), (3, 9)):
        part = scores.at(count, first, stop)
        pairs = [(x, y) for ids in streams for x, y in list(pairwise(ids))[first:stop]]
        assert part.losses == pytest.approx([-math.log(p[x, y]) for x, y in pairs], rel=1e-5)
        assert part.base_losses == pytest.approx([-math.log(b[x, y]) for x, y in pairs], rel=1e-5)
        assert part.kl == pytest.approx([(b[x] * np.log(b[x] / p[x])).sum() for x, _ in pairs], rel=1e-4, abs=1e-7)
        assert part.same.tolist() == [p[x].argmax() == b[x].argmax() for x, _ in pairs]
