"""Means of keys: mirrors that put them on the first axis, the same in every backend, and what they are good for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.container import open_trit
from formats.errors import FormatError
from formats.kv_modules import read_key_means, read_kv_modules
from formats.writer import TritWriter
from runtime.config import ModelConfig
from runtime.kernels import get_kernels
from runtime.model import Model
from runtime.ring.cache import KVRing
from runtime.ring.codecs import Plane, mirrored
from runtime.rope import angles, frequencies
from tests import tiny
from tests.native_library import ensure_native_library

HEADS, WIDTH = 2, 64
CONFIG = ModelConfig(256, 64, 1, 4, HEADS, WIDTH, 8, 512, 1e-5, 1e4)


@pytest.fixture
def mean() -> np.ndarray:
    return (3 * np.random.default_rng(0).standard_normal((HEADS, WIDTH))).astype(np.float32)


def vectors(mean: np.ndarray, n: int, seed: int = 1) -> np.ndarray:
    """Keys that scatter about their mean. out: (n, HEADS * WIDTH) float32"""
    x = mean + np.random.default_rng(seed).standard_normal((n, HEADS, WIDTH))
    return x.reshape(n, -1).astype(np.float32)


def test_a_mirror_swaps_the_mean_and_the_first_axis(mean: np.ndarray) -> None:
    plane = Plane("q4", HEADS, WIDTH, 4, mean=mean)
    assert plane.mirror is not None
    image = mirrored(mean[:, None], plane.mirror)[:, 0]
    assert np.allclose(image[:, 0], np.linalg.norm(mean, axis=1), rtol=1e-5) and np.abs(image[:, 1:]).max() < 1e-4
    x = vectors(mean, 5).reshape(5, HEADS, WIDTH).swapaxes(0, 1)
    assert np.allclose(mirrored(mirrored(x, plane.mirror), plane.mirror), x, atol=1e-4)
    assert np.allclose(np.linalg.norm(mirrored(x, plane.mirror), axis=2), np.linalg.norm(x, axis=2), rtol=1e-5)


@pytest.mark.parametrize(("codec", "width", "learned"), [("q8", 64, False), ("q4", 80, False), ("q4", 64, True)])
def test_no_mirror_where_no_base_takes_the_mean_up(codec: str, width: int, learned: bool) -> None:
    assert Plane(codec, 1, width, 4, learned, np.ones((1, width), np.float32)).mirror is None


def test_a_mean_of_zero_or_on_the_axis_changes_nothing() -> None:
    mean = np.zeros((HEADS, WIDTH), np.float32)
    mean[1, 0] = 2
    x = vectors(mean, 6)
    with_mean, without = Plane("q4", HEADS, WIDTH, 6, mean=mean), Plane("q4", HEADS, WIDTH, 6)
    for plane in (with_mean, without):
        plane.write(np.arange(6), x)
    assert all((a == b).all() for a, b in zip(with_mean.arrays, without.arrays, strict=True))


def test_known_means_make_the_error_less(mean: np.ndarray) -> None:
    x = vectors(mean, 200)
    errors = []
    for known in (mean, None):
        plane = Plane("q4", HEADS, WIDTH, 200, mean=known)
        plane.write(np.arange(200), x)
        read = plane.read(np.arange(200)).swapaxes(0, 1).reshape(200, -1)
        errors.append(float(np.square(read - x).mean()))
    assert errors[0] < 0.25 * errors[1]


@pytest.mark.parametrize("backend", ["numba", "native"])
def test_every_backend_stores_the_same_bits_and_attends_alike(backend: str, mean: np.ndarray) -> None:
    """Through a ring that has gone round, so that the sinks are read with queries of their own."""
    if backend == "native":
        ensure_native_library()
    reference, kernels = get_kernels("numpy", 1, int8=False), get_kernels(backend, 2, int8=False)
    rings = [KVRing(CONFIG, 40, 16, 3, "q4", key_means={0: mean}) for _ in range(2)]
    rng, freqs = np.random.default_rng(3), frequencies(CONFIG)
    for step in range(6):
        q, v = (rng.standard_normal((16, heads * WIDTH)).astype(np.float32) for heads in (4, HEADS))
        k, seen = vectors(mean, 16, step), []
        positions = np.arange(step * 16, step * 16 + 16)
        turns: Any = (*angles(freqs, positions), *angles(freqs, np.minimum(positions, 39)))
        for ops, ring in zip((reference, kernels), rings, strict=True):
            near, out = np.zeros_like(q), np.zeros_like(q)
            mine = q.copy()
            ring.note_turns(*turns[:2])
            ops.append(k, v, ring, 0)
            ops.rope(mine, near, k.copy(), turns, ring)
            ops.attention(mine, near, ring, 0, out, (None, None))
            ring.advance(16)
            seen.append(out)
        for one, other in zip(rings[0].planes, rings[1].planes, strict=True):
            assert (one.codes == other.codes).all() and (one.scales == other.scales).all()
        assert np.allclose(*seen, atol=1e-4)


def with_means(source: Path, target: Path, means: dict[str, np.ndarray]) -> Path:
    with open_trit(source) as file:
        header = {key: value for key, value in file.header.items() if key != "tensors"}
        with TritWriter(target, header, [*file.tensors, *means]) as writer:
            for t in file.tensors.values():
                writer.add(t.name, t.codec, t.shape, t.params, t.parts)
            for name, values in means.items():
                writer.add(name, "f32", values.shape, {}, {"values": values})
    return target


def test_a_file_tells_the_means(tmp_path: Path) -> None:
    """A mean is a hint: products are what they were, but for how keys are rounded."""
    config = {**tiny.CONFIG, "n_heads": 4, "n_kv_heads": 2, "head_dim": 32}
    plain = tiny.write_trit(tmp_path / "plain.trit", config)
    told = with_means(plain, tmp_path / "told.trit", {"layers.1.kv.k.mean": np.arange(64, dtype=np.float32)})
    with open_trit(told) as file:
        assert read_kv_modules(file) == []
        means = read_key_means(file)
        assert list(means) == [1] and means[1].shape == (2, 32) and means[1][1, 0] == 32
    ids = np.arange(40) % 200
    models = [Model.load(path, "numpy", activations="f32") for path in (plain, told)]
    logits: dict[str, list[Any]] = {}
    for codec in ("f16", "q4"):
        rings = [model.new_cache(32, n_batch=8, kv=codec) for model in models]
        logits[codec] = [model.forward(ids, ring, "all") for model, ring in zip(models, rings, strict=True)]
        assert (rings[1].layers[1].keys.mirror is not None) == (codec == "q4")
        assert rings[1].layers[0].keys.mirror is None and rings[1].copy().key_means == rings[1].key_means
    assert (logits["f16"][0] == logits["f16"][1]).all()
    assert 0 < np.abs(logits["q4"][0] - logits["q4"][1]).max() < 0.5


@pytest.mark.parametrize("name", ["layers.0.kv.k.mean", "layers.9.kv.k.mean", "layers.0.kv.v.mean"])
def test_wrong_means_are_refused(tmp_path: Path, name: str) -> None:
    values = np.full(20, np.inf, np.float32) if name.startswith("layers.0.kv.k") else np.ones(20, np.float32)
    path = with_means(tiny.write_trit(tmp_path / "plain.trit"), tmp_path / "told.trit", {name: values})
    with pytest.raises(FormatError, match=name):
        Model.load(path, "numpy")
