"""Calibrated quantisation: compiled like the reference, better than rounding, the same however it is run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
from tiny import MATRICES, folder_with_tokenizer

from formats.codecs.nf4 import NF4Codec
from formats.codecs.trit import GROUP, quantize_levels
from formats.codecs.trit_codec import encode_reference
from formats.container import open_trit
from formats.conversion.convert import convert
from formats.conversion.mixed import Measured, allocate, base_depth
from formats.sources.source import Source, expected_tensors, open_source
from runtime.calibration.effects import ROLES, measure_effects
from runtime.calibration.feedback import (
    DAMPING,
    SHRINKAGE,
    Factors,
    corrected,
    factorize,
    quantize,
    regularize,
)
from runtime.calibration.layer import MLP, LayerRun, Moments
from runtime.calibration.nf4 import PARAMS, quantize_nf4
from runtime.calibration.run import Calibration
from runtime.calibration.state import StateFolder
from runtime.calibration.streams import Forward
from runtime.calibration.windows import CalibrationError, cut_windows
from runtime.kernels import get_kernels
from runtime.kernels.numba_best import BestSearch
from runtime.kernels.numba_feedback import RoundColumns
from runtime.model import Model
from runtime.tokenizer import make_tokenizer
from tools.convert import main

DEPTHS = (1, 2, 3, 4)


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


# ==== One matrix ====


@pytest.mark.parametrize("shape", [(1, 16), (5, 33), (70, 100)], ids=str)
@pytest.mark.parametrize("depth", DEPTHS)
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


@pytest.mark.parametrize("depth", DEPTHS)
def test_feedback_makes_a_fraction_of_the_loss_of_rounding(depth: int) -> None:
    w, hessian = problem(48, 160)
    found = values(*quantize(w, factorize(hessian), depth, RoundColumns(), BestSearch()))
    assert loss(w, found, hessian) < 0.65 * loss(w, values(*quantize_levels(w, depth)), hessian)


@pytest.mark.parametrize("depth", DEPTHS)
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


# ==== A whole model ====


@pytest.fixture(scope="module", params=["tiny-llama-tied-bf16", "tiny-llama-bias-bf16"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(folder_with_tokenizer(tmp_path_factory.mktemp("source") / "model", request.param))


def windows_of(source: Source, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, source.config["vocab_size"], (6, 40))


class Stopped(Exception):
    """What the tests stop a run with."""


@contextmanager
def calibration(source: Source, folder: Path, codec: str, stop: int = 0, threads: int = 2) -> Iterator[Source]:
    def progress(done: int, total: int, what: str) -> None:
        if done == stop:
            raise Stopped

    codecs = {name: codec for name in expected_tensors(source.config) if name.endswith(MATRICES)}
    kernels = get_kernels("numba", threads, int8=False)
    with ThreadPoolExecutor(threads) as pool:
        try:
            yield Calibration(source, windows_of(source), codecs, folder, kernels, pool, progress).run()
        finally:
            kernels.close()


def divergence(source: Path, other: Path, windows: np.ndarray) -> float:
    """Mean KL divergence of the predictions of two files."""
    logs = []
    for path in (source, other):
        model = Model.load(path, "numpy", activations="f32")
        logits = np.concatenate([model.forward(ids, model.new_cache(len(ids)), "all") for ids in windows])  # type: ignore[misc]
        model.close()
        logits = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        logs.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).mean())


@pytest.mark.parametrize(("codec", "limit"), [("trit1", 0.7), ("trit2", 0.5), ("trit4", 0.5), ("nf4", 0.5)])
def test_a_calibrated_model_is_nearer_to_its_source(source: Source, codec: str, limit: float, tmp_path: Path) -> None:
    base, plain, better = tmp_path / "base.trit", tmp_path / "plain.trit", tmp_path / "better.trit"
    convert(source, base, "f32", embed="f32")
    convert(source, plain, codec, embed="f32")
    with calibration(source, tmp_path / "state", codec) as found:
        convert(found, better, codec, embed="f32")
    windows = windows_of(source)
    assert divergence(base, better, windows) < limit * divergence(base, plain, windows)


@pytest.mark.parametrize("stop", [3, 9, 12])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(source: Source, stop: int, tmp_path: Path) -> None:
    with calibration(source, tmp_path / "whole", "trit2", threads=1) as found:
        convert(found, tmp_path / "whole.trit", "trit2")
    with pytest.raises(Stopped), calibration(source, tmp_path / "state", "trit2", stop):
        raise AssertionError("it should have stopped")
    with calibration(source, tmp_path / "state", "trit2") as found:
        convert(found, tmp_path / "resumed.trit", "trit2")
    assert (tmp_path / "resumed.trit").read_bytes() == (tmp_path / "whole.trit").read_bytes()


def test_a_folder_of_something_else_is_left_alone(source: Source, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(CalibrationError, match="holds other things"), calibration(source, tmp_path, "trit2"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_one_calibration_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    first = StateFolder(tmp_path / "state", {"a": 1})
    with pytest.raises(CalibrationError, match="another conversion is at work"):
        StateFolder(tmp_path / "state", {"a": 1})
    first.release()
    with pytest.raises(CalibrationError, match="beginning of another conversion"):
        StateFolder(tmp_path / "state", {"a": 2})
    again = StateFolder(tmp_path / "state", {"a": 1})
    (tmp_path / "state" / "notes.txt").write_text("mine", encoding="utf-8")
    again.clear()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["notes.txt"]


def test_a_damaged_folder_is_told(tmp_path: Path) -> None:
    folder = StateFolder(tmp_path / "state", {})
    (tmp_path / "state" / "layer-0003.npz").write_bytes(b"PK")
    with pytest.raises(CalibrationError, match=r"layer-0003\.npz: is damaged"):
        folder.layer(3)
    folder.release()
    (tmp_path / "state" / "job.json").write_text("{", encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"job\.json: is damaged"):
        StateFolder(tmp_path / "state", {})


def test_a_finished_layer_is_not_worked_on_again(source: Source, tmp_path: Path) -> None:
    with pytest.raises(Stopped), calibration(source, tmp_path, "trit2", stop=8):
        pass
    assert sorted(path.name for path in tmp_path.glob("layer-*")) == ["layer-0000.npz"]
    before = (tmp_path / "layer-0000.npz").stat().st_mtime_ns
    with calibration(source, tmp_path, "trit2"):
        assert (tmp_path / "layer-0000.npz").stat().st_mtime_ns == before


def test_the_folder_of_another_conversion_is_refused(source: Source, tmp_path: Path) -> None:
    with calibration(source, tmp_path, "trit2"):
        pass
    with pytest.raises(CalibrationError, match="another conversion"), calibration(source, tmp_path, "trit3"):
        pass


# ==== Depth by effect ====


def test_effects_are_those_of_roles_and_layers_on_the_output(source: Source, tmp_path: Path) -> None:
    windows = windows_of(source)[:2]
    kernels = get_kernels("numpy", int8=False)
    effects = measure_effects(source, windows, 2, kernels, encode_reference)
    assert list(effects) == [f"layers.{i}.{role}" for i in range(source.config["n_layers"]) for role in ROLES]
    base = convert(source, tmp_path / "base.trit", "f32", embed="f32").path

    def measured(part: str) -> float:
        codecs = {name: "trit2" if f".{part}" in name else "f32" for name in effects}
        convert(source, tmp_path / "part.trit", "f32", embed="f32", codecs=codecs, overwrite=True)
        return divergence(base, tmp_path / "part.trit", windows)

    for one, other, sums in (("wv", "w2", "layers.{}.wv layers.{}.w2"), ("0.w", "1.w", "layers.0.{} layers.1.{}")):
        names = range(source.config["n_layers"]) if one == "wv" else ROLES
        totals = [sum(effects[pattern.format(name)] for name in names) for pattern in sums.split()]
        assert totals[0] / totals[1] == pytest.approx(measured(one) / measured(other), rel=0.01)


def test_depths_follow_the_measured_effects() -> None:
    matrices = [Measured(f"layers.{i}.wq", 1000, (0.2, 0.02, 0.002, 0.0002), (200, 400, 600, 800)) for i in range(4)]
    effects = [0.1, 0.4, 0.2, 0.3]
    known = [replace(matrix, effect=(2, effect)) for matrix, effect in zip(matrices, effects, strict=True)]
    assert base_depth(known, 4.0) == 2
    assert allocate(known, 4.0) == {f"layers.{i}.wq": depth for i, depth in enumerate((2, 3, 2, 3))}


# ==== The text ====


def test_windows_are_spread_over_every_text(source: Source) -> None:
    tokenizer = make_tokenizer(source.tokenizer, source.blobs.__getitem__, str(source.path))
    texts = ["".join(chr(97 + (i + 7 * j) % 26) for i in range(800)) for j in range(2)]
    windows = cut_windows(tokenizer, texts, 192, ctx=16)
    assert windows.shape == (12, 16) and (windows[:, 0] == tokenizer.bos_id).all()
    for half, text in ((windows[:6], texts[0]), (windows[6:], texts[1])):
        ids = tokenizer.encode(text, add_bos=False)
        assert half[0, 1:].tolist() == ids[1:16]
        last = len(ids) // 16 * 16
        assert half[-1, 1:].tolist() == ids[last - 15 : last]


def test_what_a_short_text_lacks_the_others_give(source: Source) -> None:
    tokenizer = make_tokenizer(source.tokenizer, source.blobs.__getitem__, str(source.path))
    first, short, last = ("".join(chr(97 + (i + 7 * j) % 26) for i in range(n)) for j, n in enumerate((800, 48, 800)))
    windows = cut_windows(tokenizer, [first, short, last], 192, ctx=16)
    assert windows.shape == (12, 16)
    own = np.array(tokenizer.encode(short, add_bos=False)[:32]).reshape(2, 16)
    assert (windows[5:7, 1:] == own[:, 1:]).all()


def test_a_text_that_is_too_short_is_refused(source: Source) -> None:
    tokenizer = make_tokenizer(source.tokenizer, source.blobs.__getitem__, str(source.path))
    with pytest.raises(CalibrationError, match="less than one window of 512 tokens"):
        cut_windows(tokenizer, ["Hello."], 4096)


# ==== The command ====

# A conversion that is ended in the middle of what it writes for the n-th time into a stream.
KILLED = """
import os, signal, sys
from runtime.calibration.streams import Stream
from tools.convert import main

