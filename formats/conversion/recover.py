"""Find the trits in a matrix of dequantised values, so that it can be packed with nothing lost.

A released trit checkpoint holds `cast(float32(q) * unit, dtype)`: q in -L..L, L = (3**depth - 1) / 2, one of
at most 27 units for each group of 16 inputs. Depth, units and q are not stored; they follow from the values.

A matrix has few distinct magnitudes (at most 27 L), so the work is done on tables. For a magnitude and a
level the units that round to it form an interval of float32 numbers; the ends of all intervals cut the axis
of units into segments in which every unit behaves alike. Units are chosen greedily on a sample: the
segment that explains most groups wins. Then every group of the matrix is looked up (one bit per unit and
magnitude, AND over the group), groups that fit no unit join the sample, and the choice is made again. At the
end everything is dequantised and compared with the source bit for bit; what does not fit is an exception.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..codecs.base import DTYPES
from ..codecs.trit import ENTRIES, GROUP, UNITS, max_level
from .recover_units import Magnitudes, UnitSearch, round_bits, to_float32

MAX_EXCEPTIONS = 0.01  # of the groups; above it a matrix is "not of that form"
PROBES = 32  # groups that must mostly fit some unit before a depth is tried
POOL = 8192  # groups the units are chosen on, and how many that did not fit may join in each round
GROWTH = 1024
ROUNDS = 8
CHUNK = 1 << 16  # groups, and ROWS rows, handled at a time: bounds the temporary memory
ROWS = 256


@dataclass(frozen=True, eq=False)
class Recovery:
    """Trits, units and scale codes that give the source values back.

    units: (32,) float32, ascending, unused entries 0 at the end
    levels: (out, in) int8 in -L..L
    scale_codes: (out, groups) uint8, groups = ceil(in / 16); all-zero groups and exceptions have code 0
    exceptions: (k,) int64, ascending indices of flattened groups that do not fit (their levels are 0)
    exception_bits: (k, 16) uint16 or uint32, the source's raw bits, a short last group filled with 0
    negative_zeros: how many source values are -0.0 outside the exceptions; here they come back as +0.0, and whoever
        packs the matrix adds their signs (recovered.py)
    """

    depth: int
    dtype: str
    units: np.ndarray
    levels: np.ndarray
    scale_codes: np.ndarray
    exceptions: np.ndarray
    exception_bits: np.ndarray
    negative_zeros: int

    def dequantize(self) -> np.ndarray:
        """The source values, exceptions included, as (out, in) float32."""
        columns = self.levels.shape[1]
        values = np.empty(self.levels.shape, np.float32)
        for start in range(0, len(values), ROWS):
            part = slice(start, start + ROWS)
            unit = self.units[self.scale_codes[part]].repeat(GROUP, axis=1)[:, :columns]
            product = self.levels[part].astype(np.float32) * unit
            values[part] = to_float32(round_bits(product, self.dtype), self.dtype)
        for index, bits in zip(self.exceptions, to_float32(self.exception_bits, self.dtype), strict=True):
            row, group = divmod(int(index), self.scale_codes.shape[1])
            place = values[row, group * GROUP : (group + 1) * GROUP]
            place[:] = bits[: len(place)]
        return values


@dataclass(frozen=True)
class Refusal:
    """Why a matrix is not of the recoverable form."""

    reason: str


def recover(
    values: np.ndarray, dtype: str | None = None, max_exceptions: float = MAX_EXCEPTIONS
) -> Recovery | Refusal:
    """Recover trits from dequantised values, or say why they are not of that form.

    The smallest depth with at most `max_exceptions` of the groups left over wins. The result depends on the
    values alone: a group takes the largest unit that reproduces it, a magnitude the smallest level.

    values: (out, in) float16 or float32
    dtype: "float16", "bfloat16" or "float32", the grid the values were rounded to; default: that of the array
    Raises ValueError for another dtype, or if the array is not two-dimensional."""
    if values.ndim != 2:
        raise ValueError(f"expected a matrix (out, in), found shape {values.shape}")
    dtype = dtype or values.dtype.name
    if reason := _hopeless(values, dtype):
        return Refusal(f"not of that form: {reason}")
    groups = _grouped_bits(values, dtype)
    if groups is None:
        return Refusal(f"not of that form: the values are not all on the {dtype} grid")
    magnitudes = Magnitudes.of(_chunks(groups), dtype)
    ids = np.empty(groups.shape, np.uint16)
    for start in range(0, len(groups), CHUNK):
        ids[start : start + CHUNK] = magnitudes.lookup(groups[start : start + CHUNK])
    reasons = []
    for depth in (1, 2, 3, 4):
        found = _units(ids, magnitudes, depth, max_exceptions)
        if isinstance(found, str):
            reasons.append(f"depth {depth}: {found}")
            continue
        return _encode(groups, ids, *found, values.shape, dtype)
    return Refusal("not of that form: " + "; ".join(reasons))


def _hopeless(values: np.ndarray, dtype: str) -> str | None:
    """Look at a few rows, so that an ordinary matrix is refused in no time."""
    few = _grouped_bits(values[:: max(len(values) // PROBES, 1)][:PROBES], dtype)
    if few is None:
        return f"the values are not all on the {dtype} grid"
    few = few[_spread(len(few), POOL)]
    magnitudes = Magnitudes.of([few], dtype)
    limit = ENTRIES * max_level(4)
    if magnitudes.rare(limit) > 0.05 * few.size:
        seen = f"{magnitudes.count} distinct magnitudes in a sample of {len(few)} groups"
        return f"{seen}, at most {limit} possible"
    return _probe(UnitSearch(magnitudes, 4), magnitudes.lookup(few))  # depth 4 can do what the others can


def _probe(search: UnitSearch, ids: np.ndarray) -> str | None:
    """Say so if most of a few groups fit no unit whatever. ids: (groups, 16) uint16"""
    probes = ids[_spread(len(ids), PROBES)]
    feasible = sum(search.fits(group) for group in probes)
    if 2 * feasible < len(probes):
        return f"no unit fits {len(probes) - feasible} of {len(probes)} sampled groups"
    return None


def _grouped_bits(values: np.ndarray, dtype: str) -> np.ndarray | None:
    """Raw bits of the values as (groups, 16) uint16 or uint32; None if some are not on the grid of dtype."""
    wide = values.dtype.name == "float32" and dtype in DTYPES
    if not wide and (values.dtype.name, dtype) != ("float16", "float16"):
        raise ValueError(f"cannot recover {dtype} values from a {values.dtype} array")
    rows, columns = values.shape
    width = -(-columns // GROUP) * GROUP
    kind = np.uint32 if dtype == "float32" else np.uint16
    if values.dtype.name == dtype and width == columns:
        return np.ascontiguousarray(values).view(kind).reshape(-1, GROUP)
    bits = np.zeros((rows, width), kind)
    for start in range(0, rows, ROWS):
        part = np.ascontiguousarray(values[start : start + ROWS])
        out = bits[start : start + ROWS, :columns]
        if part.dtype.name == dtype:
            out[:] = part.view(kind)
            continue
        out[:] = round_bits(part, dtype)
        if not np.array_equal(to_float32(out, dtype).view(np.uint32), part.view(np.uint32)):
            return None
    return bits.reshape(-1, GROUP)


def _spread(n: int, count: int) -> np.ndarray:
    """At most `count` of the indices 0..n-1, ascending, without a period that could follow the columns."""
    if n <= count:
        return np.arange(n)
    steps = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(32)
    return np.unique((steps * np.uint64(n)) >> np.uint64(32)).astype(np.int64)


def _chunks(groups: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(groups), CHUNK):
        yield groups[start : start + CHUNK]


def _units(
    ids: np.ndarray, magnitudes: Magnitudes, depth: int, max_exceptions: float
) -> tuple[UnitSearch, np.ndarray, np.ndarray] | str:
    """Choose the units of one depth: the search, the units as float32 bits, one bit mask of units per group.

    ids: (groups, 16) uint16 magnitude ids"""
    limit = ENTRIES * max_level(depth)
    rare = magnitudes.rare(limit)
    if rare > max_exceptions * ids.size:
        return f"{magnitudes.count} distinct magnitudes, at most {limit} possible"
    search = UnitSearch(magnitudes, depth)
    if reason := _probe(search, ids):
        return reason
    pool = _spread(len(ids), POOL)
    masks = np.zeros(len(ids), np.uint32)
    unfit = np.zeros(len(ids), bool)
    for turn in range(ROUNDS):
        points, hopeless, gave_up = search.choose(ids[pool])
        if gave_up and turn == 0:
            return f"no unit fits {hopeless.sum()} or more of {len(pool)} sampled groups"
        unfit[pool[hopeless]] = True
        for start in range(0, len(ids), CHUNK):
            masks[start : start + CHUNK] = search.cover(ids[start : start + CHUNK], points)
        left = np.flatnonzero(masks == 0)
        fresh = np.setdiff1d(left[~unfit[left]], pool, assume_unique=True)
        if not len(fresh):
            break
        pool = np.union1d(pool[~hopeless], fresh[_spread(len(fresh), GROWTH)])
    if len(left) > max_exceptions * len(ids):
        return f"{len(left)} of {len(ids)} groups fit none of {len(points)} units"
    return search, points, masks


def _codes(ids: np.ndarray, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale codes, the largest unit of each mask, as (groups,) uint8, and the units they use, (k,) int64."""
    empty = (masks == 0) | ~ids.any(axis=1)
    highest = np.frexp(np.where(empty, 1, masks).astype(np.float64))[1] - 1
    used = np.unique(highest[~empty])
    compact = np.zeros(ENTRIES, np.uint8)
    compact[used] = np.arange(len(used))
    return np.where(empty, 0, compact[highest]).astype(np.uint8), used


