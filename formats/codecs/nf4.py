"""NF4 as bitsandbytes stores it, with and without double quantisation, bit-exact on the way back.

Blocks are consecutive elements of the flat row-major tensor, so they may cross rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .base import (
    CHUNK,
    DTYPES,
    Codec,
    Layout,
    Params,
    Parts,
    Rows,
    Shape,
    check_fits,
    check_ids,
    check_params,
    finite_span,
    magnitude,
    round_to,
    unfit,
)

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCKS = (256, 0)
ZERO_CODE = 7
TINY = np.float32(1e-38)

LEVELS = np.array(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    np.float32,
)
BOUNDS = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)


def nested_levels() -> np.ndarray:
    """Give the 256 values for the scales of double quantisation: (256,) float32, ascending.

    Seven decades, each with twice as many steps as the one below; 0 in the middle and 1 at the end.
    The rounding follows bitsandbytes: edges once from exact products, middles and powers of ten in float32.
    """
    values = [np.zeros(1, np.float32), np.ones(1, np.float32)]
    low, high = np.float32(0.1), np.float32(1)
    for i in range(7):
        n = 2**i
        step = np.float64((high - low) / np.float32(n))
        k = np.arange(n + 1)
        edges = np.where(k < (n + 1) // 2, low + step * k, high - step * (n - k)).astype(np.float32)
        middles = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        values += [middles, -middles]
    return np.sort(np.concatenate(values))


# ======== packing


def pack_codes(codes: np.ndarray) -> np.ndarray:
    """Pack two codes a byte, the first in the high nibble; an odd end is filled with the code of 0.

    codes: (n,) uint8 in 0..15
    returns: (ceil(n / 2),) uint8
    """
    if codes.size % 2:
        codes = np.append(codes, np.uint8(ZERO_CODE))
    return (codes[0::2] << 4) | codes[1::2]


def unpack_codes(packed: np.ndarray, n: int) -> np.ndarray:
    """Undo `pack_codes`.

    packed: (ceil(n / 2),) uint8
    returns: (n,) uint8
    """
    codes = np.empty(packed.size * 2, np.uint8)
    codes[0::2] = packed >> 4
    codes[1::2] = packed & 15
    return codes[:n]


def block_scales(parts: Parts, params: Params, ids: np.ndarray | None = None) -> np.ndarray:
    """Give the scale (absmax) of blocks.

    ids: block numbers, any shape, or None for all
    returns: float32, shape of ids or (blocks,). Under double quantisation a scale may be 0 or negative.
    """
    absmax = parts["absmax"] if ids is None else parts["absmax"][ids]
    nested = params["nested_block"]
    if not nested:
        return absmax
    where = (np.arange(absmax.size) if ids is None else ids) // nested
    # Two roundings, product then sum: a fused multiply-add would not match bitsandbytes.
    product = parts["nested_levels"][absmax] * parts["nested_absmax"][where]
    return product + parts["offset"][0]


# ======== codec


class NF4Codec(Codec):
    """Four bits a weight: a level of a 16-entry table times the scale of its block."""

    name = "nf4"
    ndims = (1, 2)

    def parts(self, shape: Shape, params: Params) -> Layout:
        self.check_ndim(shape)
        check_params(params, {"block": BLOCKS, "nested_block": NESTED_BLOCKS, "dtype": DTYPES})
        n = math.prod(shape)
        blocks = -(-n // params["block"])
        f4, u1 = np.dtype("<f4"), np.dtype("u1")
        layout: Layout = {"codes": (u1, (-(-n // 2),)), "levels": (f4, (16,))}
        if not params["nested_block"]:
            return {**layout, "absmax": (f4, (blocks,))}
        return {
            **layout,
            "absmax": (u1, (blocks,)),
            "nested_absmax": (f4, (-(-blocks // params["nested_block"]),)),
            "nested_levels": (f4, (256,)),
            "offset": (f4, (1,)),
        }

    def quantize(self, w: np.ndarray | Rows, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Quantise as bitsandbytes does on a CPU.

        Options: block (default 64), nested_block (default 256; 0 turns double quantisation off), dtype, to
        which dequantised values are rounded (default "float32").
        Codes equal those of bitsandbytes; under double quantisation the scales may differ in the last place,
        because bitsandbytes itself gives different ones on CPU and GPU.
        """
        params = {"block": 64, "nested_block": 256, "dtype": "float32", **options}
        self.parts(w.shape, params)
        packed, absmax = _quantize_blocks(w, params["block"])
        parts = {"codes": packed, "levels": LEVELS, "absmax": absmax}
        if params["nested_block"]:
            parts.update(quantize_scales(absmax, params["nested_block"]))
        check_fits(np.abs(block_scales(parts, params)).max(), params["dtype"], self.name)
        return params, parts

    def dequantize_range(self, parts: Parts, shape: Shape, params: Params, start: int, stop: int) -> np.ndarray:
        width = math.prod(shape[1:])
        return self._span(parts, params, start * width, stop * width).reshape(stop - start, *shape[1:])

    def largest(self, parts: Parts, shape: Shape, params: Params) -> float:
        scale = magnitude(parts["absmax"])
        if params["nested_block"]:
            scale = magnitude(parts["nested_levels"]) * magnitude(parts["nested_absmax"]) + magnitude(parts["offset"])
        return magnitude(parts["levels"]) * scale

    def problems(self, parts: Parts, shape: Shape, params: Params) -> Iterator[str]:
        found = list(super().problems(parts, shape, params))
        yield from found
        if not found:  # else the product says nothing new
            with np.errstate(over="ignore"):
                largest = np.abs(parts["levels"]).max() * np.abs(block_scales(parts, params)).max()
            yield from unfit(largest, params["dtype"], self.name)

    def _span(self, parts: Parts, params: Params, start: int, stop: int) -> np.ndarray:
        """Values start..stop of the flat tensor, as float32."""
        block = params["block"]
        first = start // block * block
        codes = unpack_codes(parts["codes"][first // 2 : -(-stop // 2)], stop - first)
        scale = block_scales(parts, params, np.arange(first // block, -(-stop // block)))
        return self._values(parts, params, codes, np.repeat(scale, block)[: stop - first])[start - first :]

    def dequantize_rows(self, parts: Parts, shape: Shape, params: Params, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, np.int64)
        if len(shape) == 1:
            shape, flat = (shape[0], 1), ids[:, None]
        else:
            flat = ids[:, None] * shape[1] + np.arange(shape[1])
        check_ids(ids, shape)
        packed = parts["codes"][flat // 2]
        codes = np.where(flat % 2 == 0, packed >> 4, packed & 15)
        return self._values(parts, params, codes, block_scales(parts, params, flat // params["block"]))

    def _values(self, parts: Parts, params: Params, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            return round_to(parts["levels"][codes] * scale, params["dtype"])


def _quantize_blocks(w: np.ndarray | Rows, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantise the flat tensor; a last, shorter block divides where full ones multiply by the reciprocal.

    returns: packed codes (ceil(n / 2),) uint8, absmax (ceil(n / block),) float32
    """
    n = math.prod(w.shape)
    whole = n // block * block
    codes = np.empty(-(-n // 2), np.uint8)
    absmax = np.empty(-(-n // block), np.float32)
    for start in range(0, whole, CHUNK):
        stop = min(start + CHUNK, whole)
        x = finite_span(w, start, stop).reshape(-1, block)
        top = np.abs(x).max(axis=1)
        absmax[start // block : stop // block] = top
        scaled = np.clip(x * (np.float32(1) / np.maximum(top, TINY))[:, None], -1, 1)
        codes[start // 2 : stop // 2] = pack_codes(nearest(BOUNDS, scaled.reshape(-1)))
    if whole < n:
        x = finite_span(w, whole, n)
        absmax[-1] = max(np.abs(x).max(), TINY)
        codes[whole // 2 :] = pack_codes(nearest(BOUNDS, x / absmax[-1]))
    return codes, absmax


def quantize_scales(absmax: np.ndarray, nested_block: int) -> dict[str, np.ndarray]:
    """Store the scales as one byte each, relative to their mean and to the largest of 256.

    absmax: (blocks,) float32
    """
    table = nested_levels()
    # fsum rounds once, so the mean does not depend on the order of a vectorised sum.
    total = math.fsum(x for start in range(0, absmax.size, CHUNK) for x in absmax[start : start + CHUNK].tolist())
    offset = np.float32(total / absmax.size)
    y = absmax - offset
    starts = np.arange(0, y.size, nested_block)
    top = np.maximum.reduceat(np.abs(y), starts)
    divisor = np.repeat(np.where(top > 0, top, np.float32(1)), nested_block)[: y.size]
    bounds = (table[:-1] + table[1:]) / np.float32(2)
    return {
        "absmax": nearest(bounds, y / divisor),
        "nested_absmax": top,
        "nested_levels": table,
        "offset": np.array([offset], np.float32),
    }


def nearest(bounds: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Index of the nearest level, the lower one on a tie: uint8."""
    if len(bounds) > 16:
        return np.searchsorted(bounds, values, side="left").astype(np.uint8)
    index = np.zeros(values.shape, np.uint8)
    for bound in bounds:  # many times faster than a search
        index += values > bound
    return index
