"""The KV ring's tokens as bytes, and back. Nothing of a ring is touched before all of a state has been checked.

Layout: b"TRITKV7\\n", a line of JSON (the ring's geometry), the used slots of every array, slot by slot for each head,
u32 crc32 of all before.
A state may come from anyone: whatever is wrong with it is a CacheError.
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CacheError
from .codecs import base_of, put_rows, rows

if TYPE_CHECKING:
    from .cache import KVRing

MAGIC = b"TRITKV7\n"
MAX_HEAD = 1 << 20
MAX_LENGTH = 1 << 40  # tokens
OPTIONS = {"capacity": "n_ctx, -c", "chunk": "n_batch, -b", "codec": "kv, --kv"}  # what a context is asked for with
_CHUNK = 1 << 20
_CHUNK_SLOTS = 1 << 13


@dataclass(frozen=True)
class SavedRing:
    """A checked state of a ring: length, oldest stored token, sinks, and where its arrays begin in the stream."""

    length: int
    oldest: int
    sinks: int
    start: int


def ring_parts(ring: KVRing) -> Iterator[bytes | memoryview]:
    """Give a ring's state piece by piece, so that a large one is never held twice."""
    crc = 0
    head: list[bytes | memoryview] = [MAGIC, json.dumps(_geometry(ring), sort_keys=True).encode() + b"\n"]
    for part in chain(head, (_as_bytes(rows(*piece)) for piece in _pieces(ring, ring.length))):
        crc = zlib.crc32(part, crc)
        yield part
    yield crc.to_bytes(4, "little")


def read_ring(ring: KVRing, stream: io.BufferedIOBase) -> SavedRing:
    """Check the state that goes from here to the end of a stream, every byte of it, against the ring's geometry.

    Raises CacheError.
    """
    begin = stream.tell()
    if stream.read(len(MAGIC)) != MAGIC:
        raise CacheError("the saved state is damaged, or was not written by this version")
    head = stream.readline(MAX_HEAD)
    start = stream.tell()
    _check_sum(stream, begin)
    length, oldest, sinks = _check_geometry(ring, head)
    expected = sum(_nbytes(*piece) for piece in _pieces(ring, length))
    found = stream.tell() - 4 - start
    if found != expected:
        raise CacheError(f"the saved state is damaged: it has {found} bytes of keys and values, not {expected}")
    return SavedRing(length, oldest, sinks, start)


def fill_ring(ring: KVRing, saved: SavedRing, stream: io.BufferedIOBase) -> None:
    """Copy the arrays of a state that `read_ring` has checked. Raises CacheError if the stream has changed since."""
    stream.seek(saved.start)
    for tiles, slots in _pieces(ring, saved.length):
        given = np.empty((1, _nbytes(tiles, slots) // tiles.itemsize), tiles.dtype)
        if stream.readinto(_as_bytes(given)) != given.nbytes:
            raise CacheError("the saved state became shorter while it was read")
        put_rows(tiles, slots, given)


def _check_sum(stream: io.BufferedIOBase, begin: int) -> None:
    """Compare the checksum of a stream's bytes from `begin` on with its last four."""
    end = stream.seek(0, 2) - 4
    stream.seek(begin)
    crc, buffer = 0, memoryview(bytearray(_CHUNK))
    while (left := end - stream.tell()) > 0:
        block = buffer[: min(left, _CHUNK)]
        if not stream.readinto(block):
            break
        crc = zlib.crc32(block, crc)
    if stream.read() != crc.to_bytes(4, "little"):
        raise CacheError("the saved state is damaged: its checksum differs")


def _geometry(ring: KVRing) -> dict[str, Any]:
    config = ring.config
    return {
        "codec": ring.codec,
        "modules": [[m.layer, m.side, m.rank, m.rope] for m in ring.modules],
        "n_layers": config.n_layers,
        "n_kv_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "capacity": ring.capacity,
        "chunk": ring.chunk,
        "sinks": ring.sinks,
        "length": ring.length,
        "oldest": ring.oldest,
    }


def _check_geometry(ring: KVRing, head: bytes) -> tuple[int, int, int]:
    """Read the line of JSON; returns length, oldest and sinks. Raises CacheError if they do not fit this ring."""
    try:
        saved = json.loads(head)
    except (ValueError, RecursionError) as exc:
        raise CacheError("the saved state is damaged: its first line cannot be read") from exc
    expected = _geometry(ring)
    if not isinstance(saved, dict) or set(saved) != set(expected):
        raise CacheError("the saved state is damaged: its first line does not describe a ring")
    numbers = tuple(saved[key] for key in ("length", "oldest", "sinks"))
    expected.update(zip(("length", "oldest", "sinks"), numbers, strict=True))
    for key, value in expected.items():
        if saved[key] != value:
            option = f" (see {OPTIONS[key]})" if key in OPTIONS else ""
            raise CacheError(f"the saved state has {key} = {saved[key]!r:.80}, this context has {value}{option}")
    if not all(type(n) is int for n in numbers):
        raise CacheError(f"the saved state is damaged: it counts {numbers!r:.80}")
    length, oldest, sinks = numbers
    if not 0 <= length < MAX_LENGTH or not 0 <= sinks < ring.capacity or not 0 <= oldest <= length:
        raise CacheError(f"the saved state is damaged: it has {length} tokens from {oldest} on, {sinks} sinks")
    base, needed = base_of(sinks), max(sinks, length + 1 - (ring.capacity - sinks))
    lost = length - (ring.slots - base) if length > ring.slots else 0
    if oldest < lost or max(needed, base) < min(length, oldest):
        raise CacheError(f"the saved state is damaged: {length} tokens cannot be there from {oldest} on")
    return length, oldest, sinks


def _pieces(ring: KVRing, length: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Arrays of one head and some of their used slots, for a ring of that many tokens; together all of them."""
    used = min(length, ring.slots)
    for plane in ring.planes:
        for tiles in plane.arrays:
            for head in range(len(tiles) if tiles.size else 0):
                for start in range(0, used, _CHUNK_SLOTS):
                    yield tiles[head : head + 1], np.arange(start, min(start + _CHUNK_SLOTS, used))


def _nbytes(tiles: np.ndarray, slots: np.ndarray) -> int:
    return len(slots) * tiles[0, 0, 0, 0].nbytes


def _as_bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
