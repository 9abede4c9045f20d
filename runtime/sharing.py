"""Who uses what: one call at a time a context, and as many contexts as there are a model."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from .fair_lock import FairLock

if TYPE_CHECKING:
    from .model import Model


class BusyError(RuntimeError):
    """The thread that asks is itself in the middle of an answer: waiting for it would never end."""


class Turns:
    """Lets one call at a time use a context; others wait in the order of asking."""

    def __init__(self) -> None:
        self._lock = FairLock()
        self._owner: int | None = None
        self._pid = os.getpid()

    @contextmanager
    def take(self) -> Iterator[bool]:
        """Wait for a turn; yields whether a fork has cut a call off, so that the context is not what it was.

        Raises BusyError in the thread that has the turn: it would wait for its own stream.
        """
        if self._owner == threading.get_ident():
            raise BusyError("an answer is still being streamed: read it to its end or close its iterator")
        with self._lock:
            forked, self._pid = self._pid != os.getpid(), os.getpid()
            cut_off = forked and self._owner is not None
            self.hand_over()
            try:
                yield cut_off
            finally:
                self._owner = None

    def hand_over(self) -> None:
        """Give the turn that is being used to the thread that calls this: it reads the stream on."""
        self._owner = threading.get_ident()


class Users:
    """Counts the contexts over a model. The last that closes, or is dropped, gives the model back."""

    def __init__(self, model: Model) -> None:
        self._model, self._count = model, 0
        self._lock = threading.RLock()  # a garbage collection may drop one context while another is counted

    def add(self) -> None:
        with self._lock:
            self._count += 1

    def remove(self) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                self._model.close()
