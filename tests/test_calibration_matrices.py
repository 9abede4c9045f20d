"""Rounding one matrix for its inputs: compiled like the reference, and better than rounding alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from formats.codecs.nf4 import NF4Codec
from formats.codecs.trit import GROUP, quantize_levels
from runtime.calibration.feedback import DAMPING, SHRINKAGE, Factors, corrected, factorize, quantize, regularize
from runtime.calibration.layer import MLP, LayerRun, Moments
from runtime.calibration.nf4 import PARAMS, quantize_nf4
from runtime.calibration.streams import Forward
from runtime.kernels.numba_best import BestSearch
from runtime.kernels.numba_feedback import RoundColumns

each_depth = pytest.mark.parametrize("depth", (1, 2, 3, 4))


def problem(out: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A matrix and H of inputs that are correlated and of very different sizes, some of them always zero."""
    rng = np.random.default_rng(seed)
    x = (
        rng.standard_normal((4 * width, width))
        @ rng.standard_normal((width, width))
        * np.exp(rng.standard_normal(width))
    )
    x[:, 3::17] = 0
    hessian = (x.T @ x).astype(np.float32)
    regularize(hessian)
    return (rng.standard_t(5, (out, width)) * 0.02).astype(np.float32), hessian


def values(levels: np.ndarray, codes: np.ndarray, units: np.ndarray) -> np.ndarray:
    return levels * np.repeat(units[codes], GROUP, axis=1)[:, : levels.shape[1]]


def loss(w: np.ndarray, q: np.ndarray, hessian: np.ndarray) -> float:
    e = (w - q).astype(np.float64)
    return float(np.einsum("ij,jk,ik->", e, hessian.astype(np.float64), e))


@pytest.mark.parametrize("shape", [(1, 16), (5, 33), (70, 100)], ids=str)
@each_depth
def test_the_kernel_rounds_like_the_reference(shape: tuple[int, int], depth: int) -> None:
    w, hessian = problem(*shape)
    factors = factorize(hessian)
    expected = quantize(w, factors, depth)
    with ThreadPoolExecutor(3) as pool:
        for run in (map, pool.map):
            found = quantize(w, factors, depth, RoundColumns(run), BestSearch(run))
            for part, wanted in zip(found, expected, strict=True):
                assert part.dtype == wanted.dtype and np.array_equal(part, wanted)


def test_the_factors_are_those_of_the_hessian() -> None:
    _, hessian = problem(1, 50)
    f = factorize(hessian)
    u = f.feedback.astype(np.float64)
    assert np.array_equal(u, np.triu(u)) and np.allclose(np.diagonal(u), 1)
    whole = np.eye(64)
    whole[:50, :50] = hessian
    assert np.allclose(u * f.weights @ u.T, whole[np.ix_(f.order, f.order)], rtol=1e-4, atol=1e-4 * whole.max())
    assert all(len(set(group // GROUP)) == 1 for group in f.order.reshape(-1, GROUP))


@each_depth
def test_feedback_makes_a_fraction_of_the_loss_of_rounding(depth: int) -> None:
    w, hessian = problem(48, 160)
    found = values(*quantize(w, factorize(hessian), depth, RoundColumns(), BestSearch()))
    assert loss(w, found, hessian) < 0.65 * loss(w, values(*quantize_levels(w, depth)), hessian)


@each_depth
def test_the_largest_weights_are_never_cut_off(depth: int) -> None:
    """However little its input matters, the unit of a very large weight is there."""
    w, hessian = problem(48, 160)
    hessian[40:64] *= 1e-2
    hessian[:, 40:64] *= 1e-2
    w[17, 50] = 3.0
    found = values(*quantize(w, factorize(hessian), depth, RoundColumns(), BestSearch()))
    assert found[17, 50] == pytest.approx(3.0, rel=0.2)


@pytest.mark.parametrize(("shape", "limit"), [((5, 33), 1.0), ((40, 160), 0.8)], ids=str)
def test_nf4_with_feedback(shape: tuple[int, int], limit: float) -> None:
    w, hessian = problem(*shape)
    w[3, 20] = 3.0
    codec = NF4Codec()
    parts, found = quantize_nf4(w, factorize(hessian))
    assert np.array_equal(codec.dequantize(parts, shape, PARAMS), found)
    assert loss(w, found, hessian) < limit * loss(w, codec.dequantize(codec.quantize(w)[1], shape, PARAMS), hessian)
    assert found[3, 20] == pytest.approx(3.0, rel=0.05)


def test_the_corrected_matrix_takes_back_an_error_of_its_inputs() -> None:
    rng = np.random.default_rng(5)
    w = rng.standard_normal((8, 24)).astype(np.float32)
    x = rng.standard_normal((500, 24)).astype(np.float32)
    wrong = x @ (np.eye(24) + 0.1 * rng.standard_normal((24, 24))).astype(np.float32)
    rest = (x @ w.T - wrong @ w.T).T @ wrong
    factors = factorize(wrong.T @ wrong)
    better = corrected(w, rest, factors)
    before, after = (np.square(wrong @ m.T - x @ w.T).sum() for m in (w, better))
    assert after < 0.001 * before
    assert np.allclose(corrected(w, 0 * rest, factors), w)


def test_the_correction_is_exact_in_blocks() -> None:
    w, hessian = problem(5, 600)
    rest = (np.random.default_rng(1).standard_normal(w.shape) * hessian.trace() / 600).astype(np.float32)
    exact = np.linalg.solve(hessian.astype(np.float64), rest.T).T
    found = corrected(0 * w, rest, factorize(hessian))
    assert np.abs(found - exact).max() < 1e-4 * np.abs(exact).max()


def test_regularising_keeps_the_diagonal_apart() -> None:
    hessian = np.array([[4.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]], np.float32)
    regularize(hessian)
    more = DAMPING * 2
    cross = 2 * (1 - SHRINKAGE)
    assert np.allclose(hessian, [[4 + more, cross, 0], [cross, 2 + more, 0], [0, 0, more]])
    nothing = np.zeros((3, 3), np.float32)
    regularize(nothing)
    assert np.array_equal(nothing, np.eye(3))


def test_matrices_of_a_layer_aim_at_what_the_source_makes_of_its_own_inputs(tmp_path: Path) -> None:
    """Inputs of the quantised model are off in a way that is not symmetric; what is to be rounded takes it back."""
    rng = np.random.default_rng(7)
    w = {name: rng.standard_normal((8, 24)).astype(np.float32) for name in ("w1", "w3", "w2")}
    seen: dict[str, np.ndarray] = {}

    def quantize(name: str, better: np.ndarray, factors: Factors) -> tuple[dict[str, np.ndarray], np.ndarray]:
        seen[name] = better
        return {}, better

    run = LayerRun(cast(Forward, None), w.get, quantize, tmp_path, 0, lambda: None)
    x = rng.standard_normal((500, 24)).astype(np.float32)
    own = x + 0.1 * x @ np.triu(rng.standard_normal((24, 24)), 1).astype(np.float32)
    moments, outputs = Moments(24, 24), Moments(24, 8)
    moments.add(own, x - own)
    outputs.add(own, x @ w["w2"].T)
    run._round_inputs(MLP, moments)
    run._round_output(MLP, outputs)
    for name, better in seen.items():
        before, after = (np.square(own @ m.T - x @ w[name].T).sum() for m in (w[name], better))
        assert after < 0.2 * before, name