left, write = int(sys.argv[1]), Stream.write

def half(self, start, values):
    global left
    left -= 1
    write(self, start, values if left else values[: len(values) // 2])
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

Stream.write = half
main(sys.argv[2:])
"""


def write_text(path: Path) -> str:
    path.write_text("The rain in Spain stays mainly in the plain. " * 40, encoding="utf-8")
    return str(path)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder, text = folder_with_tokenizer(tmp_path / "model"), write_text(tmp_path / "text.txt")
    command = [str(folder), "--quant", "trit2", "--calibrate", text, "--calibrate-tokens", "1024"]
    assert main([*command, "-o", str(tmp_path / "whole.trit")]) == 0
    command += ["-o", str(tmp_path / "out.trit"), "--state", str(tmp_path / "state")]
    found = []
    for n in (1, 9):  # among the embeddings, in the second layer
        ended = subprocess.run([sys.executable, "-c", KILLED, str(n), *command], capture_output=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        found.append(sorted(path.name for path in (tmp_path / "state").glob("layer-*")))
    assert found == [[], ["layer-0000.npz"]]
    assert main(command) == 0
    assert (tmp_path / "out.trit").read_bytes() == (tmp_path / "whole.trit").read_bytes()
    assert not (tmp_path / "state").exists()


def test_the_command_writes_what_the_library_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with_tokenizer(tmp_path / "model")
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "out.trit"
    command = [str(folder), "-o", str(out), "--quant", "trit2", "--calibrate", text, "--calibrate-tokens", "1024"]
    assert main(command) == 0
    assert not (tmp_path / "out.trit.state").exists()
    with open_trit(out) as file:
        assert file.tensors["layers.0.wq"].codec == "trit2"
        assert file.header["source"]["options"].endswith("--calibrate text.txt --calibrate-tokens 1024")
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    mixed = [*command[:4], "trit-mixed", *command[5:], "--bpw", "5", "--overwrite"]
    assert main(mixed) == 0
    assert "plan: 5.00 bits per weight" in capsys.readouterr().err
    with open_trit(out) as file:
        assert {tensor.codec for name, tensor in file.tensors.items() if name.endswith(MATRICES)} > {"trit2"}
    assert main([*command, "--overwrite", "--encoder", "best"]) == 2
    assert main([*command[:4], "f16", *command[5:]]) == 2
