"""Several files from one pass, mixed depths, and the compiled quantiser in the converter."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.codecs.trit_codec import encode_reference
from formats.container import dequantize, open_trit
from formats.conversion import mixed
from formats.conversion.convert import convert, convert_several, several_paths
from formats.conversion.mixed import SENSITIVITY, Measured, allocate, measure
from formats.conversion.plan import rows_of
from formats.errors import SourceError
from formats.sources.source import Source, expected_tensors, open_source
from runtime.encoder import fast_encoder
from tests.checkpoints import HF_CONFIG, weights_for, write_hf
from tests.converting import command, left

DEPTHS = ("trit2", "trit3", "trit4")


# ---- the compiled quantiser -----------------------------------------------------------------------------


@pytest.mark.parametrize("embed", [None, "trit3"])
def test_the_compiled_quantiser_writes_the_same_file(folder: Path, embed: str | None) -> None:
    slow, fast = folder.parent / "slow.trit", folder.parent / "fast.trit"
    convert(open_source(folder), slow, "trit3", embed)
    for threads in (1, 3):
        with fast_encoder(threads) as encode:
            convert(open_source(folder), fast, "trit3", embed, overwrite=True, encode=encode)
        assert slow.read_bytes() == fast.read_bytes()


def test_without_numba_the_reference_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with fast_encoder() as encode:
        assert encode is not encode_reference
    for name in ("numba", "runtime.kernels.numba_encode"):
        monkeypatch.setitem(sys.modules, name, None)
    with fast_encoder() as encode:
        assert encode is encode_reference


def test_broken_values_are_named_from_any_thread(folder: Path) -> None:
    weights = weights_for(HF_CONFIG, "float32")
    weights["layers.1.w2"][5, 7] = np.nan
    write_hf(folder, dtype="float32", weights=weights)
    with fast_encoder(2) as encode, pytest.raises(SourceError, match=r"holds nan at \[5, 7\]") as caught:
        convert(open_source(folder), folder.parent / "x.trit", "trit2", encode=encode)
    assert caught.value.tensor == "model.layers.1.mlp.down_proj.weight" and left(folder) == []


# ---- several files --------------------------------------------------------------------------------------


def test_each_file_is_what_a_conversion_of_its_own_writes(folder: Path) -> None:
    source = open_source(folder)
    quants = (*DEPTHS, "nf4", "f16")
    paths = several_paths(source, folder.parent, quants)
    assert paths["trit2"] == folder.parent / "source-trit2.trit"
    summaries = convert_several(source, paths, "q8")
    for quant, summary in zip(quants, summaries, strict=True):
        alone = folder.parent / "alone.trit"
        convert(open_source(folder), alone, quant, "q8", overwrite=True)
        assert summary.path == paths[quant] and summary.path.read_bytes() == alone.read_bytes()
        with open_trit(summary.path) as file:
            assert file.tensors["layers.0.w1"].codec == quant


def counted(source: Source) -> list[str]:
    """Make a source note each tensor of which rows are read."""
    reads: list[str] = []
    for name, tensor in source.tensors.items():

        def read_rows(start: int, stop: int, name: str = name, read: Any = tensor.read_rows) -> np.ndarray:
            reads.append(name)
            values: np.ndarray = read(start, stop)
            return values

        object.__setattr__(tensor, "read_rows", read_rows)
    return reads


def test_more_depths_read_no_more(folder: Path) -> None:
    counts = []
    for quants in (DEPTHS[:1], DEPTHS):
        source = open_source(folder)
        reads = counted(source)
        target = folder.parent / str(len(quants))
        target.mkdir()
        with fast_encoder(1) as encode:
            convert_several(source, several_paths(source, target, quants), "trit4", encode=encode)
        counts.append([reads.count(name) for name in source.tensors if name.startswith("layers.0.w")])
    assert counts[0] == counts[1] and max(counts[0]) <= 2


@pytest.mark.parametrize("existing", [True, False])
def test_all_files_or_none(folder: Path, existing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(folder)
    paths = several_paths(source, folder.parent, DEPTHS)
    if existing:
        paths["trit3"].write_bytes(b"precious")
        with pytest.raises(FileExistsError, match="--overwrite"):
            convert_several(source, paths)
        assert left(folder) == ["source-trit3.trit"] and paths["trit3"].read_bytes() == b"precious"
        return
    real, calls = os.replace, []

    def replace(a: str, b: str) -> None:
        calls.append(b)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="Input/output error"):
        convert_several(source, paths)
    assert len(calls) == 2 and left(folder) == []


def test_a_broken_tensor_leaves_none(folder: Path) -> None:
    weights = weights_for(HF_CONFIG, "float32")
    weights["output"][-1, -1] = np.inf
    write_hf(folder, dtype="float32", weights=weights)
    source = open_source(folder)
    with pytest.raises(SourceError, match="lm_head"):
        convert_several(source, several_paths(source, folder.parent, DEPTHS))
    assert left(folder) == []


def test_names_are_safe(folder: Path) -> None:
    source = open_source(folder)
    for name, expected in (("a b/../c", "a-b-..-c-q8.trit"), ("..", "model-q8.trit"), ("Llä", "Ll-q8.trit")):
        source.name = name
        assert several_paths(source, Path("x"), ["q8"])["q8"] == Path("x") / expected


def test_command_for_several(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder.parent / "out"
    code, stdout, err = command(capsys, folder, "-o", out, "--quant", "trit2,trit4")
    assert code == 0 and stdout == "" and err.count("bits per weight") == 2
    assert sorted(p.name for p in out.iterdir()) == ["source-trit2.trit", "source-trit4.trit"]
    for args, text in (
        ((folder, "-o", out, "--quant", "trit2,trit4"), "--overwrite"),
        ((folder, "-o", out, "--quant", "trit2,trit2"), "twice"),
        ((folder, "-o", out, "--quant", "trit2,keep"), "'keep' is not one of"),
        ((folder, "-o", out, "--quant", "trit2,"), "'' is not one of"),
        ((folder, "-o", folder / "config.json", "--quant", "trit2,trit3"), "is a file"),
    ):
        code, stdout, err = command(capsys, *args)
        assert code == 2 and stdout == "" and text in err and err.count("\n") == 1


def test_a_folder_that_was_made_is_taken_away_again(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = weights_for(HF_CONFIG, "float32")
    weights["norm"][0] = np.nan
    write_hf(folder, dtype="float32", weights=weights)
    code, _, err = command(capsys, folder, "-o", folder.parent / "out", "--quant", "trit1,trit2")
    assert code == 2 and "broken" in err and left(folder) == []


# ---- mixed depth ----------------------------------------------------------------------------------------


def fake(seed: int, count: int = 6) -> list[Measured]:
    """Matrices of all roles whose errors fall about ninefold with each trit."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(count):
        role = list(SENSITIVITY)[int(rng.integers(len(SENSITIVITY)))]
        weights = int(rng.integers(1, 20)) * 1280
        errors = [0.18 * 9.0 ** -(d + rng.normal(0, 0.1)) for d in range(4)]
        found.append(Measured(f"layers.{i}.{role}", weights, errors, [weights * d // 5 + 96 for d in (1, 2, 3, 4)]))
    return found


def bits(matrices: list[Measured], depths: Any) -> float:
    return 8 * sum(m.nbytes[depths[m.name] - 1] for m in matrices) / sum(m.weights for m in matrices)


@pytest.mark.parametrize("seed", range(20))
def test_an_allocation_keeps_its_promises(seed: int) -> None:
    matrices = fake(seed)
    uniform = [bits(matrices, {m.name: d for m in matrices}) for d in (1, 2, 3, 4)]
    for bpw in np.linspace(uniform[0], uniform[3] + 0.5, 9):
        depths = allocate(matrices, float(bpw))
        spent = bits(matrices, depths)
        assert spent <= bpw + 1e-9
        base = max(d for d in (1, 2, 3, 4) if uniform[d - 1] <= bpw)
        assert min(depths.values()) >= base
        assert base > 1 or max(depths.values()) <= 2
        for m in matrices:  # nothing more fits
            if depths[m.name] < (4 if base > 1 else 2):
                assert bits(matrices, {**depths, m.name: depths[m.name] + 1}) > bpw
        harm = sum(m.harm(depths[m.name]) for m in matrices)
        assert harm <= sum(m.harm(base) for m in matrices)
    with pytest.raises(ValueError, match="too few: one trit each"):
        allocate(matrices, uniform[0] - 0.01)


def test_the_values_come_first() -> None:
    """Of equal matrices wv gets the first trit, then wk, then w2."""
    roles = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    matrices = [Measured(f"layers.0.{r}", 1600, [0.18, 0.02, 0.001, 0.00005], [320, 640, 960, 1280]) for r in roles]
    for extra, expected in ((1, {"wv"}), (2, {"wv", "wk"}), (3, {"wv", "wk", "w2"})):
        depths = allocate(matrices, 3.2 + extra * 1.6 / 7 + 1e-6)
        assert {name[9:] for name, depth in depths.items() if depth == 3} == expected


def test_measuring_a_sample_is_close_to_measuring_all(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = open_source(folder).tensors["layers.0.w1"]
    whole = measure("layers.0.w1", rows_of(tensor), encode_reference)
    monkeypatch.setattr(mixed, "SAMPLE", 2048)
    part = measure("layers.0.w1", rows_of(tensor), encode_reference)
    assert whole.nbytes == part.nbytes and whole.weights == part.weights == 96 * 64
    np.testing.assert_allclose(part.errors, whole.errors, rtol=0.3)
    assert 0.1 < whole.errors[0] < 0.25 and all(a > 5 * b for a, b in zip(whole.errors, whole.errors[1:], strict=False))


def test_a_mixed_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = convert(open_source(folder), "x", "trit2", dry_run=True).matrix_bpw
    top = convert(open_source(folder), "x", "trit3", dry_run=True).matrix_bpw
    bpw = (2 * base + top) / 3
    one, other = folder.parent / "one.trit", folder.parent / "other.trit"
    summary = convert(open_source(folder), one, "trit-mixed", bpw=bpw)
    with fast_encoder() as encode:
        convert(open_source(folder), other, "trit-mixed", bpw=bpw, encode=encode)
    assert one.read_bytes() == other.read_bytes()
    assert base < summary.matrix_bpw <= bpw
    with open_trit(one) as file:
        file.verify()
        codecs = {name: t.codec for name, t in file.tensors.items() if len(t.shape) == 2}
        assert {c for n, c in codecs.items() if n.startswith("layers")} <= {"trit2", "trit3", "trit4"}
        assert codecs["layers.0.wv"] == "trit4" and codecs["layers.0.wq"] == "trit2" and codecs["output"] == "f16"
        assert f"--bpw {bpw:g}" in file.header["source"]["options"]
        size = sum(t.nbytes for n, t in file.tensors.items() if n.startswith("layers") and len(t.shape) == 2)
        weights = sum(np.prod(t.shape) for n, t in file.tensors.items() if n.startswith("layers") and len(t.shape) == 2)
        assert summary.matrix_bpw == 8 * size / weights
    code, out, _ = command(capsys, folder, "--quant", "trit-mixed", "--bpw", bpw, "--dry-run")
    assert code == 0 and "trit2" in out and f"{summary.matrix_bpw:.2f} in the layers' matrices" in out


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--quant", "trit-mixed"), "--bpw"),
        (("--quant", "trit2", "--bpw", "3"), "--bpw"),
        (("--quant", "trit-mixed", "--bpw", "0.5"), "too few"),
        (("--quant", "trit-mixed", "--bpw", "nan"), "bpw is nan"),
        (("--quant", "trit-mixed,trit2", "--bpw", "3"), "'trit-mixed' is not one of"),
    ],
)
def test_a_budget_that_cannot_be(
    folder: Path, args: tuple[str, ...], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = command(capsys, folder, "-o", folder.parent / "x.trit", *args)
    assert code == 2 and text in err and err.count("\n") == 1 and left(folder) == []


# ---- the report -----------------------------------------------------------------------------------------


def test_the_report_tells_every_tensor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = folder.parent / "m.trit", folder.parent / "report.json"
    code, _, _ = command(capsys, folder, "-o", out, "--quant", "trit2", "--embed", "q8", "--report", report)
    found = json.loads(report.read_text())
    source = open_source(folder)
    assert code == 0 and found["file"] == str(out) and [t["name"] for t in found["tensors"]] == expected_of(source)
    with open_trit(out) as file:
        for line in found["tensors"]:
            tensor, values = file.tensors[line["name"]], source.tensors[line["name"]].read().astype(np.float64)
            again = dequantize(tensor).astype(np.float64)
            assert (line["codec"], line["bytes"], line["shape"]) == (tensor.codec, tensor.nbytes, [*tensor.shape])
            assert line["bpw"] == 8 * tensor.nbytes / values.size
            error = np.sqrt(np.square(values - again).sum() / np.square(values).sum())
            assert line["rel_rmse"] == pytest.approx(error, rel=1e-9, abs=1e-12)
            cosine = (values * again).sum() / np.sqrt(np.square(values).sum() * np.square(again).sum())
            assert line["cosine"] == pytest.approx(cosine, rel=1e-9)
            limit = 0.2 if tensor.codec == "trit2" else 0.01 if tensor.codec == "q8" else 0
            assert line["rel_rmse"] <= limit
    again = ("--quant", "trit1,bf16", "--report", report, "--overwrite")
    code, _, _ = command(capsys, folder, "-o", folder.parent / "out", *again)
    one, other = json.loads(report.read_text())
    assert code == 0 and one["matrix_bpw"] < other["matrix_bpw"] == 16
    assert all(0 < t["rel_rmse"] < 0.005 for t in other["tensors"] if t["codec"] == "bf16")


def expected_of(source: Source) -> list[str]:
    return list(expected_tensors(source.config))
