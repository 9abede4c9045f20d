"""A progress bar on stderr: with rate and time left on a terminal, nothing anywhere else."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm


class Bar:
    """A bar that is called with (done, total, note), as `convert` and `verify` do.

    >>> with Bar("convert") as bar:
    ...     bar(10, 100, "layers.0.wq")

    Raises nothing: with stderr not a terminal every call does nothing.
    """

    def __init__(self, what: str, unit: str = "B", enabled: bool | None = None) -> None:
        self._enabled = sys.stderr.isatty() if enabled is None else enabled
        self._what = what
        self._unit = unit
        self._bar: tqdm | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if not self._enabled:
            return
        if self._bar is None:
            self._bar = tqdm(
                desc=self._what, total=total, unit=self._unit, unit_scale=True, unit_divisor=1000,
                file=sys.stderr, leave=False, dynamic_ncols=True, mininterval=0.1,
            )  # fmt: skip
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        if done < self._bar.n:  # the next phase
            self._bar.reset(total)
        self._bar.total = total
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
