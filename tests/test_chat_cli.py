"""`python -m runtime.chat` as its users run it: in a process of its own, with pipes or on a terminal."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from formats.container import open_trit
from formats.conversion.convert import convert
from formats.sources.source import open_source
from formats.writer import TritWriter
from runtime import Llama
from runtime.chat.__main__ import main
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--backend", "numpy", "--temp", "0")
PATIENCE = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a real tokenizer, whose chat template is none of the built-in ones."""
    folder = tmp_path_factory.mktemp("cli")
    convert(open_source(tiny.folder_with_tokenizer(folder / "source")), folder / "tiny.trit", "f16", "f16")
    return folder / "tiny.trit"


def chat(*args: object, stdin: str | bytes = "", **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command with pipes for all streams."""
    done = subprocess.run(
        [sys.executable, "-m", "runtime.chat", *map(str, args)],
        input=stdin if isinstance(stdin, bytes) else stdin.encode(),
        capture_output=True, cwd=ROOT, timeout=PATIENCE, env={**os.environ, "PYTHONUTF8": "1", **env},
    )  # fmt: skip
    out, err = done.stdout.decode(), done.stderr.decode()
    return subprocess.CompletedProcess(done.args, done.returncode, out, err)


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of an error of the user's."""
    assert done.returncode == 2 and done.stdout == "", (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.splitlines()
    assert "Traceback" not in done.stderr and lines[-1].startswith("error: ")
    return lines[-1]


# ==== One prompt ====


def test_stdout_is_the_text_and_nothing_else(model: Path) -> None:
    done = chat(model, "-p", "Hello", "--raw", "-n", 12, *QUICK)
    with Llama(model, backend="numpy") as llm:
        result: Any = llm.create_completion("Hello", max_tokens=12, temperature=0)
    text = result["choices"][0]["text"]
    assert done.returncode == 0 and done.stdout == text + "\n" * (not text.endswith("\n"))
    assert "backend: numpy" in done.stderr
    assert re.search(r"\[prompt \d+ tokens \(0 reused\), [\d.]+ tok/s \| generated 12 tokens,", done.stderr)
    assert re.search(r", length \| memory: weights .* MB, cache .* MB.* \| context \d+ of \d+ \(f16\)", done.stderr)
    assert re.search(r" \| seed \d+ \| numpy\]", done.stderr)


def test_a_context_beyond_the_models_own_is_told(model: Path) -> None:
    done = chat(model, "-p", "Hello", "--raw", "-n", 1, "-c", 2049, *QUICK)
    assert done.returncode == 0 and "more than the 2048 that the model was made for" in done.stderr


@pytest.mark.parametrize("how", ["stdin", "dash", "file", "file dash"])
def test_the_prompt_may_come_from_elsewhere(model: Path, tmp_path: Path, how: str) -> None:
    (tmp_path / "prompt.txt").write_text("Hello\n", encoding="utf-8")
    given: dict[str, Sequence[object]] = {
        "stdin": (), "dash": ("-p", "-"), "file": ("-f", tmp_path / "prompt.txt"), "file dash": ("-f", "-"),
    }  # fmt: skip
    options = ("--raw", "-n", 6, *QUICK)
    done = chat(model, *given[how], *options, stdin="" if how == "file" else "Hello\n")
    assert done.returncode == 0 and done.stdout == chat(model, "-p", "Hello", *options).stdout


def test_json(model: Path) -> None:
    options = ("-p", "Hi", "--chat-format", "llama2", "-n", 5, "-s", 7, "--backend", "numpy")
    done = chat("-m", model, "--json", *options)
    found = json.loads(done.stdout)
    assert done.returncode == 0 and done.stdout.count("\n") == 1
    assert found["seed"] == 7 and found["usage"]["completion_tokens"] == 5
    assert found["finish_reason"] == "length" and found["backend"] == "numpy"
    assert found["options"]["temperature"] == 0.8 and found["memory"]["weights"] > 0
    assert chat(model, *options).stdout.rstrip("\n") == found["text"].rstrip("\n")


def test_templates_are_run_only_when_asked_for(model: Path) -> None:
    line = refused(chat(model, "-p", "Hi", *QUICK))
    assert "--chat-format" in line and "--jinja" in line and "--raw" in line
    done = chat(model, "-p", "Hi", "--jinja", "-n", 3, *QUICK)
    assert done.returncode == 0 and "chat format jinja" in done.stderr


def test_a_base_model_says_that_it_completes(model: Path, tmp_path: Path) -> None:
    done = chat(rewritten(model, tmp_path, chat={}), "-p", "Hi", "-n", 3, *QUICK)
    assert done.returncode == 0 and "no chat template in this model" in done.stderr
    assert "no chat template" in refused(chat(tmp_path / "rewritten.trit", "-p", "Hi", "-sys", "x", *QUICK))


def test_built_with_llama_is_shown(model: Path, tmp_path: Path) -> None:
    path = rewritten(model, tmp_path, licence={"name": "llama3.1", "llama": True})
    assert "Built with Llama" in chat(path, "-p", "Hi", "--raw", "-n", 1, *QUICK).stderr.splitlines()
    assert "Built with Llama" not in chat(model, "-p", "Hi", "--raw", "-n", 1, *QUICK).stderr


def rewritten(model: Path, folder: Path, **header: Any) -> Path:
    """Copy a model with another header."""
    path = folder / "rewritten.trit"
    with open_trit(model) as file:
        metadata = {key: value for key, value in file.header.items() if key != "tensors"}
        with TritWriter(path, {**metadata, **header}, list(file.tensors)) as writer:
            for name, tensor in file.tensors.items():
                writer.add(name, tensor.codec, tensor.shape, tensor.params, tensor.parts)
    return path


def test_characters_that_stdout_cannot_express(model: Path) -> None:
    env = {"PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = chat(model, "-p", "日本 🦙", "--raw", "-n", 20, *QUICK, **env)
    assert done.returncode == 0 and done.stdout.isascii()
    assert chat(model, "--raw", "-n", 2, *QUICK, stdin=b"\xff\xfe bytes").returncode == 0


# ==== Wrong input ====


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["-p", ""], "the prompt is empty"),
        (["-p", "x", "--temp", "-1"], "temperature must be 0 or more, got -1.0"),
        (["-p", "x", "--temp", "nan"], "temperature must be 0 or more"),
        (["-p", "x", "--top-p", "2"], "top_p must be from 0 to 1"),
        (["-p", "x", "--top-k", "many"], "invalid int value: 'many'"),
        (["-p", "x", "-c", "0"], "n_ctx must be"),
        (["-p", "x", "-b", "0"], "n_batch must be"),
        (["-p", "x", "-t", "0"], "n_threads must be"),
        (["-p", "x", "-n", "-2"], "max_tokens must be"),
        (["-p", "x", "-s", "4294967296"], "seed must be"),
        (["-p", "x", "--stop", ""], "stop must be"),
        (["-p", "x", "--kv", "q5"], "kv must be auto"),
        (["-p", "x", "--unknown"], "unrecognized arguments: --unknown"),
        (["-p", "x", "--raw", "-sys", "y"], "--raw uses no chat format"),
        (["-p", "x", "--jinja", "--chat-format", "llama2"], "leave out --chat-format"),
        (["-p", "x", "-f", "y"], "leave one out"),
        (["-p", "x", "-m", "other.trit"], "named twice"),
        (["-i", "--json"], "--json answers one prompt"),
        (["-f", "no such file"], "no such file: No such file"),
    ],
)
def test_wrong_options_are_found_before_the_model_is_looked_at(
    args: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(["no such model.trit", *args])
    assert text in refused(subprocess.CompletedProcess(args, code, *capsys.readouterr()))


def test_wrong_models(model: Path, tmp_path: Path) -> None:
    assert "No such file" in refused(chat(tmp_path / "missing.trit", "-p", "x"))
    (tmp_path / "text.trit").write_text("hello", encoding="utf-8")
    assert "text.trit" in refused(chat(tmp_path / "text.trit", "-p", "x"))
    (tmp_path / "cut.trit").write_bytes(model.read_bytes()[:-1000])
    assert "cut.trit" in refused(chat(tmp_path / "cut.trit", "-p", "x"))
    assert "unknown chat format 'x'" in refused(chat(model, "-p", "x", "--chat-format", "x", *QUICK))


def test_a_prompt_longer_than_the_context(model: Path) -> None:
    line = refused(chat(model, "-p", "word " * 50, "--raw", "-c", 16, *QUICK))
    assert re.search(r"the prompt has \d+ tokens, the context holds 16", line)


def test_debug_shows_the_traceback(model: Path) -> None:
    done = chat(model, "-p", "x" * 100, "--raw", "-c", 16, "--debug", *QUICK)
    assert done.returncode == 2 and "Traceback" in done.stderr and "ContextOverflowError" in done.stderr


# ==== Conversations through pipes ====


def converse(model: Path, *lines: str, options: Sequence[object] = ()) -> subprocess.CompletedProcess[str]:
    args = (model, "-i", "--chat-format", "llama2", "-n", 4, *QUICK, *options)
    return chat(*args, stdin="".join(f"{line}\n" for line in lines))


def reused(done: subprocess.CompletedProcess[str]) -> list[tuple[int, int]]:
    """(prompt tokens, reused ones) of each answer."""
    return [(int(n), int(r)) for n, r in re.findall(r"\[prompt (\d+) tokens \((\d+) reused\)", done.stderr)]


def test_turns_reuse_the_context(model: Path) -> None:
    done = converse(model, "one", "two", "three", "/exit", "four")
    (first, none), (second, kept), (_, more) = reused(done)
    assert done.returncode == 0 and none == 0
    assert kept >= first + 3 and more >= second + 3  # all but the last token of the answer was in the ring


def test_regen_undo_and_reset(model: Path) -> None:
    done = converse(model, "one", "/regen", "two", "/undo", "two", "/reset", "one")
    figures = reused(done)
    assert figures[1] == (figures[0][0], figures[0][0] - 1)
    assert figures[3][0] == figures[2][0] and figures[4][1] == 0
    assert "(taken back; 1 exchange left)" in done.stderr
    answers = done.stdout
    assert answers.startswith(converse(model, "one").stdout)


def test_commands(model: Path) -> None:
    done = converse(
        model, "/help", "/stats", "/regen", "/undo", "/nonsense", "/stats now", "/system", "/system Be kind.",
        "/system", "/bye",
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout == ""
    for text in (
        "/regen  ", "(nothing was generated yet)", "error: there is no answer yet",
        "error: there is nothing to take back", "error: unknown command /nonsense",
        "error: /stats takes no text",
        "(no system message)", "(the conversation begins anew)", "\nBe kind.\n",
    ):  # fmt: skip
        assert text in done.stderr, text


def test_lines_that_belong_together(model: Path) -> None:
    def tokens(*lines: str) -> int:
        ((count, _),) = reused(converse(model, *lines))
        return count

    assert tokens("a\\", "b") == tokens('"""', "a", 'b"""') == tokens('"""a', "b", '"""')
    assert tokens("//help") == tokens('"""/help"""')


def test_a_conversation_longer_than_the_context_goes_on(model: Path) -> None:
    done = converse(model, *["some words to say"] * 6, options=("-c", 40))
    figures = reused(done)
    assert done.returncode == 0 and len(figures) == 6 and figures[-1][0] > 40
    assert all(kept > 0 for _, kept in figures[1:])
    assert done.stderr.count("the oldest ones slide out") == 1


def test_an_error_leaves_the_conversation_as_it_was(model: Path) -> None:
    done = chat(model, "-i", "--raw", "-n", 3, *QUICK, stdin="one\n two\n/system x\n")
    assert done.returncode == 0 and len(reused(done)) == 2
    assert "a plain text has no system message" in done.stderr
    assert reused(done)[1][1] >= reused(done)[0][0]


# ==== Sessions ====


def test_a_session_goes_on_where_it_ended(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    whole = converse(model, "one", "two", "three")
    first = converse(model, "one", "two", options=("--session", path))
    second = converse(model, "three", options=("--session", path))
    assert first.returncode == second.returncode == 0
    assert first.stdout + second.stdout == whole.stdout
    assert reused(second) == reused(whole)[2:] and f"session: {path}, 2 exchanges" in second.stderr
    once = chat(model, "-p", "four", "--chat-format", "llama2", "-n", 4, "--session", path, *QUICK)
    assert once.stdout == converse(model, "one", "two", "three", "four").stdout.removeprefix(whole.stdout)


def test_save_and_load(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    done = converse(model, "one", f"/save {path}", "two", "/reset", f"/load {path}", "two", "/load", f"/load {path}x")
    assert "(saved 1 exchange)" in done.stderr and "(loaded 1 exchange)" in done.stderr
    assert reused(done)[2] == reused(done)[1]
    assert "error: /load FILE takes the name of a file" in done.stderr
    assert f"error: {path}x: No such file" in done.stderr


def test_a_session_that_cannot_be_used(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    converse(model, "one", options=("--session", path))
    assert "capacity" in refused(converse(model, "two", options=("--session", path, "-c", 50)))
    assert "plain text" in refused(chat(model, "-p", "x", "--raw", "--session", path, *QUICK))
    path.write_bytes(path.read_bytes()[:-1])
    assert "checksum" in refused(converse(model, "two", options=("--session", path)))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")  # to open one is to wait for a writer
        done = converse(model, f"/load {tmp_path / 'pipe'}", "/stats")
        assert f"error: {tmp_path / 'pipe'}: is a pipe or device; expected a regular file" in done.stderr


def test_a_session_that_could_not_be_saved_is_refused_before_anything_is_said(model: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    wrong: dict[object, str] = {
        "": "takes the name of a file", tmp_path / "x" / "y": "no such folder", tmp_path / "folder": "is a folder",
        tmp_path / ("y" * 300): "too long",
    }  # fmt: skip
    for path, message in wrong.items():
        done = chat(model, "-p", "x", "--raw", "-n", 4, "--session", path, *QUICK)
        assert message in refused(done) and done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_message_longer_than_the_context_is_refused_in_a_conversation(model: Path) -> None:
    done = converse(model, "word " * 50, "one", options=("-c", 40))
    assert done.returncode == 0 and len(reused(done)) == 1 and "the context holds 40" in done.stderr
    slid = converse(model, "word " * 50, "one", options=("-c", 40, "--overflow", "slide"))
    assert len(reused(slid)) == 2 and " slid out," in slid.stderr
    assert " cut," in chat(model, "-p", "word " * 50, "--raw", "-c", 40, "--overflow", "truncate-middle", *QUICK).stderr
