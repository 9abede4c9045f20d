"""Reading GGUF files: exact values in Hugging Face's row order, and what is refused."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType

from formats.errors import SourceError, UnsupportedError
from formats.sources.gguf_file import read_gguf
from formats.sources.gguf_source import llama3_factors, open_gguf, source_rows
from formats.sources.source import open_source
from tests import tiny
from tests.checkpoints import LLAMA3_OURS, config_of, permute, refused, same, write_gguf


def header(values: bytes, fields: int = 1, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + values


KEY = struct.pack("<Q", 1) + b"k" + struct.pack("<I", 9)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(KEY + struct.pack("<IQ", 8, 12_000_000) + bytes(8 * 12_000_000)), "announces 12000001 values"),
        (header(KEY + struct.pack("<IQ", 0, 1 << 40)), "announces 1099511627777 values"),
        (header(bytes(64), fields=1 << 40), "announces 1099511627776 values"),
        (header(bytes(64), 0, 1 << 22), "announces 4194304 values"),
        (header(KEY + struct.pack("<IQQ", 8, 1, 1 << 25) + bytes(1 << 25)), "a string of 33554432 bytes; the limit is"),
        (header(KEY + struct.pack("<IQQ", 8, 2, 1 << 63) + bytes(64)), "ends inside its header"),
        (header(KEY + struct.pack("<IQQ", 8, 9, 1) + b"ab"), "ends inside its header"),
    ],
)  # fmt: skip
def test_gguf_headers_of_any_size_are_refused_before_they_are_read(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(SourceError, match=message):
        read_gguf(path)


# ---- GGUF -----------------------------------------------------------------------------------------------


def test_gguf_gives_the_exact_values_in_hugging_face_order(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "m.gguf")
    source = open_source(tmp_path / "m.gguf")
    same(source, weights)
    expected = {**config_of(), "max_seq_len": 2048}
    assert source.config == expected
    assert source.name == "Tiny Test" and source.licence == {"name": "apache-2.0", "llama": False}
    assert source.chat == {"template": tiny.TEMPLATE} and source.tokenizer["type"] == "bpe"


def test_gguf_biases_are_permuted_too(tmp_path: Path) -> None:
    changes = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    weights = write_gguf(tmp_path / "m.gguf", changes)
    source = open_source(tmp_path / "m.gguf")
    assert source.config["attention_bias"] and source.config["mlp_bias"] and source.config["tied_embeddings"]
    same(source, weights)


def test_the_permutation_is_undone() -> None:
    w = np.arange(24)[:, None]
    np.testing.assert_array_equal(permute(w, 3)[source_rows(24, 3)], w)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0"])
def test_gguf_types_equal_the_reference_dequantiser(tmp_path: Path, kind: str) -> None:

    weights = write_gguf(tmp_path / "m.gguf", kind=kind)
    source = open_gguf(tmp_path / "m.gguf")
    qtype = GGMLQuantizationType[kind]
    for name in ("tok_embeddings", "layers.0.wq", "layers.1.w2", "output"):
        packed = gguf.quants.quantize(weights[name], qtype)
        expected = gguf.quants.dequantize(packed, qtype).reshape(weights[name].shape)
        tensor = source.tensors[name]
        np.testing.assert_array_equal(tensor.read(), expected, err_msg=name)
        np.testing.assert_array_equal(tensor.read_rows(5, 9), expected[5:9])


@pytest.mark.parametrize(("factor", "original"), [(8.0, 8192), (32.0, 8192), (8.0, 32)])
def test_gguf_llama3_factors_are_recognised(tmp_path: Path, factor: float, original: int) -> None:
    scaling = {**LLAMA3_OURS, "factor": factor, "original_max_seq_len": original}
    factors = llama3_factors(scaling, 16, 500000.0).astype(np.float32)
    path = tmp_path / "m.gguf"
    write_gguf(path, {"rope_theta": 500000.0}, extra={"rope_freqs.weight": factors})
    assert open_source(path).config["rope_scaling"] == scaling


def test_gguf_factors_of_one_are_no_scaling(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, extra={"rope_freqs.weight": np.ones(8, np.float32)})
    assert open_source(path).config["rope_scaling"] is None


@pytest.mark.parametrize(
    "values", [np.linspace(1, 8, 8), np.full(7, 2.0), np.full(8, np.nan), np.full(8, 0.5)]
)
def test_gguf_other_factors_are_refused(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, extra={"rope_freqs.weight": values.astype(np.float32)})
    refused(path, "rope_freqs.weight", kind=UnsupportedError)


def test_gguf_linear_scaling(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert open_source(tmp_path / "m.gguf").config["rope_scaling"] == {"type": "linear", "factor": 4.0}


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"rope.scaling.type": "yarn"}, "'yarn'"),
        ({"expert_count": 8}, "expert_count"),
        ({"rope.dimension_count": 8}, "rope.dimension_count"),
        ({"attention.key_length": 16, "attention.value_length": 32}, "value_length"),
        ({"attention.head_count_kv": [2, 1]}, "layer to layer"),
    ],
)
def test_gguf_variants_are_refused(tmp_path: Path, keys: dict[str, Any], text: str) -> None:
    write_gguf(tmp_path / "m.gguf", keys=keys)
    refused(tmp_path / "m.gguf", text, kind=UnsupportedError)


def test_gguf_missing_extra_and_unfit_tensors(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, drop=["blk.0.attn_q.weight", "output_norm.weight"])
    refused(path, "misses 2 of", "blk.0.attn_q.weight", "output_norm.weight")
    write_gguf(path, extra={"blk.7.attn_q.weight": np.zeros(3, np.float32)})
    refused(path, "holds 1 tensors", "blk.7.attn_q.weight")
    write_gguf(path, keys={"feed_forward_length": 95})
    refused(path, "wrong shape", "blk.0.ffn_gate.weight")
    write_gguf(path, keys={"block_count": None})
    refused(path, "block_count")


def test_gguf_cut_anywhere_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q8_0")
    data = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(4, 64, 7), *range(64, len(data), len(data) // 60), len(data) - 1]:
        cut.write_bytes(data[:size])
        refused(cut, "cut.gguf", "download it again")


def test_gguf_tensors_in_each_other_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = path.read_bytes()
    offsets = sorted((t.offset, t.name) for t in read_gguf(path).tensors.values())
    start = offsets[0][0]
    at = data.index(offsets[1][1].encode()) + len(offsets[1][1])  # dimensions, type and offset follow the name
    at = data.index((offsets[1][0] - start).to_bytes(8, "little"), at)
    path.write_bytes(data[:at] + (32).to_bytes(8, "little") + data[at + 8 :])
    refused(path, offsets[1][1], f"inside of {offsets[0][1]}")


def test_gguf_rope_factors_are_of_one_type(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", extra={"rope_freqs.weight": np.ones(8, np.float16)})
    refused(tmp_path / "m.gguf", "rope_freqs.weight", "type F16; supported is F32", kind=UnsupportedError)


def test_gguf_version_byte_order_and_architecture(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = path.read_bytes()
    for patch, text in ((struct.pack("<I", 1), "version 1"), (struct.pack(">I", 3), "big-endian")):
        path.write_bytes(data[:4] + patch + data[8:])
        refused(path, text, kind=UnsupportedError)
    path.write_bytes(data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2", 1))
    refused(path, "'qwen2'", kind=UnsupportedError)


def test_gguf_hostile_counts_end_at_once(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = path.read_bytes()
    huge = struct.pack("<Q", 1 << 62)
    for at in (8, 16, 24):  # tensors, keys, length of the first key
        path.write_bytes(data[:at] + huge + data[at + 8 :])
        refused(path, "m.gguf")


def test_gguf_unknown_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"token_embd.weight") + len("token_embd.weight") + 4 + 16
    data[at : at + 4] = struct.pack("<I", 36)
    path.write_bytes(data)
    refused(path, "token_embd.weight", "type 36", kind=UnsupportedError)


def test_gguf_splits_are_refused(tmp_path: Path) -> None:

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("token_embd.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refused(tmp_path / "m.gguf", "one of 3 parts", kind=UnsupportedError)
