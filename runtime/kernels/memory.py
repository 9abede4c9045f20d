"""Arrays as compiled kernels see them."""

from __future__ import annotations

from typing import Any

import numpy as np


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Zeroed memory that starts at a cache line."""
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(nbytes + 64, np.uint8)
    start = -address(raw) % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)
