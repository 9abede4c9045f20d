"""The conversation on a pseudo-terminal: Ctrl-C and Ctrl-D."""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from formats.conversion.convert import convert
from formats.sources.source import open_source
from tests import tiny

pty = pytest.importorskip("pty")

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("--backend", "numpy", "--temp", "0")
PATIENCE = 60.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("terminal")
    convert(open_source(tiny.folder_with_tokenizer(folder / "source")), folder / "tiny.trit", "f16", "f16")
    return folder / "tiny.trit"


class Terminal:
    """The command on a pseudo-terminal: what is typed, what is seen."""

    def __init__(self, *args: object) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "-m", "runtime.chat", *map(str, args)])
        self.seen = ""

    def type(self, text: str) -> None:
        # readline shows its prompt a moment before it waits for keys; a Ctrl-C in between is lost.
        time.sleep(0.5)
        os.write(self.fd, text.encode())

    def expect(self, text: str) -> str:
        """Read until `text` is seen; returns everything before it since the last call."""
        deadline = time.monotonic() + PATIENCE
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} not in {self.seen!r}"
            if select.select([self.fd], [], [], 0.1)[0]:
                try:
                    data = os.read(self.fd, 4096)
                except OSError:
                    data = b""
                assert data, f"it ended without {text!r}: {self.seen!r}"
                self.seen += data.decode(errors="replace")
        before, _, self.seen = self.seen.partition(text)
        return before

    def exit_code(self) -> int:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if select.select([self.fd], [], [], 0.1)[0]:
                with suppress(OSError):
                    os.read(self.fd, 4096)
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
        raise AssertionError("it did not end")

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def terminal(model: Path) -> Iterator[Terminal]:
    screen = Terminal(model, "--chat-format", "llama2", "-n", -1, *QUICK, "--stop", "never said")
    yield screen
    screen.close()


def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type("hello\n")
    terminal.expect("hello\r\n")  # the answer has no end, and begins within the wait of type()
    terminal.type("\x03")
    terminal.expect("(stopped)")
    figures = terminal.expect("> ")
    assert "cancelled" in figures
    terminal.type("/stats\n")
    assert "cancelled" in terminal.expect("numpy]")
    terminal.type("/undo\n")
    terminal.expect("(taken back; 0 exchanges left)")
    terminal.type("\x04")
    assert terminal.exit_code() == 0


def test_ctrl_c_ends_a_single_answer(model: Path) -> None:
    screen = Terminal(model, "-p", "hello", "--raw", "-n", -1, *QUICK)
    try:
        screen.expect("no chat format")
        screen.type("\x03")
        assert "cancelled" in screen.expect("numpy]")
        assert screen.exit_code() == 130
    finally:
        screen.close()


def test_ctrl_c_twice_at_the_prompt_leaves(terminal: Terminal) -> None:
    terminal.expect("> ")
    terminal.type("\x03")
    terminal.expect("(Ctrl-C again or Ctrl-D leaves)")
    terminal.expect("> ")
    terminal.type("\x03")
    assert terminal.exit_code() == 0
