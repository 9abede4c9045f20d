"""A progress bar on stderr: with rate and time left on a terminal, nothing anywhere else, or a line now and then."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_EVERY = 15.0  # seconds


class Bar:
    """A bar that is called with (done, total, note), as `convert` and `verify` do.

    >>> with Bar("convert") as bar:
    ...     bar(10, 100, "layers.0.wq")

    lines: where there is no terminal, say in lines how far it is, for work that takes minutes
    Raises nothing: with stderr not a terminal every call does nothing else.
    """

    def __init__(self, what: str, unit: str = "B", enabled: bool | None = None, lines: bool = False) -> None:
        self._enabled = sys.stderr.isatty() if enabled is None else enabled
        self._what = what
        self._unit = unit
        self._bar: tqdm | None = None
        self._lines = lines and not self._enabled
        self._begun = self._said = time.monotonic()

    def __call__(self, done: int, total: int, note: str = "") -> None:
        if self._lines:
            self._say(done, total)
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

    def _say(self, done: int, total: int) -> None:
        """Write a line, unless the last one is new."""
        now = time.monotonic()
        if now - self._said < LINE_EVERY:
            return
        self._said = now
        print(f"{self._what}: {done} of {total} {self._unit}s, {now - self._begun:.0f} s", file=sys.stderr, flush=True)

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
