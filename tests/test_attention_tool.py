"""tools.attention: which layers are told apart, what its figures mean, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from formats.conversion.convert import convert
from formats.conversion.synthetic import make_checkpoint
from formats.sources.source import open_source
from runtime.model import Model
from runtime.sizes import kv_bytes_per_token
from tools import attention


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers, the second with learned values."""
    folder = tmp_path_factory.mktemp("attention")
    make_checkpoint(folder / "source", "tiny", "f16", kv_modules="v", kv_rank=32)
    convert(open_source(folder / "source"), folder / "learned.trit", "keep")
    return folder / "learned.trit"


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.attention.ENOUGH", 1 << 16)
    monkeypatch.setattr("runtime.benchmark.READ_BYTES", 1 << 20)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_lines(learned: Path, backend: str, capsys: pytest.CaptureFixture[str]) -> None:
    args = [str(learned), "--backend", backend, "-d", "300", "-r", "3", "--kv", "f16,k=q8,v=q4"]
    assert attention.main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["depth"] == 300 and found["rounds"] == 3 and found["kernels"].startswith(backend)
    lines = found["lines"]
    assert [(line["kv"], line["layers"], bool(line["learned"])) for line in lines] == [
        ("f16", [0], False), ("k=q8,v=q4", [0], False), ("f16", [1], True), ("k=q8,v=q4", [1], True),
    ]  # fmt: skip
    assert lines[0]["first"] == 1.0 and all(line["ms"] > 0 and line["reading"] > 0 for line in lines)
    for line in lines:
        assert line["gb_s"] == pytest.approx(line["bytes_per_token"] * 300 / line["ms"] / 1e6)
    model = Model.load(learned, "numpy")
    for kv in ("f16", "k=q8,v=q4"):  # one layer of each kind make the model
        each = [line["bytes_per_token"] for line in lines if line["kv"] == kv]
        assert sum(each) == kv_bytes_per_token(model.config, kv, model.modules)
    model.close()
    assert attention.main(args) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| learned.trit")]
    assert len(rows) == 4 and "values of rank 32, decoded linearly" in rows[2]
    assert all(re.search(r"\| \d+ \| \d+\.\d{3} \|", row) for row in rows)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-d", "99999999"], "-d 99999999 and a token"),
        (["--kv", "q5"], "q5"),
        (["-r", "0"], "-r"),
        (["none.trit"], "none.trit"),
    ],
)
def test_what_is_refused(learned: Path, args: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = attention.main([*args, str(learned)])
    out, err = capsys.readouterr()
    assert code == 2 and not out and err.count("\n") == 1 and said in err
