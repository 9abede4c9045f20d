"""An answer that comes in chunks."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Any


class Stream(Iterator[dict[str, Any]]):
    """The chunks of an answer, one at a time, for any thread to read.

    The context is in use until the last chunk, or until `close()`, the end of a `with` block, or nobody holds
    the stream any more. `close()` works from any thread, in the middle of reading the prompt too.
    """

    def __init__(self, chunks: Generator[dict[str, Any], None, None], closed: threading.Event) -> None:
        """closed: ends the run where it is, once it is set"""
        self._chunks, self._closed = chunks, closed

    def __next__(self) -> dict[str, Any]:
        return next(self._chunks)

    def close(self) -> None:
        self._closed.set()
        with suppress(ValueError):  # another thread is in the middle of a chunk: it will find the run closed
            self._chunks.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
