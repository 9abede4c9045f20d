"""Released trit checkpoints: every bit of every value comes back, and what is no trits is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.codecs.base import round_to
from formats.codecs.trit import max_level, quantize_levels
from formats.container import dequantize, open_trit
from formats.conversion.convert import Summary, convert
from formats.sources.source import open_source
from tests.checkpoints import HF_CONFIG, Weights, weights_for, write_hf
from tools.convert import main

SIZES = {"hidden_size": 160, "intermediate_size": 200, "head_dim": 40, "num_hidden_layers": 1}
Depths = dict[str, int] | int


def is_layer_matrix(name: str, values: np.ndarray) -> bool:
    return values.ndim == 2 and name.startswith("layers")


def released(folder: Path, depths: Depths, dtype: str = "float16", signed: bool = False, **how: Any) -> Weights:
    """Write a checkpoint of dequantised trits. signed: weights of level 0 keep the sign of what they were.

    how: for write_hf. returns: the values by our names, as they are in the file
    """
    weights = weights_for({**HF_CONFIG, **SIZES}, "float32")
    for name, values in weights.items():
        if is_layer_matrix(name, values):
            depth = depths if isinstance(depths, int) else depths.get(name.rsplit(".", 1)[-1], 2)
            weights[name] = dequantized(values * np.float32(0.05), depth, dtype, signed)
        else:
            weights[name] = round_to(values, dtype)
    write_hf(folder, SIZES, weights=weights, dtype=how.pop("stored", dtype), **how)
    return weights


def dequantized(w: np.ndarray, depth: int, dtype: str, signed: bool = False) -> np.ndarray:
    levels, codes, units = quantize_levels(w, depth)
    assert np.abs(levels).max() <= max_level(depth)
    values = round_to(levels * units[codes].repeat(16, axis=1)[:, : w.shape[1]], dtype)
    return np.where((levels == 0) & signed, np.copysign(values, w), values)


def keep(folder: Path, quant: str = "keep", **options: Any) -> Summary:
    return convert(open_source(folder), folder.parent / "out.trit", quant, overwrite=True, **options)


def check_bits(folder: Path, weights: Weights) -> dict[str, str]:
    """Compare every bit of every value. returns: the codecs"""
    with open_trit(folder.parent / "out.trit") as file:
        file.verify()
        codecs = {}
        for name, values in weights.items():
            tensor = file.tensors[name]
            codecs[name] = tensor.codec
            assert dequantize(tensor).tobytes() == values.tobytes(), name
        return codecs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "source"


# ---- without loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "dtype", "signed"),
    [
        (1, "float16", False), (2, "float16", True), (3, "float16", False), (4, "float16", True),
        (1, "bfloat16", True), (4, "bfloat16", False), (2, "float32", False), (3, "float32", True),
    ],
)  # fmt: skip
def test_every_bit_comes_back(depth: int, dtype: str, signed: bool, folder: Path) -> None:
    weights = released(folder, depth, dtype, signed)
    summary = keep(folder)
    codecs = check_bits(folder, weights)
    kept = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}[dtype]
    for name, values in weights.items():
        expected = f"trit{depth}" if is_layer_matrix(name, values) else kept if values.ndim == 2 else codecs[name]
        assert codecs[name] == expected, name
    facts = [item.facts for item in summary.plan if item.is_matrix]
    assert len(facts) == 7 and all(f["depth"] == depth and not f["exceptions"] and f["units"] <= 27 for f in facts)
    zeros = sum(int((np.signbit(v) & (v == 0)).sum()) for n, v in weights.items() if is_layer_matrix(n, v))
    assert sum(f["negative_zeros"] for f in facts) == zeros and (zeros > 0) == signed
    (note,) = [n for n in summary.notes if "without loss" in n]
    assert f"from 7 of 7 matrices (7 trit{depth}); 0 exceptions, {zeros} negative zeros" in note


def test_mixed_depths_in_shards(folder: Path) -> None:
    depths = {"wv": 4, "wk": 3, "wq": 1, "w2": 3}
    weights = released(folder, depths, shards=3)
    summary = keep(folder, embed="q8")
    del weights["tok_embeddings"], weights["output"]
    codecs = check_bits(folder, weights)
    for name, codec in codecs.items():
        if codec.startswith("trit"):
            assert codec == f"trit{depths.get(name.rsplit('.', 1)[-1], 2)}"
    assert set(summary.by_codec()) == {"f16", "q8", "trit1", "trit2", "trit3", "trit4"}


@pytest.mark.parametrize("grid", ["float16", "bfloat16"])
def test_values_widened_to_float32(grid: str, folder: Path) -> None:
    weights = released(folder, 3, grid, stored="float32")
    keep(folder)
    assert check_bits(folder, weights)["layers.0.wq"] == "trit3"
    with open_trit(folder.parent / "out.trit") as file:
        assert file.tensors["layers.0.wq"].params == {"dtype": grid}


def test_small_units_that_become_negative_zeros(folder: Path) -> None:
    """Values below half precision's smallest number vanish, and may keep their sign."""
    weights = weights_for({**HF_CONFIG, **SIZES}, "float32")
    w = weights["layers.0.w1"] * np.float32(1e-6)
    weights["layers.0.w1"] = dequantized(w, 2, "float16")
    assert (np.signbit(weights["layers.0.w1"]) & (weights["layers.0.w1"] == 0)).any()
    write_hf(folder, SIZES, dtype="float16", weights=weights)
    for name in weights:
        weights[name] = round_to(weights[name], "float16")
    keep(folder)
    assert check_bits(folder, weights)["layers.0.w1"].startswith("trit")


