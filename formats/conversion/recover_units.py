"""The search for the units of a matrix of dequantised trits: tables over its distinct magnitudes.

Magnitudes are the bits of |value| in the source's dtype; units are handled as the int32 bits of positive
float32 numbers, which order as the numbers do, so that intervals of units are exact and closed.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..codecs.base import from_bf16, to_bf16
from ..codecs.trit import ENTRIES, max_level

LARGEST = 0x7F7FFFFF  # bits of the largest float32
INFINITY = {"float16": 0x7C00, "bfloat16": 0x7F80, "float32": 0x7F800000}
BATCH = 64  # candidate units judged at a time: one bit each


def round_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """Bits of float32 values rounded to dtype (to nearest, ties to even): uint16, or uint32 for float32."""
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).view(np.uint16)
    return to_bf16(x) if dtype == "bfloat16" else np.ascontiguousarray(x, np.float32).view(np.uint32)


def to_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values of raw bits in dtype."""
    if dtype == "float16":
        return np.ascontiguousarray(bits, np.uint16).view(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        return from_bf16(bits)
    return np.ascontiguousarray(bits, np.uint32).view(np.float32)


class Magnitudes:
    """The finite nonzero magnitudes of a matrix: id 0 is zero, 1..count ascend, count + 1 is any other."""

    def __init__(self, bits: np.ndarray, weights: np.ndarray, total: int, dtype: str) -> None:
        """bits: (count,) uint32, ascending; weights: (count,) int64, how often each occurs

        total: the number of nonzero values, others included"""
        self.bits, self.weights, self.total, self.dtype = bits, weights, total, dtype
        self.count = len(bits)
        self._table: np.ndarray | None = None
        if dtype != "float32":
            self._table = np.full(1 << 15, self.count + 1, np.uint16)
            self._table[0] = 0
            self._table[bits] = np.arange(1, self.count + 1)

    @classmethod
    def of(cls, chunks: Iterable[np.ndarray], dtype: str) -> Magnitudes:
        """Collect the magnitudes of chunks of raw bits (uint16 or uint32)."""
        counts = np.zeros(1 << 15, np.int64)
        seen: tuple[np.ndarray, np.ndarray] = (np.zeros(0, np.uint32), np.zeros(0, np.int64))
        total = 0
        for chunk in chunks:
            total += chunk.size
            if dtype != "float32":
                counts += np.bincount((chunk & np.uint16(0x7FFF)).ravel(), minlength=1 << 15)
            elif len(seen[0]) < 60000:  # more are never of the form: stop collecting, the rest counts as rare
                bits, weights = np.unique(chunk & np.uint32(0x7FFFFFFF), return_counts=True)
                bits, inverse = np.unique(np.concatenate([seen[0], bits]), return_inverse=True)
                merged = np.zeros(len(bits), np.int64)
                np.add.at(merged, inverse, np.concatenate([seen[1], weights]))
                seen = bits, merged
        if dtype != "float32":
            present = np.flatnonzero(counts)
            seen = present.astype(np.uint32), counts[present]
        finite = (seen[0] > 0) & (seen[0] < INFINITY[dtype])
        zeros = int(seen[1][seen[0] == 0].sum())
        return cls(seen[0][finite][:65000], seen[1][finite][:65000], total - zeros, dtype)

    def lookup(self, bits: np.ndarray) -> np.ndarray:
        """Ids of raw bits of any shape, the sign ignored: uint16."""
        if self._table is not None:
            return self._table[bits & np.uint16(0x7FFF)]
        bits = bits & np.uint32(0x7FFFFFFF)
        place = np.searchsorted(self.bits, bits)
        hit = place < self.count
        hit[hit] = self.bits[place[hit]] == bits[hit]
        return np.where(bits == 0, 0, np.where(hit, place + 1, self.count + 1)).astype(np.uint16)

    def frequent(self, limit: int) -> np.ndarray:
        """Bits of the `limit` most frequent magnitudes, ascending."""
        return np.sort(self.bits[np.argsort(-self.weights, kind="stable")[:limit]])

    def rare(self, limit: int) -> int:
        """How many nonzero values lie outside the `limit` most frequent magnitudes."""
        return self.total - int(np.sort(self.weights)[::-1][:limit].sum())


class UnitSearch:
    """Choose at most 27 units of one depth that explain groups of magnitude ids."""

    def __init__(self, magnitudes: Magnitudes, depth: int) -> None:
        self.magnitudes, self.depth = magnitudes, depth
        self.top = max_level(depth)
        low, high = self._intervals(magnitudes.frequent(ENTRIES * self.top))
        self._breaks = np.unique(np.concatenate([low.ravel(), high.ravel() + 1]))

    def _intervals(self, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last unit (float32 bits) that rounds to a magnitude at a level.

        bits: (n,) uint32 magnitudes; returns two (n, L) int64, empty intervals have first > last"""
        dtype = self.magnitudes.dtype
        kind = np.uint32 if dtype == "float32" else np.uint16
        below, middle, above = (
            to_float32((bits.astype(np.int64) + i).astype(kind), dtype).astype(np.float64) for i in (-1, 0, 1)
        )
        above = np.where(np.isfinite(above), above, 2 * middle - below)
        level = np.arange(1, self.top + 1)
        offsets = np.arange(-3, 4)[:, None, None]  # a guess is within an ulp or two
        ends = []
        for bound, strict in ((below, False), (above, True)):
            guess = ((bound + middle) / 2)[:, None] / level
            near = guess.astype(np.float32).view(np.int32).astype(np.int64) + offsets
            near = np.clip(near, 1, LARGEST)
            got = self._products(near, level)
            short = got <= bits[:, None] if strict else got < bits[:, None]
            ends.append(near[0] + short.sum(axis=0))
        return ends[0], ends[1] - 1

    def _products(self, points: np.ndarray, level: np.ndarray) -> np.ndarray:
        """Magnitude bits of level * unit, for units given as float32 bits."""
        units = points.astype(np.int32).view(np.float32)
        with np.errstate(over="ignore"):
            return round_bits(units * level.astype(np.float32), self.magnitudes.dtype)

    def rows(self, points: np.ndarray) -> np.ndarray:
        """points: (p,) units; returns (p, L) uint16, the magnitude ids of levels 1..L."""
        return self.magnitudes.lookup(self._products(points[:, None], np.arange(1, self.top + 1)))

    def levels(self, points: np.ndarray) -> np.ndarray:
        """Level of every magnitude id under every unit, the smallest if several.

        points: (p,) units; returns (max(p, 1), count + 2) int8, 0 where there is none"""
        table = np.zeros((max(len(points), 1), self.magnitudes.count + 2), np.int8)
        rows = self.rows(points)
        for level in range(self.top, 0, -1):
            table[np.arange(len(points)), rows[:, level - 1]] = level
        table[:, 0] = 0
        return table

    def _bits(self, rows: np.ndarray, kind: type[np.unsignedinteger]) -> np.ndarray:
        """Per magnitude id the mask of the rows that hold it: (count + 2,)."""
        mask = np.zeros(self.magnitudes.count + 2, kind)
        for k, row in enumerate(rows):
            mask[row] |= kind(1 << k)
        mask[0] = np.iinfo(kind).max
        mask[-1] = 0
        return mask

    def cover(self, ids: np.ndarray, points: np.ndarray) -> np.ndarray:
        """Mask of the units that explain each group, every bit for an all-zero one.

        ids: (n, 16); returns (n,) uint32"""
        return np.bitwise_and.reduce(self._bits(self.rows(points), np.uint32)[ids], axis=1)

    def _segments(self, seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The segments of units (first and last) that explain one group.

        seed: (16,) ids"""
        present = np.unique(seed[seed > 0])
        if present[-1] > self.magnitudes.count:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        low, high = self._intervals(self.magnitudes.bits[present - 1])
        pieces = [np.concatenate([low.ravel(), high.ravel() + 1])]
        ends = [(a, b) for a, b in zip(low[-1], high[-1], strict=True) if a <= b]  # of the largest magnitude
        for first, last in ends:
            pieces.append(self._breaks[slice(*np.searchsorted(self._breaks, (first, last + 1)))])
        breaks = np.unique(np.concatenate(pieces))
        inside = np.zeros(len(breaks), bool)
        for first, last in ends:
            inside |= (breaks >= first) & (breaks <= last)
        starts = breaks[inside]
        if not len(starts):
            return starts, starts
        stops = breaks[np.flatnonzero(inside) + 1] - 1
        rows = self.rows(starts)
        fits = np.ones(len(starts), bool)
        for one in present:
            fits &= (rows == one).any(axis=1)
        return starts[fits], stops[fits]

    def fits(self, group: np.ndarray) -> bool:
        """Whether any unit at all explains a group of (16,) ids."""
        return not group.any() or len(self._segments(group)[0]) > 0

    def choose(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, bool]:
        """Greedy cover of a sample of groups.

        groups: (n, 16) ids
        Returns ascending units as (k,) float32 bits, a (n,) mask of groups that no unit at all explains, and
        whether those were so many that the search was given up."""
        columns = np.ascontiguousarray(groups.T)
        ordered = np.sort(groups, axis=1)
        distinct = (np.diff(ordered, axis=1) != 0).sum(axis=1) + (ordered[:, 0] > 0)
        todo: np.ndarray = np.asarray(groups.any(axis=1))
        hopeless = np.zeros(len(groups), bool)
        chosen: list[int] = []
        patience = max(BATCH, len(groups) // 16)
        for seed in np.argsort(-distinct, kind="stable"):
            if len(chosen) == BATCH or patience == 0:
                break
            if not todo[seed]:
                continue
            point = self._best(groups[seed], columns, todo)
            if point is None:
                hopeless[seed], todo[seed] = True, False
                patience -= 1
                continue
            chosen.append(point)
            todo &= ~self._explained(columns, np.array([point]))[0]
        return self._pruned(np.array(sorted(chosen), np.int64), columns), hopeless, patience == 0

    def _explained(self, columns: np.ndarray, points: np.ndarray) -> np.ndarray:
        """columns: (16, n) ids; points: (p <= 64,); returns (p, n) bool, which unit explains which group."""
        mask = self._bits(self.rows(points), np.uint64)
        got = mask[columns[0]]
        for column in columns[1:]:
            got &= mask[column]
        return np.stack([(got >> np.uint64(k)) & np.uint64(1) != 0 for k in range(len(points))])

    def _best(self, seed: np.ndarray, columns: np.ndarray, todo: np.ndarray) -> int | None:
        """The unit for one group that explains most groups: of those still open, then of all."""
        starts, stops = self._segments(seed)
        if not len(starts):
            return None
        points = starts + (stops - starts) // 2
        scores = np.zeros((5, len(points)), np.int64)
        for at in range(0, len(points), BATCH):
            part = slice(at, at + BATCH)
            explained = self._explained(columns, points[part])
            scores[4, part] = (explained & todo).sum(axis=1)
            scores[3, part] = explained.sum(axis=1)
        rows = self.rows(points)
        scores[2] = (rows <= self.magnitudes.count).sum(axis=1)  # a real unit shows all its levels somewhere
        scores[1] = stops - starts
        scores[0] = points
        return int(points[np.lexsort(scores)[-1]])

    def _pruned(self, points: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Drop units that the others make redundant, then the least useful until 27 are left."""
        if not len(points):
            return points
        explained = self._explained(columns, points)[:, columns.any(axis=0)]
        keep = np.ones(len(points), bool)
        while keep.any():
            alone = explained[keep] & (explained[keep].sum(axis=0) == 1)
            need = alone.sum(axis=1)
            least = int(np.argmin(need))
            if need[least] > 0 and keep.sum() <= ENTRIES:
                break
            keep[np.flatnonzero(keep)[least]] = False
        return points[keep]
