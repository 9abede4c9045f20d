"""Compile kernels when they are first needed, and keep the machine code between runs.

The code is kept in one folder per version of the kernels' source, so that an edit to any of these files never meets
machine code made from the old one (Numba itself looks at the file of the outermost function alone).
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llvmlite
import numba
import platformdirs
from numba import cfunc, njit

log = logging.getLogger("tritllama")
_lock = threading.RLock()
_registry: list[Compiled] = []
TASK = "void(intp, intp)"


def cache_directory() -> Path | None:
    """The folder for this version's machine code, or None where nothing can be written."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    versions = f"{numba.__version__}-{llvmlite.__version__}-{platform.python_version()}"
    root = os.environ.get("TRITLLAMA_CACHE") or platformdirs.user_cache_dir("tritllama", appauthor=False)
    folder = Path(root) / "kernels" / f"{digest.hexdigest()[:16]}-{versions}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        log.warning("compiled kernels cannot be kept: %s", error)
        return None
    return folder if os.access(folder, os.W_OK) else None


@contextmanager
def _numba_cache(folder: Path | None) -> Iterator[bool]:
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder) if folder else before
    try:
        yield folder is not None
    finally:
        numba.config.CACHE_DIR = before


class Compiled:
    """A function that is compiled on its first use, for one fixed signature."""

    def __init__(self, function: Callable[..., Any], signature: str) -> None:
        self.function, self.signature = function, signature
        self._ready: Any = None
        _registry.append(self)

    @property
    def name(self) -> str:
        return self.function.__name__.strip("_")

    def compile(self) -> Any:
        """Compile, or load what an earlier run kept."""
        with _lock:
            if self._ready is None:
                _announce(self.function.__name__)
                with _numba_cache(_folder()) as keep:
                    if self.signature == TASK:
                        self._ready = cfunc(TASK, cache=keep, error_model="numpy")(self.function)
                    else:
                        options = {"cache": keep, "nogil": True, "error_model": "numpy"}
                        self._ready = njit(self.signature, **options)(self.function)
            return self._ready

    def __call__(self, *args: Any) -> Any:
        return (self._ready or self.compile())(*args)

    @property
    def address(self) -> int:
        """Of the C function (tasks only)."""
        return int((self._ready or self.compile()).address)


_chosen: list[Path | None] = []
_announced: list[bool] = []


def _announce(name: str) -> None:
    """Say once that there will be a wait, if the machine code is not there yet."""
    folder = _folder()
    if not _announced and not (folder and any(folder.rglob(f"*.{name}-*.nbi"))):
        _announced.append(True)
        log.info("compiling kernels for this CPU; this happens once and takes up to a minute")


def _folder() -> Path | None:
    if not _chosen:
        _chosen.append(cache_directory())
    return _chosen[0]


def compiled(signature: str) -> Callable[[Callable[..., Any]], Compiled]:
    """Decorate a function that runs without the GIL; nothing is compiled before it is called."""
    return lambda function: Compiled(function, signature)


def task(function: Callable[[int, int], None]) -> Compiled:
    """Decorate a pool task: `function(arguments, unit)`, both integers, the first an address."""
    return Compiled(function, TASK)


def compile_all(progress: Callable[[int, int, str], None] | None = None) -> None:
    """Have every kernel ready. progress is called with (done, total, name) before each."""
    for i, item in enumerate(_registry):
        if progress:
            progress(i, len(_registry), item.name)
        item.compile()
