"""How the KV ring stores numbers. What is written here in NumPy is the definition; compiled kernels give the same bits.

A vector is cut into groups, its last one filled with zeros.

| codec | group | a number is read as |
|---|---|---|
| f32 | 16 | itself |
| f16 | 16 | itself, in half precision; larger numbers than 65504 are stored as that |
| q8 | 64 (32 where 64 does not divide the vector) | code * scale, code in -127..127, scale in f16 |
| q4 | 32 | code * scale + base, code in 0..15, scale and base in f16 |

Scales are one for each group, token and head. That of q8 is taken from the largest number. Those of q4, and its bases,
begin with the smallest and the largest number, which rounds none by more than half a step. Twice they are fitted to the
codes by least squares and the codes are made anew, and what that gives is stored where the sum of squared errors is
less: the ends of a group are few, and a smaller step helps all others.

Before keys and values become q8 or q4 they are rotated by a Hadamard matrix, which spreads outliers over all numbers
(QuaRot; Ashkboos et al., 2024). It is its own inverse, and leaves products of rotated queries and keys as they were.
Codes of learned projections are not rotated.

Keys have a mean, far from zero, that says nothing: it shifts all scores of a query alike. Where it is known (SPEC.md,
6.2), keys that become q4, and queries, are first mirrored so that the mean falls on the first axis. The rotation turns
that into a constant, which the base of a group takes up, so that codes are left for what differs. Before that, keys are
multiplied by their balance, where that is known, and queries divided by it: numbers that queries look at closely are
then rounded in smaller steps, at the cost of those that they hardly see.
"""

from __future__ import annotations

import mmap
import re

import numpy as np

from ..errors import CacheError

CODECS = ("f32", "f16", "q8", "q4")
BLOCK = 64  # slots that attention reads at a time; planes have a whole number of such blocks
LARGEST = np.float32(65504)  # of float16
FITS = 2  # of scale and base of a q4 group


