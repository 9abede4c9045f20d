"""Exported folders: the source's bytes, whole or not at all, and readable as a source again."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from formats.codecs import CODECS
from formats.container import dequantize, open_trit
from formats.conversion.convert import convert
from formats.conversion.hf_export import Exported, export_hf
from formats.errors import HeaderError, TensorError
from formats.sources.hf_names import HF_NAMES
from formats.sources.safetensors_reader import open_folder
from formats.sources.source import expected_tensors, open_source
from formats.writer import TritWriter
from tests import tiny
from tests.checkpoints import LLAMA3, same, write_gguf, write_hf
from tests.test_recovered import SIZES, released
from tools.export import main

BIASES = {"attention_bias": True, "mlp_bias": True, "head_dim": 24}
U1 = np.dtype("u1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "source"


def round_trip(folder: Path, quant: str = "keep", dtype: str | None = None, **options: Any) -> Exported:
    """Convert a folder and export it to the folder "back" beside it."""
    path = folder.parent / "m.trit"
    convert(open_source(folder), path, quant, overwrite=True)
    with open_trit(path) as file:
        return export_hf(file, folder.parent / "back", dtype, **options)


def assert_same_bytes(one: Path, other: Path) -> None:
    first, second = open_folder(one)[0], open_folder(other)[0]
    assert set(first) == set(second)
    for name, tensor in first.items():
        twin = second[name]
        assert (tensor.dtype, tensor.shape) == (twin.dtype, twin.shape), name
        assert tensor.raw(U1, 0, tensor.nbytes).tobytes() == twin.raw(U1, 0, twin.nbytes).tobytes(), name


# ---- what comes back ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, BIASES], ids=["plain", "tied", "biases"])
def test_a_kept_checkpoint_comes_back_byte_for_byte(dtype: str, changes: dict[str, Any], folder: Path) -> None:
    weights = write_hf(folder, changes, dtype=dtype)
    made = round_trip(folder)
    assert made.dtype == dtype and not made.notes
    assert_same_bytes(folder, folder.parent / "back")
    back = open_source(folder.parent / "back")
    source = open_source(folder)
    same(back, weights)
    assert back.config == source.config and back.chat == source.chat and back.tokenizer == source.tokenizer
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (folder.parent / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert not list(folder.parent.glob(".export-*"))


def test_f16_of_a_bf16_checkpoint_rounds_and_says_so(folder: Path) -> None:
    weights = write_hf(folder, dtype="bfloat16")
    made = round_trip(folder, dtype="float16")
    assert made.dtype == "float16" and "were rounded to float16" in made.notes[0]
    for name, tensor in open_source(folder.parent / "back").tensors.items():
        np.testing.assert_array_equal(tensor.read(), weights[name].astype(np.float16).astype(np.float32))


def test_shards_and_their_index(folder: Path) -> None:
    weights = write_hf(folder)
    made = round_trip(folder, shard_bytes=60_000)
    shards = [name for name in made.files if name.endswith(".safetensors")]
    assert len(shards) >= 3 and "model.safetensors.index.json" in made.files
    back = folder.parent / "back"
    assert all((back / name).stat().st_size < 80_000 for name in shards)
    same(open_source(back), weights)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(2 * v.size for v in weights.values())


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_recovered_trits_come_back_as_they_were_released(depth: int, dtype: str, folder: Path) -> None:
    weights = released(folder, depth, dtype, signed=True)
    weights["layers.0.wo"][5, 40] += np.float32(0.25)
    write_hf(folder, SIZES, weights=weights, dtype=dtype)
    made = round_trip(folder)
    assert made.dtype == dtype and not made.notes
    assert_same_bytes(folder, folder.parent / "back")


def test_nf4_comes_back_as_its_own_dequantisation(tmp_path: Path) -> None:
    source = open_source(tiny.fixture_folder("tiny-llama-bias-nf4-dq-emb"))
    convert(source, tmp_path / "m.trit", "keep")
    with open_trit(tmp_path / "m.trit") as file:
        assert export_hf(file, tmp_path / "back").dtype == "float16"
    for name, tensor in open_source(tmp_path / "back").tensors.items():
        assert tensor.dtype == "F16"
        np.testing.assert_array_equal(tensor.read(), source.tensors[name].read())


@pytest.mark.parametrize("quant", ["trit1", "trit4", "q8", "nf4"])
def test_quantised_here(quant: str, folder: Path) -> None:
    write_hf(folder)
    made = round_trip(folder, quant, "float32")
    assert not made.notes
    with open_trit(folder.parent / "m.trit") as file:
        for name, tensor in open_source(folder.parent / "back").tensors.items():
            assert tensor.read().tobytes() == dequantize(file.tensors[name]).tobytes()


def test_a_large_tensor_in_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_hf(folder)
    monkeypatch.setattr("formats.codecs.base.CHUNK", 1000)
    round_trip(folder)
    assert_same_bytes(folder, folder.parent / "back")


# ---- the small files ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ],
)
def test_config_in_the_form_of_transformers_4(rope: dict[str, Any], folder: Path) -> None:
    write_hf(folder, {**rope, "bos_token_id": 1, "eos_token_id": [2, 3]})
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [2, 3]}')
    round_trip(folder)
    back = folder.parent / "back"
    raw = json.loads((back / "config.json").read_text())
    assert raw["architectures"] == ["LlamaForCausalLM"] and raw["torch_dtype"] == "float16"
    assert raw["rope_scaling"] == rope.get("rope_scaling") and raw["rope_theta"] == rope.get("rope_theta", 10000.0)
    assert raw["bos_token_id"] == 1 and raw["eos_token_id"] == [2, 3]
    generation = json.loads((back / "generation_config.json").read_text())
    assert generation == {"temperature": 0.6, "bos_token_id": 1, "eos_token_id": [2, 3]}
    assert open_source(back).config == open_source(folder).config


def test_licence_template_and_provenance(folder: Path) -> None:
    write_hf(folder)
    (folder / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    (folder / "LICENSE").write_text("Llama 3.1 Community License\r\n", newline="")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    round_trip(folder, "trit2")
    back = folder.parent / "back"
    assert (back / "LICENSE").read_bytes() == (folder / "LICENSE").read_bytes()
    assert (back / "chat_template.jinja").read_text() == "{{ messages }}"
    text = (back / "README.md").read_text()
    assert "license: llama3.1" in text and "Built with Llama" in text and "--quant trit2" in text
    assert open_source(back).licence == open_source(folder).licence


def test_a_gguf_brings_no_tokenizer_files(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "m.gguf", {"tie_word_embeddings": True}, kind="F16")
    convert(open_source(tmp_path / "m.gguf"), tmp_path / "m.trit", "keep")
    with open_trit(tmp_path / "m.trit") as file:
        made = export_hf(file, tmp_path / "back")
    assert "tokenizer files" in made.notes[0] and made.dtype == "float16"
    assert (tmp_path / "back" / "chat_template.jinja").read_text() == tiny.TEMPLATE
    tensor = open_source(tmp_path / "back").tensors["layers.1.wk"]
    np.testing.assert_array_equal(tensor.read(), weights["layers.1.wk"].astype(np.float16).astype(np.float32))


# ---- refused, leaving nothing ---------------------------------------------------------------------------


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    write_hf(folder)
    convert(open_source(folder), folder.parent / "m.trit", "f16")
    with open_trit(folder.parent / "m.trit") as file:
        yield file


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.parent.iterdir() if p.name not in ("source", "m.trit"))


def test_an_existing_folder_stays(model: Any, folder: Path) -> None:
    for name in ("source", "m.trit"):
        with pytest.raises(FileExistsError, match="exists already"):
            export_hf(model, folder.parent / name)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        export_hf(model, folder.parent / "none" / "back")
    assert left(folder) == []


def test_failures_leave_nothing(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = folder.parent / "back"

    def interrupt(done: int, total: int, name: str) -> None:
        assert 0 < done <= total
        if name.endswith("layers.1.mlp.up_proj.weight"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_hf(model, target, progress=interrupt)
    assert left(folder) == []
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=0))
        with pytest.raises(OSError, match="0 are free"):
            export_hf(model, target)

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("formats.conversion.hf_export.write_folder", full)
    with pytest.raises(OSError, match="nothing was left behind") as caught:
        export_hf(model, target)
    assert caught.value.filename == str(target) and left(folder) == []


def test_values_beyond_the_dtype_are_named(folder: Path) -> None:
    weights = write_hf(folder, dtype="float32")
    weights["layers.0.w2"][1, 2] = 1e6
    write_hf(folder, dtype="float32", weights=weights)
    with pytest.raises(TensorError, match=r"1e\+06, which float16 cannot") as caught:
        round_trip(folder, dtype="float16")
    assert caught.value.tensor == "layers.0.w2" and left(folder) == []


def test_files_that_lack_something(tmp_path: Path) -> None:
    config = {**tiny.CONFIG, "n_layers": 1}
    shapes = expected_tensors(config)
    drop = "layers.0.wk"
    for changes, error, text in (
        ({"architecture": "mamba"}, HeaderError, "'mamba'"),
        ({"n_layers": "2"}, HeaderError, "config"),
        ({"n_layers": 10**9}, HeaderError, "n_layers 1000000000"),
        ({"rope_scaling": 7}, HeaderError, "config"),
        ({}, TensorError, "is missing"),
        ({"hidden_dim": 99}, TensorError, "the config calls for"),
    ):
        with TritWriter(tmp_path / "m.trit", {"config": {**config, **changes}}, list(shapes), overwrite=True) as writer:
            for name, shape in shapes.items():
                other = "spare" if name == drop and "is missing" in text else name
                if other == "spare":
                    writer._left["spare"] = writer._left.pop(name)
                params, parts = CODECS["f32"].quantize(np.ones(shape, np.float32))
                writer.add(other, "f32", shape, params, parts)
        with open_trit(tmp_path / "m.trit") as file, pytest.raises(error, match=text):
            export_hf(file, tmp_path / "back")
        assert not (tmp_path / "back").exists()


def test_other_tensors_are_named_and_stay_behind(tmp_path: Path) -> None:
    shapes = {**expected_tensors(tiny.CONFIG), "layers.1.other": (2, 20)}
    with TritWriter(tmp_path / "m.trit", {"config": tiny.CONFIG, "tokenizer": {}}, list(shapes)) as writer:
        for name, shape in shapes.items():
            params, parts = CODECS["f16"].quantize(np.ones(shape, np.float32))
            writer.add(name, "f16", shape, params, parts)
    with open_trit(tmp_path / "m.trit") as file:
        made = export_hf(file, tmp_path / "back")
    assert any("stay behind: layers.1.other" in note for note in made.notes)
    assert HF_NAMES.theirs("norm") in open_folder(tmp_path / "back")[0]


def test_command(model: Any, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, back = str(folder.parent / "m.trit"), str(folder.parent / "back")
    assert main([file, "-o", back, "--dtype", "bfloat16"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "bfloat16" in err and "model.safetensors" in err and "rounded" in err
    for args, text in (
        ([file, "-o", back], "exists already"),
        ([file, "-o", back + "2", "--dtype", "int8"], "int8"),
        ([file], "required"),
        ([back, "-o", back + "2"], "directory"),
    ):
        assert main(args) == 2
        out, err = capsys.readouterr()
        assert out == "" and text in err and err.count("\n") == 1


def test_released_tensors_are_still_there(model: Any) -> None:
    for name, tensor in model.tensors.items():
        before = {key: part.tobytes() for key, part in tensor.parts.items()}
        model.release(name)
        assert {key: part.tobytes() for key, part in tensor.parts.items()} == before
    model.verify()
