"""The search of formats/codecs/best_units.py, compiled: the same bytes, several depths from one pass.

Groups are handled LANES at a time, one lane each, because the errors of a group must be summed in order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from formats.codecs.base import CHUNK, Rows
from formats.codecs.best_units import fit_units, sample_groups
from formats.codecs.trit import ENTRIES, GROUP, grouped, max_level
from formats.codecs.trit_codec import Encoded

from .numba_encode import READ_ONLY, Run, compiled, pack_nearest

LANES = 64
ROUNDER = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to integer, ties to even


@compiled(f"void({READ_ONLY}, {READ_ONLY}, float32[::1], float32, uint8[::1], float64[:,::1])")
def _search(groups, importance, units, top, codes, sums):
    """Do what `search_reference` does. codes: (n,) uint8, sums: (n, 2) float64, both written"""
    n, m = len(groups), len(importance)
    x = np.zeros((GROUP, LANES), np.float32)
    h = np.zeros((GROUP, LANES), np.float32)
    error = np.empty(LANES, np.float32)
    best = np.empty(LANES, np.float64)
    code = np.empty(LANES, np.int32)
    for first in range(0, n, LANES):
        lanes = min(LANES, n - first)
        for lane in range(lanes):
            own = (first + lane) % m
            for j in range(GROUP):
                x[j, lane] = groups[first + lane, j]
                h[j, lane] = importance[own, j]
        best[:] = np.inf
        code[:] = 0
        for k in range(ENTRIES):
            unit = units[k]
            if not unit > np.float32(0):
                continue
            error[:] = np.float32(0)
            for j in range(GROUP):
                for lane in range(LANES):
                    y = x[j, lane] / unit
                    q = top if y > top else y
                    q = -top if q < -top else q
                    rest = y - ((q + ROUNDER) - ROUNDER)
                    error[lane] += rest * rest * h[j, lane]
            for lane in range(LANES):
                square = np.float64(error[lane]) * np.float64(unit) * np.float64(unit)
                better = square < best[lane]
                best[lane] = square if better else best[lane]
                code[lane] = k if better else code[lane]
        for lane in range(lanes):
            unit = units[code[lane]]
            product = square = 0.0
            for j in range(GROUP):
                q = x[j, lane] / unit if unit > np.float32(0) else np.float32(0)
                q = top if q > top else q
                q = -top if q < -top else q
                level = np.float64((q + ROUNDER) - ROUNDER)
                product += np.float64(h[j, lane]) * level * np.float64(x[j, lane])
                square += np.float64(h[j, lane]) * level * level
            codes[first + lane] = code[lane]
            sums[first + lane, 0], sums[first + lane, 1] = product, square


class BestSearch:
    """`search_reference`, compiled. run: how to call a function for all chunks, see `numba_encode.encode`"""

    def __init__(self, run: Run = map) -> None:
        self._search, self._run = _search.ready, run

    def __call__(
        self, groups: np.ndarray, importance: np.ndarray, units: np.ndarray, depth: int
    ) -> tuple[np.ndarray, np.ndarray]:
        codes, sums = np.empty(len(groups), np.uint8), np.empty((len(groups), 2))
        top, step = np.float32(max_level(depth)), CHUNK // GROUP // len(importance) * len(importance)

        def find(chunk: tuple[int, int]) -> None:
            rows = slice(*chunk)
            self._search(groups[rows], importance, units, top, codes[rows], sums[rows])

        for _ in self._run(find, [(start, start + step) for start in range(0, len(groups), step)]):
            pass
        return codes, sums


def encode_best(w: np.ndarray | Rows, depths: Sequence[int], dtype: str = "float32", run: Run = map) -> Encoded:
    """Quantise a matrix at several depths, each as `encode_best_reference` byte for byte.

    w: (out, in) float16 or float32, read three times in chunks of rows; run, returns, raises: as `encode`
    """
    whole, part = BestSearch(run), BestSearch()
    sample, largest = sample_groups(w)
    even = np.ones((1, GROUP), np.float32)
    units = {depth: fit_units(sample, even, largest, depth, whole) for depth in depths}

    def choose(values: np.ndarray, start: int, depth: int) -> np.ndarray:
        codes, _ = part(grouped(values, 0, len(values)), even, units[depth], depth)
        return codes.reshape(len(values), -1)

    return pack_nearest(w, units, choose, dtype, run)
