"""Files and folders that are made under a temporary name and appear whole under their own, or not at all.

A temporary is locked for as long as its writer lives, whatever ends it. The next writer in the same folder removes
those that nobody holds: what a kill or a power cut left behind.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_NAME = re.compile(r"\.tritllama-[0-9a-f]{16}\.tmp")
_TRIES = 8


class Unfinished:
    """A temporary beside `target`; fill it at `path`, then `publish` or `discard` it.

    folder: make a folder instead of an empty file; private: nobody but its owner may read it
    Raises OSError that names the folder which cannot be written to.
    """

    def __init__(self, target: str | os.PathLike[str], folder: bool = False, private: bool = False) -> None:
        self.target = os.path.realpath(target)
        self._inside = os.path.dirname(self.target)
        self._is_folder, self._lock, self._owner = folder, -1, os.getpid()
        remove_abandoned(self._inside)
        for _ in range(_TRIES):
            self.path = os.path.join(self._inside, f".tritllama-{secrets.token_hex(8)}.tmp")
            try:
                self._make(0o600 if private else 0o666)
                self._lock = _open_locked(self.path)
            except FileNotFoundError:  # the folder is gone, or another writer was faster than our lock
                continue
            except OSError as exc:
                self.discard()
                raise OSError(exc.errno, f"{exc.strerror} (making a file in this folder)", self._inside) from exc
            except BaseException:
                self.discard()  # a signal may end a call that made the file
                raise
            return
        raise FileNotFoundError(errno.ENOENT, "no such folder to write to", self._inside)

    def publish(self) -> None:
        """Give it its name, in the place of a file that has it. Raises OSError; then it can still be discarded."""
        if self._lock >= 0 and os.name == "nt":  # an open file cannot be renamed there
            self._release()
        try:
            (os.rename if self._is_folder else os.replace)(self.path, self.target)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise OSError(exc.errno, exc.strerror, self.target) from exc
            raise FileExistsError(errno.EEXIST, "was made by another program meanwhile", self.target) from exc
        self._release()
        self._owner = -1
        _sync_folder(self._inside)

    def discard(self) -> None:
        """Remove it, if it is there."""
        self._release()
        if self._owner >= 0:
            _remove(self.path)
        self._owner = -1

    def __del__(self) -> None:
        if getattr(self, "path", None) and self._owner == os.getpid():  # a signal came before anybody could discard it
            self.discard()

    def _make(self, mode: int) -> None:
        if self._is_folder:
            os.mkdir(self.path)
        else:
            os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))

    def _release(self) -> None:
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


@contextmanager
def unfinished(target: str | os.PathLike[str], folder: bool = False, private: bool = False) -> Iterator[str]:
    """Give the path of a temporary to fill; it gets its name at the end, or is removed on an error."""
    made = Unfinished(target, folder, private)
    try:
        with naming(target):
            yield made.path
            made.publish()
    except BaseException:
        made.discard()
        raise


@contextmanager
def naming(path: str | os.PathLike[str], hint: str = "nothing was left behind") -> Iterator[None]:
    """Say what could not be written: a full disk gives an error without a name."""
    try:
        yield
    except OSError as exc:
        if exc.filename is not None:
            raise
        raise OSError(exc.errno or errno.EIO, f"{exc.strerror or exc} ({hint})", os.fspath(path)) from exc


def check_target(target: str | os.PathLike[str]) -> None:
    """Refuse, before any work, what no file can be put in the place of. Raises OSError that names it."""
    name, path = os.fspath(target), os.path.realpath(target)
    if not os.path.isdir(os.path.dirname(path)):
        raise FileNotFoundError(errno.ENOENT, "no such folder to write to", os.path.dirname(path))
    try:
        mode = os.stat(path).st_mode  # also where a name is too long
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder; expected a file name to write to", name)
    if not stat.S_ISREG(mode):
        raise FileExistsError(errno.EEXIST, "is a device or a pipe; expected a file name to write to", name)


def check_writable(target: str | os.PathLike[str]) -> None:
    """Make sure, before any work, that a file can be made there at its end. Raises OSError that says what is wrong."""
    check_target(target)
    Unfinished(target).discard()


def remove_abandoned(folder: str) -> None:
    """Remove the temporaries in a folder whose writers are gone, where the system can tell."""
    with suppress(OSError), os.scandir(folder) as entries:
        for name in [entry.name for entry in entries if _NAME.fullmatch(entry.name) and not entry.is_symlink()]:
            path = os.path.join(folder, name)
            with suppress(OSError):
                lock = _open_locked(path, wait=False)
                if lock >= 0:
                    try:
                        _remove(path)
                    finally:
                        os.close(lock)


def _open_locked(path: str, wait: bool = True) -> int:
    """Lock a file or folder until the descriptor that is returned is closed, or its process ends; -1 if it cannot be.

    Raises FileNotFoundError if it is not there (any more), BlockingIOError if another has it and `wait` is False.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return -1
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        os.stat(path)
    except OSError as exc:
        os.close(descriptor)
        if isinstance(exc, (FileNotFoundError, BlockingIOError)):
            raise
        return -1  # a file system without locks
    return descriptor


def _remove(path: str) -> None:
    with suppress(OSError):
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def _sync_folder(folder: str) -> None:
    """Make the rename itself durable, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
