"""A step that is always the same, recorded once: its jobs are then run again in as few calls as possible.

Job words hold addresses. What they point to must not move, and a program keeps it from being freed; what changes
between two runs of a step is read from memory: the ring's clock, the buffers that the step begins with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .memory import address

if TYPE_CHECKING:
    from .pool import Pool


class Program:
    """What a pool was asked to do while it recorded: lists of jobs, and calls of functions between them."""

    def __init__(self) -> None:
        self._steps: list[np.ndarray | Callable[[], object]] = []
        self._jobs: list[int] = []
        self._keep: list[Any] = []

    def add(self, task: int, words: np.ndarray, units: int, keep: tuple[Any, ...]) -> None:
        """Note a job with its words as they are now. keep: what these point to"""
        mine = words.copy()
        self._keep += mine, keep
        self._jobs += task, address(mine), units

    def add_call(self, call: Callable[[], object]) -> None:
        """Note a call that follows the jobs noted so far."""
        self.finish()
        self._steps.append(call)

    def finish(self) -> None:
        """Close the list of jobs."""
        if self._jobs:
            self._steps.append(np.array([len(self._jobs) // 3, *self._jobs], np.int64))
            self._jobs = []

    def run(self, pool: Pool) -> None:
        """Do all again."""
        for step in self._steps:
            if isinstance(step, np.ndarray):
                pool.run_jobs(step)
            else:
                step()
