"""The folder of an interrupted calibration: whose it is, who works in it, and what of it may be removed."""

from __future__ import annotations

import json
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from .windows import CalibrationError

JOB, LOCK = "job.json", "lock"
# What a calibration writes; nothing else in the folder is ever touched.
OURS = (JOB, LOCK, "layer-*.npz", "source-*", "quantized-*", "work-*")


class StateFolder:
    """A folder that one calibration at a time works in.

    about: JSON values that tell what the calibration is of; another one does not go on from it
    Raises CalibrationError if the folder is in use, holds something else, or belongs to another calibration.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        if path.is_dir() and not (path / JOB).exists() and any(file.name != LOCK for file in path.iterdir()):
            raise CalibrationError(
                f"{path}: holds other things; expected an empty folder, or that of an interrupted conversion"
            )
        path.mkdir(exist_ok=True)
        self._lock = _locked(path / LOCK)
        try:
            self._claim(about)
        except BaseException:
            self.release()
            raise

    def layer(self, i: int) -> Path:
        """The file that makes layer i count as finished. Raises CalibrationError if it is there but damaged."""
        path = self.path / f"layer-{i:04}.npz"
        if path.exists() and not zipfile.is_zipfile(path):
            raise CalibrationError(f"{path}: is damaged; remove it, and this layer is done again with those after it")
        return path

    def clear(self) -> None:
        """Remove what a calibration wrote, and the folder if nothing else is in it."""
        self.release()
        for pattern in OURS:
            for file in self.path.glob(pattern):
                file.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()

    def release(self) -> None:
        """Let others work in the folder."""
        self._lock.close()

    def _claim(self, about: dict[str, Any]) -> None:
        job = self.path / JOB
        if not job.exists():
            partial = self.path / "work-job.json"
            partial.write_text(json.dumps(about), encoding="utf-8")
            os.replace(partial, job)
            return
        try:
            found = json.loads(job.read_text(encoding="utf-8"))
        except ValueError:
            raise CalibrationError(f"{job}: is damaged; remove the folder to begin anew") from None
        if found != about:
            raise CalibrationError(
                f"{self.path}: holds the beginning of another conversion (other source, text or options); "
                "remove it, or repeat that one"
            )


def _locked(path: Path) -> IO[bytes]:
    """Open a file that only one process at a time has. The system lets go of it when the process ends."""
    file = open(path, "ab")  # noqa: SIM115 - kept open
    try:
        import fcntl
    except ImportError:  # Windows
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise CalibrationError(f"{path.parent}: another conversion is at work in it; wait for that one") from None
    return file
