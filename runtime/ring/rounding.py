"""Vectors before they are rounded, and rounded to q8 and q4 (see codecs.py)."""

from __future__ import annotations

import numpy as np

LARGEST = np.float32(65504)  # of float16
FITS = 2  # of scale and base of a q4 group


def mirror(mean: np.ndarray, balance: np.ndarray) -> np.ndarray:
    """What swaps the balanced mean's direction and the first axis (Householder, 1958), and the factors before it.

    mean, balance: (heads, width) float32; returns: (heads, 3, width)
    """
    mean = mean.astype(np.float64) * balance  # whose squares may be too large for float32
    normal = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    normal[:, 0] -= np.where(mean.any(axis=1), 1, 0)
    normal *= np.sqrt(2) / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    return np.stack((normal, balance, 1 / balance), axis=1).astype(np.float32)


def mirrored(x: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """x - normal (normal . x), its own inverse.

    x: (heads, n, width) float32; normal: (heads, width), width a multiple of 16; returns: as x
    """
    return x - normal[:, None] * _sum(x * normal[:, None])[..., None]


def _sum(x: np.ndarray) -> np.ndarray:
    """Sum as kernels do: sixteen sums side by side, then a tree of halves. x: (..., 16 n) float32; returns: (...)"""
    lanes = x.reshape(*x.shape[:-1], -1, 16)
    total = lanes[..., 0, :]
    for i in range(1, lanes.shape[-2]):
        total = total + lanes[..., i, :]
    while (half := total.shape[-1] // 2) > 0:
        total = total[..., :half] + total[..., half:]
    return total[..., 0]


def hadamard(x: np.ndarray, size: int) -> np.ndarray:
    """Rotate vectors by a Hadamard matrix, in blocks of `size` numbers, a power of two.

    x: (..., width) float32, width a multiple of size; returns: as x
    """
    if size == 1:
        return x
    y, step = x.reshape(-1, size), 1
    while step < size:
        pairs = y.reshape(len(y), -1, 2, step)
        y = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), axis=2).reshape(len(y), size)
        step *= 2
    return (y * np.float32(1 / np.sqrt(size))).reshape(x.shape)


def quantize_q8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x: (..., group) float32; returns: codes as x, int8; scales (...) float16"""
    scales = np.minimum(np.abs(x).max(axis=-1) / np.float32(127), LARGEST).astype(np.float16)
    return np.clip(np.rint(_divided(x, scales)), -127, 127).astype(np.int8), scales


def quantize_q4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x: (..., group) float32; returns: codes (..., group / 2) uint8; scales and bases (..., 2) float16"""
    low, high = x.min(axis=-1), x.max(axis=-1)
    steps = _halves(((high - low) / np.float32(15), low))
    codes = _codes_q4(x, steps)
    fitted, mine = steps, codes
    for _ in range(FITS):
        fitted = _fit_q4(x, mine, steps[..., 1])
        mine = _codes_q4(x, fitted)
    better = (_error_q4(x, mine, fitted) < _error_q4(x, codes, steps))[..., None]
    whole, half = np.where(better, mine, codes).astype(np.uint8), codes.shape[-1] // 2
    return whole[..., :half] | whole[..., half:] << 4, np.where(better, fitted, steps).astype(np.float16)


def _halves(steps: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Scales and bases, (...) float32, rounded to float16. returns: (..., 2) float32"""
    limited = np.minimum(steps[0], LARGEST), np.clip(steps[1], -LARGEST, LARGEST)
    return np.stack(limited, axis=-1).astype(np.float16).astype(np.float32)


def _codes_q4(x: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """x: (..., group) float32; steps: (..., 2), scales and bases; returns: as x, whole numbers from 0 to 15"""
    return np.clip(np.rint(_divided(x - steps[..., 1:], steps[..., 0])), 0, 15)


def _error_q4(x: np.ndarray, codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The sum of squared errors of each group. x, codes: (..., group) float32; steps: (..., 2)"""
    error = (x - steps[..., 1:]) - codes * steps[..., :1]
    return _sum(error * error)


def _fit_q4(x: np.ndarray, codes: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Scales and bases with the least squared error for these codes; sums are those of x - start.

    x, codes: (..., group) float32; start: (...); returns: (..., 2)
    """
    x, n = x - start[..., None], np.float32(x.shape[-1])
    of_codes, of_x = _sum(codes), _sum(x)
    spread = n * _sum(codes * codes) - of_codes * of_codes
    scales = n * _sum(codes * x) - of_codes * of_x
    scales = np.divide(scales, spread, out=np.zeros_like(spread), where=spread > 0)
    scales = _halves((scales, start))[..., 0]
    return _halves((scales, start + (of_x - scales * of_codes) / n))


def _divided(x: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """x / scale for each group, zero where the scale is."""
    wide = scales.astype(np.float32)[..., None]
    return np.divide(x, wide, out=np.zeros_like(x), where=wide > 0)
