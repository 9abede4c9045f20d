"""Files of one model beside each other."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from formats.conversion.convert import convert
from formats.sources.source import open_source
from tests import tiny
from tools import compare, peers
from tools.compare import main
from tools.compare_plot import Point, _keep_apart, draw_points


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in three codecs, and a text."""
    folder = tmp_path_factory.mktemp("compare")
    source = open_source(tiny.folder_with_tokenizer(folder / "source"))
    for quant in ("f16", "trit4", "trit1"):
        convert(source, folder / f"{quant}.trit", quant)
    (folder / "text.txt").write_text("In the beginning was the word. " * 12, encoding="utf-8")
    return folder


def arguments(folder: Path, *more: str) -> list[str]:
    files = [str(folder / f"{quant}.trit") for quant in ("f16", "trit4", "trit1")]
    return [*files, "-f", str(folder / "text.txt"), "-c", "32", "--chunks", "2", "--backend", "numpy", *more]


def test_more_bits_are_nearer_to_the_base(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--json")) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert [p["name"] for p in points] == ["trit1.trit", "trit4.trit", "f16.trit"]
    assert points[0]["bpw"] < points[1]["bpw"] < points[2]["bpw"] == 16
    assert points[0]["kl_mean"] > 10 * points[1]["kl_mean"] > 0
    assert points[2]["kl_mean"] is None
    assert points[2]["nbytes"] == (folder / "f16.trit").stat().st_size


def test_the_table_has_a_line_for_each_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--kl", str(folder / "trit4.trit"))) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[2].startswith("| trit1.trit |")
    assert lines[3].startswith("| trit4.trit |") and lines[3].endswith("| - | - |")  # nothing is held against itself


def test_every_model_must_have_been_made_for_the_window(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.folder_with_tokenizer(tmp_path / "source")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}), encoding="utf-8")
    convert(open_source(source), tmp_path / "short.trit", "trit1")
    assert main([str(tmp_path / "short.trit"), *arguments(folder)]) == 2
    assert capsys.readouterr().err.endswith(f"-c 32: the context of {tmp_path / 'short.trit'} has at most 16 tokens\n")


def test_every_tokenizer_must_give_the_same_ids(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny.folder_with_tokenizer(tmp_path / "source")
    tiny.write_tokenizer(source, 300)
    convert(open_source(source), tmp_path / "other.trit", "trit1")
    assert main([str(tmp_path / "other.trit"), *arguments(folder)]) == 2
    expected = f"other.trit: its tokenizer gives other ids for this text than that of {folder / 'f16.trit'}\n"
    assert capsys.readouterr().err.endswith(expected)


def test_the_picture(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(arguments(folder, "--plot", str(tmp_path / "out.png"))) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_labels_of_files_that_are_alike_stand_apart() -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    labels = [axes.annotate("a long name", (0.5, 0.5), (0, 0), textcoords="offset points") for _ in range(6)]
    figure.draw_without_rendering()
    _keep_apart(axes, labels)
    boxes = [label.get_window_extent() for label in labels]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_names_with_dollar_signs_are_names(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    points = [Point("a$\\base$.trit", 9, 16.0, 5.0, 0.1), Point("a$\\frac$.trit", 4, 8.0, 5.1, 0.1, 0.1, 0.01, 0.9)]
    draw_points(points, "$\\text$.txt", str(tmp_path / "out.png"))
    assert (tmp_path / "out.png").stat().st_size


def test_files_whose_names_differ_in_digits_are_one_series() -> None:
    names = ("trit2-best.trit", "trit3-best.trit", "trit3.trit", "Q4_K_M", "Q5_K_M.gguf")
    points = [Point(name, 1, 4.0, 20.0, 1.0) for name in names]
    assert [point.series for point in points] == ["trit-best", "trit-best", "trit", "Q_K_M", "Q_K_M"]
    assert [point.is_peer for point in points] == [False, False, False, True, True]


def test_what_is_missing_is_said_before_anything_is_measured(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("it measured")

    monkeypatch.setattr(compare.evaluate, "perplexity", never)
    monkeypatch.setattr("tools.arguments.find_spec", lambda name: None)
    assert main(arguments(folder, "--plot", str(tmp_path / "out.png"))) == 2
    assert "pip install 'tritllama[plot]'" in capsys.readouterr().err
    assert main(arguments(folder, "--k-quants", "Q4_K_M")) == 2
    assert "needs a .gguf file" in capsys.readouterr().err
    assert main(["no.gguf", "-f", str(folder / "text.txt")]) == 2


def test_an_unknown_k_quant_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    with pytest.raises(peers.UserError, match="no quantisation 'Q9_Z'"):
        peers.k_quant(tmp_path / "a.gguf", "Q9_Z", tmp_path / "b.gguf")
