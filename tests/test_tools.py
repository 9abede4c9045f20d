"""The commands, run as a user runs them."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.conversion.convert import convert
from formats.sources.source import open_source
from runtime import benchmark, evaluate, warmup
from runtime.kernels.words import KERNELS
from runtime.model import Model
from runtime.tokenizer import load_tokenizer
from tests import tiny
from tools import cli

ROOT = Path(__file__).resolve().parent.parent
TEXT = "In the beginning was the word. " * 12
CTX = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in two codecs, a text, and a damaged copy."""
    folder = tmp_path_factory.mktemp("tools")
    source = tiny.folder_with_tokenizer(folder / "source")
    for quant in ("f16", "trit2"):
        convert(open_source(source), folder / f"{quant}.trit", quant)
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    data = bytearray((folder / "f16.trit").read_bytes())
    data[-1000] ^= 1
    (folder / "damaged.trit").write_bytes(data)
    (folder / "short.trit").write_bytes(data[:5000])
    return folder


def run(module: str, *args: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *map(str, args)]
    return subprocess.run(command, cwd=cwd or ROOT, env=env, capture_output=True, text=True, timeout=120)


def good(module: str, *args: object) -> str:
    done = run(module, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_process(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Run `trit ...` without a new interpreter; returns (exit code, stdout, stderr)."""
    code = cli.main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err


# ---- inspect ----------------------------------------------------------------------------------------------


def test_inspect_json(folder: Path) -> None:
    found = json.loads(good("tools.inspect", folder / "trit2.trit", "--json"))
    assert found["config"]["n_layers"] == 2 and found["config"]["tied_embeddings"] is True
    trits = found["codecs"]["trit2"]
    assert trits["tensors"] == 14 and trits["weights"] == 2 * (128 * 128 * 2 + 2 * 32 * 128 + 3 * 320 * 128)
    assert trits["bpw"] == pytest.approx(8 * trits["bytes"] / trits["weights"])
    assert 3.5 <= trits["bpw"] < 5.0
    names = {t["name"] for t in found["tensors"]}
    assert {"tok_embeddings", "layers.1.w2", "norm"} <= names
    by_name = {t["name"]: t for t in found["tensors"]}
    assert by_name["layers.0.wk"] | {"params": None} == {
        "name": "layers.0.wk", "codec": "trit2", "shape": [32, 128], "params": None,
        "nbytes": by_name["layers.0.wk"]["nbytes"],
    }  # fmt: skip
    memory = found["memory"]
    assert memory["kv_bytes_per_token"] == 2 * 2 * 1 * 32 * 2
    assert memory["kv_full_context"] == 2048 * memory["kv_bytes_per_token"]
    assert memory["weights"] == sum(t["nbytes"] for t in found["tensors"] if "tokenizer" not in t["name"])
    assert found["bytes"] == (folder / "trit2.trit").stat().st_size
    assert set(found) >= {"licence", "source", "fingerprint", "tokenizer", "chat"}
    assert sum(c["bytes"] for c in found["codecs"].values()) == sum(t["nbytes"] for t in found["tensors"])


def test_inspect_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = in_process(capsys, "inspect", folder / "trit2.trit")
    assert code == 0 and err == ""
    assert "2 layers, dim 128" in out and "layers.0-1.wq" in out and "layers.0.wq" not in out
    code, out, _ = in_process(capsys, "inspect", folder / "trit2.trit", "--tensors")
    assert code == 0 and "layers.0.wq" in out


def test_inspect_plot(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    made, report, picture = tmp_path / "m.trit", tmp_path / "m.json", tmp_path / "m.png"
    args = ("--quant", "trit2", "--report", report)
    assert in_process(capsys, "convert", folder / "source", "-o", made, *args)[0] == 0
    assert in_process(capsys, "inspect", made, "--plot", picture, "--report", report)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, err = in_process(capsys, "inspect", folder / "f16.trit", "--plot", picture, "--report", report)
    assert code == 2 and one_line(err) and "another conversion" in err
    code, _, err = in_process(capsys, "inspect", made, "--plot", picture, "--report", folder / "source" / "config.json")
    assert code == 2 and one_line(err) and "not the report" in err


def test_inspect_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(capsys, "inspect", "--verify", folder / "f16.trit")[0] == 0
    code, out, _ = in_process(capsys, "inspect", "--verify", folder / "f16.trit", "--json")
    assert code == 0 and json.loads(out)["verified"] is True
    done = run("tools.inspect", folder / "damaged.trit", "--verify")
    assert done.returncode == 2 and done.stdout == ""
    assert one_line(done.stderr) and "damaged.trit" in done.stderr and "crc32" in done.stderr


def test_inspect_template(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, "inspect", folder / "f16.trit", "--template")
    assert code == 0 and out == tiny.TEMPLATE + "\n"


def test_inspect_does_not_let_a_file_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write_trit(tmp_path / "x.trit", metadata={
        "licence": {"name": "\x1b[31mred\x07", "llama": False},
        "chat": {"format": None, "template": "a\x1b]0;title\x07b\n\tc", "system": None},
    })  # fmt: skip
    _, out, _ = in_process(capsys, "inspect", path)
    assert "\x1b" not in out and "red" in out
    _, out, _ = in_process(capsys, "inspect", path, "--template")
    assert out == "a\\x1b]0;title\\x07b\n\tc\n"


STRANGE: dict[str, dict[str, Any]] = {
    "no sections": {"chat": {}, "licence": {}, "source": {}, "generation": {}, "tokenizer": {}},
    "numbers": {"chat": {"template": 7}, "licence": {"name": 8}, "source": {"files": 9}, "tokenizer": {"special": 1}},
    "lists": {"chat": {"template": []}, "source": {"files": [1, [], {}]}, "tokenizer": {"eos_ids": "x"}},
}


@pytest.mark.parametrize("case", STRANGE)
def test_inspect_takes_headers_as_they_come(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write_trit(tmp_path / "x.trit", metadata=STRANGE[case])
    for options in ((), ("--json",), ("--verify",)):
        assert in_process(capsys, "inspect", path, *options)[0] == 0
    assert in_process(capsys, "inspect", path, "--template")[0] == 2


def test_inspect_refuses_a_config_it_does_not_know(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny.write_trit(tmp_path / "x.trit", metadata={"config": {"architecture": "gpt2"}})
    code, _, err = in_process(capsys, "inspect", path)
    assert code == 2 and one_line(err) and "architecture" in err


# ---- perplexity -------------------------------------------------------------------------------------------


def test_perplexity_json(folder: Path) -> None:
    """The same figure as from the logits of each window, computed here."""
    path = folder / "f16.trit"
    found = json.loads(good("tools.perplexity", path, "-f", folder / "text.txt", "-c", CTX, "--json",
                            "--activations", "f32", "--backend", "numpy", "-t", 1))  # fmt: skip
    model = Model.load(path, backend="numpy", n_threads=1, activations="f32")
    tokenizer = load_tokenizer(model.file)
    ids = tokenizer.encode(TEXT, add_bos=tokenizer.add_bos)
    losses = []
    for start in range(0, len(ids) - CTX + 1, CTX):
        window = ids[start : start + CTX]
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            window[0] = tokenizer.bos_id
        logits = model.forward(window, model.new_cache(CTX), "all")
        assert logits is not None
        log_p = evaluate.log_softmax(logits)
        losses += [-log_p[i, window[i + 1]] for i in range(CTX // 2, CTX - 1)]
    assert found["tokens"] == len(losses) and found["ctx"] == CTX
    assert found["ppl"] == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert found["stderr"] > 0
    assert found["backend"] == "numpy" and found["threads"] == 1 and found["activations"] == "f32"


def test_perplexity_kl(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("-f", folder / "text.txt", "-c", CTX, "--backend", "numpy", "--activations", "f32")
    code, out, _ = in_process(capsys, "perplexity", folder / "f16.trit", *args, "--kl", folder / "f16.trit", "--json")
    same = json.loads(out)
    assert code == 0 and same["kl_mean"] == pytest.approx(0, abs=1e-9) and same["same_top1"] == 1.0
    _, out, _ = in_process(capsys, "perplexity", folder / "trit2.trit", *args, "--kl", folder / "f16.trit", "--json")
    other = json.loads(out)
    assert other["kl_mean"] > 1e-4 and other["kl_p999"] >= other["kl_mean"] and other["same_top1"] < 1.0
    assert other["base_ppl"] == pytest.approx(same["ppl"])
    _, out, _ = in_process(capsys, "perplexity", folder / "trit2.trit", *args, "--kl", folder / "f16.trit")
    assert "perplexity" in out and "KL divergence" in out and "±" in out


def test_perplexity_limits_and_streams(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = (folder / "f16.trit", "-f", folder / "text.txt", "-c", CTX, "--backend", "numpy", "--json")
    _, out, _ = in_process(capsys, "perplexity", *args, "--chunks", 1)
    assert json.loads(out)["windows"] == 1 and json.loads(out)["tokens"] == CTX - CTX // 2 - 1
    code, out, _ = in_process(capsys, "perplexity", *args, "--stream")
    found = json.loads(out)
    assert code == 0 and found["before_wrap"]["ppl"] > 0 and found["after_wrap"]["ppl"] > 0
    parts = found["by_position"]
    assert [part["from"] for part in parts[:3]] == [0, CTX // 2, CTX] and parts[1]["ppl"] == found["before_wrap"]["ppl"]


def test_perplexity_by_position(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Windows by position are the protocol's own figure; of streams each position after the wrap is told apart."""
    args = (folder / "trit2.trit", "-f", folder / "text.txt", "-c", CTX, "--backend", "numpy", "--activations", "f32",
            "--kl", folder / "f16.trit", "--json")  # fmt: skip
    whole = json.loads(in_process(capsys, "perplexity", *args)[1])
    found = json.loads(in_process(capsys, "perplexity", *args, "--by-position")[1])
    assert all(found[key] == pytest.approx(whole[key], rel=1e-6) for key in ("ppl", "stderr", "kl_mean", "same_top1"))
    parts = found["by_position"]
    assert [part["from"] for part in parts] == list(range(0, CTX, CTX // 8)) and "after_wrap" not in found
    second = np.average([math.log(part["ppl"]) for part in parts[4:]], weights=[4, 4, 4, 3])
    assert math.exp(second) == pytest.approx(whole["ppl"]) and all(part["kl_mean"] > 0 for part in parts)
    picture = tmp_path / "p.png"
    streams = ("--stream-windows", 3, "--kv", "q8")
    if find_spec("matplotlib"):
        streams += ("--plot", picture)
    code, out, _ = in_process(capsys, "perplexity", *args, *streams, "--chunks", 7)
    found = json.loads(out)
    assert code == 0 and found["streams"] == 2 and found["kv"] == "q8" and found["after_wrap"]["ppl"] > 0
    assert found["by_position"][-1]["from"] > 2 * CTX
    assert not find_spec("matplotlib") or picture.read_bytes().startswith(b"\x89PNG")
    code, _, err = in_process(capsys, "perplexity", *args, "--stream-windows", 1000)
    assert code == 2 and one_line(err) and "32000 at least" in err


# ---- bench ------------------------------------------------------------------------------------------------


def test_bench_json(folder: Path) -> None:
    path = folder / "trit2.trit"
    found = json.loads(good("tools.bench", path, "-p", 8, "-n", "4,6", "-d", 10, "-t", 1, "-r", 2, "--json",
                            "--backend", "numpy"))  # fmt: skip
    assert [(f["pp"]["n"], f["tg"]["n"], f["tg"]["depth"]) for f in found] == [(8, 4, 10), (8, 6, 10)]
    first = found[0]
    assert first["backend"] == "numpy" and first["threads"] == 1 and first["model"] == "trit2.trit"
    assert first["pp"]["tok_s"] > 0 and first["tg"]["tok_s"] > 0 and first["tg"]["std"] >= 0
    assert isinstance(first["tg"]["depth_cost"], float) and "depth_cost" not in first["pp"]
    assert first["read_gb_s"] > 0.1 and first["cpu"] and first["fingerprint"] and first["versions"]["numpy"]
    tensors = json.loads(good("tools.inspect", path, "--json"))
    weights = tensors["memory"]["weights"]  # embeddings are tied, so every one is read
    assert first["weight_bytes_per_token"] == weights
    assert first["bytes_per_token"] == weights + tensors["memory"]["kv_bytes_per_token"] * (10 + 2)
    assert first["tg_gb_s"] == pytest.approx(first["bytes_per_token"] * first["tg"]["tok_s"] / 1e9)
    assert first["tg_fraction"] == pytest.approx(first["tg_gb_s"] / first["read_gb_s"])


def test_bench_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("-p", "0", "-n", "2", "-r", "1", "-t", "1,2", "--backend", "numpy")
    code, out, _ = in_process(capsys, "bench", folder / "f16.trit", *args)
    rows = [line for line in out.splitlines() if line.startswith("| f16.trit")]
    assert code == 0 and len(rows) == 2
    assert all("tg2" in row and row.count("|") == 10 for row in rows)


def test_bench_several_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Models are measured one after the other; weights per second and bits per weight fit their sizes."""
    models, picture = [folder / "f16.trit", folder / "trit2.trit"], folder / "speed.png"
    plot = ["--plot", picture] if find_spec("matplotlib") else []
    args = ("-p", 0, "-n", 2, "-r", 1, "-t", 1, "--backend", "numpy", "--json", *plot)
    code, out, _ = in_process(capsys, "bench", *models, *args)
    found = json.loads(out)
    assert code == 0 and [f["model"] for f in found] == ["f16.trit", "trit2.trit"]
    f16, trit2 = found
    assert f16["weights_per_token"] == trit2["weights_per_token"] > 0
    assert 3 < trit2["bits_per_weight"] < 12 < f16["bits_per_weight"] < 17
    assert f16["tg_gweights_s"] == pytest.approx(f16["weights_per_token"] * f16["tg"]["tok_s"] / 1e9)
    assert not plot or picture.read_bytes().startswith(b"\x89PNG")


def test_bench_takes_turns() -> None:
    """Subjects are timed one after the other in every round, and put back after each."""
    log: list[str] = []

    class Subject:
        def __init__(self, name: str) -> None:
            self.name = name

        def read(self, ids: Sequence[int]) -> None:
            log.append(f"{self.name}{len(ids)}")

        def rewind(self) -> None:
            log.append("-")

    speeds = benchmark.compare([Subject("a"), Subject("b")], [1, 2], generate=True, repeats=2)
    assert [len(s) for s in speeds] == [2, 2] and all(rate > 0 for s in speeds for rate in s)
    assert "".join(log) == "a1a1-b1b1-" * 3
    log.clear()
    benchmark.compare([Subject("a")], [1, 2], generate=False, repeats=1)
    assert "".join(log) == "a2-a2-"


def test_bench_tells_what_depth_costs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rounds: 100 ms more at 100 and at 200 bytes a second, and 900 ms more, for 10 bytes."""
    assert benchmark.depth_cost([5, 5, 1], [10, 10, 10], [100, 200, 100], 10) == pytest.approx(2.0)
    args = ("-p", "2,3", "-n", "2", "-r", "1", "-t", "1", "--backend", "numpy")
    for depth, lines in (("20", 1), ("0", 0)):
        code, out, _ = in_process(capsys, "bench", folder / "f16.trit", *args, "-d", depth)
        assert code == 0 and out.count("f16.trit (-t 1 -n 2): 20 tokens in the context cost ") == lines


def test_warmup_has_every_kernel_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert warmup.main([]) == 0
    out, err = capsys.readouterr()
    assert out == "" and f"{sum(map(len, KERNELS.values()))} kernels are ready" in err
    assert warmup.main(["--backend", "numpy"]) == 2


# ---- what is wrong is told in one line --------------------------------------------------------------------


def one_line(text: str) -> bool:
    return text.count("\n") == 1 and text.startswith("error: ")


BAD: dict[str, tuple[str, ...]] = {
    "no command": (),
    "unknown command": ("fly",),
    "inspect nothing": ("inspect",),
    "inspect no file": ("inspect", "DIR/none.trit"),
    "inspect a folder": ("inspect", "DIR"),
    "inspect a text": ("inspect", "DIR/text.txt"),
    "inspect a short file": ("inspect", "DIR/short.trit"),
    "inspect report alone": ("inspect", "DIR/f16.trit", "--report", "DIR/x.json"),
    "inspect unknown option": ("inspect", "DIR/f16.trit", "--nonsense"),
    "perplexity no text": ("perplexity", "DIR/f16.trit"),
    "perplexity missing text": ("perplexity", "DIR/f16.trit", "-f", "DIR/none.txt"),
    "perplexity short text": ("perplexity", "DIR/f16.trit", "-f", "DIR/text.txt"),
    "perplexity not text": ("perplexity", "DIR/f16.trit", "-f", "DIR/trit2.trit"),
    "perplexity long context": ("perplexity", "DIR/f16.trit", "-f", "DIR/text.txt", "-c", "4096"),
    "perplexity bad number": ("perplexity", "DIR/f16.trit", "-f", "DIR/text.txt", "-c", "many"),
    "perplexity no context": ("perplexity", "DIR/f16.trit", "-f", "DIR/text.txt", "-c", "0"),
    "perplexity short file": ("perplexity", "DIR/short.trit", "-f", "DIR/text.txt"),
    "perplexity no base": (
        "perplexity", "DIR/f16.trit", "-f", "DIR/text.txt", "-c", "32", "--kl", "DIR/none.trit"
    ),
    "bench no file": ("bench", "DIR/none.trit"),
    "bench bad list": ("bench", "DIR/f16.trit", "-p", "8,x"),
    "bench nothing": ("bench", "DIR/f16.trit", "-p", "0", "-n", "0"),
    "bench too deep": ("bench", "DIR/f16.trit", "-d", "5000"),
    "bench peer missing": ("bench", "DIR/f16.trit", "--peers", "DIR/none.gguf"),
    "bench too many peers": ("bench", "DIR/f16.trit", "--peers", "DIR/a.gguf", "DIR/b.gguf"),
    "bench bad backend": ("bench", "DIR/f16.trit", "--backend", "abacus"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_code_2(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = in_process(capsys, *(a.replace("DIR", str(folder)) for a in BAD[case]))
    assert code == 2 and out == "" and one_line(err), err


def test_trit_is_python_m(folder: Path) -> None:
    """`trit inspect ...` and `python -m tools.inspect ...` are the same; bad input too, from any folder."""
    direct = run("tools.inspect", folder / "f16.trit")
    through = run("tools.cli", "inspect", folder / "f16.trit", cwd=folder)
    assert direct.returncode == through.returncode == 0
    assert direct.stdout == through.stdout != ""
    bad = run("tools.cli", "bench", folder / "short.trit", cwd=folder)
    assert bad.returncode == 2 and bad.stdout == "" and one_line(bad.stderr)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_do_no_harm(folder: Path, closed: str) -> None:
    command = f'exec "$0" -m tools.inspect "$1" {closed}'
    done = subprocess.run(["sh", "-c", command, sys.executable, folder / "f16.trit"], capture_output=True, cwd=ROOT)
    assert done.returncode == 0 and done.stderr == b""
    assert bool(done.stdout) == (">&-" not in closed.split())


def test_trit_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = in_process(capsys, "--help")
    assert code == 0 and all(name in out for name in cli.COMMANDS)
    code, out, _ = in_process(capsys, "--version")
    assert code == 0 and out.startswith("tritllama ")
    for name in cli.COMMANDS:
        code, out, _ = in_process(capsys, name, "--help")
        assert code == 0 and out.startswith("usage: "), name


def test_a_model_of_another_vocabulary_is_no_base(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "source", tmp_path / "other")
    tokenizer: dict[str, Any] = json.loads((tmp_path / "other" / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"] = []
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    convert(open_source(tmp_path / "other"), tmp_path / "other.trit", "f16")
    code, _, err = in_process(capsys, "perplexity", folder / "f16.trit", "-f", folder / "text.txt", "-c", CTX,
                              "--kl", tmp_path / "other.trit", "--backend", "numpy")  # fmt: skip
    assert code == 2 and one_line(err) and "tokenizer" in err
