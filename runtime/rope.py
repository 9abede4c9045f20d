"""Rotary position embeddings (Su et al., 2021): frequencies with Llama 3.1's scaling, and the angles of positions."""

from __future__ import annotations

import math

import numpy as np

from .config import ModelConfig


def frequencies(config: ModelConfig) -> np.ndarray:
    """Angle per position of each pair of a head.

    returns: (head_dim / 2,) float64, radians
    """
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    base: np.ndarray = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return base
    if scaling.type == "linear":
        return base / scaling.factor
    # Llama 3.1: long waves are stretched, short ones stay, those between are mixed.
    wavelength = 2 * math.pi / base
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((scaling.original_max_seq_len / wavelength - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * base / scaling.factor + smooth * base


def angles(freqs: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of every angle, computed in float64 so that far positions lose nothing.

    freqs: (half,) float64; positions: (n,) integer
    returns: two (n, half) float32
    """
    turns = np.multiply.outer(positions, freqs)
    return np.cos(turns).astype(np.float32), np.sin(turns).astype(np.float32)
