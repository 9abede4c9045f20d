"""The encoder "best": units fitted to each matrix, and for every group the one of all 27 with the least error.

tritllm v2 spaces its units evenly in the logarithm and tries four scales for a group. Here the units are free: they
start log-spaced and are then fitted to the weights by alternating least squares (Lloyd, 1982: choose the best unit for
every group, then the best value for every unit). The file format and whatever reads it stay as they are.

The largest unit always carries the largest weight of the matrix to the top level, so that none is cut off: a few very
large weights decide what some models do, and a fit that clips them has the smaller error and the far worse model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from .base import Rows, check_fits, finite_rows, row_chunks
from .trit import ENTRIES, GROUP, UNITS, grouped, max_level, pack, round_levels
from .trit_codec import Encoded

ROUNDS = 8
SAMPLE = 1 << 18  # groups of a matrix that its units are fitted to
LOW = 0.003  # share of the groups that are smaller than what the first of the log-spaced units is made for


class Search(Protocol):
    """Finds the best unit of every group; `search_reference` defines what it gives."""

    def __call__(
        self, groups: np.ndarray, importance: np.ndarray, units: np.ndarray, depth: int
    ) -> tuple[np.ndarray, np.ndarray]: ...


def search_reference(
    groups: np.ndarray, importance: np.ndarray, units: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find for every group the unit with the least weighted squared error, the first of equals.

    Errors are summed in units of the unit, in float32 and in order, so that the result does not depend on the machine.

    groups: (n, 16) float32; importance: (m, 16) float32, of group i the row i mod m
    units: (27,) float32, those that are 0 are not taken
    returns: codes (n,) uint8; sums (n, 2) float64: of w * level and of level^2, weighted, for the fit of the units
    """
    x, h = np.ascontiguousarray(groups.T), importance[np.arange(len(groups)) % len(importance)].T
    best, codes = np.full(len(groups), np.inf), np.zeros(len(groups), np.uint8)
    top = np.float32(max_level(depth))
    with np.errstate(over="ignore"):
        for k, unit in enumerate(units[:ENTRIES]):
            if unit <= 0:
                continue
            error = np.zeros(len(groups), np.float32)
            for values, weight in zip(x, h, strict=True):
                y = values / unit
                rest = y - np.rint(np.clip(y, -top, top))
                error += rest * rest * weight
            square = error.astype(np.float64) * np.float64(unit) * np.float64(unit)
            better = square < best
            best[better], codes[better] = square[better], k
    q = round_levels(x, units[codes], depth).astype(np.float64)
    sums = np.zeros((len(groups), 2))
    for values, level, weight in zip(x, q, h, strict=True):
        sums[:, 0] += weight * level * values
        sums[:, 1] += weight * level * level
    return codes, sums


def fit_units(
    groups: np.ndarray, importance: np.ndarray, largest: float, depth: int, search: Search = search_reference
) -> np.ndarray:
    """Fit the units of a matrix to a sample of its groups.

    groups: (n, 16) float32; importance: (m, 16) float32, see `search_reference`; largest: of all |w| of the matrix
    returns: (32,) float32, ascending up to the 27th
    """
    units = np.zeros(UNITS, np.float32)
    sizes = np.abs(groups).max(axis=1)
    sizes = np.sort(sizes[sizes > 0])
    if not sizes.size:
        return units
    last = np.float32(largest) / np.float32(max_level(depth))
    low = math.log(float(sizes[int(LOW * sizes.size)]) / max_level(depth))
    step = (math.log(float(last)) - low) / (ENTRIES - 1) if last > 0 else 0.0
    found = np.array([math.exp(low + k * step) for k in range(ENTRIES)], np.float32)
    for _ in range(ROUNDS):
        found[-1] = max(found[-1], last)
        codes, sums = search(groups, importance, found, depth)
        product, square = (np.bincount(codes, values, ENTRIES) for values in sums.T)
        found = np.sort(np.divide(product, square, out=found.astype(np.float64), where=square > 0).astype(np.float32))
    units[:ENTRIES] = found
    units[ENTRIES - 1] = max(found[-1], last)
    return units


def sample_groups(w: np.ndarray | Rows) -> tuple[np.ndarray, float]:
    """Read the groups of evenly spaced rows, and the largest |w| of all.

    returns: (n, 16) float32, about SAMPLE of them or all
    Raises ValueError if a value is NaN or infinite.
    """
    largest = max(float(np.abs(finite_rows(w, a, b)).max()) for a, b in row_chunks(w.shape))
    few = min(w.shape[0], max(SAMPLE * GROUP // w.shape[1], 1))
    if few == w.shape[0]:
        return grouped(w, 0, few), largest
    rows = np.linspace(0, w.shape[0] - 1, few).astype(int)
    return np.concatenate([grouped(w, row, row + 1) for row in rows]), largest


def encode_best_reference(w: np.ndarray | Rows, depths: Sequence[int], dtype: str = "float32") -> Encoded:
    """Quantise a matrix at several depths with fitted units: the definition, slow.

    w: (out, in) floating point; returns: as `formats.codecs.trit_codec.Encode`
    Raises ValueError if a value is NaN or infinite, or the largest unit does not fit the dtype.
    """
    sample, largest = sample_groups(w)
    even = np.ones((1, GROUP), np.float32)
    columns = -(-w.shape[1] // GROUP)
    found: Encoded = {}
    for depth in depths:
        units = fit_units(sample, even, largest, depth)
        check_fits(units.max() * np.float32(max_level(depth)), dtype, f"trit{depth}")
        levels, codes = np.empty(w.shape, np.int8), np.empty((w.shape[0], columns), np.uint8)
        for start, stop in row_chunks(w.shape):
            groups = grouped(w, start, stop)
            code, _ = search_reference(groups, even, units, depth)
            q = round_levels(groups, units[code][:, None], depth).reshape(stop - start, -1)
            levels[start:stop], codes[start:stop] = q[:, : w.shape[1]], code.reshape(-1, columns)
        found[depth] = {"dtype": dtype}, {"units": units, "blocks": pack(levels, codes, depth)}
    return found
