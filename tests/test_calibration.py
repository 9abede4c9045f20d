"""Calibrating a whole model: nearer to its source, the same however it is run; effects of its parts; its text."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from formats.codecs.trit_codec import encode_reference
from formats.conversion.convert import convert
from formats.conversion.mixed import Measured, allocate, base_depth
from formats.sources.source import Source, expected_tensors, open_source
from runtime.calibration.effects import ROLES, measure_effects
from runtime.calibration.run import Calibration
from runtime.calibration.state import StateFolder
from runtime.calibration.windows import CalibrationError, cut_windows
from runtime.kernels import get_kernels
from runtime.model import Model
from runtime.tokenizer import Tokenizer, make_tokenizer
from tests.tiny import MATRICES, folder_with_tokenizer


@pytest.fixture(scope="module", params=["tiny-llama-tied-bf16", "tiny-llama-bias-bf16"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(folder_with_tokenizer(tmp_path_factory.mktemp("source") / "model", request.param))


@pytest.fixture(scope="module")
def tokenizer(source: Source) -> Tokenizer:
    return make_tokenizer(source.tokenizer, source.blobs.__getitem__, str(source.path))


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


# ==== A whole model ====


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
    with pytest.raises(CalibrationError, match="beginning of another"), calibration(source, tmp_path, "trit3"):
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


def test_windows_are_spread_over_every_text(tokenizer: Tokenizer) -> None:
    texts = ["".join(chr(97 + (i + 7 * j) % 26) for i in range(800)) for j in range(2)]
    windows = cut_windows(tokenizer, texts, 192, ctx=16)
    assert windows.shape == (12, 16) and (windows[:, 0] == tokenizer.bos_id).all()
    for half, text in ((windows[:6], texts[0]), (windows[6:], texts[1])):
        ids = tokenizer.encode(text, add_bos=False)
        assert half[0, 1:].tolist() == ids[1:16]
        last = len(ids) // 16 * 16
        assert half[-1, 1:].tolist() == ids[last - 15 : last]


def test_what_a_short_text_lacks_the_others_give(tokenizer: Tokenizer) -> None:
    first, short, last = ("".join(chr(97 + (i + 7 * j) % 26) for i in range(n)) for j, n in enumerate((800, 48, 800)))
    windows = cut_windows(tokenizer, [first, short, last], 192, ctx=16)
    assert windows.shape == (12, 16)
    own = np.array(tokenizer.encode(short, add_bos=False)[:32]).reshape(2, 16)
    assert (windows[5:7, 1:] == own[:, 1:]).all()


def test_a_text_that_is_too_short_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(CalibrationError, match="less than one window of 512 tokens"):
        cut_windows(tokenizer, ["Hello."], 4096)
