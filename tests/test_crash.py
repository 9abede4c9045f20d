"""What a crash leaves: the old file or the new one under its name, whole, and nothing else unless the crash was a kill.

Every command runs in a process of its own that has been loaded beforehand, so that a case takes a fraction of a second.
`pytest -m slow -s tests/test_crash.py` injects many more faults.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

import runtime.chat.__main__
import tools.convert
import tools.learn_kv
from tests.checkpoints import write_hf

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")
FEW, MANY = 2, 25  # faults of each kind in each command
NOBODY = 65534
PATIENCE = 60.0
COMMANDS = {"convert": tools.convert.main, "learn_kv": tools.learn_kv.main, "chat": runtime.chat.__main__.main}
NAMES = ("convert", "several", "learn_kv", "chat")
SEVERAL = ("trit2,nf4", "-o", "{}")
EXACT = ("--backend", "numpy", "-t", "1")


@dataclass(frozen=True)
class Job:
    """A command that replaces the files in its folder: what they hold before and after, and the seconds it takes."""

    command: str
    arguments: tuple[str, ...]
    folder: Path
    old: dict[str, bytes]
    new: dict[str, bytes]
    seconds: float

    def prepare(self) -> None:
        """Put the old files back, and nothing else."""
        shutil.rmtree(self.folder)
        put(self.folder, self.old)

    def check(self, temporary: bool = False) -> str:
        """Look at what is there. temporary: may there be unfinished files? returns: 'old', 'new' or 'mixed'"""
        found = contents(self.folder)
        unfinished = {name for name in found if name.startswith(".") and name.endswith(".tmp")}
        assert temporary or not unfinished, f"{self.command} left {unfinished}"
        found = {name: data for name, data in found.items() if name not in unfinished}
        assert set(found) == set(self.old)
        fresh = {name: data == self.new[name] for name, data in found.items()}
        assert all(fresh[name] or data == self.old[name] for name, data in found.items()), "a file is neither"
        return "new" if all(fresh.values()) else "mixed" if any(fresh.values()) else "old"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(mode=0o755)
    for name, data in files.items():
        (folder / name).write_bytes(data)


# ======== processes


def in_child(pipe: Connection, command: str, arguments: tuple[str, ...], room: int | None, nobody: bool) -> None:
    """Run a command. room: bytes that a file may have; nobody: without root's right to write everywhere"""
    import resource

    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    if nobody and os.geteuid() == 0:
        codecs.lookup("unicode_escape")  # nobody may not be able to read Python's library
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        pipe.send(None)
        code = COMMANDS[command](arguments)
    pipe.send(said.getvalue())
    pipe.close()
    os._exit(code)


