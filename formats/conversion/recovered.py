"""--quant keep on a released trit checkpoint: matrices of dequantised values are packed as the trits they were.

What is packed is proven: it is dequantised again and compared with the source, every bit of every value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..codecs import CODECS
from ..codecs.base import Rows, row_chunks
from ..codecs.trit import GROUP, pack
from ..codecs.trit_extras import EXCEPTIONS, SIGNS, STORED, pack_signs
from .recover import Recovery, Refusal, recover

# Type of the source -> roundings that its values may have been through, the likelier first
GRIDS = {"F16": ("float16",), "BF16": ("bfloat16",), "F32": ("float32", "float16", "bfloat16")}
SAMPLE_ROWS = 32
SAMPLE_EXCEPTIONS = 0.25  # of its groups: rows with more are not worth reading the others

Packed = tuple[str, dict[str, Any], dict[str, np.ndarray]]


def guess_trits(rows: Rows, dtype: str) -> tuple[str, dict[str, Any]] | str:
    """Look at a few rows: the codec and params that the matrix will probably have, or why it holds no trits.

    dtype: the source's name of it
    """
    step = max(rows.shape[0] // SAMPLE_ROWS, 1)
    few = np.concatenate([rows[i : i + 1] for i in range(0, rows.shape[0], step)][:SAMPLE_ROWS])
    reason = ""
    for grid in GRIDS[dtype]:
        found = recover(few, grid, SAMPLE_EXCEPTIONS)
        if isinstance(found, Recovery):
            return f"trit{found.depth}", {"dtype": grid}
        reason = reason or found.reason
    return reason


def recover_packed(rows: Rows, grid: str) -> tuple[Packed, dict[str, Any]] | str:
    """Pack a matrix as the trits that it was made of, or say why it cannot be.

    returns: (codec, params, parts), and facts for the report: depth, units, exceptions, negative_zeros
    """
    values = rows[:]
    found = recover(values, grid)
    if isinstance(found, Refusal):
        return found.reason
    codec, params, parts = _pack(values, found)
    for start, stop in row_chunks(values.shape):
        again = CODECS[codec].dequantize_range(parts, values.shape, params, start, stop)
        if not np.array_equal(again.view(np.uint32), values[start:stop].view(np.uint32)):
            return "what was recovered does not give the values back: please report it"
    used = np.count_nonzero(found.units)
    counts = {"exceptions": len(found.exceptions), "negative_zeros": found.negative_zeros}
    return (codec, params, parts), {"depth": found.depth, "units": int(used), **counts}


def _pack(values: np.ndarray, found: Recovery) -> Packed:
    params: dict[str, Any] = {"dtype": found.dtype}
    parts = {"units": found.units, "blocks": pack(found.levels, found.scale_codes, found.depth)}
    if count := len(found.exceptions):
        params[EXCEPTIONS] = count
        parts["exception_groups"] = found.exceptions.astype("<u8")
        raw, stored = found.exception_bits, STORED[found.dtype]
        parts["exception_values"] = raw.view(stored) if raw.dtype.itemsize == stored.itemsize else raw.astype(stored)
    if found.negative_zeros:
        parts |= pack_signs(_zeros(values, found))
        params[SIGNS] = len(parts["signs"])
    return f"trit{found.depth}", params, parts


def _zeros(values: np.ndarray, found: Recovery) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield, block of rows by block, where levels are 0 and where the value is -0.0 and in no exception."""
    fits = np.ones(found.scale_codes.shape, bool)
    fits.reshape(-1)[found.exceptions] = False
    for start, stop in row_chunks(values.shape):
        zero = found.levels[start:stop] == 0
        inside = np.repeat(fits[start:stop], GROUP, axis=1)[:, : values.shape[1]]
        yield zero, zero & inside & np.signbit(values[start:stop])
