"""Temporaries: published whole, and removed by the next writer once nobody holds them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

import formats
from formats.unfinished import Unfinished, naming, unfinished

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks of POSIX")
KILLED = (
    "import os, sys\n"
    "from formats.unfinished import Unfinished\n"
    "made = Unfinished(sys.argv[1], folder=sys.argv[2] == 'folder')\n"
    "if sys.argv[2] == 'folder': open(os.path.join(made.path, 'weights'), 'w').close()\n"
    "os.kill(os.getpid(), 9)\n"
)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path, kind: str) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "m"), kind]
    assert subprocess.run(command, cwd=Path(formats.__file__).parents[1], check=False).returncode == -9
    (left,) = names(tmp_path)
    with unfinished(tmp_path / "other") as path:
        assert names(tmp_path) == [os.path.basename(path)] != [left]
    assert names(tmp_path) == ["other"]


def test_what_a_living_writer_holds_stays(tmp_path: Path) -> None:
    held = [Unfinished(tmp_path / "a"), Unfinished(tmp_path / "b", folder=True)]
    with unfinished(tmp_path / "c"):
        pass
    for made in held:
        assert os.path.exists(made.path)
        made.publish()
    assert names(tmp_path) == ["a", "b", "c"] and (tmp_path / "b").is_dir()


def test_what_only_looks_alike_stays(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".tritllama-notes.tmp").write_text("mine")
    (tmp_path / f".tritllama-{'0' * 16}.tmp").symlink_to("precious")
    with unfinished(tmp_path / "c"):
        pass
    assert len(names(tmp_path)) == 4 and (tmp_path / "precious").read_text() == "mine"


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(FileExistsError, match="by another program") as caught, unfinished(target, folder=True):
        target.mkdir()
        (target / "theirs").touch()
    assert caught.value.filename == str(target) and names(tmp_path) == ["out"] and names(target) == ["theirs"]


def test_errors_name_the_folder_or_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, *_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", path)

    with monkeypatch.context() as patch:
        patch.setattr("os.open", refuse)
        with pytest.raises(PermissionError) as caught:
            Unfinished(tmp_path / "m")
    assert caught.value.filename == str(tmp_path)
    for bare in (OSError(errno.ENOSPC, "No space left on device"), OSError("100 requested and 0 written")):
        with pytest.raises(OSError, match="nothing was left behind") as caught, unfinished(tmp_path / "m"):
            raise bare
        assert caught.value.filename == str(tmp_path / "m")
    with pytest.raises(FileNotFoundError) as caught, naming(tmp_path / "m"):
        open(tmp_path / "none").close()
    assert caught.value.filename == str(tmp_path / "none") and names(tmp_path) == []


def test_one_that_nobody_could_discard_goes_with_its_owner(tmp_path: Path) -> None:
    """A signal may come between the making and the first line that would clean up; a fork must not take it away."""
    made = Unfinished(tmp_path / "m")
    if (child := os.fork()) == 0:
        del made
        os._exit(0)
    os.waitpid(child, 0)
    assert len(names(tmp_path)) == 1
    del made
    assert names(tmp_path) == []
