"""Texts that a model writes by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from formats.conversion.convert import convert
from formats.sources.source import open_source
from runtime import Llama
from tests import tiny
from tools.sample import main, texts


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample")
    convert(open_source(tiny.folder_with_tokenizer(folder / "source")), folder / "tiny.trit", "f16")
    return folder / "tiny.trit"


def test_texts_differ_and_can_be_repeated(path: Path, tmp_path: Path) -> None:
    with Llama(str(path), n_ctx=64, backend="numpy") as llm:
        found = list(texts(llm, 3, 12, 5))
        assert len(set(found)) == 3
        assert list(texts(llm, 2, 12, 6)) == found[1:]
    out = tmp_path / "sample.txt"
    assert main([str(path), "-o", str(out), "-n", "3", "--tokens", "12", "--seed", "5", "--backend", "numpy"]) == 0
    assert out.read_bytes().decode() == "\n".join(found)


def test_a_file_is_not_replaced_unasked(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sample.txt"
    out.write_text("mine")
    assert main([str(path), "-o", str(out)]) == 2
    assert out.read_text() == "mine" and "exists already" in capsys.readouterr().err
