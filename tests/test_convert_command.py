"""The command tools.convert: what it prints, its exit codes, and what is left when it is stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from formats.container import open_trit
from formats.sources.hf_names import HF_NAMES
from tests.checkpoints import HF_CONFIG, edit_json, weights_for, write_hf, write_safetensors
from tests.converting import command, left

ROOT = Path(__file__).resolve().parent.parent


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
