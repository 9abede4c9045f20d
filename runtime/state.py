"""A session as bytes: the ids that were read and the ring's keys and values, bound to their model.

Layout, little-endian: b"TRITSESS", u32 version, u32 length of a JSON header {"model", "tokens", "conversation"},
the header, the ids as <i4, u32 crc32 of everything before, and the ring's own state (ring/state.py).
"model" is the fingerprint of its file. That covers what the ring's state does not name and its bytes depend on: RoPE,
the means and the balance of keys, the weights of learned projections.
A state may come from anyone: it is read as JSON and numbers, and whatever is wrong with it is a CacheError.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.unfinished import check_target, unfinished

from .errors import CacheError
from .generate import Session
from .ring.state import SavedRing, read_ring, ring_parts

MAGIC = b"TRITSESS"
VERSION = 2
FIXED = struct.Struct("<8sII")
CHECKSUM = struct.Struct("<I")
MAX_HEADER = 1 << 28  # it holds the texts of a conversation


@dataclass(frozen=True)
class SavedSession:
    """A checked state: ids, ring, and the JSON value that was saved beside them."""

    ids: list[int]
    ring: SavedRing
    conversation: Any


def session_parts(session: Session, fingerprint: str, conversation: Any = None) -> Iterator[bytes | memoryview]:
    """Give the state of a session piece by piece. fingerprint: of the model's file; conversation: a JSON value"""
    head = {"model": fingerprint, "tokens": len(session.ids), "conversation": conversation}
    header = json.dumps(head).encode()
    body = FIXED.pack(MAGIC, VERSION, len(header)) + header + np.array(session.ids, "<i4").tobytes()
    yield body
    yield CHECKSUM.pack(zlib.crc32(body))
    yield from ring_parts(session.cache)


def read_session(session: Session, fingerprint: str, stream: io.BufferedIOBase) -> SavedSession:
    """Check a state, every byte of it, and change nothing.

    Raises CacheError if it is damaged or belongs to another model or context.
    """
    fixed = stream.read(FIXED.size)
    if len(fixed) < FIXED.size or not fixed.startswith(MAGIC):
        raise CacheError("these bytes are not a saved state")
    _, version, length = FIXED.unpack(fixed)
    if version != VERSION:
        raise CacheError(f"the saved state has version {version}, this program reads version {VERSION}")
    header = stream.read(min(length, MAX_HEADER))
    count, conversation = _read_header(header, fingerprint)
    ids = _read_ids(stream, count, zlib.crc32(header, zlib.crc32(fixed)))
    if ids and not 0 <= min(ids) <= max(ids) < session.model.config.vocab_size:
        raise CacheError("the saved state is damaged: it has a token id outside of the vocabulary")
    ring = read_ring(session.cache, stream)
    if ring.length != count:
        raise CacheError(f"the saved state is damaged: its ring holds {ring.length} tokens, not {count}")
    return SavedSession(ids, ring, conversation)


def restore_session(session: Session, saved: SavedSession, stream: io.BufferedIOBase) -> None:
    """Put a session into the state that `read_session` has checked for it."""
    session.reset()
    session.cache.restore(saved.ring, stream)
    session.ids = list(saved.ids)


def write_private(path: str | os.PathLike[str], parts: Iterable[bytes | memoryview]) -> None:
    """Write a file that appears whole or not at all, and that only its owner may read. Raises OSError."""
    check_target(path)
    with unfinished(path, private=True) as temporary, open(temporary, "wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def _read_header(raw: bytes, fingerprint: str) -> tuple[int, Any]:
    """Check the JSON header; returns the number of ids and the conversation."""
    try:
        header = json.loads(raw)
        model, count, conversation = header["model"], header["tokens"], header["conversation"]
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise CacheError("the saved state is damaged: its header cannot be read") from exc
    if model != fingerprint:
        found = f"the saved state belongs to another model ({model!r:.80}); this one is {fingerprint}"
        raise CacheError(f"{found}; open the one that it was saved with, or begin anew")
    if type(count) is not int or count < 0:
        raise CacheError(f"the saved state is damaged: it counts {count!r:.80} tokens")
    return count, conversation


def _read_ids(stream: io.BufferedIOBase, count: int, crc: int) -> list[int]:
    """Read the ids and the checksum behind them. crc: of what came before"""
    here, end = stream.tell(), stream.seek(0, io.SEEK_END)
    stream.seek(here)
    if 4 * count + CHECKSUM.size > end - here:
        raise CacheError("the saved state is damaged: it is shorter than its header says")
    raw = stream.read(4 * count)
    if stream.read(CHECKSUM.size) != CHECKSUM.pack(zlib.crc32(raw, crc)):
        raise CacheError("the saved state is damaged: its checksum differs")
    return [int(i) for i in np.frombuffer(raw, "<i4")]
