"""How well a model predicts a text: perplexity, and the divergence from another model's predictions.

The protocol is llama.cpp's, so that figures compare: the ids are cut into windows of `ctx`, each read from a
fresh context with its first id replaced by BOS, and the second half of each window is scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .model import Model
    from .ring.cache import KVRing

Floats = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]
Progress = Callable[[int, int, str], None]

MIN_CTX = 8
LOGITS_AT_ONCE = 1 << 24  # 64 MB of float32: a window of a 128K vocabulary would be 262 MB
ROWS_AT_ONCE = 1 << 21  # values widened to float64 together


class EvaluationError(ValueError):
    """The text, the window or the pair of models cannot be evaluated."""


@dataclass(frozen=True)
class Divergence:
    """How the predictions differ from a base model's, over all scored tokens (natural logarithms)."""

    mean: float
    stderr: float
    median: float
    p999: float
    maximum: float
    same_top1: float
    base_ppl: float


@dataclass(frozen=True)
class Result:
    """Perplexity over `tokens` scored tokens with its standard error; kl only where there is a base model."""

    ppl: float
    stderr: float
    tokens: int
    windows: int
    ctx: int
    kl: Divergence | None = None


@dataclass(frozen=True)
class Scores:
    """Of n tokens. losses, base_losses, kl: (n,) float64, same: (n,) bool; the last three empty without a base."""

    losses: Floats
    base_losses: Floats
    kl: Floats
    same: npt.NDArray[np.bool_]

    def at(self, streams: int, first: int, stop: int | None = None) -> Scores:
        """Those of the positions first .. stop - 1 of each of several streams that stand one after the other."""

        def cut(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return x.reshape(streams, -1)[:, first:stop].ravel()

        return Scores(cut(self.losses), cut(self.base_losses), cut(self.kl), cut(self.same))


def log_softmax(logits: npt.NDArray[np.float32]) -> Floats:
    """logits: (n, vocab_size) float32, out: (n, vocab_size) float64"""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    x -= np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return x


def cut_windows(ids: Sequence[int], ctx: int, bos_id: int | None, limit: int | None = None) -> list[Ids]:
    """Cut ids into whole windows; what is left over is not used.

    bos_id: replaces the first id of each window, None for a tokenizer that adds none; limit: at most so many.
    Raises EvaluationError for less than two windows of text, or a window too short to score.
    """
    if ctx < MIN_CTX:
        raise EvaluationError(f"a context of {ctx} is too short to score; it takes at least {MIN_CTX} tokens")
    if len(ids) < 2 * ctx:
        raise EvaluationError(
            f"the text has {len(ids)} tokens, but two windows of {ctx} are the least that can be scored; "
            "give a longer text or a smaller context"
        )
    count = len(ids) // ctx
    if limit is not None:
        count = min(count, limit)
    cut = np.array(ids[: count * ctx], dtype=np.int64).reshape(count, ctx)
    if bos_id is not None:
        cut[:, 0] = bos_id
    return list(cut)


def perplexity(
    model: Model,
    windows: Sequence[Ids],
    base: Model | None = None,
    progress: Progress | None = None,
) -> Result:
    """Score the second half of every window; with `base`, compare with its predictions at the same places.

    windows: from cut_windows; progress: called with (windows done, windows, "ppl N").
    Raises EvaluationError if the two models have different vocabularies.
    """
    models = _pair(model, base)
    ctx = len(windows[0])
    caches = [each.new_cache(ctx) for each in models]
    scores: list[Scores] = []
    total = 0.0
    for done, window in enumerate(windows, 1):
        for cache in caches:
            cache.reset()
        parts = [
            _score(logits, window[start + 1 : start + 1 + len(logits[0])])
            for start, logits in _second_half(models, caches, window)
        ]
        scores += parts
        total += sum(float(part.losses.sum()) for part in parts)
        if progress is not None:
            progress(done, len(windows), f"ppl {math.exp(total / (done * (ctx - ctx // 2 - 1))):.4f}")
    whole = _join(scores)
    ppl, stderr = mean_perplexity(whole.losses)
    kl = None if base is None else divergence(whole)
    return Result(ppl, stderr, len(whole.losses), len(windows), ctx, kl)


def stream_losses(model: Model, ids: Sequence[int], ctx: int, progress: Progress | None = None) -> Floats:
    """Read a text as one stream through a ring of `ctx` tokens: the loss of each token after the first.

    This is what a long conversation goes through: losses[ctx:] are those after the ring has wrapped.
    out: (len(ids) - 1,) float64
    """
    return stream_scores(model, [np.asarray(ids, np.int64)], ctx, progress=progress).losses


def stream_scores(
    model: Model, streams: Sequence[Ids], ctx: int, base: Model | None = None, progress: Progress | None = None
) -> Scores:
    """Read texts, each as one stream through an empty ring of `ctx` tokens; with `base`, compare its predictions.

    streams: (n,) ids each, all of one length; progress: called with (tokens done, tokens in all, "")
    returns: scores of all tokens of a stream but its first, stream after stream
    """
    models = _pair(model, base)
    caches = [each.new_cache(ctx) for each in models]
    step = min(_logit_rows(model), max(1, ctx // 2))
    scores: list[Scores] = []
    last = len(streams[0]) - 1
    for number, ids in enumerate(streams):
        for cache in caches:
            cache.reset()
        for start in range(0, last, step):
            given, wanted = ids[start : min(start + step, last)], ids[start + 1 : start + step + 1]
            logits = [_logits(each, given, cache) for each, cache in zip(models, caches, strict=True)]
            scores.append(_score(logits, wanted))
            if progress is not None:
                progress(number * last + start + len(given), len(streams) * last, "")
    return _join(scores)


def _pair(model: Model, base: Model | None) -> list[Model]:
    """The models to run. Raises EvaluationError if they have different vocabularies."""
    if base is None:
        return [model]
    if base.config.vocab_size != model.config.vocab_size:
        raise EvaluationError(
            f"the models have vocabularies of {model.config.vocab_size} and {base.config.vocab_size} tokens; "
            "only models with the same tokenizer can be compared"
        )
    return [model, base]


def mean_perplexity(losses: Floats) -> tuple[float, float]:
    """Return exp of the mean loss and its standard error. losses: (n,) natural logarithms"""
    ppl = float(np.exp(losses.mean()))
    error = float(losses.std()) / math.sqrt(len(losses) - 1) if len(losses) > 1 else 0.0
    return ppl, ppl * error


def _second_half(
    models: Sequence[Model], caches: Sequence[KVRing], window: Ids
) -> Iterator[tuple[int, list[npt.NDArray[np.float32]]]]:
    """Yield (position, logits of each model from there on), bounded in memory. logits: (n, vocab_size)"""
    first, last = len(window) // 2, len(window) - 1
    for model, cache in zip(models, caches, strict=True):
        model.forward(window[:first], cache, None)
    step = _logit_rows(models[0])
    for start in range(first, last, step):
        ids = window[start : min(start + step, last)]
        yield start, [_logits(model, ids, cache) for model, cache in zip(models, caches, strict=True)]


def _logits(model: Model, ids: Ids, cache: KVRing) -> npt.NDArray[np.float32]:
    """ids: (n,) int64, out: (n, vocab_size)"""
    logits = model.forward(ids, cache, "all")
    assert logits is not None
    return logits


def _logit_rows(model: Model) -> int:
    return max(1, LOGITS_AT_ONCE // model.config.vocab_size)


def _score(logits: Sequence[npt.NDArray[np.float32]], wanted: Ids) -> Scores:
    """logits: (n, vocab_size) float32 of the model, perhaps of the base; wanted: (n,) ids that came next"""
    rows = max(1, ROWS_AT_ONCE // logits[0].shape[1])
    blocks = [
        _score_block([each[i : i + rows] for each in logits], wanted[i : i + rows]) for i in range(0, len(wanted), rows)
    ]
    return _join(blocks)


def _score_block(logits: Sequence[npt.NDArray[np.float32]], wanted: Ids) -> Scores:
    index = np.arange(len(wanted))
    mine = log_softmax(logits[0])
    losses = -mine[index, wanted]
    if not np.isfinite(losses).all():
        raise EvaluationError("the logits are not finite numbers; the weights are damaged (try inspect --verify)")
    if len(logits) == 1:
        nothing = np.empty(0)
        return Scores(losses, nothing, nothing, nothing.astype(bool))
    theirs = log_softmax(logits[1])
    same = mine.argmax(axis=-1) == theirs.argmax(axis=-1)
    kl = (np.exp(theirs) * (theirs - mine)).sum(axis=-1)
    return Scores(losses, -theirs[index, wanted], kl, same)


def _join(parts: Sequence[Scores]) -> Scores:
    return Scores(
        np.concatenate([part.losses for part in parts]),
        np.concatenate([part.base_losses for part in parts]),
        np.concatenate([part.kl for part in parts]),
        np.concatenate([part.same for part in parts]),
    )


def divergence(whole: Scores) -> Divergence:
    """Sum up how predictions differ from a base model's."""
    kl = whole.kl
    return Divergence(
        mean=float(kl.mean()),
        stderr=float(kl.std()) / math.sqrt(max(1, len(kl) - 1)),
        median=float(np.median(kl)),
        p999=float(np.quantile(kl, 0.999)),
        maximum=float(kl.max()),
        same_top1=float(whole.same.mean()),
        base_ppl=math.exp(float(whole.base_losses.mean())),
    )
