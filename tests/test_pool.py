"""The threads of the compiled backends: they come, they end, and a fork has its own."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from runtime.kernels import Kernels, get_kernels
from runtime.model import Model
from tests import tiny
from tests.native_library import ensure_native_library

ROWS, WIDTH = 200, 64


@pytest.fixture(params=["numba", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        ensure_native_library()
    return str(request.param)


@pytest.fixture
def alone() -> Iterator[None]:
    """Nobody else's workers are about."""
    gc.collect()
    for thread in workers():
        thread.join(60)
    yield


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("trit-worker")]


def normalizes(kernels: Kernels) -> bool:
    """Run a job of many units and say whether each was done."""
    x = np.arange(1, ROWS * WIDTH + 1, dtype=np.float32).reshape(ROWS, WIDTH)
    out = np.zeros_like(x)
    kernels.rmsnorm(x, np.ones(WIDTH, np.float32), 0.0, out)
    return bool(np.allclose((out**2).mean(axis=1), 1, rtol=1e-5))


@pytest.mark.parametrize("threads", [1, 2, 9])
def test_every_unit_is_done_again_and_again(threads: int, backend: str) -> None:
    kernels = get_kernels(backend, threads)
    assert all(normalizes(kernels) for _ in range(50))
    kernels.close()


def test_a_closed_pool_has_no_threads_and_can_be_used_again(backend: str, alone: None) -> None:
    kernels = get_kernels(backend, 3)
    for _ in range(3):
        assert normalizes(kernels) and len(workers()) == 2
        kernels.close()
        assert not workers()


def test_a_forgotten_pool_lets_its_threads_end(backend: str, alone: None) -> None:
    kernels = get_kernels(backend, 3)
    assert normalizes(kernels)
    mine = workers()
    del kernels
    gc.collect()
    for thread in mine:
        thread.join(60)
    assert len(mine) == 2 and not workers()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_in_the_middle_of_jobs_goes_on_by_itself(backend: str) -> None:
    kernels, stop = get_kernels(backend, 3), threading.Event()

    def work() -> None:
        while not stop.is_set():
            normalizes(kernels)

    busy = threading.Thread(target=work)
    busy.start()
    for _ in range(5):
        child = os.fork()
        if child == 0:
            os._exit(0 if normalizes(kernels) else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stop.set()
    busy.join()
    assert normalizes(kernels)
    kernels.close()


def test_prompts_may_have_threads_of_their_own(backend: str, alone: None, tmp_path: Path) -> None:
    path = tiny.write_trit(tmp_path / "m.trit")
    ids = list(range(3, 20))
    with closing(Model.load(path, backend, n_threads=1, n_threads_batch=4)) as model:
        model.forward([3], model.new_cache(32))
        assert not workers()
        got = model.forward(ids, model.new_cache(32), "all")
        assert len(workers()) == 3 and model.kernels.n_threads == 1
    with closing(Model.load(path, backend, n_threads=1)) as model:
        assert np.array_equal(got, model.forward(ids, model.new_cache(32), "all"))
    assert not workers()
