"""The converter: what is in the file it writes, and that nothing is left when it fails."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from formats.codecs import CODECS
from formats.container import dequantize, open_trit
from formats.conversion.convert import Summary, convert
from formats.errors import SourceError, UnsupportedError
from formats.sources.hf_names import HF_NAMES
from formats.sources.source import expected_tensors, open_source
from tests import tiny
from tests.checkpoints import (
    HF_CONFIG,
    Weights,
    edit_json,
    weights_for,
    write_gguf,
    write_hf,
    write_safetensors,
)
from tools.convert import main

ROOT = Path(__file__).resolve().parent.parent
WQ = "layers.0.wq"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_hf(tmp_path / "source")
    return tmp_path / "source"


def to_trit(folder: Path, quant: str = "f16", name: str = "out.trit", **options: Any) -> Summary:
    return convert(open_source(folder), folder.parent / name, quant, **options)


def with_values(folder: Path, name: str, values: np.ndarray | float, dtype: str = "float32") -> Weights:
    """Rewrite the checkpoint with the first value, or all values, of one tensor replaced."""
    weights = weights_for(HF_CONFIG, "float32")
    weights[name].reshape(-1)[: np.size(values)] = np.reshape(values, -1)
    write_hf(folder, dtype=dtype, weights=weights)
    return weights


# ---- what is written ------------------------------------------------------------------------------------


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
        for codec, (count, nbytes) in planned.items():
            assert count == sum(t.codec == codec for t in found)
            assert nbytes == sum(t.nbytes for t in found if t.codec == codec)


def test_a_matrix_in_row_blocks_equals_the_matrix_at_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for quant in ("q8", "f16", "bf16", "f32"):
        to_trit(folder, quant, name=f"{quant}-whole.trit", embed=quant)
    monkeypatch.setattr("formats.conversion.pack.BLOCK_ELEMENTS", 200)
    for quant in ("q8", "f16", "bf16", "f32"):
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


# ---- what is refused, leaving nothing -------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.parent.iterdir() if p != folder)


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


# ---- the command ----------------------------------------------------------------------------------------


def command(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_command_converts_and_sums_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out_path = folder.parent / "m.trit"
    code, out, err = command(capsys, folder, "-o", out_path, "--quant", "trit4", "--embed", "q8")
    assert code == 0 and out == ""
    assert "bits per weight" in err and "trit4" in err and "q8" in err
    open_trit(out_path).verify()


def test_command_dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, folder, "--quant", "trit4", "--dry-run")
    assert code == 0 and "layers.0-1.wq" in out and "layers.0.wq" not in out and "bits per weight" in out
    assert left(folder) == []
    assert "memory to run: " in out and "GB with 2048 tokens of context" in out


def test_every_expected_problem_is_one_line_and_code_2(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = folder.parent / "m.trit"
    broken = folder.parent / "broken"
    write_hf(broken)
    edit_json(broken / "config.json", model_type="mixtral")
    sampling, small = folder.parent / "sampling", folder.parent / "small"
    write_hf(sampling)
    (sampling / "generation_config.json").write_text('{"top_p": 1.5}')
    write_hf(small, {"vocab_size": 300})
    cases = [
        ((), "required"),
        ((folder, "--quant", "trit4"), "-o/--out"),
        ((folder, "-o", out, "--quant", "trit9"), "trit9"),
        ((folder, "-o", out, "--quant", "f16", "--what"), "--what"),
        ((folder.parent / "none", "-o", out, "--quant", "f16"), "No such file"),
        ((folder / "tokenizer.json", "-o", out, "--quant", "f16"), "expected a Hugging Face folder"),
        ((broken, "-o", out, "--quant", "f16"), "mixtral"),
        ((sampling, "-o", out, "--quant", "f16"), "sampling: cannot be run: generation: top_p must be"),
        ((small, "-o", out, "--quant", "f16"), "tokenizer.json: has ids up to 511, but"),
        ((folder, "-o", "", "--quant", "f16"), "the name is empty"),
        ((folder, "-o", out, "--quant", "f16", "--kv-map", ""), "the name is empty"),
        ((folder, "-o", out, "--quant", "nf4", "--encoder", "best"), "--encoder finds trits"),
        ((folder, "-o", out, "--quant", "keep", "--encoder", "best", "--dry-run"), "--encoder finds trits"),
        ((folder, "--quant", "trit2", "--dry-run", "--calibrate", folder / "none"), "none: No such file"),
        ((folder, "-o", out, "--quant", "f16", "--report", folder / "x" / "y.json"), "no such folder for the report"),
        ((folder, "-o", out, "--quant", "f16", "--report", out), "is a file of the conversion itself"),
        ((folder, "-o", out, "--quant", "f16", "--report", folder / "config.json"), "of the conversion itself"),
        ((folder, "-o", out, "--quant", "f16", "--report", folder.parent), "exists already"),
        ((folder, "-o", out, "--quant", "f16", "--state", folder.parent / "s"), "go with --calibrate"),
        ((folder, "-o", "/dev/null", "--quant", "f16", "--overwrite"), "is a device or a pipe"),
        ((folder, "-o", folder / "x" / "y.trit", "--quant", "f16"), "no such folder"),
    ]
    for args, text in cases:
        code, stdout, err = command(capsys, *args)
        assert code == 2 and stdout == "" and text in err, (args, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert not out.exists()


def test_debug_shows_the_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = command(capsys, folder.parent / "none", "-o", "x", "--quant", "f16", "--debug")
    assert code == 2 and "Traceback" in err


def start(folder: Path, *args: object) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "tools.convert", str(folder), *map(str, args)]
    return subprocess.Popen(
        line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_command_as_a_process(folder: Path) -> None:
    process = start(folder, "-o", folder.parent / "m.trit", "--quant", "nf4")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == "" and "\r" not in err
    process = start(folder, "-o", folder.parent / "m.trit", "--quant", "nf4")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and err.count("\n") == 1 and "--overwrite" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_stopped_process_leaves_nothing(tmp_path: Path, number: int, code: int) -> None:
    big = {"hidden_size": 512, "intermediate_size": 2048, "vocab_size": 512, "num_hidden_layers": 3}
    folder = tmp_path / "source"
    write_hf(folder, big, tokenizer=False)
    process = start(folder, "-o", tmp_path / "m.trit", "--quant", "nf4")  # the slowest
    while process.poll() is None and not left(folder):
        pass  # until the writer's temporary file is there
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code and left(folder) == [], err


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


def test_shards_cut_short_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    code, _, err = command(capsys, folder, "-o", folder.parent / "m.trit", "--quant", "f16")
    assert code == 2 and err.count("\n") == 1 and "cut short" in err and left(folder) == []


def test_control_characters_in_names_do_not_reach_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = {HF_NAMES.theirs(name): v for name, v in weights_for(HF_CONFIG).items()}
    write_safetensors(folder / "model.safetensors", {**theirs, "\x1b[2Jevil\n": np.zeros(1, np.float32)})
    code, _, err = command(capsys, folder, "-o", folder.parent / "m.trit", "--quant", "f16")
    assert code == 2 and "\x1b" not in err and err.count("\n") == 1 and "evil" in err
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