def test_the_same_bytes_each_time(folder: Path) -> None:
    released(folder, 2, signed=True)
    first = keep(folder).path.read_bytes()
    assert keep(folder).path.read_bytes() == first


# ---- what does not fit is named -------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_one_flipped_value_is_found_and_carried(depth: int, folder: Path) -> None:
    weights = released(folder, depth)
    values = weights["layers.0.w3"]
    values[7, 35] = np.float32(np.float16(values[7, 35]) * np.float16(1.07) + np.float16(0.001))
    write_hf(folder, SIZES, weights=weights)
    summary = keep(folder)
    assert check_bits(folder, weights)["layers.0.w3"] == f"trit{depth}"
    (found,) = [item for item in summary.plan if item.facts.get("exceptions")]
    assert found.name == "layers.0.w3" and found.facts["exceptions"] == 1 and found.params["exceptions"] == 1
    named = [note for note in summary.notes if "model.layers.0.mlp.up_proj.weight has 1 groups of 16" in note]
    assert len(named) == 1
    with open_trit(summary.path) as file:
        assert file.tensors["layers.0.w3"].parts["exception_groups"].tolist() == [7 * 10 + 2]


def test_an_ordinary_matrix_is_named_and_kept(folder: Path) -> None:
    weights = released(folder, 2)
    ordinary = round_to(np.random.default_rng(0).standard_normal((200, 160)).astype(np.float32), "float16")
    weights["layers.0.w1"] = ordinary
    write_hf(folder, SIZES, weights=weights)
    summary = keep(folder)
    codecs = check_bits(folder, weights)
    assert codecs["layers.0.w1"] == "f16" and codecs["layers.0.w3"] == "trit2"
    assert any("without loss from 6 of 7" in note for note in summary.notes)
    assert any("model.layers.0.mlp.gate_proj.weight is kept as f16: not of that form" in n for n in summary.notes)


def test_a_matrix_that_only_looks_like_trits_is_kept(folder: Path) -> None:
    """The rows that are looked at first are trits, most of the others are not."""
    weights = released(folder, 2)
    ordinary = np.random.default_rng(0).standard_normal((200, 160)).astype(np.float16).astype(np.float32)
    step = 200 // 32
    ordinary[::step] = weights["layers.0.w1"][::step]
    weights["layers.0.w1"] = ordinary
    write_hf(folder, SIZES, weights=weights)
    plan = keep(folder, dry_run=True)
    assert any("seem to be in 7 trit2 of 7 matrices" in note for note in plan.notes)
    summary = keep(folder)
    assert check_bits(folder, weights)["layers.0.w1"] == "f16"
    assert any("gate_proj.weight is kept as f16" in note for note in summary.notes)


def test_an_ordinary_checkpoint_is_kept(folder: Path) -> None:
    weights = write_hf(folder)
    summary = keep(folder)
    assert set(check_bits(folder, weights).values()) == {"f16"}
    assert "none of 14 matrices holds trits: they are kept as they are" in summary.notes


def test_many_remarks_are_summed_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = released(folder, {"wq": 2})
    rng = np.random.default_rng(0)
    for name in [n for n, v in weights.items() if is_layer_matrix(n, v) and not n.endswith("wq")]:
        weights[name] = rng.standard_normal(weights[name].shape).astype(np.float16).astype(np.float32)
    write_hf(folder, SIZES, weights=weights)
    monkeypatch.setattr("formats.conversion.plan.MAX_REMARKS", 3)
    assert keep(folder).notes[-1] == "and 3 more such matrices"


# ---- sizes and the command ------------------------------------------------------------------------------


def test_dry_run_knows_the_size(folder: Path) -> None:
    released(folder, 3)
    plan, done = keep(folder, dry_run=True), keep(folder)
    assert plan.by_codec() == done.by_codec() and abs(plan.nbytes - done.nbytes) < 1024
    assert any("seem to be in 7 trit3 of 7 matrices" in note for note in plan.notes)


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = released(folder, 1)
    for args in (("--quant", "keep"), ("--recover",)):
        out = folder.parent / "out.trit"
        assert main([str(folder), "-o", str(out), "--overwrite", *args]) == 0
        stdout, err = capsys.readouterr()
        assert stdout == "" and "trits recovered without loss from 7 of 7" in err and "trit1" in err
        check_bits(folder, weights)
    assert main([str(folder), "-o", str(out), "--recover", "--quant", "trit2"]) == 2
    assert "not allowed with" in capsys.readouterr().err
    assert main([str(folder), "-o", str(out)]) == 2
    assert "required" in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_recovered_files_run(backend: str, folder: Path) -> None:
    """With an exception and with negative zeros: the logits are those of the checkpoint kept as it is."""
    from runtime.model import Model

    weights = released(folder, 2, signed=True)
    weights["layers.0.w2"][3, 100] += np.float32(0.25)
    write_hf(folder, SIZES, weights=weights, tokenizer=False)
    ids = list(range(1, 20))
    logits = []
    for quant in ("keep", "f16"):
        path = keep(folder, quant).path
        model = Model.load(path, backend=backend, n_threads=1, activations="f32")
        logits.append(model.forward(ids, model.new_cache(32), "all"))
        if quant == "keep":
            assert model.file.tensors["layers.0.w2"].params["exceptions"] == 1
        model.close()
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-5)
