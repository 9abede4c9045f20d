"""Rounding with feedback of runtime/calibration/feedback.py, compiled: the same results, LANES rows at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from formats.codecs.trit import ENTRIES, GROUP, max_level

from .numba_encode import READ_ONLY, Run, compiled

if TYPE_CHECKING:
    from ..calibration.feedback import Factors

LANES = 64
ROUNDER = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to integer, ties to even


@compiled(f"void({READ_ONLY}, {READ_ONLY}, float32[::1], float32[::1], float32, int8[:,::1], uint8[:,::1])")
def _round_columns(w, u, d, units, top, levels, codes):
    """Do what `round_columns_reference` does.

    w: (rows, n) float32; levels: (rows, n) int8, codes: (rows, groups) uint8, both written
    """
    n = w.shape[1]
    error = np.zeros((n, LANES), np.float32)
    x = np.zeros((GROUP, LANES), np.float32)
    start = np.empty((GROUP, LANES), np.float32)
    t = np.empty((GROUP, LANES), np.float32)
    q = np.empty((GROUP, LANES), np.float32)
    q_best = np.empty((GROUP, LANES), np.float32)
    loss = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float32)
    code = np.empty(LANES, np.int32)
    for row in range(0, len(w), LANES):
        lanes = min(LANES, len(w) - row)
        for first in range(0, n, GROUP):
            for lane in range(lanes):
                for j in range(GROUP):
                    x[j, lane] = w[row + lane, first + j]
            start[:] = x
            for i in range(first):
                for j in range(GROUP):
                    factor = u[i, first + j]
                    for lane in range(LANES):
                        start[j, lane] += error[i, lane] * factor
            best[:] = np.inf
            q_best[:] = np.float32(0)
            code[:] = 0
            for k in range(ENTRIES):
                unit = units[k]
                if not unit > np.float32(0):
                    continue
                t[:] = start
                loss[:] = np.float32(0)
                for j in range(GROUP):
                    weight = d[first + j]
                    for lane in range(LANES):
                        y = t[j, lane] / unit
                        y = top if y > top else y
                        y = -top if y < -top else y
                        y = (y + ROUNDER) - ROUNDER
                        q[j, lane] = y
                        rest = t[j, lane] - y * unit
                        loss[lane] += rest * rest * weight
                    for later in range(j + 1, GROUP):
                        factor = u[first + j, first + later]
                        for lane in range(LANES):
                            t[later, lane] += (x[j, lane] - q[j, lane] * unit) * factor
                for j in range(GROUP):
                    for lane in range(LANES):
                        q_best[j, lane] = q[j, lane] if loss[lane] < best[lane] else q_best[j, lane]
                for lane in range(LANES):
                    better = loss[lane] < best[lane]
                    best[lane] = loss[lane] if better else best[lane]
                    code[lane] = k if better else code[lane]
            for lane in range(LANES):
                unit = units[code[lane]]
                for j in range(GROUP):
                    error[first + j, lane] = x[j, lane] - q_best[j, lane] * unit
            for lane in range(lanes):
                codes[row + lane, first // GROUP] = code[lane]
                for j in range(GROUP):
                    levels[row + lane, first + j] = np.int8(q_best[j, lane])


class RoundColumns:
    """`round_columns_reference`, compiled. run: how to call a function for all chunks, see `numba_encode.encode`"""

    def __init__(self, run: Run = map) -> None:
        self._round, self._run = _round_columns.ready, run

    def __call__(self, w: np.ndarray, factors: Factors, units: np.ndarray, depth: int) -> tuple[np.ndarray, np.ndarray]:
        levels, codes = np.empty(w.shape, np.int8), np.empty((len(w), w.shape[1] // GROUP), np.uint8)
        top = np.float32(max_level(depth))

        def work(chunk: tuple[int, int]) -> None:
            rows = slice(*chunk)
            self._round(w[rows], factors.feedback, factors.weights, units, top, levels[rows], codes[rows])

        for _ in self._run(work, [(start, start + LANES) for start in range(0, len(w), LANES)]):
            pass
        return levels, codes
