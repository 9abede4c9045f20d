"""One matrix to NF4 so that its products come out right: feedback as in feedback.py, on a grid with given scales.

The scales are chosen first, for each block the share of its largest weight that makes the least error where it matters;
blocks with the largest weights of the matrix keep theirs, because what a few very large weights do is not to be cut
off. Columns are then rounded in the order of `Factors`, BLOCK at a time, with products of whole matrices in between.
"""

from __future__ import annotations

import numpy as np

from formats.codecs.base import row_chunks
from formats.codecs.nf4 import BOUNDS, LEVELS, TINY, block_scales, nearest, pack_codes, quantize_scales
from formats.conversion.plan import OPTIONS

from .feedback import Factors

BLOCK = 64  # columns whose feedback is applied one by one
SHARES = np.linspace(0.7, 1, 13, dtype=np.float32)
LARGE = 0.5  # of the largest weight of the matrix: blocks that reach it keep their scale
PARAMS = OPTIONS["nf4"]


def quantize_nf4(w: np.ndarray, factors: Factors) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Quantise a matrix.

    w: (out, in) float32
    returns: the parts of codec nf4 with PARAMS, and what they are dequantised to, (out, in) float32
    """
    importance = factors.importance.reshape(-1)[: w.shape[1]]
    absmax = choose_scales(w, importance)
    parts = {"levels": LEVELS, "absmax": absmax, **quantize_scales(absmax, PARAMS["nested_block"])}
    scales = np.repeat(block_scales(parts, PARAMS), PARAMS["block"])[: w.size].reshape(w.shape)
    codes = round_columns(w, scales, factors)
    values = LEVELS[codes] * scales
    return {"codes": pack_codes(codes.reshape(-1)), **parts}, values


def choose_scales(w: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Choose the scale of each block of 64 weights, in the order in which they lie.

    importance: (in,) float32, of the inputs; returns: (blocks,) float32
    """
    block = PARAMS["block"]
    flat = np.zeros(-(-w.size // block) * block, np.float32)
    flat[: w.size] = w.reshape(-1)
    weights = np.zeros_like(flat)
    weights[: w.size] = np.broadcast_to(importance, w.shape).reshape(-1)
    blocks, weights = flat.reshape(-1, block), weights.reshape(-1, block)
    largest = np.abs(blocks).max(axis=1)
    best, found = np.full(len(blocks), np.inf, np.float32), largest.copy()
    for start, stop in row_chunks(blocks.shape):
        for share in SHARES:
            scale = np.maximum(largest[start:stop] * share, TINY)
            x = blocks[start:stop] / scale[:, None]
            error = (np.square(x - LEVELS[nearest(BOUNDS, x)]) * weights[start:stop]).sum(axis=1) * scale * scale
            better = error < best[start:stop]
            best[start:stop][better] = error[better]
            found[start:stop][better] = scale[better]
    keep = largest >= LARGE * largest.max()
    found[keep] = largest[keep]
    return found


def round_columns(w: np.ndarray, scales: np.ndarray, factors: Factors) -> np.ndarray:
    """Round a matrix with feedback.

    w, scales: (out, in) float32; returns: codes (out, in) uint8
    """
    order, u = factors.order, factors.feedback
    if len(order) > w.shape[1]:  # inputs that only fill the last group
        real = np.flatnonzero(order < w.shape[1])
        order, u = order[real], u[np.ix_(real, real)]
    x, s = w[:, order], scales[:, order]
    error, found = np.zeros_like(x), np.empty(x.shape, np.uint8)
    for start in range(0, len(order), BLOCK):
        stop = min(start + BLOCK, len(order))
        t = x[:, start:stop] + error[:, :start] @ u[:start, start:stop]
        for k in range(start, stop):
            scaled = np.divide(t[:, k - start], s[:, k], out=np.zeros(len(t), np.float32), where=s[:, k] != 0)
            found[:, k] = nearest(BOUNDS, scaled)
            error[:, k] = x[:, k] - LEVELS[found[:, k]] * s[:, k]
            t[:, k - start + 1 :] += error[:, k, None] * u[k, k + 1 : stop]
    codes = np.empty_like(found)
    codes[:, order] = found
    return codes
