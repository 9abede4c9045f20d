"""tools.convert --calibrate: what it writes, and that it goes on after it was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from formats.container import open_trit
from tests.tiny import MATRICES, folder_with_tokenizer
from tools.convert import main

# A conversion that is ended in the middle of what it writes for the n-th time into a stream.
KILLED = """
import os, signal, sys
from runtime.calibration.streams import Stream
from tools.convert import main

left, write = int(sys.argv[1]), Stream.write

def half(self, start, values):
    global left
    left -= 1
    write(self, start, values if left else values[: len(values) // 2])
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

Stream.write = half
main(sys.argv[2:])
"""


def write_text(path: Path) -> str:
    path.write_text("The rain in Spain stays mainly in the plain. " * 40, encoding="utf-8")
    return str(path)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_a_killed_conversion_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    folder, text = folder_with_tokenizer(tmp_path / "model"), write_text(tmp_path / "text.txt")
    command = [str(folder), "--quant", "trit2", "--calibrate", text, "--calibrate-tokens", "1024"]
    assert main([*command, "-o", str(tmp_path / "whole.trit")]) == 0
    command += ["-o", str(tmp_path / "out.trit"), "--state", str(tmp_path / "state")]
    found = []
    for n in (1, 9):  # among the embeddings, in the second layer
        ended = subprocess.run([sys.executable, "-c", KILLED, str(n), *command], capture_output=True, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
        found.append(sorted(path.name for path in (tmp_path / "state").glob("layer-*")))
    assert found == [[], ["layer-0000.npz"]]
    assert main(command) == 0
    assert (tmp_path / "out.trit").read_bytes() == (tmp_path / "whole.trit").read_bytes()
    assert not (tmp_path / "state").exists()


def test_the_command_writes_what_the_library_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_with_tokenizer(tmp_path / "model")
    text, out = write_text(tmp_path / "text.txt"), tmp_path / "out.trit"
    command = [str(folder), "-o", str(out), "--quant", "trit2", "--calibrate", text, "--calibrate-tokens", "1024"]
    assert main(command) == 0
    assert not (tmp_path / "out.trit.state").exists()
    with open_trit(out) as file:
        assert file.tensors["layers.0.wq"].codec == "trit2"
        assert file.header["source"]["options"].endswith("--calibrate text.txt --calibrate-tokens 1024")
    assert main(command) == 2
    assert "exists already" in capsys.readouterr().err
    mixed = [*command[:4], "trit-mixed", *command[5:], "--bpw", "5", "--overwrite"]
    assert main(mixed) == 0
    assert "plan: 5.00 bits per weight" in capsys.readouterr().err
    with open_trit(out) as file:
        assert {tensor.codec for name, tensor in file.tensors.items() if name.endswith(MATRICES)} > {"trit2"}
    assert main([*command, "--overwrite", "--encoder", "best"]) == 2
    assert main([*command[:4], "f16", *command[5:]]) == 2
