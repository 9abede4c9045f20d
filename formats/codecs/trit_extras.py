"""What a trit matrix may carry besides its trits, so that packing released values loses nothing.

Exceptions are groups of 16 whose values no unit gives: they are stored as they are, in the matrix's dtype. Signs tell
which of the weights of level 0 are -0.0. Both are absent from matrices that were quantised here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .base import Layout, Params, Parts, Shape, all_finite, from_bf16
from .trit import GROUP

EXCEPTIONS, SIGNS = "exceptions", "sign_bytes"
STORED: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2"), "bfloat16": np.dtype("<u2")}
U8 = np.dtype("<u8")


def split_params(params: Params) -> tuple[dict[str, Any], dict[str, int]]:
    """Part the parameters of every trit matrix from those of extras: (those, {"exceptions", "sign_bytes"} if any)."""
    rest = {key: value for key, value in params.items() if key not in (EXCEPTIONS, SIGNS)}
    return rest, {key: params[key] for key in (EXCEPTIONS, SIGNS) if key in params}


def extra_parts(shape: Shape, dtype: str, extras: Mapping[str, int]) -> Layout:
    """Give dtype and shape of the parts that follow the blocks.

    Raises ValueError if there are more exceptions than groups, or more signs than weights.
    """
    groups = math.prod(shape[:-1]) * -(-shape[-1] // GROUP)
    limits = {EXCEPTIONS: groups, SIGNS: math.prod(shape[:-1]) * -(-shape[-1] // 8)}
    for key, value in extras.items():
        if type(value) is not int or not 1 <= value <= limits[key]:
            raise ValueError(f"parameter {key} is {value!r:.80}; expected an integer from 1 to {limits[key]}")
    layout: Layout = {}
    if count := extras.get(EXCEPTIONS):
        layout |= {"exception_groups": (U8, (count,)), "exception_values": (STORED[dtype], (count, GROUP))}
    if nbytes := extras.get(SIGNS):
        layout |= {"sign_starts": (U8, (shape[0],)), "signs": (np.dtype("u1"), (nbytes,))}
    return layout


# ---- exceptions -----------------------------------------------------------------------------------------


def widen(values: np.ndarray) -> np.ndarray:
    """Widen stored values to float32; uint16 are the bits of bfloat16."""
    return from_bf16(values) if values.dtype.kind == "u" else values.astype(np.float32)


def exception_weights(parts: Parts, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the exceptions as weights of a product: their packed levels are 0, so these only have to be added.

    returns: rows (k,) int64, first inputs (k,) int64, values (k, 16) float32, zero beyond the last input
    Raises ValueError if the groups are not ascending ones of the matrix.
    """
    groups, per_row = parts["exception_groups"], -(-shape[1] // GROUP)
    if not _ascending(groups, shape[0] * per_row):
        raise ValueError("exception_groups are not ascending groups of the matrix")
    rows, columns = np.divmod(groups.astype(np.int64), per_row)
    values = widen(parts["exception_values"])
    beyond = columns[:, None] * GROUP + np.arange(GROUP) >= shape[1]
    return rows, columns * GROUP, np.where(beyond, np.float32(0), values)


def put_exceptions(values: np.ndarray, parts: Parts, shape: Shape, ids: np.ndarray) -> None:
    """Overwrite the exceptions among some rows. values: (n, in) float32, those of the rows `ids`"""
    groups, per_row = parts["exception_groups"], -(-shape[1] // GROUP)
    first = np.searchsorted(groups, ids.astype(np.uint64) * np.uint64(per_row))
    last = np.searchsorted(groups, (ids.astype(np.uint64) + np.uint64(1)) * np.uint64(per_row))
    for i in np.flatnonzero(last > first):
        for k in range(first[i], last[i]):
            at = int(groups[k]) % per_row * GROUP
            place = values[i, at : at + GROUP]
            place[:] = widen(parts["exception_values"][k])[: len(place)]


# ---- signs of zeros -------------------------------------------------------------------------------------


def pack_signs(zeros: Iterator[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Pack the signs of the weights of level 0: one bit for each, every row beginning a new byte.

    zeros: in order, blocks of rows: whether a weight is of level 0, whether it is negative, both (n, in) bool
    """
    starts, packed, end = [], [], 0
    for zero, negative in zeros:
        for row in range(len(zero)):
            starts.append(end)
            packed.append(np.packbits(negative[row, zero[row]], bitorder="little"))
            end += len(packed[-1])
    return {"sign_starts": np.array(starts, U8), "signs": np.concatenate(packed)}


def put_signs(values: np.ndarray, levels: np.ndarray, parts: Parts, ids: np.ndarray) -> None:
    """Make zeros negative where a row's signs say so. values, levels: (n, in), those of the rows `ids`"""
    zero = levels == 0
    rank = np.cumsum(zero, axis=1, dtype=np.int64) - 1
    rows, columns = np.nonzero(zero)
    bit = rank[rows, columns]
    signs = parts["signs"]
    at = np.minimum(parts["sign_starts"][ids][rows] + (bit // 8).astype(np.uint64), np.uint64(len(signs) - 1))
    negative = signs[at] >> (bit % 8).astype(np.uint8) & 1 != 0
    values[rows[negative], columns[negative]] = np.float32(-0.0)


def extra_problems(parts: Parts, shape: Shape) -> Iterator[str]:
    """Name what no writer puts into these parts."""
    if "exception_groups" in parts:
        if not _ascending(parts["exception_groups"], shape[0] * -(-shape[1] // GROUP)):
            yield "exception_groups are not ascending groups of the matrix"
        if not all_finite(widen(parts["exception_values"])):
            yield "exception_values holds NaN or infinity"
    if "signs" in parts:
        starts = parts["sign_starts"]
        if (np.diff(starts.astype(np.int64)) < 0).any() or starts[0] != 0 or starts[-1] > len(parts["signs"]):
            yield "sign_starts do not ascend from 0 to the length of signs"


def _ascending(groups: np.ndarray, limit: int) -> bool:
    return bool((groups[1:] > groups[:-1]).all() and groups[-1] < limit)
