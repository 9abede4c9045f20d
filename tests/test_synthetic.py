"""Checkpoints with random weights: every form is read, converted and recovered as the real one would be."""

from __future__ import annotations

from math import prod
from pathlib import Path

import numpy as np
import pytest

from formats.container import dequantize, open_trit
from formats.conversion.convert import convert
from formats.conversion.synthetic import _COMMON, FORMS, KV_FORMS, SHAPES, make_checkpoint, random_rows
from formats.kv_modules import KVModule, module_tensors
from formats.sources.hf_config import config_from_hf
from formats.sources.safetensors_reader import open_folder
from formats.sources.source import expected_tensors, open_source
from tests import tiny
from tools.make_checkpoint import main


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_kept_without_loss(form: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", "tiny", form, layers=1, shard_bytes=300_000)
    source = open_source(tmp_path / "source")
    assert len([f for f in source.files if f.suffix == ".safetensors"]) > 1
    convert(source, tmp_path / "m.trit", "keep")
    codec = {"released": form[9:], "nf4": "nf4"}.get(form.split("-")[0], form)
    with open_trit(tmp_path / "m.trit") as file:
        for name, tensor in source.tensors.items():
            values = tensor.read()
            assert dequantize(file.tensors[name]).tobytes() == values.tobytes()
            assert 0.02 < np.sqrt(np.square(values).mean()) < 1.3
            if values.ndim == 2 and name.startswith("layers"):
                assert file.tensors[name].codec == codec
                assert not {"exceptions", "sign_bytes"} & set(file.tensors[name].params)
    if form in ("f16", "bf16", "f32"):
        assert {tensor.dtype for tensor in open_folder(tmp_path / "source")[0].values()} == {form.upper()}


def test_a_rank_for_learned_values(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", "tiny", "f16", kv_modules="v", kv_rank=24)
    assert open_source(tmp_path / "source").kv_modules == [KVModule(1, "v", 24)]


@pytest.mark.parametrize("modules", KV_FORMS)
def test_learned_kv_modules_are_found_and_kept(modules: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "source", "tiny", "nf4", kv_modules=modules)
    source = open_source(tmp_path / "source")
    form = {"v": [KVModule(1, "v", 40)]}.get(modules) or [
        KVModule(1, side, 4, 128, "gelu", "before" if side == "k" else None) for side in "kv"
    ]
    assert source.kv_modules == form
    convert(source, tmp_path / "m.trit", "keep")
    with open_trit(tmp_path / "m.trit") as file:
        for name in module_tensors(form, source.config):
            assert file.tensors[name].codec == "f16"
            assert np.array_equal(dequantize(file.tensors[name]), source.tensors[name].read())


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_checkpoint(tmp_path / name, "tiny", "nf4", layers=1, seed=seed)
    one, same, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert one == same and one != other


def test_rows_do_not_depend_on_how_they_are_read() -> None:
    rows = random_rows("layers.0.wq", (50, 7), 3)
    whole = rows[:]
    assert whole.shape == (50, 7)
    for start, stop in ((0, 1), (15, 17), (16, 32), (3, 50)):
        np.testing.assert_array_equal(rows[start:stop], whole[start:stop])


@pytest.mark.parametrize(("shape", "parameters"), [("llama3.1-8b", 8_030_261_248), ("llama3.2-1b", 1_235_814_400)])
def test_shapes_are_those_of_the_models(shape: str, parameters: int) -> None:
    config = config_from_hf({**_COMMON, **SHAPES[shape]}, Path("config.json"))
    assert sum(prod(size) for size in expected_tensors(config).values()) == parameters


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    tiny.write_tokenizer(tokenizer)
    out = str(tmp_path / "out")
    args = ["--shape", "tiny", "-o", out, "--layers", "1", "--tokenizer", str(tokenizer)]
    assert main(args) == 0
    assert "tiny as f16" in capsys.readouterr().err
    source = open_source(tmp_path / "out")
    assert source.config["n_layers"] == 1 and source.tokenizer["type"] == "bpe"
    assert main(args) == 2
    assert "exists" in capsys.readouterr().err
    assert main(["--shape", "tiny", "-o", out + "2", "--form", "q4"]) == 2
    capsys.readouterr()
    refused = (["--kv-rank", "8"], "--kv-modules v"), (["--kv-modules", "v", "--kv-rank", "80"], "80 values")
    for wrong, said in refused:
        assert main(["--shape", "tiny", "-o", out + "2", *wrong]) == 2 and not Path(out + "2").exists()
        assert said in capsys.readouterr().err


def test_failures_leave_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_checkpoint(tmp_path / "out", "tiny", "f16", progress=interrupt)
    assert not (tmp_path / "out").exists()
