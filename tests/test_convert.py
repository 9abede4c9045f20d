"""The converter: what is in the file it writes."""

from __future__ import annotations

import hashlib
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from formats.codecs import CODECS
from formats.container import dequantize, open_trit
from formats.conversion.convert import convert
from formats.conversion.pack import STREAMED
from formats.errors import UnsupportedError
from formats.sources.source import expected_tensors, open_source
from tests import tiny
from tests.checkpoints import write_gguf, write_hf
from tests.converting import WQ, to_trit, with_values


def test_f16_holds_the_values_and_everything_else(folder: Path) -> None:
    weights = write_hf(folder)
    (folder / "README.md").write_text("---\nlicense: llama3.1\n---\n")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    to_trit(folder)
    source = open_source(folder)
    with open_trit(folder.parent / "out.trit") as file:
        file.verify()
        for name, expected in weights.items():
            assert file.tensors[name].codec == "f16"
            np.testing.assert_array_equal(dequantize(file.tensors[name]), expected, err_msg=name)
        for name, data in source.blobs.items():
            assert file.blob(name) == data
        assert list(file.tensors) == [*sorted(source.blobs), *expected_tensors(source.config)]
        assert file.config == source.config and file.tokenizer == source.tokenizer
        assert file.header["chat"]["template"] == tiny.TEMPLATE
        assert file.header["generation"] == {"temperature": 0.6}
        assert file.header["licence"] == {"name": "llama3.1", "llama": True}


def test_provenance_names_every_file_with_its_hash(folder: Path) -> None:
    to_trit(folder, "trit2")
    with open_trit(folder.parent / "out.trit") as file:
        record = file.header["source"]
    assert record["name"] == "source" and record["options"] == "--quant trit2 --embed f16"
    assert record["converter"].startswith("tritllama ")
    hashes = {entry["name"]: entry for entry in record["files"]}
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(hashes)
    for name, entry in hashes.items():
        data = (folder / name).read_bytes()
        assert entry["bytes"] == len(data) and entry["sha256"] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("quant", ["trit1", "trit2", "trit3", "trit4", "nf4", "q8", "f16", "bf16", "f32"])
@pytest.mark.parametrize("embed", [None, "q8", "trit4"])
def test_each_tensor_gets_its_codec(folder: Path, quant: str, embed: str | None) -> None:
    summary = to_trit(folder, quant, embed=embed)
    source = open_source(folder)
    with open_trit(folder.parent / "out.trit") as file:
        for name, tensor in file.tensors.items():
            if name.startswith("tokenizer."):
                continue
            matrix = name in ("tok_embeddings", "output")
            assert tensor.codec == ("f16" if len(tensor.shape) == 1 else embed or "f16" if matrix else quant)
            values = source.tensors[name].read()
            params, parts = CODECS[tensor.codec].quantize(values)
            expected = CODECS[tensor.codec].dequantize(parts, values.shape, params)
            np.testing.assert_array_equal(dequantize(tensor), expected, err_msg=name)
    planned = {codec: (row["tensors"], row["bytes"]) for codec, row in summary.by_codec().items()}
    with open_trit(folder.parent / "out.trit") as file:
        found = [t for n, t in file.tensors.items() if not n.startswith("tokenizer.")]
        assert set(planned) == {t.codec for t in found}
        for codec, (count, nbytes) in planned.items():
            assert count == sum(t.codec == codec for t in found)
            assert nbytes == sum(t.nbytes for t in found if t.codec == codec)


def test_a_matrix_in_row_blocks_equals_the_matrix_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for quant in STREAMED:
        to_trit(folder, quant, name=f"{quant}-whole.trit", embed=quant)
    monkeypatch.setattr("formats.conversion.pack.BLOCK_ELEMENTS", 200)
    for quant in STREAMED:
        to_trit(folder, quant, name=f"{quant}-rows.trit", embed=quant)
        whole, rows = (folder.parent / f"{quant}-{how}.trit" for how in ("whole", "rows"))
        assert whole.read_bytes() == rows.read_bytes()


def test_norms_are_f16_only_where_that_is_exact(folder: Path) -> None:
    weights = with_values(folder, "norm", 1 + 2**-20)
    weights["layers.0.ffn_norm"][:] = 1.0
    write_hf(folder, dtype="float32", weights=weights)
    to_trit(folder, "trit3")
    with open_trit(folder.parent / "out.trit") as file:
        assert file.tensors["norm"].codec == "f32" and file.tensors["layers.0.ffn_norm"].codec == "f16"
        np.testing.assert_array_equal(dequantize(file.tensors["norm"]), weights["norm"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_keep_carries_the_source_type(folder: Path, dtype: str) -> None:
    weights = write_hf(folder, dtype=dtype)
    to_trit(folder, "keep")
    with open_trit(folder.parent / "out.trit") as file:
        codec = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
        assert {file.tensors[name].codec for name in (WQ, "tok_embeddings")} == {codec}
        for name, expected in weights.items():
            np.testing.assert_array_equal(dequantize(file.tensors[name]), expected)


def test_keep_says_which_types_it_cannot_carry(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", kind="Q4_0")
    with pytest.raises(UnsupportedError, match="type Q4_0, which cannot be kept"):
        to_trit(tmp_path / "m.gguf", "keep")


def test_gguf_becomes_a_file_that_opens(tmp_path: Path) -> None:
    weights = write_gguf(tmp_path / "m.gguf", {"tie_word_embeddings": True}, kind="F16")
    to_trit(tmp_path / "m.gguf", "f16")
    with open_trit(tmp_path / "out.trit") as file:
        assert file.header["licence"]["name"] == "apache-2.0" and file.header["source"]["name"] == "Tiny Test"
        for name in (WQ, "layers.1.wk", "tok_embeddings"):
            expected = weights[name].astype(np.float16).astype(np.float32)
            np.testing.assert_array_equal(dequantize(file.tensors[name]), expected)


def test_same_input_same_bytes(folder: Path) -> None:
    for quant in ("trit2", "nf4"):
        to_trit(folder, quant, name="a.trit")
        to_trit(folder, quant, name="other-name.trit")
        assert (folder.parent / "a.trit").read_bytes() == (folder.parent / "other-name.trit").read_bytes()
        (folder.parent / "a.trit").unlink()
        (folder.parent / "other-name.trit").unlink()


def test_progress_ends_at_the_total(folder: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    to_trit(folder, "trit1", progress=lambda *call: calls.append(call))
    assert all(0 <= done <= total for done, total, _ in calls)
    assert calls[-1][0] == calls[-1][1] and any(note == WQ for _, _, note in calls)


def test_dry_run_writes_nothing_and_knows_the_size(folder: Path) -> None:
    plan = to_trit(folder, "trit4", dry_run=True)
    assert not (folder.parent / "out.trit").exists()
    done = to_trit(folder, "trit4")
    assert plan.nbytes == done.nbytes and plan.by_codec() == done.by_codec()
    size = (folder.parent / "out.trit").stat().st_size
    assert 0 < size - plan.nbytes < 64 * 1024


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    """Twelve layers need no more memory than two: the peak follows the largest tensor."""
    peaks = []
    for layers in (2, 12):
        folder = tmp_path / str(layers) / "source"
        write_hf(folder, {"num_hidden_layers": layers, "hidden_size": 256, "intermediate_size": 512})
        source = open_source(folder)
        tracemalloc.start()
        convert(source, folder.parent / "out.trit", "trit4")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    all_of_it = 12 * 600_000 * 4
    assert peaks[1] < 1.5 * peaks[0] < all_of_it / 2