class Child:
    """A command that is running in another process."""

    def __init__(
        self, job: Job, arguments: tuple[str, ...] = (), room: int | None = None, nobody: bool = False
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe(duplex=False)
        arguments = job.arguments + arguments
        self.process: BaseProcess = context.Process(
            target=in_child, args=(theirs, job.command, arguments, room, nobody), daemon=True
        )
        self.process.start()
        theirs.close()
        self.pipe.recv()  # it begins
        self.started = time.perf_counter()

    def end(self) -> tuple[int | None, str]:
        """Wait for the end. returns: exit code, what it said on stderr"""
        said = ""
        with contextlib.suppress(EOFError, ConnectionResetError):
            if self.pipe.poll(PATIENCE):
                said = self.pipe.recv()
        self.process.join(PATIENCE)
        self.pipe.close()
        return self.process.exitcode, said


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder that everybody may read, which pytest's own is not."""
    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        os.chmod(name, 0o755)
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        multiprocessing.set_forkserver_preload([__name__])
        forkserver.ensure_running()
        yield Path(name)


@pytest.fixture(scope="module")
def jobs(place: Path) -> dict[str, Job]:
    source, model, text = place / "source", place / "model.trit", place / "text.txt"
    write_hf(source)
    text.write_text("the ring is full of tokens and slides on " * 30)
    assert tools.convert.main([str(source), "-o", str(model), "--quant", "f16"]) == 0
    convert = ("convert", (str(source), "--overwrite", "--quant"))
    fixed = ("-f", str(text), "-c", "64", "--overwrite", *EXACT, "-o", "{}/out.trit")
    learn = ("learn_kv", (str(model), *fixed, "--layers", "2", "--rank"))
    chat = ("chat", (str(model), "-c", "256", "-n", "16", "--temp", "0", "--raw", *EXACT, "--session", "{}/a", "-p"))
    return {
        "convert": make(place / "convert", convert, ("nf4", "-o", "{}/out.trit"), ("trit3", "-o", "{}/out.trit")),
        "several": make(place / "several", convert, (*SEVERAL, "--embed", "q8"), SEVERAL),
        "learn_kv": make(place / "learn_kv", learn, ("8",), ("16",)),
        "chat": make(place / "chat", chat, ("one",), ("two",)),
    }  # fmt: skip


def make(folder: Path, start: tuple[str, tuple[str, ...]], first: tuple[str, ...], second: tuple[str, ...]) -> Job:
    """Run a command with its first arguments and its second, to learn what both write."""
    folder.mkdir(mode=0o755)
    command, common = start
    states, seconds = [], 0.0
    for more in (first, second):
        arguments = tuple(argument.format(folder) for argument in (*common, *more))
        child = Child(Job(command, arguments, folder, {}, {}, 0))
        code, said = child.end()
        assert code == 0, said
        seconds = time.perf_counter() - child.started
        states.append(contents(folder))
    assert states[0].keys() == states[1].keys() and all(states[0][name] != states[1][name] for name in states[0])
    return Job(command, arguments, folder, *states, seconds)


# ======== faults


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGTERM"])
def test_a_signal_at_any_moment(fault: str, name: str, jobs: dict[str, Job]) -> None:
    interrupt(jobs[name], fault, range(FEW))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGTERM"])
def test_a_signal_at_many_moments(fault: str, name: str, jobs: dict[str, Job]) -> None:
    found = interrupt(jobs[name], fault, range(100, 100 + MANY))
    print(f"\n{fault} in {name}: {dict(found)}")
    assert found["old"] and len(found) > 1, "all came at the same moment"
    for file, data in jobs[name].old.items():
        (jobs[name].folder / file).write_bytes(data)
    assert Child(jobs[name]).end()[0] == 0 and jobs[name].check() == "new"  # what the killed ones left is gone, too


def interrupt(job: Job, fault: str, seeds: range) -> Counter[str]:
    """Send a signal at random moments, half of them after the new file was begun."""
    found: Counter[str] = Counter()
    for seed in seeds:
        rng = random.Random(seed)
        job.prepare()
        child = Child(job)
        if seed % 2:
            while child.process.is_alive() and len(os.listdir(job.folder)) == len(job.old):
                time.sleep(0.0005)
            time.sleep(rng.choice((0, 0.001, job.seconds / 4)) * rng.random())
        else:
            time.sleep(rng.random() * 1.1 * job.seconds)
        killed = fault == "SIGKILL"
        child.process.kill() if killed else child.process.terminate()
        code, said = child.end()
        assert code in ((0, -signal.SIGKILL) if killed else (0, 143, -signal.SIGTERM)), said
        unfinished = len(os.listdir(job.folder)) > len(job.old)
        found[job.check(temporary=killed) + (" and an unfinished file" if unfinished else "")] += 1
    return found


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(name: str, jobs: dict[str, Job]) -> None:
    fill(jobs[name], 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_disk_that_is_full_at_any_byte(name: str, jobs: dict[str, Job]) -> None:
    fill(jobs[name], MANY)


def fill(job: Job, times: int) -> None:
    """Let a file grow to fewer bytes than the largest needs: all but one, random numbers."""
    most = max(map(len, job.new.values()))
    rng = random.Random(1)
    for room in (most - 1, *(rng.randrange(most) for _ in range(times - 1))):
        job.prepare()
        code, said = Child(job, room=room).end()
        assert code == 2 and said.count("error: ") == 1 and "large" in said.lower(), said
        assert job.check() == "old"


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_may_not_be_written_to(name: str, jobs: dict[str, Job]) -> None:
    job = jobs[name]
    job.prepare()
    job.folder.chmod(0o555)
    code, said = Child(job, nobody=True).end()
    job.folder.chmod(0o755)
    assert code == 2 and f"error: {job.folder}: Permission denied" in said and job.check() == "old", said


@pytest.mark.parametrize("name", NAMES)
def test_two_writers_of_one_name(name: str, jobs: dict[str, Job]) -> None:
    """Both end well, one after the other; what is there is whole."""
    job = jobs[name]
    job.prepare()
    children = [Child(job), Child(job)]
    assert [child.end()[0] for child in children] == [0, 0]
    if name != "chat":  # the second may go on with the first one's session
        assert job.check() == "new"
    assert set(contents(job.folder)) == set(job.old)


def test_a_file_that_is_replaced_while_it_is_mapped(place: Path, jobs: dict[str, Job]) -> None:
    """Whoever has it open goes on with what it was."""
    from formats.container import open_trit

    job = jobs["convert"]
    job.prepare()
    with open_trit(job.folder / "out.trit") as file:
        assert Child(job).end()[0] == 0 and job.check() == "new"
        file.verify()
        assert file.size == len(job.old["out.trit"])
