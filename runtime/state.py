"""A session as bytes: the ids that were read and the ring's keys and values, bound to their model.

Layout, little-endian: b"TRITSESS", u32 version, u32 length of a JSON header {"model", "tokens"}, the header,
the ids as <i4, the ring's own bytes (KVRing.save), u32 crc32 of everything before.
"""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np

from .errors import CacheError
from .generate import Session

MAGIC = b"TRITSESS"
VERSION = 1
FIXED = struct.Struct("<8sII")
CHECKSUM = struct.Struct("<I")


def pack_session(session: Session, fingerprint: str) -> bytes:
    """Return the state of a session. fingerprint: of the model's file."""
    header = json.dumps({"model": fingerprint, "tokens": len(session.ids)}).encode()
    body = b"".join(
        [
            FIXED.pack(MAGIC, VERSION, len(header)),
            header,
            np.array(session.ids, "<i4").tobytes(),
            session.cache.save(),
        ]
    )
    return body + CHECKSUM.pack(zlib.crc32(body))


def unpack_session(session: Session, fingerprint: str, state: bytes) -> None:
    """Put a session into a saved state.

    Raises CacheError, and changes nothing, if the state is damaged or belongs to another model or context.
    """
    if not isinstance(state, (bytes, bytearray, memoryview)):
        raise CacheError(f"a state is bytes, as save_state returns them; got {type(state).__name__}")
    state = bytes(state)
    if len(state) < FIXED.size + CHECKSUM.size or not state.startswith(MAGIC):
        raise CacheError("these bytes are not a saved state")
    _, version, header_length = FIXED.unpack_from(state)
    if version != VERSION:
        raise CacheError(f"the saved state has version {version}, this program reads version {VERSION}")
    body, checksum = state[: -CHECKSUM.size], CHECKSUM.unpack(state[-CHECKSUM.size :])[0]
    if zlib.crc32(body) != checksum:
        raise CacheError("the saved state is damaged: its checksum differs")
    start = FIXED.size + header_length
    count = _read_header(body[FIXED.size : start], fingerprint)
    if start + 4 * count > len(body):
        raise CacheError("the saved state is damaged: it is shorter than its header says")
    ids = np.frombuffer(body, "<i4", count, start).tolist()
    if ids and not 0 <= min(ids) <= max(ids) < session.model.config.vocab_size:
        raise CacheError("the saved state is damaged: it has a token id outside of the vocabulary")
    session.cache.load(body[start + 4 * count :])
    if session.cache.length != count:
        session.reset()
        raise CacheError(f"the saved state is damaged: the ring does not hold its {count} tokens")
    session.ids = ids


def _read_header(raw: bytes, fingerprint: str) -> int:
    """Check the JSON header; returns the number of ids."""
    try:
        header = json.loads(raw)
        model, count = header["model"], header["tokens"]
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise CacheError("the saved state is damaged: its header cannot be read") from exc
    if model != fingerprint:
        raise CacheError(f"the saved state belongs to another model ({model}); this one is {fingerprint}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise CacheError(f"the saved state is damaged: it counts {count!r} tokens")
    return count
