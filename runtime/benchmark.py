"""Measuring speed: prompt processing, token generation, and what the memory itself can deliver."""

from __future__ import annotations

import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.cache import KVRing
from runtime.model import Model

READ_BYTES = 1 << 29  # for each thread, up to four: far more than caches hold
READ_REPEATS = 5
WARM_UP_TOKENS = 2


@dataclass(frozen=True)
class Speed:
    """Tokens per second over some repeats: mean and standard deviation."""

    tok_s: float
    std: float


@cache
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


def prefill_speed(model: Model, n: int, depth: int, repeats: int) -> Speed:
    """Time reading a prompt of n tokens after `depth` others."""
    ids = synthetic_ids(model, n)
    return _repeat(model, n, depth, repeats, lambda cache: model.forward(ids, cache, "last"))


def decode_speed(model: Model, n: int, depth: int, repeats: int) -> Speed:
    """Time generating n tokens, one by one, after `depth` others."""
    ids = synthetic_ids(model, n)

    def decode(cache: KVRing) -> None:
        for token in ids:
            model.forward([token], cache, "last")

    return _repeat(model, n, depth, repeats, decode)


def _repeat(model: Model, n: int, depth: int, repeats: int, work: Callable[[KVRing], object]) -> Speed:
    """Run `work` at the same depth again and again; the first run is a warm-up and is not counted."""
    cache = model.new_cache(max(2, depth + n))
    if depth:
        model.forward(synthetic_ids(model, depth), cache, None)
    speeds = []
    for number in range(repeats + 1):
        start = time.perf_counter()
        work(cache)
        seconds = time.perf_counter() - start
        if number:
            speeds.append(n / seconds)
        cache.trim(depth)
    return Speed(statistics.mean(speeds), statistics.stdev(speeds) if repeats > 1 else 0.0)


def cpu_name() -> str:
    """Return the name of the processor as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
