"""Balanced ternary weights: quantiser (tritllm v2), packer, unpacker in NumPy. This code defines the bytes.

A weight of depth d is q - L, with q in 0..3^d - 1 and L = (3^d - 1) / 2, times the unit of its group of 16
inputs. Five weights take d bytes; SPEC.md describes the layout.
"""

from __future__ import annotations

import math

import numpy as np

from .base import Rows, Shape, check_ids, finite_rows, row_chunks

ROWS, INPUTS = 16, 80
GROUP = 16
GROUPS = INPUTS // GROUP
ENTRIES = 27
UNITS = 32
SCALE_BYTES = 48
CANDIDATES = (10, 12, 14, 15)
INVALID = 243


def max_level(depth: int) -> int:
    return (3**depth - 1) // 2


def block_bytes(depth: int) -> int:
    return 256 * depth + SCALE_BYTES


def blocks_shape(shape: Shape, depth: int) -> Shape:
    return (-(-shape[0] // ROWS), -(-shape[1] // INPUTS), block_bytes(depth))


# ======== packing


def pack(levels: np.ndarray, scale_codes: np.ndarray, depth: int) -> np.ndarray:
    """Pack signed levels and scale codes into superblocks.

    levels: (out, in) integer in -L..L
    scale_codes: (out, ceil(in / 16)) integer in 0..26
    returns: (ceil(out / 16), ceil(in / 80), 256 * depth + 48) uint8
    Raises ValueError if a level or code is out of range, or the shapes disagree.
    """
    top = max_level(depth)
    out, width = levels.shape
    if scale_codes.shape != (out, -(-width // GROUP)):
        raise ValueError(f"scale codes {scale_codes.shape} do not belong to levels {levels.shape}")
    if levels.min() < -top or levels.max() > top:
        raise ValueError(f"a level lies outside -{top}..{top}")
    if scale_codes.min() < 0 or scale_codes.max() >= ENTRIES:
        raise ValueError(f"a scale code lies outside 0..{ENTRIES - 1}")
    blocks = np.empty(blocks_shape(levels.shape, depth), np.uint8)
    columns = blocks.shape[1]
    for start, stop in row_chunks((out, width), ROWS):
        strips = -(-(stop - start) // ROWS)
        q = np.full((strips * ROWS, columns * INPUTS), top, np.uint8)
        q[: stop - start, :width] = levels[start:stop].astype(np.int16) + top
        codes = np.zeros((strips * ROWS, columns * GROUPS), np.uint8)
        codes[: stop - start, : scale_codes.shape[1]] = scale_codes[start:stop]
        here = blocks[start // ROWS : start // ROWS + strips]
        # (strip, row, column, group, quad, input) becomes (group, strip, column, quad, row, input).
        groups = q.reshape(strips, ROWS, columns, GROUPS, 4, 4).transpose(3, 0, 2, 4, 1, 5)
        vectors = here[:, :, : 256 * depth].reshape(strips, columns, 4, depth, ROWS, 4)
        for v, packed in enumerate(_join_levels(groups, depth)):
            vectors[:, :, :, v] = packed
        by_group = codes.reshape(strips, ROWS, columns, GROUPS).transpose(3, 0, 2, 1)
        for v, packed in enumerate(_join_codes(by_group)):
            here[:, :, 256 * depth + ROWS * v : 256 * depth + ROWS * (v + 1)] = packed
    return blocks


def unpack(blocks: np.ndarray, shape: Shape, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """Undo `pack`.

    blocks: (ceil(out / 16), ceil(in / 80), 256 * depth + 48) uint8
    returns: levels (out, in) int8, scale codes (out, ceil(in / 16)) uint8
    """
    levels = np.empty(shape, np.int8)
    codes = np.empty((shape[0], -(-shape[1] // GROUP)), np.uint8)
    for start, stop in row_chunks(shape, ROWS):
        levels[start:stop], codes[start:stop] = unpack_range(blocks, shape, depth, start, stop)
    return levels, codes


def unpack_range(
    blocks: np.ndarray, shape: Shape, depth: int, start: int, stop: int
) -> tuple[np.ndarray, np.ndarray]:
    """Unpack the rows start..stop, as `unpack_rows` does but faster."""
    first = start // ROWS
    part = blocks[first : -(-stop // ROWS)]
    strips, columns = part.shape[:2]
    vectors = part[:, :, : 256 * depth].reshape(strips, columns, 4, depth, ROWS, 4)
    q = np.empty((strips, ROWS, columns, GROUPS, 4, 4), np.uint8)
    for g, values in enumerate(_split_levels([vectors[:, :, :, v] for v in range(depth)], depth)):
        q[:, :, :, g] = values.transpose(0, 3, 1, 2, 4)
    scales = part[:, :, 256 * depth :].reshape(strips, columns, 3, ROWS)
    codes = np.stack(_split_codes([scales[:, :, v] for v in range(3)]), axis=3).transpose(0, 2, 1, 3)
    levels = (q.view(np.int8) - np.int8(max_level(depth))).reshape(strips * ROWS, -1)
    rows = slice(start - first * ROWS, stop - first * ROWS)
    return levels[rows, : shape[1]], codes.reshape(strips * ROWS, -1)[rows, : -(-shape[1] // GROUP)]


def unpack_rows(
    blocks: np.ndarray, shape: Shape, depth: int, ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Unpack some rows.

    ids: (n,) integer
    returns: levels (n, in) int8, scale codes (n, ceil(in / 16)) uint8
    Bytes of 243 and more, which no writer makes, give levels beyond L and codes up to 31, never an error, and the
    same ones in every reader of ours.
    """
    ids = np.asarray(ids)
    check_ids(ids, shape)
    strip, row = ids // ROWS, ids % ROWS
    columns = blocks.shape[1]
    vectors = blocks[:, :, : 256 * depth].reshape(-1, columns, 4, depth, ROWS, 4)[strip, :, :, :, row]
    q = np.empty((len(ids), columns, GROUPS, 4, 4), np.uint8)
    for g, values in enumerate(_split_levels([vectors[:, :, :, v] for v in range(depth)], depth)):
        q[:, :, g] = values
    levels = (q.view(np.int8) - np.int8(max_level(depth))).reshape(len(ids), -1)[:, : shape[1]]
    scales = blocks[:, :, 256 * depth :].reshape(-1, columns, 3, ROWS)[strip, :, :, row]
    codes = np.stack(_split_codes([scales[:, :, v] for v in range(3)]), axis=2)
    return levels, codes.reshape(len(ids), -1)[:, : -(-shape[1] // GROUP)]


def _join_levels(q: np.ndarray, depth: int) -> list[np.ndarray]:
    """Combine the unsigned levels of five groups (5, ...) uint8 into `depth` byte arrays."""
    if depth == 4:
        return [q[i] + 81 * (q[4] // 3 ** (3 - i) % 3) for i in range(4)]
    if depth == 3:
        high = [q[3] % 9, q[4] % 9, q[3] // 9 * 3 + q[4] // 9]
        return [q[i] + 27 * high[i] for i in range(3)]
    if depth == 2:
        return [q[0] + 9 * q[1] + 81 * (q[4] // 3), q[2] + 9 * q[3] + 81 * (q[4] % 3)]
    return [q[0] * 81 + q[1] * 27 + q[2] * 9 + q[3] * 3 + q[4]]


def _digit(v: np.ndarray, weight: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a byte into its digit of that weight, at most 2, and the rest."""
    digit = np.minimum(v // weight, 2)
    return digit, v - digit * np.uint8(weight)


def _split_levels(v: list[np.ndarray], depth: int) -> list[np.ndarray]:
    """Undo `_join_levels`."""
    t, low = zip(*(_digit(x, 81) for x in v), strict=True)
    if depth == 4:
        return [*low, ((t[0] * 3 + t[1]) * 3 + t[2]) * 3 + t[3]]
    if depth == 3:
        u, q = zip(*(_digit(x, 27) for x in low), strict=True)
        return [*q, 9 * t[2] + 3 * t[0] + u[0], 9 * u[2] + 3 * t[1] + u[1]]
    if depth == 2:
        (a, x), (b, y) = (_digit(x, 27) for x in low)
        (c, q0), (d, q2) = _digit(x, 9), _digit(y, 9)
        return [q0, 3 * a + c, q2, 3 * b + d, 3 * t[0] + t[1]]
    levels = [t[0]]
    rest = low[0]
    for weight in (27, 9, 3):
        digit, rest = _digit(rest, weight)
        levels.append(digit)
    return [*levels, rest]


def _join_codes(c: np.ndarray) -> list[np.ndarray]:
    """Combine the scale codes of five groups (5, ...) uint8 into three byte arrays."""
    high = [c[3] % 9, c[4] % 9, c[3] // 9 + 3 * (c[4] // 9)]
    return [c[k] + 27 * high[k] for k in range(3)]


def _split_codes(s: list[np.ndarray]) -> list[np.ndarray]:
    h = [x // 27 for x in s]
    # Bytes beyond 242 could give up to 36; the table of units has 32 entries.
    last = [(h[0] + 9 * (h[2] % 3)) % UNITS, (h[1] + 9 * (h[2] // 3)) % UNITS]
    return [x % 27 for x in s] + last


# ======== quantising


def quantize_levels(w: np.ndarray | Rows, depth: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantise as tritllm v2: a scale per group of 16, rounded to 27 log-spaced entries per matrix.

    Every step is one correctly rounded float32 operation, and sums run in float64 in a fixed order,
    so that the result does not depend on the machine.

    w: (out, in) floating point
    returns: levels (out, in) int8, scale codes (out, ceil(in / 16)) uint8, units (32,) float32
    Raises ValueError if a value is NaN or infinite.
    """
    groups = -(-w.shape[1] // GROUP)
    scales = np.empty((w.shape[0], groups), np.float32)
    for start, stop in row_chunks(w.shape):
        scales[start:stop] = _best_scales(grouped(w, start, stop), depth).reshape(-1, groups)
    entries, middles = codebook(scales)
    units = np.zeros(UNITS, np.float32)
    units[:ENTRIES] = entries / np.float32(max_level(depth))
    levels = np.empty(w.shape, np.int8)
    codes = np.empty(scales.shape, np.uint8)
    for start, stop in row_chunks(w.shape):
        codes[start:stop] = np.searchsorted(middles, scales[start:stop].astype(np.float64))
        rows = grouped(w, start, stop)
        q = round_levels(rows, units[codes[start:stop].reshape(-1, 1)], depth)
        levels[start:stop] = q.reshape(stop - start, -1)[:, : w.shape[1]]
    return levels, codes, units


def grouped(w: np.ndarray | Rows, start: int, stop: int) -> np.ndarray:
    """Rows start..stop as groups, the last of a row padded with zeros: (n, 16) float32."""
    rows = finite_rows(w, start, stop)
    pad = -w.shape[1] % GROUP
    return (np.pad(rows, ((0, 0), (0, pad))) if pad else rows).reshape(-1, GROUP)


def round_levels(x: np.ndarray, unit: np.ndarray, depth: int) -> np.ndarray:
    """Nearest level of each value, as float32; 0 where the unit is 0. `unit` broadcasts against x."""
    top = np.float32(max_level(depth))
    with np.errstate(over="ignore"):
        q = np.divide(x, unit, out=np.zeros_like(x), where=unit > 0)
    return np.clip(np.rint(q, out=q), -top, top, out=q)


def _best_scales(groups: np.ndarray, depth: int) -> np.ndarray:
    """Of four order statistics of |w|, the one that, mapped to level L, has the least squared error.

    groups: (n, 16) float32
    returns: (n,) float32, 0 for groups of zeros
    """
    ordered = np.sort(np.abs(groups), axis=1)
    x = np.ascontiguousarray(groups.T)
    best = np.full(len(groups), np.inf)
    scales = np.zeros(len(groups), np.float32)
    for candidate in CANDIDATES:
        unit = ordered[:, candidate] / np.float32(max_level(depth))
        rest = x - round_levels(x, unit, depth) * unit
        error = np.zeros(len(groups))
        for values in rest:
            error += np.multiply(values, values, dtype=np.float64)
        better = (unit > 0) & (error < best)
        best[better] = error[better]
        scales[better] = ordered[better, candidate]
    return scales


def codebook(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give 27 log-spaced entries (float32) between the extremes of the positive scales, and the 26 boundaries
    (float64) between them."""
    positive = scales[scales > 0]
    if positive.size == 0:
        return np.zeros(ENTRIES, np.float32), np.full(ENTRIES - 1, np.inf)
    low, high = math.log(float(positive.min())), math.log(float(positive.max()))
    if low == high:
        return np.full(ENTRIES, positive.min(), np.float32), np.full(ENTRIES - 1, np.inf)
    step = (high - low) / (ENTRIES - 1)
    entries = [math.exp(low + k * step) for k in range(ENTRIES)]
    entries[0], entries[-1] = float(positive.min()), float(positive.max())
    middles = [math.exp(low + (k + 0.5) * step) for k in range(ENTRIES - 1)]
    return np.array(entries, np.float32), np.array(middles)
