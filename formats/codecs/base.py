"""What every codec shares: interface, strict parameter checks, chunks of rows, rounding to half types."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Shape = tuple[int, ...]
Params = Mapping[str, Any]
Parts = Mapping[str, np.ndarray]
Layout = dict[str, tuple[np.dtype, Shape]]

DTYPES = ("float32", "float16", "bfloat16")
# Elements worked on at a time: temporaries of a few megabytes, whatever the matrix.
CHUNK = 1 << 18
LARGEST = 65536.0  # no value is larger: products and sums of a whole model then stay within float32


@dataclass(frozen=True)
class Rows:
    """A matrix that is read as it is sliced, so that it is never whole in memory: quantisers take it like an array.

    read: called with (start, stop), gives these rows
    """

    shape: Shape
    read: Callable[[int, int], np.ndarray]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(self.shape[0])
        return self.read(start, stop)


@dataclass(frozen=True)
class Streamed:
    """A part that is made as it is written. blocks: gives it in order, in arrays of the dtype."""

    dtype: np.dtype
    shape: Shape
    blocks: Callable[[], Iterator[np.ndarray]]


class Codec(ABC):
    """How the values of one tensor are laid out as named arrays ("parts")."""

    name: str
    ndims: tuple[int, ...] = (2,)

    @abstractmethod
    def parts(self, shape: Shape, params: Params) -> Layout:
        """Give the dtype and shape of every part, in payload order.

        Raises ValueError if the shape or the parameters are not this codec's.
        """

    @abstractmethod
    def quantize(self, w: np.ndarray | Rows, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Turn values into (params, parts).

        w: (out, in) or (n,) floating point, read in blocks of rows, perhaps more than once
        Raises ValueError if a value is NaN or infinite, or does not fit.
        """

    @abstractmethod
    def dequantize_rows(self, parts: Parts, shape: Shape, params: Params, ids: np.ndarray) -> np.ndarray:
        """Give the rows `ids` of a matrix without expanding the rest.

        ids: (n,) integer
        returns: (n, in) float32
        """

    def dequantize(self, parts: Parts, shape: Shape, params: Params) -> np.ndarray:
        """Give all values: float32 of `shape`."""
        out = np.empty(shape, np.float32)
        for start, stop in row_chunks(shape):
            out[start:stop] = self.dequantize_range(parts, shape, params, start, stop)
        return out

    def dequantize_range(self, parts: Parts, shape: Shape, params: Params, start: int, stop: int) -> np.ndarray:
        """Give the rows start..stop: (stop - start, ...) float32."""
        return self.dequantize_rows(parts, shape, params, np.arange(start, stop))

    def problems(self, parts: Parts, shape: Shape, params: Params) -> Iterator[str]:
        """Name the values in the parts that no writer puts there; the default looks for NaN and infinity."""
        for key, part in parts.items():
            if part.dtype.kind == "f" and not all_finite(part):
                yield f"{key} holds NaN or infinity"

    def largest(self, parts: Parts, shape: Shape, params: Params) -> float:
        """Bound the magnitude of all values by the few numbers that they share; the default knows none: 0.

        NaN if one of these is.
        """
        return 0.0

    def check_ndim(self, shape: Shape) -> None:
        if len(shape) not in self.ndims:
            wanted = " or ".join(str(n) for n in self.ndims)
            raise ValueError(f"codec {self.name} takes {wanted} dimensions, not shape {list(shape)}")


def check_params(params: Params, allowed: Mapping[str, Sequence[Any]]) -> None:
    """Raise ValueError unless `params` has exactly the keys of `allowed`, each with one of its values."""
    if missing := sorted(set(allowed) - set(params)):
        raise ValueError(f"parameter {missing[0]!r} is missing")
    if unknown := sorted(set(params) - set(allowed)):
        raise ValueError(f"parameter {unknown[0]!r} is not known")
    for key, values in allowed.items():
        # The type is compared too, because False == 0 and 64.0 == 64.
        if not any(type(params[key]) is type(value) and params[key] == value for value in values):
            allowed_values = ", ".join(map(repr, values))
            raise ValueError(f"parameter {key} is {params[key]!r:.80}; allowed are {allowed_values}")


def row_chunks(shape: Shape, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Split the first axis into (start, stop) of about CHUNK elements, starts divisible by `multiple`."""
    width = int(np.prod(shape[1:], dtype=np.int64)) if len(shape) > 1 else 1
    step = max(CHUNK // max(width, 1) // multiple, 1) * multiple
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])


def finite_rows(w: np.ndarray | Rows, start: int, stop: int) -> np.ndarray:
    """Give w[start:stop] as contiguous float32.

    Raises ValueError naming the first value that is NaN or infinite.
    """
    rows = np.ascontiguousarray(w[start:stop], dtype=np.float32)
    if not np.isfinite(rows).all():
        where = np.argwhere(~np.isfinite(rows))[0]
        where[0] += start
        raise ValueError(f"the value at {where.tolist()} is NaN, infinite or beyond float32")
    return rows


def finite_span(w: np.ndarray | Rows, start: int, stop: int) -> np.ndarray:
    """Give the values start..stop of the flattened tensor as float32. Raises ValueError as `finite_rows`."""
    width = math.prod(w.shape[1:])
    first = start // width
    return finite_rows(w, first, -(-stop // width)).reshape(-1)[start - first * width : stop - first * width]


def check_fits(largest: np.ndarray | np.float32, dtype: str, codec: str) -> None:
    """Raise ValueError if the largest dequantised value would become infinite in `dtype`."""
    if not np.isfinite(round_to(np.atleast_1d(largest), dtype)).all():
        raise ValueError(f"a value of {largest:g} does not fit codec {codec} with dtype {dtype}; use float32")


def unfit(largest: np.ndarray | np.float32, dtype: str, codec: str) -> Iterator[str]:
    """Say what `check_fits` would raise, if anything."""
    try:
        check_fits(largest, dtype, codec)
    except ValueError as exc:
        yield str(exc)


def magnitude(*parts: np.ndarray) -> float:
    """The largest magnitude in some arrays; NaN if one holds NaN."""
    return float(np.max([max(-float(part.min()), float(part.max())) for part in parts if part.size], initial=0))


def check_ids(ids: np.ndarray, shape: Shape) -> None:
    """Raise IndexError unless every id is a row; negative ones are not."""
    if ids.size and (ids.min() < 0 or ids.max() >= shape[0]):
        bad = ids.min() if ids.min() < 0 else ids.max()
        raise IndexError(f"row {bad} of a tensor with {shape[0]} rows")


def all_finite(values: np.ndarray) -> bool:
    flat = values.reshape(-1)
    return all(bool(np.isfinite(flat[a:b]).all()) for a, b in row_chunks(flat.shape))


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round float32 to the nearest bfloat16, ties to even; NaN stays NaN.

    values: float32
    returns: uint16 bits, same shape
    """
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bits to float32.

    bits: uint16
    """
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 values once to `dtype` and widen them again.

    values: float32; returns: float32, same shape
    """
    if dtype == "float32":
        return values
    if dtype == "bfloat16":
        return from_bf16(to_bf16(values))
    with np.errstate(over="ignore"):
        return values.astype(np.float16).astype(np.float32)
