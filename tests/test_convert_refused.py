"""What the converter refuses, and that nothing is left when it fails."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from formats.container import open_trit
from formats.conversion.convert import convert
from formats.errors import SourceError
from formats.sources.hf_names import HF_NAMES
from formats.sources.source import open_source
from tests.checkpoints import edit_json, write_gguf, write_hf
from tests.converting import WQ, left, to_trit, with_values


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [WQ, "tok_embeddings", "norm"])
@pytest.mark.parametrize("quant", ["trit3", "nf4", "f16"])
def test_values_that_are_not_finite_are_named(folder: Path, bad: float, name: str, quant: str) -> None:
    with_values(folder, name, bad)
    with pytest.raises(SourceError, match="checkpoint is broken") as caught:
        to_trit(folder, quant)
    assert caught.value.tensor == HF_NAMES.theirs(name) and caught.value.path.endswith("model.safetensors")
    assert left(folder) == []


@pytest.mark.parametrize("quant", ["f16", "q8"])
def test_values_beyond_float16_are_named(folder: Path, quant: str) -> None:
    with_values(folder, WQ, 1e8)
    with pytest.raises(SourceError, match=r"does not fit.*bf16") as caught:
        to_trit(folder, quant)
    assert caught.value.tensor == HF_NAMES.theirs(WQ) and left(folder) == []
    to_trit(folder, "bf16")


def test_what_no_header_can_hold_is_the_sources_fault(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", chat_template="[" * 300_000)
    with pytest.raises(SourceError, match=r"does not fit into the header.*more than 250000 values") as caught:
        to_trit(folder, "f16")
    assert caught.value.path == str(folder) and left(folder) == []


@pytest.mark.parametrize("name", [WQ, "norm"])
@pytest.mark.parametrize("quant", ["trit3", "nf4"])
def test_values_beyond_any_sum_are_named(folder: Path, quant: str, name: str) -> None:
    with_values(folder, name, 1e8)
    with pytest.raises(SourceError, match=r"may exceed 65536") as caught:
        to_trit(folder, quant)
    assert caught.value.tensor == HF_NAMES.theirs(name) and left(folder) == []


def test_an_existing_file_stays_unless_told(folder: Path) -> None:
    out = folder.parent / "out.trit"
    out.write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="--overwrite"):
        to_trit(folder)
    assert out.read_bytes() == b"precious"
    with_values(folder, WQ, np.nan)
    with pytest.raises(SourceError):
        to_trit(folder, overwrite=True)
    assert out.read_bytes() == b"precious" and left(folder) == ["out.trit"]
    write_hf(folder)
    to_trit(folder, overwrite=True)
    open_trit(out).close()


def test_the_source_is_never_the_output(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    with pytest.raises(FileExistsError, match="source itself"):
        convert(open_source(tmp_path / "m.gguf"), tmp_path / "m.gguf", "f16", overwrite=True)
    assert (tmp_path / "m.gguf").read_bytes() == data


def test_places_that_cannot_be_written(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        convert(open_source(folder), folder / "nowhere" / "out.trit", "f16")
    with pytest.raises(IsADirectoryError):
        convert(open_source(folder), folder, "f16", overwrite=True)


def test_a_full_disk_is_said_before_and_during(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="0 are free"):
        to_trit(folder)
    monkeypatch.undo()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("formats.writer.TritWriter.add", full)
    with pytest.raises(OSError, match=r"out\.trit") as caught:
        to_trit(folder)
    assert caught.value.errno == errno.ENOSPC and left(folder) == []


def test_ctrl_c_leaves_nothing(folder: Path) -> None:
    def interrupt(done: int, total: int, note: str) -> None:
        if note == WQ:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        to_trit(folder, progress=interrupt)
    assert left(folder) == []


def test_unknown_codecs(folder: Path) -> None:
    for quant, embed in (("trit5", None), ("u8", None), ("f16", "q4")):
        with pytest.raises(ValueError, match="supported are trit1"):
            to_trit(folder, quant, embed=embed)


def test_a_source_that_changes_meanwhile_is_refused(folder: Path) -> None:
    shard, source = folder / "model.safetensors", open_source(folder)

    def change(done: int, total: int, what: str) -> None:
        if what == "closing":
            data = bytearray(shard.read_bytes())
            data[-1] ^= 1
            shard.write_bytes(data)

    with pytest.raises(SourceError, match=r"model\.safetensors: changed while it was converted"):
        convert(source, folder.parent / "m.trit", "f16", progress=change)
    assert left(folder) == []