def _encode(
    groups: np.ndarray,
    ids: np.ndarray,
    search: UnitSearch,
    points: np.ndarray,
    masks: np.ndarray,
    shape: tuple[int, int],
    dtype: str,
) -> Recovery | Refusal:
    """Look up codes and levels of every group and prove them against the source.

    groups: (groups, 16) raw bits; ids: (groups, 16) uint16
    points: (k,) int64, ascending; masks: (groups,) uint32"""
    exceptions = np.flatnonzero(masks == 0)
    codes, used = _codes(ids, masks)
    units = np.zeros(UNITS, np.float32)
    units[: len(used)] = points[used].astype(np.int32).view(np.float32)
    table = search.levels(points[used])
    levels = np.zeros(ids.shape, np.int8)
    sign = groups.dtype.type(1 << (8 * groups.dtype.itemsize - 1))
    negative_zeros = 0
    keep = masks != 0
    for start in range(0, len(groups), CHUNK):
        part = slice(start, start + CHUNK)
        source = groups[part]
        q = table.reshape(-1)[codes[part, None] * np.int32(table.shape[1]) + ids[part]]
        q = np.where(source >= sign, -q, q)
        q[~keep[part]] = 0
        got = round_bits(q.astype(np.float32) * units[codes[part]][:, None], dtype)
        differ = (got != source) & keep[part, None]
        lost = differ & (source == sign) & (got == 0)
        if (differ != lost).any():
            return Refusal(f"recovery at depth {search.depth} did not return the values: please report it")
        negative_zeros += int(np.count_nonzero(lost))
        levels[part] = q
    rows, columns = shape
    per_row = -(-columns // GROUP)
    levels = np.ascontiguousarray(levels.reshape(rows, per_row * GROUP)[:, :columns])
    codes = codes.reshape(rows, per_row)
    raw = groups[exceptions]
    return Recovery(search.depth, dtype, units, levels, codes, exceptions, raw, negative_zeros)
