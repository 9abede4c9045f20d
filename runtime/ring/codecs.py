"""How the KV ring stores numbers. What is written here in NumPy is the definition; compiled kernels give the same bits.

A vector is cut into groups, its last one filled with zeros.

| codec | group | a number is read as |
|---|---|---|
| f32 | 16 | itself |
| f16 | 16 | itself, in half precision; larger numbers than 65504 are stored as that |
| q8 | 32 to 256 | code * scale, code in -127..127, scale in f16 |
| q4 | 32 | code * scale + base, code in 0..15, scale and base in f16 |

Groups of q8 are as long as the largest power of two that divides the vector, within these bounds: a scale serves
numbers of one size, and so these are after their rotation.

Scales are one for each group, token and head. That of q8 is taken from the largest number. Those of q4, and its bases,
begin with the smallest and the largest number, which rounds none by more than half a step. Twice they are fitted to the
codes by least squares and the codes are made anew, and what that gives is stored where the sum of squared errors is
less: the ends of a group are few, and a smaller step helps all others.

Before vectors become q8 or q4 they are rotated by a Hadamard matrix, which spreads outliers over all numbers (QuaRot;
Ashkboos et al., 2024). It is its own inverse, and leaves products of rotated queries and keys as they were. Codes of
learned projections, of which the first are the largest, are rotated too.

Keys have a mean, far from zero, that says nothing: it shifts all scores of a query alike. Where it is known (SPEC.md,
6.2), keys that become q4, and queries, are first mirrored so that the mean falls on the first axis. The rotation turns
that into a constant, which the base of a group takes up, so that codes are left for what differs. Before that, keys are
multiplied by their balance, where that is known, and queries divided by it: numbers that queries look at closely are
then rounded in smaller steps, at the cost of those that they hardly see.
"""

from __future__ import annotations

import mmap
import re
from contextlib import suppress

import numpy as np

from ..config import MAX_HEAD_DIM
from ..errors import CacheError
from .rounding import LARGEST, hadamard, mirror, mirrored, quantize_q4, quantize_q8

