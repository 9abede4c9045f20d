"""Matrices for the tests of the codecs, and what it means that two are the same."""

from __future__ import annotations

import numpy as np

DEPTHS = (1, 2, 3, 4)
# Sizes that no block or superblock divides, and one superblock.
SHAPES = ((1, 1), (3, 5), (17, 83), (16, 80), (33, 161))


def gaussian(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()
