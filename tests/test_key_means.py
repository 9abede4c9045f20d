"""Means and balance of keys: the same in every backend, and what they are good for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.container import open_trit
from formats.errors import FormatError
from formats.kv_modules import read_key_facts, read_kv_modules
from formats.writer import TritWriter
from runtime.config import ModelConfig
from runtime.kernels import get_kernels
from runtime.model import Model
from runtime.ring.cache import KVRing
from runtime.ring.codecs import Plane
from runtime.ring.rounding import mirrored
from runtime.rope import angles, frequencies
from tests import tiny
from tests.native_library import ensure_native_library
from tests.test_attention import CODES_ERROR

HEADS, WIDTH = 2, 64
CONFIG = ModelConfig(256, 64, 1, 4, HEADS, WIDTH, 8, 512, 1e-5, 1e4)


@pytest.fixture
def mean() -> np.ndarray:
    return (3 * np.random.default_rng(0).standard_normal((HEADS, WIDTH))).astype(np.float32)


@pytest.fixture
def facts(mean: np.ndarray) -> np.ndarray:
    """Means, and a balance that is none of ones. out: (2, HEADS, WIDTH)"""
    return np.stack((mean, np.exp(np.random.default_rng(9).standard_normal((HEADS, WIDTH))))).astype(np.float32)


def unbalanced(mean: np.ndarray) -> np.ndarray:
    return np.stack((mean, np.ones_like(mean)))


def vectors(mean: np.ndarray, n: int, seed: int = 1) -> np.ndarray:
    """Keys that scatter about their mean. out: (n, HEADS * WIDTH) float32"""
    x = mean + np.random.default_rng(seed).standard_normal((n, HEADS, WIDTH))
    return x.reshape(n, -1).astype(np.float32)


def test_a_mirror_swaps_the_mean_and_the_first_axis(mean: np.ndarray) -> None:
    plane = Plane("k", "q4", HEADS, WIDTH, 4, facts=unbalanced(mean))
    assert plane.mirror is not None
    normal = plane.mirror[:, 0]
    image = mirrored(mean[:, None], normal)[:, 0]
    assert np.allclose(image[:, 0], np.linalg.norm(mean, axis=1), rtol=1e-5) and np.abs(image[:, 1:]).max() < 1e-4
    x = vectors(mean, 5).reshape(5, HEADS, WIDTH).swapaxes(0, 1)
    assert np.allclose(mirrored(mirrored(x, normal), normal), x, atol=1e-4)
    assert np.allclose(np.linalg.norm(mirrored(x, normal), axis=2), np.linalg.norm(x, axis=2), rtol=1e-5)


@pytest.mark.parametrize(("codec", "width"), [("q8", 64), ("q4", 80)])
def test_no_mirror_where_no_base_takes_the_mean_up(codec: str, width: int) -> None:
    assert Plane("k", codec, 1, width, 4, np.ones((2, 1, width), np.float32)).mirror is None


def test_a_mean_of_zero_or_on_the_axis_changes_nothing() -> None:
    mean = np.zeros((HEADS, WIDTH), np.float32)
    mean[1, 0] = 2
    x = vectors(mean, 6)
    with_mean, without = Plane("k", "q4", HEADS, WIDTH, 6, facts=unbalanced(mean)), Plane("k", "q4", HEADS, WIDTH, 6)
    for plane in (with_mean, without):
        plane.write(np.arange(6), x)
    assert all((a == b).all() for a, b in zip(with_mean.arrays, without.arrays, strict=True))


@pytest.mark.parametrize("size", [1e-42, 1e25, 3e35])
def test_a_mean_of_any_size_falls_on_the_first_axis(size: float, facts: np.ndarray) -> None:
    """Such that squares, or products with a balance, are none of float32."""
    facts[0] *= np.float32(size / np.abs(facts[0]).max())
    facts[1] *= 1000 / facts[1].max()
    plane = Plane("k", "q4", HEADS, WIDTH, 4, facts=facts)
    assert plane.mirror is not None
    towards = facts[0].astype(np.float64) * facts[1]
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    image = mirrored(towards[:, None].astype(np.float32), plane.mirror[:, 0])[:, 0]
    assert np.allclose(image, np.eye(WIDTH)[:1], atol=1e-5)


def test_known_means_make_the_error_less(mean: np.ndarray) -> None:
    x = vectors(mean, 200)
    errors = []
    for known in (unbalanced(mean), None):
        plane = Plane("k", "q4", HEADS, WIDTH, 200, facts=known)
        plane.write(np.arange(200), x)
        read = plane.read(np.arange(200)).swapaxes(0, 1).reshape(200, -1)
        errors.append(float(np.square(read - x).mean()))
    assert errors[0] < 0.25 * errors[1]


def test_products_stay_what_they_were(facts: np.ndarray) -> None:
    plane = Plane("k", "q4", HEADS, WIDTH, 4, facts=facts)
    keys, queries = np.random.default_rng(4).standard_normal((2, HEADS, 20, WIDTH)).astype(np.float32)
    turned = plane.turn(keys) @ plane.turn(queries, queries=True).swapaxes(1, 2)
    assert np.allclose(turned, keys @ queries.swapaxes(1, 2), atol=1e-3)
    for of_queries, x in ((False, keys), (True, queries)):
        assert np.allclose(plane.turn_back(plane.turn(x, of_queries), of_queries), x, atol=1e-4)


def test_a_balance_makes_the_error_of_products_less(facts: np.ndarray) -> None:
    """Keys that are small where queries are large: what the balance is the fourth root of their ratio for."""
    rng, balance = np.random.default_rng(8), facts[1]
    keys = (rng.standard_normal((200, HEADS, WIDTH)) / balance).astype(np.float32)
    queries = (rng.standard_normal((HEADS, 100, WIDTH)) * balance[:, None]).astype(np.float32)
    errors = []
    for factors in (balance, np.ones_like(balance)):
        plane = Plane("k", "q4", HEADS, WIDTH, 200, facts=np.stack((np.zeros_like(balance), factors)))
        plane.write(np.arange(200), keys.reshape(200, -1))
        wrong = queries @ (plane.read(np.arange(200)) - keys.swapaxes(0, 1)).swapaxes(1, 2)
        errors.append(float(np.square(wrong).mean()))
    assert errors[0] < 0.5 * errors[1]


@pytest.mark.parametrize("int8", [False, True], ids=["f32", "int8"])
@pytest.mark.parametrize("backend", ["numba", "native"])
def test_every_backend_stores_the_same_bits_and_attends_alike(
    backend: str, int8: bool, mean: np.ndarray, facts: np.ndarray
) -> None:
    """Through a ring that has gone round, so that the sinks are read with queries of their own."""
    if backend == "native":
        ensure_native_library()
    reference, kernels = get_kernels("numpy", 1, int8=int8), get_kernels(backend, 2, int8=int8)
    rings = [KVRing(CONFIG, 40, 16, 3, "q4", key_facts={0: facts}) for _ in range(2)]
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
            assert (one.memory == other.memory).all()
        assert np.allclose(*seen, atol=CODES_ERROR[7] * np.abs(seen[0]).max() if int8 else 1e-4)


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
    told = with_means(plain, tmp_path / "told.trit", {
        "layers.1.kv.k.mean": np.arange(64, dtype=np.float32),
        "layers.1.kv.k.balance": np.linspace(0.5, 2, 64, dtype=np.float32),
    })  # fmt: skip
    with open_trit(told) as file:
        assert read_kv_modules(file) == []
        found = read_key_facts(file)
        assert list(found) == [1] and found[1].shape == (2, 2, 32)
        assert found[1][0, 1, 0] == 32 and (found[1][1, 0, 0], found[1][1, 1, 31]) == (0.5, 2)
    ids = np.arange(40) % 200
    models = [Model.load(path, "numpy", activations="f32") for path in (plain, told)]
    logits: dict[str, list[Any]] = {}
    for codec in ("f16", "q4"):
        rings = [model.new_cache(32, n_batch=8, kv=codec) for model in models]
        logits[codec] = [model.forward(ids, ring, "all") for model, ring in zip(models, rings, strict=True)]
        assert (rings[1].layers[1].keys.mirror is not None) == (codec == "q4")
        assert rings[1].layers[0].keys.mirror is None and rings[1].copy().key_facts == rings[1].key_facts
    assert (logits["f16"][0] == logits["f16"][1]).all()
    assert 0 < np.abs(logits["q4"][0] - logits["q4"][1]).max() < 0.5


def test_one_fact_alone(tmp_path: Path) -> None:
    plain = tiny.write_trit(tmp_path / "plain.trit")
    for name, other in (("mean", 1), ("balance", 0)):
        values = {f"layers.0.kv.k.{name}": np.full(20, 3, np.float32)}
        with open_trit(with_means(plain, tmp_path / f"{name}.trit", values)) as file:
            found = read_key_facts(file)[0]
        assert (found[1 - other] == 3).all() and (found[other] == other).all()


@pytest.mark.parametrize("bad", [0.0, -1.0, 2.0**-11, 2.0**11])
def test_a_balance_out_of_range_is_refused(tmp_path: Path, bad: float) -> None:
    values = np.ones(20, np.float32)
    values[7] = bad
    told = {"layers.0.kv.k.balance": values}
    path = with_means(tiny.write_trit(tmp_path / "plain.trit"), tmp_path / "told.trit", told)
    with pytest.raises(FormatError, match=r"layers\.0\.kv\.k\.balance"):
        Model.load(path, "numpy")


@pytest.mark.parametrize(
    "name", ["layers.0.kv.k.mean", "layers.9.kv.k.mean", "layers.0.kv.v.mean", "x.kv.k.mean", ".kv.k.balance", "x.kv.y"]
)
def test_wrong_means_are_refused(tmp_path: Path, name: str) -> None:
    values = np.full(20, np.inf, np.float32) if name.startswith("layers.0.kv.k") else np.ones(20, np.float32)
    path = with_means(tiny.write_trit(tmp_path / "plain.trit"), tmp_path / "told.trit", {name: values})
    with pytest.raises(FormatError, match=name):
        Model.load(path, "numpy")
