"""Codecs without a codebook: f32, f16, bf16, raw bytes (u8) and 8-bit blocks of 32 (q8)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .base import (
    Codec,
    Layout,
    Params,
    Parts,
    Rows,
    Shape,
    all_finite,
    check_ids,
    check_params,
    finite_rows,
    from_bf16,
    magnitude,
    row_chunks,
    to_bf16,
)

Q8_BLOCK = 32


class FloatCodec(Codec):
    """Values as they are, in one of three floating point types; bf16 is kept as its upper 16 bits."""

    ndims = (1, 2)

    def __init__(self, name: str, dtype: str) -> None:
        self.name = name
        self.dtype = np.dtype(dtype)

    def parts(self, shape: Shape, params: Params) -> Layout:
        self.check_ndim(shape)
        check_params(params, {})
        return {"values": (self.dtype, shape)}

    def quantize(self, w: np.ndarray | Rows, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        check_params(options, {})
        self.check_ndim(w.shape)
        values = np.empty(w.shape, self.dtype)
        for start, stop in row_chunks(w.shape):
            rows = finite_rows(w, start, stop)
            with np.errstate(over="ignore"):
                values[start:stop] = to_bf16(rows) if self.name == "bf16" else rows
            if not np.isfinite(self._widen(values[start:stop])).all():
                raise ValueError(f"a value of {np.abs(rows).max():g} does not fit codec {self.name}; use f32")
        return {}, {"values": values}

    def dequantize_rows(self, parts: Parts, shape: Shape, params: Params, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        check_ids(ids, shape)
        return self._widen(parts["values"][ids])

    def largest(self, parts: Parts, shape: Shape, params: Params) -> float:
        return magnitude(self._widen(parts["values"])) if len(shape) == 1 else 0.0

    def problems(self, parts: Parts, shape: Shape, params: Params) -> Iterator[str]:
        flat = parts["values"].reshape(-1)
        if not all(all_finite(self._widen(flat[a:b])) for a, b in row_chunks(flat.shape)):
            yield "values holds NaN or infinity"

    def _widen(self, values: np.ndarray) -> np.ndarray:
        return from_bf16(values) if self.name == "bf16" else values.astype(np.float32)


class ByteCodec(Codec):
    """A blob of bytes, such as a tokenizer's data."""

    name = "u8"
    ndims = (1,)

    def parts(self, shape: Shape, params: Params) -> Layout:
        self.check_ndim(shape)
        check_params(params, {})
        return {"values": (np.dtype("u1"), shape)}

    def quantize(self, w: np.ndarray | Rows, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        check_params(options, {})
        self.check_ndim(w.shape)
        if not isinstance(w, np.ndarray) or w.dtype != np.uint8:
            raise ValueError(f"codec u8 stores bytes (uint8), not {getattr(w, 'dtype', 'numbers')}")
        return {}, {"values": w}

    def dequantize_rows(self, parts: Parts, shape: Shape, params: Params, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        check_ids(ids, shape)
        return parts["values"][ids].astype(np.float32)


class Q8Codec(Codec):
    """Signed bytes, with one float16 scale for 32 consecutive inputs of a row."""

    name = "q8"

    def parts(self, shape: Shape, params: Params) -> Layout:
        self.check_ndim(shape)
        check_params(params, {})
        blocks = -(-shape[1] // Q8_BLOCK)
        return {
            "values": (np.dtype("i1"), (shape[0], blocks * Q8_BLOCK)),
            "scales": (np.dtype("<f2"), (shape[0], blocks)),
        }

    def quantize(self, w: np.ndarray | Rows, **options: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        layout = self.parts(w.shape, options)
        values = np.zeros(layout["values"][1], np.int8)
        scales = np.zeros(layout["scales"][1], np.dtype("<f2"))
        for start, stop in row_chunks(values.shape):
            x = np.zeros((stop - start, *scales.shape[1:], Q8_BLOCK), np.float32)
            x.reshape(stop - start, -1)[:, : w.shape[1]] = finite_rows(w, start, stop)
            with np.errstate(over="ignore"):
                half = (np.abs(x).max(axis=2) / np.float32(127)).astype(np.float16)
            if not np.isfinite(half).all():
                raise ValueError(f"a value of {np.abs(x).max():g} does not fit codec q8; use f32")
            scale = half.astype(np.float32)[:, :, None]
            # A block below half the smallest float16 has scale 0: all its values become 0.
            q = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
            values[start:stop] = np.clip(np.rint(q), -127, 127).reshape(stop - start, -1)
            scales[start:stop] = half
        return {}, {"values": values, "scales": scales}

    def dequantize_rows(self, parts: Parts, shape: Shape, params: Params, ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(ids)
        check_ids(ids, shape)
        values = parts["values"][ids].astype(np.float32)
        scales = parts["scales"][ids].astype(np.float32)
        w = values.reshape(len(values), -1, Q8_BLOCK) * scales[:, :, None]
        return w.reshape(len(values), -1)[:, : shape[1]]
