"""The codecs trit1 to trit4: trits and 27 units per matrix (trit.py), and what trit_extras.py may add to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from .base import (
    DTYPES,
    Codec,
    Layout,
    Params,
    Parts,
    Rows,
    Shape,
    check_fits,
    check_params,
    magnitude,
    round_to,
    row_chunks,
    unfit,
)
from .trit import (
    ENTRIES,
    GROUP,
    INVALID,
    UNITS,
    blocks_shape,
    max_level,
    pack,
    quantize_levels,
    unpack_range,
    unpack_rows,
)
from .trit_extras import extra_parts, extra_problems, put_exceptions, put_signs, split_params, widen


class TritCodec(Codec):
    """Weights of 1 to 4 trits with 27 units per matrix, and what `trit_extras` may add."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        self.name = f"trit{depth}"

    def parts(self, shape: Shape, params: Params) -> Layout:
        self.check_ndim(shape)
        params, extras = split_params(params)
        check_params(params, {"dtype": DTYPES})
        return {
            "units": (np.dtype("<f4"), (UNITS,)),
            "blocks": (np.dtype("u1"), blocks_shape(shape, self.depth)),
            **extra_parts(shape, params["dtype"], extras),
        }

    def quantize(self, w: np.ndarray | Rows, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Quantise a matrix. Option: dtype, to which dequantised values are rounded (default "float32")."""
        params = {"dtype": "float32", **options}
        self.check_ndim(w.shape)
        check_params(params, {"dtype": DTYPES})
        levels, codes, units = quantize_levels(w, self.depth)
        check_fits(units.max() * np.float32(max_level(self.depth)), params["dtype"], self.name)
        return params, {"units": units, "blocks": pack(levels, codes, self.depth)}

    def dequantize_rows(self, parts: Parts, shape: Shape, params: Params, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        return self._values(parts, shape, params, ids, *unpack_rows(parts["blocks"], shape, self.depth, ids))

    def dequantize_range(self, parts: Parts, shape: Shape, params: Params, start: int, stop: int) -> np.ndarray:
        found = unpack_range(parts["blocks"], shape, self.depth, start, stop)
        return self._values(parts, shape, params, np.arange(start, stop), *found)

    def _values(
        self, parts: Parts, shape: Shape, params: Params, ids: np.ndarray, levels: np.ndarray, codes: np.ndarray
    ) -> np.ndarray:
        """levels: (n, in) int8; codes: (n, groups) uint8; returns (n, in) float32"""
        unit = np.repeat(parts["units"][codes], GROUP, axis=1)[:, : shape[1]]
        values = round_to(levels.astype(np.float32) * unit, params["dtype"])
        if "signs" in parts:
            put_signs(values, levels, parts, ids)
        if "exception_groups" in parts:
            put_exceptions(values, parts, shape, ids)
        return values

    def largest(self, parts: Parts, shape: Shape, params: Params) -> float:
        exceptions = widen(parts["exception_values"]) if "exception_values" in parts else np.zeros(0)
        return max_level(self.depth) * magnitude(parts["units"], exceptions / max_level(self.depth))

    def problems(self, parts: Parts, shape: Shape, params: Params) -> Iterator[str]:
        units, flat = parts["units"], parts["blocks"].reshape(-1)
        if not np.isfinite(units).all() or (units < 0).any():
            yield "units holds NaN, infinity or a negative number"
        else:
            largest = units.max() * np.float32(max_level(self.depth))
            yield from unfit(largest, params["dtype"], self.name)
        if units[ENTRIES:].any():
            yield f"units has more than {ENTRIES} entries"
        bad = sum(int((flat[a:b] >= INVALID).sum()) for a, b in row_chunks(flat.shape))
        if bad:
            yield f"blocks holds {bad} bytes above {INVALID - 1}, which stand for no trits"
        yield from extra_problems(parts, shape)


# ======== several depths at once

Encoded = dict[int, tuple[dict[str, Any], dict[str, np.ndarray]]]


class Encode(Protocol):
    """Quantises a matrix at several depths from one pass; what it gives is `TritCodec(depth).quantize`'s, by depth."""

    def __call__(self, w: np.ndarray | Rows, depths: Sequence[int], dtype: str = "float32") -> Encoded: ...


def encode_reference(w: np.ndarray | Rows, depths: Sequence[int], dtype: str = "float32") -> Encoded:
    """Quantise at several depths, one after the other: the definition, and what is left without a compiler."""
    return {depth: TritCodec(depth).quantize(w, dtype=dtype) for depth in depths}
