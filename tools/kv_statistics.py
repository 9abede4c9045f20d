"""What a calibration text shows of keys and values: covariances, gathered in one pass, and nothing else of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.kv_modules import BALANCES
from runtime.config import ModelConfig
from runtime.model import Model
from runtime.ring.cache import KVRing

Floats = npt.NDArray[np.float32]
Progress = Callable[[int, int, str], None]

SINKS = 4  # first tokens of a window: their keys and values are like no others, and stand for themselves
DAMPING = 0.05  # of the mean square of a head's numbers, added to each: other texts are a little different
ROWS = 128  # tokens whose attention is computed at a time


class Moments:
    """Count, sum and products of vectors of `width` numbers."""

    def __init__(self, width: int) -> None:
        self.count, self.sum = 0, np.zeros(width)
        self.products = np.zeros((width, width))

    def add(self, x: Floats) -> None:
        """x: (n, width) float32"""
        self.count += len(x)
        self.sum += x.sum(axis=0, dtype=np.float64)
        self.products += x.T @ x

    @property
    def mean(self) -> npt.NDArray[np.float64]:
        return self.sum / self.count

    @property
    def second(self) -> npt.NDArray[np.float64]:
        """(width, width) mean of the products"""
        return self.products / self.count

    @property
    def covariance(self) -> npt.NDArray[np.float64]:
        """(width, width)"""
        return self.second - np.outer(self.mean, self.mean)


@dataclass
class LayerMoments:
    """Of one layer. Numbers of all key-value heads stand side by side: width = n_kv_heads * head_dim.

    keys: rotated for their positions; values: as attention averages them, one vector for each query head and token;
    queries: of each key-value head, (head_dim) numbers, rotated
    """

    keys: Moments
    values: Moments
    queries: list[Moments]

    @property
    def balance(self) -> Floats:
        """What keys are multiplied by and queries divided, so that errors of all numbers matter alike.

        In a group that is rounded with one step the product of both mean squares counts, which is least where they are
        alike (as SmoothQuant does with weights; Xiao et al., 2023). The two numbers of a pair get the same, for RoPE
        turns them into each other as positions go on. returns: (width,), geometric means of heads are 1
        """
        squares = np.stack([np.diag(q.second) for q in self.queries])
        of_both = []
        for one in (squares, np.diag(self.keys.covariance).reshape(squares.shape)):
            pairs = one.reshape(len(one), 2, -1).mean(axis=1)
            of_both.append(np.maximum(pairs + DAMPING * pairs.mean(axis=1, keepdims=True), np.finfo(np.float32).tiny))
        wanted = np.log(of_both[0] / of_both[1]) / 4
        wanted = np.exp(wanted - wanted.mean(axis=1, keepdims=True))
        return np.tile(np.clip(wanted, *BALANCES), 2).astype(np.float32).ravel()


def collect(
    model: Model, windows: Sequence[npt.NDArray[np.int64]], progress: Progress | None = None
) -> list[LayerMoments]:
    """Read windows of a text, each from a fresh context, and gather the moments of every layer.

    progress: called with (windows done, windows, "")
    """
    config = model.config
    width = config.n_kv_heads * config.head_dim
    found = [
        LayerMoments(Moments(width), Moments(width), [Moments(config.head_dim) for _ in range(config.n_kv_heads)])
        for _ in model.layers
    ]
    size = len(windows[0])
    ring = model.new_cache(size, n_batch=size, kv="f32")
    with _watched(model, lambda q, layer: _add(found[layer], config, q, ring, layer)):
        for done, window in enumerate(windows, 1):
            ring.reset()
            model.forward(window, ring, None)
            if progress is not None:
                progress(done, len(windows), "")
    return found


@contextmanager
def _watched(model: Model, see: Callable[[Floats, int], None]) -> Iterator[None]:
    """Have `see` called with the rotated queries and the layer before each attention."""
    kernels: Any = model.kernels
    attention = kernels.attention

    def watch(q: Floats, q_sink: Floats, ring: KVRing, layer: int, *rest: Any) -> None:
        see(q, layer)
        attention(q, q_sink, ring, layer, *rest)

    kernels.attention = watch
    try:
        yield
    finally:
        kernels.attention = attention


def _add(moments: LayerMoments, config: ModelConfig, q: Floats, ring: KVRing, layer: int) -> None:
    """Take in one window. q: (n, n_heads * head_dim) float32, of a ring that holds these n tokens alone"""
    n, heads, head_dim = len(q), config.n_kv_heads, config.head_dim
    slots = ring.slot(np.arange(n))
    keys, values = ring.layers[layer].keys.read(slots), ring.layers[layer].values.read(slots)
    queries = q.reshape(n, heads, -1, head_dim).transpose(1, 2, 0, 3)
    together = values.transpose(1, 0, 2).reshape(n, -1)
    for head, moment in enumerate(moments.queries):
        moment.add(queries[head, :, SINKS:].reshape(-1, head_dim))
        for one in queries[head]:
            for start in range(0, n, ROWS):
                averages = _weights(one[start : start + ROWS], keys[head], start) @ together[: start + ROWS]
                moments.values.add(averages[max(0, SINKS - start) :])
    moments.keys.add(keys.transpose(1, 0, 2).reshape(n, -1)[SINKS:])


def _weights(q: Floats, keys: Floats, start: int) -> Floats:
    """Attention of some tokens of one head, from position `start` on, to all that are not later than the last of them.

    q: (n, head_dim) float32; keys: (more, head_dim); returns: (n, start + n)"""
    scores = q @ keys[: start + len(q)].T
    scores /= np.float32(np.sqrt(q.shape[1]))
    scores[:, start:] += np.triu(np.full((len(q), len(q)), -np.inf, np.float32), 1)
    np.exp(scores - scores.max(axis=1, keepdims=True), out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores
