"""Measuring speed: prompt processing, token generation, and what the memory itself can deliver."""

from __future__ import annotations

import platform
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from runtime.model import Model
from runtime.ring.cache import KVRing
from runtime.ring.codecs import BLOCK
from runtime.rope import angles, frequencies

READ_BYTES = 1 << 29  # for each thread, up to four: far more than caches hold
READ_REPEATS = 5
FILL = 256  # tokens of noise that are made; they are repeated


@dataclass(frozen=True)
class Speed:
    """Tokens per second over some repeats: mean and standard deviation."""

    tok_s: float
    std: float


def read_bandwidth(n_threads: int) -> float:
    """Measure how fast `n_threads` threads read memory, in bytes per second: the best of some repeats."""
    share = READ_BYTES * min(n_threads, 4) // n_threads // 64 * 64
    blocks = [np.ones(share // 8, dtype=np.int64) for _ in range(n_threads)]
    best = min(_time_reading(blocks) for _ in range(READ_REPEATS))
    return share * n_threads / best


def _time_reading(blocks: Sequence[npt.NDArray[np.int64]]) -> float:
    """Sum all blocks at the same time, one thread each, and return the seconds. NumPy drops the GIL."""
    gate = threading.Barrier(len(blocks) + 1)

    def read(block: npt.NDArray[np.int64]) -> None:
        gate.wait()
        block.sum()

    threads = [threading.Thread(target=read, args=(block,)) for block in blocks]
    for thread in threads:
        thread.start()
    gate.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - start


def thread_count(model: Model, asked: int | None = None) -> int:
    """Tell how many threads a model runs on; NumPy's expansion of weights, the slow part there, has one."""
    pool = getattr(model.kernels, "pool", model.kernels)
    return int(getattr(pool, "n_threads", None) or asked or 1)


def synthetic_ids(model: Model, count: int) -> list[int]:
    """Return the same ids every time: speed does not depend on what the text says."""
    ids = np.random.default_rng(0).integers(model.config.vocab_size, size=count)
    return [int(i) for i in ids]


class Subject(Protocol):
    """A model with some tokens in its context, which reads more and can be put back to where it was."""

    def read(self, ids: Sequence[int]) -> None:
        """Append tokens to the context and compute the scores of what follows the last one."""

    def rewind(self) -> None:
        """Forget all that was read since the beginning."""


class Ours:
    """A model of this runtime as a subject, with `depth` tokens in a context that has room for n more.

    Their keys and values are noise: speed does not depend on them, and reading a long text would take long.
    """

    def __init__(self, model: Model, n: int, depth: int) -> None:
        self._model, self._depth = model, depth
        self._cache = model.new_cache(max(2, depth + n))
        if depth:
            fill(self._cache, depth)

    def read(self, ids: Sequence[int]) -> None:
        self._model.forward(ids, self._cache, "last")

    def rewind(self) -> None:
        self._cache.trim(self._depth)


class Memory:
    """What memory delivers, as a subject: for every token a piece of it is read, by `n_threads` threads."""

    def __init__(self, n_threads: int) -> None:
        share = READ_BYTES // n_threads // 64 * 64
        self._blocks = [np.ones(share // 8, dtype=np.int64) for _ in range(n_threads)]
        self.nbytes = share * n_threads

    def read(self, ids: Sequence[int]) -> None:
        for _ in ids:
            _time_reading(self._blocks)

    def rewind(self) -> None:
        pass


def depth_cost(deep: Sequence[float], shallow: Sequence[float], bandwidth: Sequence[float], nbytes: float) -> float:
    """Tell what a context adds to a token's time, over the time that reading it takes: the median of rounds.

    deep, shallow: tokens per second with the context and without; bandwidth: bytes per second
    nbytes: what is cached of the context
    """
    rounds = zip(deep, shallow, bandwidth, strict=True)
    return statistics.median((1 / slow - 1 / fast) * speed / nbytes for slow, fast, speed in rounds)


def fill(cache: KVRing, depth: int) -> None:
    """Put `depth` tokens of noise into an empty ring that has room for them."""
    rng, freqs = np.random.default_rng(0), frequencies(cache.config)
    some = np.arange(min(FILL, cache.slots))  # whole blocks
    for plane in cache.planes:
        noise = rng.standard_normal((len(some), plane.heads * plane.width)).astype(np.float32)
        plane.write(some, noise)
        count = len(some) // BLOCK
        for start in range(count, -(-depth // BLOCK), count):
            room = plane.data[:, start : start + count]
            room[...] = plane.data[:, : room.shape[1]]
    for start in range(0, depth, FILL):
        positions = np.arange(start, min(start + FILL, depth))
        cache.note_turns(*angles(freqs, positions))
        cache.advance(len(positions))


def compare(subjects: Sequence[Subject], ids: Sequence[int], generate: bool, repeats: int) -> list[list[float]]:
    """Time all subjects in turn, again and again, so that what else the machine does meets all alike.

    ids: (n,) read as one prompt, or one by one as they are in generation
    returns: tokens per second, (repeats,) for each subject; the first round is a warm-up and is not counted
    """
    speeds: list[list[float]] = [[] for _ in subjects]
    for number in range(repeats + 1):
        for subject, found in zip(subjects, speeds, strict=True):
            start = time.perf_counter()
            if generate:
                for token in ids:
                    subject.read([token])
            else:
                subject.read(ids)
            if number:
                found.append(len(ids) / (time.perf_counter() - start))
            subject.rewind()
    return speeds


def summarize(speeds: Sequence[float]) -> Speed:
    """Give mean and standard deviation of some repeats."""
    return Speed(statistics.mean(speeds), statistics.stdev(speeds) if len(speeds) > 1 else 0.0)


def cpu_name() -> str:
    """Return the name of the processor as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