CODECS = ("f32", "f16", "q8", "q4")
BLOCK = 128  # slots that attention reads at a time; planes have a whole number of such blocks
TILE = 32  # slots of a block whose keys lie together


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

    rotated: numbers in one block of the Hadamard rotation, the largest power of two that divides width, at most 512; 1
    for none
    mirror: (heads, 3, width) float32, or None: of each head the normal of its mirror, what keys are multiplied by, and
    what queries are
    codes: of one vector float32, float16, int8, or uint8 with two codes in a byte: of each group's 16 bytes, byte i
    holds code i in its lower and code i + 16 in its upper half
    scales: of one vector (groups,) float16 for q8, (groups, 2) for q4 with scale and base, else none

    Everything lies in the order in which attention reads it: the blocks of one head, then those of the next; or, where
    all heads are read together, the heads of one block, then those of the next. What a block has of a head is in one
    piece: the scales of its tokens, then their codes.
    memory: (nbytes,) uint8, all of it; data: a view of (heads, blocks, bytes)

    Bytes lie as integer kernels take them, four to a 32-bit lane and 64 to a register, so that nothing is transposed
    when it is read. A lane has four bytes of one of 32 keys, which are multiplied with a query's; or one byte of
    each of four values, which are multiplied with four weights. Of values, 32 numbers of all tokens lie together, P
    bytes of each token.
    scales (numbers, BLOCK tokens); codes of f32 and f16 (BLOCK tokens, numbers)
    of keys (BLOCK / TILE, bytes / 4, TILE tokens, 4 bytes); of values (bytes / P, BLOCK / 4, P bytes, 4 tokens)
    """

    def __init__(
        self,
        side: str,
        codec: str,
        heads: int,
        width: int,
        slots: int,
        facts: np.ndarray | None = None,
        together: bool = False,
    ) -> None:
        """side: "k" or "v"; slots: rounded up to whole blocks

        facts: (2, heads, width) float32, of keys: the means that they scatter about, and their balance
        together: attention reads all heads of a block before the next block
        """
        self.side, self.codec, self.heads, self.width = side, codec, heads, width
        self.slots = -(-slots // BLOCK) * BLOCK
        self.rotated = min(width & -width, MAX_HEAD_DIM) if codec in ("q8", "q4") else 1
        self.group = {"f32": 16, "f16": 16, "q8": min(max(self.rotated, 32), 256), "q4": 32}[codec]
        # The base is a group's: other groups than whole blocks of the rotation would not see a constant.
        whole = codec == "q4" and self.rotated == width and width % self.group == 0
        self.mirror = None if facts is None or not whole else mirror(*facts)
        groups = -(-width // self.group)
        self.padded = groups * self.group
        dtype = {"f32": np.float32, "f16": np.float16, "q8": np.int8, "q4": np.uint8}[codec]
        self.code_bytes = self.padded // 2 if codec == "q4" else self.padded * np.dtype(dtype).itemsize
        self.scale_bytes = {"q8": 2 * groups, "q4": 4 * groups}.get(codec, 0)
        blocks, n_scales = self.slots // BLOCK, BLOCK * self.scale_bytes
        piece = n_scales + BLOCK * self.code_bytes
        self.memory = _aligned(blocks * heads * piece)
        by_block, by_head = (blocks, heads, piece), (heads, blocks, piece)
        self.data = self.memory.reshape(by_block).swapaxes(0, 1) if together else self.memory.reshape(by_head)
        # Views of (heads, blocks, tiles of a block, tokens of a tile, pieces, numbers of a piece)
        scales = self.data[..., :n_scales].view(np.float16).reshape(heads, blocks, -1, BLOCK, 1, 1)
        self._scales = scales.transpose(0, 1, 4, 3, 2, 5)
        codes = self.data[..., n_scales:].view(dtype)
        if not self.scale_bytes:
            self._codes = codes.reshape(heads, blocks, BLOCK, 1, 1, self.padded)
        elif side == "k":
            codes = codes.reshape(heads, blocks, BLOCK // TILE, self.code_bytes // 4, TILE, 4)
            self._codes = codes.transpose(0, 1, 2, 4, 3, 5)
        else:
            per_32 = 32 * self.code_bytes // self.padded
            codes = codes.reshape(heads, blocks, self.code_bytes // per_32, BLOCK // 4, per_32, 4)
            self._codes = codes.transpose(0, 1, 3, 5, 2, 4)

    @property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes and scales: (heads, blocks, tiles of a block, tokens of a tile, pieces, numbers of a piece)."""
        return self._codes, self._scales

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def write(self, slots: np.ndarray, vectors: np.ndarray) -> None:
        """Store vectors. slots: (n,) integer; vectors: (n, heads * width) float32"""
        x = np.zeros((self.heads, len(slots), self.padded), np.float32)
        given = vectors.reshape(len(slots), self.heads, self.width).transpose(1, 0, 2)
        x[:, :, : self.width] = self.turn(given)
        if self.codec in ("f32", "f16"):
            put_rows(self._codes, slots, np.clip(x, -LARGEST, LARGEST) if self.codec == "f16" else x)
            return
        groups = x.reshape(*x.shape[:2], -1, self.group)
        codes, scales = (quantize_q8 if self.codec == "q8" else quantize_q4)(groups)
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
    return tiles[_places(tiles, slots)].reshape(len(tiles), len(slots), -1)


def put_rows(tiles: np.ndarray, slots: np.ndarray, given: np.ndarray) -> None:
    """Write some slots of one of a plane's arrays. slots: (n,) integer; given: (heads, n, ...), a slot's numbers"""
    tiles[_places(tiles, slots)] = given.reshape(len(tiles), len(slots), *tiles.shape[4:])


def _places(tiles: np.ndarray, slots: np.ndarray) -> tuple[slice | np.ndarray, ...]:
    within, of_tile = slots % BLOCK, tiles.shape[3]
    return slice(None), slots // BLOCK, within // of_tile, within % of_tile


def _aligned(nbytes: int) -> np.ndarray:
    """Zero bytes in a mapping of their own: pages that are never written take no memory, and with the ring all go back.

    np.zeros promises neither once the allocator has seen a ring go. Pages are large (2 MB) where the system has such:
    small ones are looked up every few tokens, and attention would wait for it.
    Raises MemoryError.
    """
    # Shared, as mmap makes them, a forked child would write into its parent's.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        raw = mmap.mmap(-1, max(1, nbytes), **flags)
    except (OSError, OverflowError) as exc:
        raise MemoryError(f"for {nbytes} bytes of keys and values; take a smaller context (n_ctx, -c)") from exc
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # of a kernel without them
            raw.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(raw, np.uint8, nbytes)
