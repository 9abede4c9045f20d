"""A lock that threads get in the order in which they asked for it."""

from __future__ import annotations

import os
import threading
from collections import deque
from types import TracebackType


class FairLock:
    """First come, first served, where threading.Lock lets the thread that runs already take it again and again.

    In a forked child it is free: the thread that held it does not exist there.
    """

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._pid = os.getpid()
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._held = False

    def __enter__(self) -> None:
        if self._pid != os.getpid():
            self._renew()
        with self._mutex:
            if not self._held:
                self._held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._waiting.append(turn)
        try:
            turn.acquire()  # whoever releases the lock hands it over
        except BaseException:  # Ctrl-C
            with self._mutex:
                handed_over = turn not in self._waiting
                if not handed_over:
                    self._waiting.remove(turn)
            if handed_over:
                self._release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pid == os.getpid():
            self._release()

    def _release(self) -> None:
        with self._mutex:
            if self._waiting:
                self._waiting.popleft().release()
            else:
                self._held = False
