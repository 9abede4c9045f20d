"""Recorded steps: a token that is run again from a recording is, bit for bit, one that is not."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.kv_modules import KVModule
from runtime.config import ModelConfig
from runtime.errors import CacheError
from runtime.kernels import get_kernels
from runtime.model import Model
from runtime.ring.cache import KVRing
from tests import tiny
from tests.native_library import ensure_native_library
from tests.test_kv_modules import FORMS, module_weights, modules_of, write

VOCAB = tiny.CONFIG["vocab_size"]
MODELS: dict[str, list[KVModule]] = {
    "plain": [],
    "codes": modules_of(FORMS["wide"], "after"),
    "rotated": modules_of(FORMS["gelu-bias"], "before", layers=[1]),
}


@pytest.fixture(params=["numba", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        ensure_native_library()
    return str(request.param)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("programs")
    made = {}
    for name, modules in MODELS.items():
        if modules:
            made[name] = write(folder / f"{name}.trit", modules, module_weights(modules))
        else:
            made[name] = tiny.write_trit(folder / f"{name}.trit", {"tied_embeddings": True}, codec="trit3", embed="q8")
    return made


def load(path: Path, backend: str, recorded: bool, threads: int = 2) -> Model:
    model = Model.load(path, backend=backend, n_threads=threads)
    if not recorded:
        model.kernels.repeat = lambda work, ring: work()  # type: ignore[method-assign]
    return model


def both(path: Path, backend: str, story: Callable[[Model], Sequence[Any]], threads: int = 2) -> None:
    """Have a story told with and without recording, and compare all that comes of it."""
    told = []
    for recorded in (True, False):
        model = load(path, backend, recorded, threads)
        told.append(story(model))
        model.close()
    assert len(told[0]) == len(told[1]) > 0
    assert all(np.array_equal(a, b) and np.isfinite(a).all() for a, b in zip(*told, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_whatever_is_done_to_the_rings(name: str, threads: int, backend: str, paths: dict[str, Path]) -> None:
    """Three rings in turn: prompts of any length, tokens, tokens taken back, states, resets with other sinks."""

    def story(model: Model) -> list[np.ndarray]:
        rng, seen = np.random.default_rng(7), []
        rings = [
            model.new_cache(14, sinks=3, n_batch=5),
            model.new_cache(40, sinks=0, n_batch=40, kv="q8"),
            model.new_cache(23, sinks=22, n_batch=1, kv="f32"),
        ]
        saved = [ring.save() for ring in rings]
        for _ in range(60):
            which = int(rng.integers(3))
            ring, deed = rings[which], rng.integers(9)
            if deed < 5:
                ids = rng.integers(VOCAB, size=1 if deed < 4 else int(rng.integers(1, 30)))
                seen.append(model.forward(ids, ring))
            elif deed == 5:
                model.forward([1], ring, None)
            elif deed == 6:
                try:
                    ring.trim(max(0, ring.length - int(rng.integers(6))))
                except CacheError:
                    ring.reset()
                    ring.sinks = int(rng.integers(12))
            elif deed == 7:
                saved[which] = ring.save()
            else:
                ring.load(saved[which])
        return seen

    both(paths[name], backend, story, threads)


@pytest.mark.parametrize("name", MODELS)
def test_past_the_depth_where_spans_are_cut(name: str, backend: str, paths: dict[str, Path]) -> None:
    def story(model: Model) -> list[Any]:
        ids, ring = np.arange(1800) % VOCAB, model.new_cache(1100, sinks=4)
        seen = [model.forward(ids[:1019], ring)]
        seen += [model.forward([i], ring) for i in ids[1019:1030]]
        seen += [model.forward(ids[1030:1600], ring)]
        return seen + [model.forward([i], ring) for i in ids[1600:1605]]

    both(paths[name], backend, story)


def test_a_token_is_recorded_once(backend: str, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(paths["plain"], backend, True)
    rings = [model.new_cache(64) for _ in range(2)]
    for ring in rings:
        model.forward([1, 2, 3], ring)
        model.forward([4], ring)

    def refuse(*_: Any) -> None:
        raise AssertionError("a job was run by itself")

    monkeypatch.setattr(model.kernels.pool, "run", refuse)  # type: ignore[attr-defined]
    for token in range(70):
        for ring in rings:
            model.forward([token], ring)
    model.close()


def test_what_is_returned_is_the_callers_own(backend: str, paths: dict[str, Path]) -> None:
    model = load(paths["plain"], backend, True)
    ring = model.new_cache(16)
    seen = [model.forward([i], ring) for i in range(4)]
    assert len({x.tobytes() for x in seen if x is not None}) == 4
    model.close()


def test_a_ring_is_not_kept_alive_by_its_recording(backend: str, paths: dict[str, Path]) -> None:
    model = load(paths["codes"], backend, True)
    ring: KVRing = model.new_cache(16)
    model.forward([1], ring)
    gone = weakref.ref(ring)
    del ring
    gc.collect()
    assert gone() is None
    model.close()


def test_work_that_fails_leaves_no_recording(backend: str, paths: dict[str, Path]) -> None:
    """A token that is interrupted half way is recorded anew, in full."""
    model, reference = (load(paths["plain"], backend, recorded) for recorded in (True, False))
    ring, other = model.new_cache(16), reference.new_cache(16)
    swiglu, calls = model.kernels.swiglu, []

    def interrupted(gate: np.ndarray, up: np.ndarray) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        swiglu(gate, up)

    model.kernels.swiglu = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        model.forward([5], ring)
    for token in (5, 6, 7):
        assert np.array_equal(model.forward([token], ring), reference.forward([token], other))
    model.close()
    reference.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_child_process_goes_on_with_a_recording(backend: str, paths: dict[str, Path]) -> None:
    model = load(paths["plain"], backend, True)
    ring = model.new_cache(16)
    model.forward([1], ring)
    twin = ring.copy()
    expected = [model.forward([i], twin) for i in (2, 3)]
    child = os.fork()
    if child == 0:
        same = all(np.array_equal(model.forward([i], ring), x) for i, x in zip((2, 3), expected, strict=True))
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    model.close()


def test_python_between_jobs_is_recorded_too(backend: str) -> None:
    """A call comes in its turn: after the jobs before it, before those after it."""
    kernels = get_kernels(backend, 2)
    ring = KVRing(ModelConfig.from_dict(tiny.CONFIG, "tiny"), 8)
    x, gain, out = np.ones((1, 72), np.float32), np.ones(72, np.float32), np.zeros((1, 72), np.float32)

    def double() -> None:
        out[:] *= 2

    def work() -> None:
        kernels.rmsnorm(x, gain, 1e-5, out)
        kernels.pool.call(double)  # type: ignore[attr-defined]
        kernels.swiglu(out, x)

    for scale in (1.0, 3.0, -2.0):
        x[:] = scale * np.linspace(-1, 2, 72)
        kernels.repeat(work, ring)
        got = out.copy()
        work()
        assert np.array_equal(got, out)
    kernels.close()
