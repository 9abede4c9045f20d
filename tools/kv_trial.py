"""Trying learned projections on a loaded model, without writing a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.codecs import CODECS
from formats.container import Tensor
from formats.kv_modules import KVModule
from runtime.model import Model
from runtime.ring.cache import KVRing
from runtime.ring.projections import Projections

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Packed = tuple[tuple[int, ...], Mapping[str, Any], Mapping[str, np.ndarray]]  # shape, params, parts: for a writer
CODEC = "f16"  # of the modules' tensors
SOME = slice(None, None, 2)  # positions whose predictions are compared: scores of all would take half of the time


@dataclass(frozen=True, eq=False)
class Learned:
    """A module and the values of its tensors, by the last part of their names."""

    module: KVModule
    values: Mapping[str, Floats]

    def tensors(self) -> dict[str, Packed]:
        """By their names."""
        found: dict[str, Packed] = {}
        for name, values in self.values.items():
            params, parts = CODECS[CODEC].quantize(values)
            found[f"{self.module.prefix}.{name}"] = (values.shape, params, parts)
        return found


def install(model: Model, learned: Sequence[Learned]) -> None:
    """Have the model compress keys and values with these modules, and no others. Its earlier contexts are void."""
    tensors = dict(model.file.tensors)
    for one in learned:
        for name, (shape, params, parts) in one.tensors().items():
            tensors[name] = Tensor(name, CODEC, shape, params, parts, 0, 0, 0, model.file.path)
    file: Any = SimpleNamespace(tensors=tensors, config=model.file.config, path=model.file.path)
    model.modules = tuple(one.module for one in sorted(learned, key=lambda one: (one.module.layer, one.module.side)))
    for i, layer in enumerate(model.layers):
        own = [module for module in model.modules if module.layer == i]
        layer.projections = Projections(own, file, model.kernels) if own else None


class Judge:
    """Compares a model with what it was before, on windows of a text.

    The first windows' predictions are kept, to measure divergence; of all of them the losses of the second half are.
    kept: number of windows whose predictions are kept; kv: codec of the caches
    """

    def __init__(self, model: Model, windows: Sequence[Ids], kept: int, kv: str) -> None:
        self._model, self._windows, self._kv = model, windows, kv
        self._half = len(windows[0]) // 2
        install(model, [])
        self._base = [_probabilities(self._finish(model.embed(window[:-1]), 0, SOME)) for window in windows[:kept]]
        self._loss = self._mean_loss(None)

    def damage(
        self, trials: Mapping[int, Learned], progress: Callable[[int, int, str], None] | None = None
    ) -> dict[int, float]:
        """Mean KL divergence of the predictions with each of these modules alone from those without. trials: by layer

        What comes before a layer is not changed by its module and is run once for all of them."""
        model = self._model
        states = [model.embed(window[:-1]) for window in self._windows[: len(self._base)]]
        found = {}
        for layer in range(max(trials) + 1):
            if layer in trials:
                install(model, [trials[layer]])
                found[layer] = float(np.mean([
                    _divergence(self._finish(states[i].copy(), layer, SOME), *self._base[i])
                    for i in range(len(states))
                ]))  # fmt: skip
                if progress is not None:
                    progress(len(found), len(trials), "")
            install(model, [])
            for x in states:
                model.run_blocks(x, self._ring(len(x)), range(layer, layer + 1))
        return found

    def increase(self, learned: Sequence[Learned], progress: Callable[[int, int, str], None] | None = None) -> float:
        """By how much these modules raise the perplexity of all windows: 0.03 is 3 %."""
        install(self._model, learned)
        return math.exp(self._mean_loss(progress) - self._loss) - 1

    def _mean_loss(self, progress: Callable[[int, int, str], None] | None) -> float:
        losses = []
        for done, window in enumerate(self._windows, 1):
            logits = self._logits(window)
            losses.append(_log_sum_exp(logits) - logits[np.arange(len(logits)), window[self._half + 1 :]])
            if progress is not None:
                progress(done, len(self._windows), "")
        return float(np.mean(losses))

    def _logits(self, window: Ids) -> Floats:
        """Scores of what follows each token of the second half but the last: (n, vocab_size) float32"""
        return self._finish(self._model.embed(window[:-1]), 0, slice(self._half, None))

    def _finish(self, x: Floats, first: int, rows: slice) -> Floats:
        """Scores of some positions from what the blocks from `first` on make of x, which they change."""
        self._model.run_blocks(x, self._ring(len(x)), range(first, len(self._model.layers)))
        return self._model.scores(x[rows])

    def _ring(self, n: int) -> KVRing:
        return self._model.new_cache(n, n_batch=n, kv=self._kv)


def _divergence(logits: Floats, probabilities: Floats, entropy: npt.NDArray[np.float64]) -> float:
    """Mean KL divergence of predictions from those of the base."""
    expected = (probabilities * logits).sum(axis=1, dtype=np.float64)
    return float(np.mean(_log_sum_exp(logits) - expected - entropy))


def _log_sum_exp(logits: Floats) -> npt.NDArray[np.float64]:
    """(n, vocab_size) to (n,)"""
    top = logits.max(axis=1)
    return np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64)) + top


def _probabilities(logits: Floats) -> tuple[Floats, npt.NDArray[np.float64]]:
    """(n, vocab_size) to probabilities and, for each row, the entropy: what a divergence is compared with."""
    logs = logits - _log_sum_exp(logits)[:, None].astype(np.float32)
    probabilities = np.exp(logs)
    return probabilities, -(probabilities * logs).sum(axis=1, dtype=np.float64)