def base_of(sinks: int) -> int:
    """The first slot of a ring that is used again: blocks with sinks stay as they are.

    Every block of positions that begins at a multiple of BLOCK so lies in one piece."""
    return -(-sinks // BLOCK) * BLOCK


def slots_of(capacity: int, chunk: int) -> int:
    """Slots of a ring: whole blocks.

    While a chunk is appended its first token must still see what its last one pushes out of the window; a part of a
    block may be left over beside the sinks."""
    return (capacity + chunk + 2 * BLOCK - 3) // BLOCK * BLOCK


def side_codecs(kv: str) -> tuple[str, str]:
    """Read "q8" or "k=q8,v=q4": the codec of keys and the codec of values.

    Raises CacheError.
    """
    match = re.fullmatch(r"k=(\w+),v=(\w+)|(\w+)", kv)
    found = (match[1] or match[3], match[2] or match[3]) if match else ("", "")
    if not set(found) <= set(CODECS):
        raise CacheError(f"the KV ring has no codec {kv!r}; it has {', '.join(CODECS)}, or k=CODEC,v=CODEC")
    return found


def code_codec(codec: str, rank: int) -> str:
    """The codec of a learned projection's codes in a ring of that codec.

    Codes carry more than the numbers they stand for: they are never 4-bit. Short ones would gain nothing from q8.
    """
    return codec if codec in ("f32", "f16") else "q8" if rank >= 32 else "f16"


class Plane:
    """For each slot of the ring `heads` vectors of `width` numbers: the keys or the values of one layer.

    rotated: numbers in one block of the Hadamard rotation, the largest power of two that divides width; 1 for none
    mirror: (heads, 3, width) float32, or None: of each head the normal of its mirror, what keys are multiplied by, and
    what queries are
    codes: of one vector float32, float16, int8, or uint8 with two codes in a byte: of each group's 16 bytes, byte i
    holds code i in its lower and code i + 16 in its upper half
    scales: of one vector (groups,) float16 for q8, (groups, 2) for q4 with scale and base, else none

    Bytes lie as integer kernels take them, four to a 32-bit lane and 64 to a register, so that nothing is transposed
    when it is read. A lane has four bytes of one of sixteen keys, which are multiplied with a query's; or one byte of
    each of four values, which are multiplied with four weights. Scales lie by sixteen tokens.
    keys (heads, slots / 16, bytes / 4, 16 tokens, 4 bytes); values (heads, slots / 4, bytes / 16, 16 bytes, 4 tokens)
    scales (heads, slots / 16, numbers, 16 tokens); f32 and f16 (heads, slots, numbers)
    """

    def __init__(
        self,
        side: str,
        codec: str,
        heads: int,
        width: int,
        slots: int,
        learned: bool = False,
        facts: np.ndarray | None = None,
    ) -> None:
        """side: "k" or "v"; learned: it stores the codes of a learned projection; slots: rounded up to whole blocks

        facts: (2, heads, width) float32, of keys: the means that they scatter about, and their balance
        """
        self.side, self.codec, self.heads, self.width = side, codec, heads, width
        self.slots = -(-slots // BLOCK) * BLOCK
        self.rotated = width & -width if codec in ("q8", "q4") and not learned else 1
        self.group = {"f32": 16, "f16": 16, "q8": 32 if width % 64 else 64, "q4": 32}[codec]
        # The base is a group's: other groups than whole blocks of the rotation would not see a constant.
        whole = codec == "q4" and self.rotated == width and width % self.group == 0
        self.mirror = None if facts is None or not whole else _mirror(*facts)
        groups = -(-width // self.group)
        self.padded = groups * self.group
        dtype = {"f32": np.float32, "f16": np.float16, "q8": np.int8, "q4": np.uint8}[codec]
        self.code_bytes = self.padded // 2 if codec == "q4" else self.padded * np.dtype(dtype).itemsize
        self.scale_bytes = {"q8": 2 * groups, "q4": 4 * groups}.get(codec, 0)
        # Codes and scales of a slot, by tile and place in it: (heads, tiles, tokens of a tile, pieces, piece)
        if self.scale_bytes:
            tile = (self.slots // 16, self.code_bytes // 4, 16, 4)
            if side == "v":
                tile = (self.slots // 4, self.code_bytes // 16, 16, 4)
            self.codes = _aligned((heads, *tile), dtype)
            self._codes = self.codes.transpose((0, 1, 3, 2, 4) if side == "k" else (0, 1, 4, 2, 3))
        else:
            self.codes = _aligned((heads, self.slots, self.padded), dtype)
            self._codes = self.codes[:, :, None, None]
        self.scales = _aligned((heads, self.slots // 16, self.scale_bytes // 2, 16), np.float16)
        self._scales = self.scales.transpose(0, 1, 3, 2)[..., None]

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Everything that is stored, as (heads, tiles, tokens of a tile, pieces, numbers of a piece)."""
        return self._codes, self._scales

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def write(self, slots: np.ndarray, vectors: np.ndarray) -> None:
        """Store vectors. slots: (n,) integer; vectors: (n, heads * width) float32"""
        x = np.zeros((self.heads, len(slots), self.padded), np.float32)
        given = vectors.reshape(len(slots), self.heads, self.width).transpose(1, 0, 2)
        x[:, :, : self.width] = self.turn(given)
        if self.codec in ("f32", "f16"):
            put_rows(self._codes, slots, np.clip(x, -LARGEST, LARGEST) if self.codec == "f16" else x)
            return
        groups = x.reshape(*x.shape[:2], -1, self.group)
        codes, scales = (_quantize_q8 if self.codec == "q8" else _quantize_q4)(groups)
        put_rows(self._codes, slots, codes)
        put_rows(self._scales, slots, scales)

    def read(self, slots: np.ndarray) -> np.ndarray:
        """Give the stored vectors. slots: (n,) integer; returns: (heads, n, width) float32"""
        codes = rows(self._codes, slots)
        if self.codec in ("f32", "f16"):
            return codes[:, :, : self.width].astype(np.float32)
        groups = codes.reshape(*codes.shape[:2], self.padded // self.group, -1)
        scales = rows(self._scales, slots).astype(np.float32).reshape(*groups.shape[:3], -1)
        if self.codec == "q8":
            x = groups * scales
        else:
            x = np.concatenate((groups & 15, groups >> 4), axis=3) * scales[..., :1] + scales[..., 1:]
        return self.turn_back(x.reshape(*codes.shape[:2], self.padded)[:, :, : self.width])

    def turn(self, x: np.ndarray, queries: bool = False) -> np.ndarray:
        """Balance, mirror and rotate vectors as they are stored, or queries so that products with these are as before.

        x: (heads, n, width) float32; returns: as x
        """
        if self.mirror is not None:
            x = mirrored(x * self.mirror[:, 2 if queries else 1, None], self.mirror[:, 0])
        return hadamard(x, self.rotated)

    def turn_back(self, x: np.ndarray, queries: bool = False) -> np.ndarray:
        """Undo `turn`."""
        x = hadamard(x, self.rotated)
        if self.mirror is None:
            return x
        return mirrored(x, self.mirror[:, 0]) * self.mirror[:, 1 if queries else 2, None]


def rows(tiles: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Some slots of one of a plane's arrays. slots: (n,) integer; returns: (heads, n, numbers), a copy"""
    found = tiles[:, slots // tiles.shape[2], slots % tiles.shape[2]]
    return found.reshape(len(tiles), len(slots), -1)


def put_rows(tiles: np.ndarray, slots: np.ndarray, given: np.ndarray) -> None:
    """Write some slots of one of a plane's arrays. slots: (n,) integer; given: (heads, n, ...), a slot's numbers"""
    shape = (len(tiles), len(slots), *tiles.shape[3:])
    tiles[:, slots // tiles.shape[2], slots % tiles.shape[2]] = given.reshape(shape)


def _mirror(mean: np.ndarray, balance: np.ndarray) -> np.ndarray:
    """What swaps the balanced mean's direction and the first axis (Householder, 1958), and the factors before it.

    mean, balance: (heads, width) float32; returns: (heads, 3, width)
    """
    mean = mean * balance
    normal = mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    normal[:, 0] -= np.where(mean.any(axis=1), 1, 0)
    normal *= np.sqrt(2) / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), np.finfo(np.float32).tiny)
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


def _quantize_q8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x: (..., group) float32; returns: codes as x, int8; scales (...) float16"""
    scales = np.minimum(np.abs(x).max(axis=-1) / np.float32(127), LARGEST).astype(np.float16)
    return np.clip(np.rint(_divided(x, scales)), -127, 127).astype(np.int8), scales


def _quantize_q4(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _aligned(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros in a mapping of their own: pages that are never written take no memory, and with the ring all go back.

    np.zeros promises neither once the allocator has seen a ring go.
    """
    count = int(np.prod(shape))
    # Shared, as mmap makes them, a forked child would write into its parent's.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    raw = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize), **flags)
    return np.frombuffer(raw, dtype, count).reshape(shape)
