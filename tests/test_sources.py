"""Reading Hugging Face folders: exact values, and one test for each way in which the weights can be wrong."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from formats.errors import SourceError, UnsupportedError
from formats.sources.hf_names import HF_NAMES
from formats.sources.safetensors_reader import read_file
from formats.sources.source import open_source
from tests import tiny
from tests.checkpoints import HF_CONFIG, edit_json, refused, same, write_hf, write_safetensors, write_shards

Q = "model.layers.1.self_attn.q_proj.weight"


# ---- what is read -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_folder_gives_the_exact_values(tmp_path: Path, dtype: str, shards: int) -> None:
    weights = write_hf(tmp_path, dtype=dtype, shards=shards)
    source = open_source(tmp_path)
    same(source, weights)
    assert source.config["dim"] == 64 and source.config["head_dim"] == 16
    assert len([p for p in source.files if p.suffix == ".safetensors"]) == shards
    assert source.tokenizer["type"] == "bpe" and source.tokenizer["eos_ids"]
    assert source.chat == {"template": tiny.TEMPLATE}


def test_biases_and_a_head_dimension_of_its_own(tmp_path: Path) -> None:
    changes = {"attention_bias": True, "mlp_bias": True, "head_dim": 24, "tie_word_embeddings": True}
    weights = write_hf(tmp_path, changes)
    source = open_source(tmp_path)
    same(source, weights)
    assert source.tensors["layers.0.wk.bias"].shape == (48,) and "output" not in source.tensors


def test_bf16_specials_are_widened_bit_by_bit(tmp_path: Path) -> None:
    bits = np.array([0x7FC1, 0x7F80, 0xFF80, 0x8000, 0x0001, 0x3F80], np.uint16)
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"x": bits})
    values = read_file(file)["x"].read_rows(0, 6)
    assert (values.view(np.uint32) >> 16).tolist() == bits.tolist()


def test_single_file_wins_over_an_index(tmp_path: Path) -> None:
    weights = write_hf(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("not even JSON")
    same(open_source(tmp_path), weights)


def test_rotary_buffers_are_ignored(tmp_path: Path) -> None:
    weights = write_hf(tmp_path)
    theirs = {HF_NAMES.theirs(name): values for name, values in weights.items()}
    theirs["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    write_safetensors(tmp_path / "model.safetensors", theirs)
    same(open_source(tmp_path), weights)
    assert open_source(tmp_path).notes[0].startswith("1 tensors rotary_emb.inv_freq are left out")


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    """In every JSON file, at any depth: which of the two is meant, nobody knows."""
    write_hf(tmp_path, {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, shards=2)
    for path in [*tmp_path.glob("*.json"), next(tmp_path.glob("*.safetensors"))]:
        data = path.read_bytes()
        *_, key = re.finditer(rb'"(\w+)": ?', data[: 1 << 13])
        spoilt = data[: key.start()] + key[0] + b"1," + data[key.start() :]
        if path.suffix == ".safetensors":
            spoilt = struct.pack("<Q", struct.unpack("<Q", data[:8])[0] + len(spoilt) - len(data)) + spoilt[8:]
        path.write_bytes(spoilt)
        with pytest.raises(SourceError, match=f"key '{key[1].decode()}' stands twice") as caught:
            open_source(tmp_path)
        assert caught.value.path == str(path)
        path.write_bytes(data)


def test_tied_embeddings_may_be_stored_once_twice_or_differ(tmp_path: Path) -> None:
    weights = write_hf(tmp_path, {"tie_word_embeddings": True})
    embedding = weights["tok_embeddings"]
    theirs = {HF_NAMES.theirs(name): values for name, values in weights.items()}
    file = tmp_path / "model.safetensors"
    write_safetensors(file, {**theirs, "lm_head.weight": embedding})
    same(open_source(tmp_path), weights)
    write_safetensors(
        file, {k: v for k, v in theirs.items() if "embed" not in k} | {"lm_head.weight": embedding}
    )
    same(open_source(tmp_path), weights)
    write_safetensors(file, {**theirs, "lm_head.weight": embedding + 1})
    source = open_source(tmp_path)
    assert "output" in source.tensors and not source.config["tied_embeddings"]
    assert "differs" in source.notes[0]


# ---- folders that are wrong -----------------------------------------------------------------------------


def test_no_such_place(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_source(tmp_path / "nothing")
    refused(tmp_path, "no config.json")
    (tmp_path / "model.gguf").touch()
    refused(tmp_path, "convert the file itself: model.gguf")


@pytest.mark.parametrize(
    ("name", "data", "text"),
    [
        ("a.trit", b"TRIT....", "is a .trit file already"),
        ("a.safetensors", b"\0" * 20, "give the folder"),
        ("a.gguf", b"version https://git-lfs", "Git LFS pointer"),
        ("a.gguf", b"", "expected a Hugging Face folder"),
        ("a.bin", b"PK\3\4", "expected a Hugging Face folder"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, name: str, data: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(data)
    refused(tmp_path / name, name, text)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ([], "no weights at all"),
        (["pytorch_model.bin"], "pickles"),
        (["model-00001-of-00002.safetensors"], "no model.safetensors.index.json"),
    ],
)
def test_folders_without_usable_weights(tmp_path: Path, files: list[str], text: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    for name in files:
        (tmp_path / name).touch()
    refused(tmp_path, text)


def changed_weights(tmp_path: Path, changes: Mapping[str, np.ndarray | None]) -> None:
    """Write a checkpoint with some tensors replaced, or removed (None)."""
    theirs = {HF_NAMES.theirs(name): values for name, values in write_hf(tmp_path).items()}
    every = {**theirs, **changes}
    write_safetensors(tmp_path / "model.safetensors", {k: v for k, v in every.items() if v is not None})


def test_all_missing_tensors_are_listed_in_one_line(tmp_path: Path) -> None:
    changed_weights(tmp_path, {Q: None, "lm_head.weight": None})
    refused(tmp_path, "misses 2 of 21 tensors", Q, "lm_head.weight")


def test_unknown_tensors_are_listed(tmp_path: Path) -> None:
    extra = {
        "model.layers.2.mlp.up_proj.weight": np.zeros((2, 2), np.float32),
        "odd": np.zeros(1, np.float32),
    }
    changed_weights(tmp_path, extra)
    refused(tmp_path, "holds 2 tensors", "model.layers.2.mlp.up_proj.weight", "odd")


def test_wrong_shapes_are_listed(tmp_path: Path) -> None:
    changed_weights(tmp_path, {Q: np.zeros((64, 32), np.float32)})
    refused(tmp_path, f"{Q} is [64, 32], expected [64, 64]")


def test_biases_that_the_configuration_does_not_announce(tmp_path: Path) -> None:
    changed_weights(tmp_path, {Q.replace("weight", "bias"): np.zeros(64, np.float32)})
    refused(tmp_path, "q_proj.bias")


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    changed_weights(tmp_path, {Q: np.zeros((64, 64), np.int8)})
    refused(tmp_path, Q, "dtype I8", kind=UnsupportedError)


# ---- safetensors ----------------------------------------------------------------------------------------


def test_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_hf(tmp_path)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for size in (0, 1, 7, 8, 9, header - 1, header, header + 1, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        refused(tmp_path, "model.safetensors", "tensor " if size >= header else "")


def test_cut_file_names_the_first_tensor_that_is_not_whole(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    write_safetensors(file, {"a": np.zeros(8, np.float32), "b": np.zeros(8, np.float32)}, "float32")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SourceError, match="cut short") as caught:
        read_file(file)
    assert caught.value.tensor == "b" and caught.value.path == str(file)


@pytest.mark.parametrize(
    "header",
    [
        b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "WHAT", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], '
        b'"data_offsets": [2, 6]}}',
    ],
)  # fmt: skip
def test_bad_headers(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(6))
    with pytest.raises(SourceError, match=r"x\.safetensors"):
        read_file(file)


def test_huge_header_length_and_pointer(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    for data, text in ((b"\xff" * 16, "announces a header"), (b"version https://git-lfs.github.com", "LFS")):
        file.write_bytes(data)
        with pytest.raises(SourceError, match=text):
            read_file(file)


# ---- shards ---------------------------------------------------------------------------------------------


def sharded(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    write_hf(tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    return index, json.loads(index.read_text())["weight_map"]


def test_missing_shard_is_named_with_a_tensor(tmp_path: Path) -> None:
    _, weight_map = sharded(tmp_path)
    shard = weight_map[Q]
    (tmp_path / shard).unlink()
    refused(tmp_path, shard, "is missing", "tensor model.")


def test_index_that_names_a_missing_tensor(tmp_path: Path) -> None:
    index, weight_map = sharded(tmp_path)
    shard = weight_map[Q]
    edit_json(index, weight_map={**weight_map, "ghost": shard})
    refused(tmp_path, shard, "tensor ghost", "is not in this file")


def test_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    index, weight_map = sharded(tmp_path)
    other = next(s for s in weight_map.values() if s != weight_map[Q])
    edit_json(index, weight_map={**weight_map, Q: other})
    refused(tmp_path, other, Q, "is not in this file")


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    _, weight_map = sharded(tmp_path)
    theirs = {HF_NAMES.theirs(name): v for name, v in write_hf(tmp_path / "copy").items()}
    shard = next(s for s in weight_map.values() if s != weight_map[Q])
    part = {name: v for name, v in theirs.items() if weight_map[name] == shard or name == Q}
    write_safetensors(tmp_path / shard, part)
    refused(tmp_path, Q, "is also in")


def test_shard_cut_short(tmp_path: Path) -> None:
    _, weight_map = sharded(tmp_path)
    shard = tmp_path / weight_map[Q]
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(tmp_path, shard.name, "tensor ", "cut short")


@pytest.mark.parametrize("weight_map", [None, {}, [], {Q: 1}, {Q: "../x.safetensors"}, {Q: ".."}, {Q: ""}])
def test_bad_index(tmp_path: Path, weight_map: object) -> None:
    index, _ = sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, "index.json")


def test_unlisted_tensors_of_a_shard_count(tmp_path: Path) -> None:
    weights = write_hf(tmp_path, shards=1)
    (tmp_path / "model.safetensors").unlink()
    theirs = {HF_NAMES.theirs(name): v for name, v in weights.items()}
    write_shards(tmp_path, theirs, 2, "float16")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    del weight_map[Q]
    edit_json(index, weight_map=weight_map)
    same(open_source(tmp_path), weights)
