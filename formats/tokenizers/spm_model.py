"""SentencePiece models as bytes: enough of the protocol buffer to check, correct and build one.

A model is a ModelProto: field 1, repeated, the pieces (1 text, 2 float score, 3 type); field 2 the
trainer's settings (3 model type, 35 byte fallback, 40 to 43 the ids of unknown, BOS, EOS, padding); field 3
the normalizer (1 name, 2 compiled character map, 3 add a space in front, 4 squeeze spaces, 5 write spaces
as U+2581). Of a field that is there twice the last value holds, and messages are merged: so settings are
changed by appending.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..errors import shown

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2
SPACE = "\u2581"
MODEL_BLOB = "tokenizer.model"

_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_NO_SPACE_IN_FRONT = b"\x1a\x02\x18\x00"


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    type: int

    def to_bytes(self) -> bytes:
        """The bytes that this piece decodes to, b"" for control tokens and the unknown token."""
        if self.type in (CONTROL, UNKNOWN):
            return b""
        byte = _BYTE_PIECE.fullmatch(self.text) if self.type == BYTE else None
        return bytes([int(byte[1], 16)]) if byte else self.text.replace(SPACE, " ").encode("utf-8")


def read_pieces(model: bytes) -> list[Piece]:
    """Read the vocabulary of a model, in id order.

    Raises ValueError saying what is wrong: damaged, empty, without byte pieces, a piece there twice.
    """
    pieces = [_piece(value) for number, kind, value in _fields(model) if number == _PIECE]
    if not pieces:
        raise ValueError("it holds no pieces")
    if len({p.text for p in pieces}) != len(pieces):
        raise ValueError("a piece is there twice")
    found = {p.to_bytes() for p in pieces if p.type == BYTE}
    missing = [b for b in range(256) if bytes([b]) not in found]
    if missing:
        raise ValueError(f"it has no piece for byte 0x{missing[0]:02X}; byte fallback is needed")
    if sum(p.type == BYTE for p in pieces) != 256:
        raise ValueError("it has more than 256 byte pieces")
    if sum(p.type == UNKNOWN for p in pieces) != 1:
        raise ValueError("it does not have exactly one unknown piece")
    return pieces


def with_types(model: bytes, types: dict[int, int]) -> bytes:
    """Copy a model with other types for some of its pieces."""
    out, i = [], 0
    for number, kind, value in _fields(model):
        if kind == _BYTES:
            assert isinstance(value, bytes)
            extra = _number(3, types[i]) if number == _PIECE and i in types else b""
            out.append(_message(number, value + extra))
        elif kind == _VARINT:
            assert isinstance(value, int)
            out.append(_number(number, value))
        else:
            raise ValueError(f"field {number} has wire type {kind}")
        i += number == _PIECE
    return b"".join(out)


def adds_prefix(model: bytes) -> bool:
    """Say whether a model puts a space in front of every text. Raises ValueError."""
    return bool(_setting(model, _NORMALIZER, 3, True))


def puts_spaces_last(model: bytes) -> bool:
    """Say whether the space belongs to the word before it, which is not supported. Raises ValueError."""
    return bool(_setting(model, _TRAINER, 24, False))


def without_prefix(model: bytes) -> bytes:
    """Copy a model so that it puts no space in front of a text."""
    return model + _NO_SPACE_IN_FRONT


def build_bpe_model(pieces: Sequence[Piece], *, add_prefix: bool, squeeze: bool, ids: dict[str, int]) -> bytes:
    """Build a BPE model with byte fallback and no normalization.

    squeeze: whether runs of spaces become one; ids: "unk", and "bos", "eos" where there are such tokens.
    """
    trainer = [_number(3, BPE), _number(4, len(pieces)), _number(35, 1)]
    for number, name in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad")):
        trainer.append(_number(number, ids.get(name, -1)))
    for number, name in ((45, "unk"), (46, "bos"), (47, "eos")):
        if name in ids:
            trainer.append(_message(number, pieces[ids[name]].text.encode("utf-8")))
    normalizer = [_message(1, b"identity"), _number(3, add_prefix), _number(4, squeeze), _number(5, 1)]
    out = [_message(_PIECE, _piece_bytes(p)) for p in pieces]
    out += [_message(_TRAINER, b"".join(trainer)), _message(_NORMALIZER, b"".join(normalizer))]
    return b"".join(out)


def is_model(data: bytes) -> bool:
    """Say whether a file looks like a SentencePiece model: it starts with a piece."""
    return data[:1] == b"\x0a" and len(data) > 2


def _setting(model: bytes, message: int, field: int, default: int) -> int:
    for number, kind, value in _fields(model):
        if number == message and kind == _BYTES:
            assert isinstance(value, bytes)
            for n, k, v in _fields(value):
                default = v if n == field and k == _VARINT and isinstance(v, int) else default
    return default


# ---- the wire format ------------------------------------------------------------------------------------


def _fields(data: bytes) -> Iterator[tuple[int, int, int | bytes]]:
    """Yield (field number, wire type, value) of a message; fixed-width values come as their bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(data, at)
            yield number, kind, value
            continue
        if kind == _BYTES:
            size, at = _varint(data, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"it ends at byte {len(data)}, in the middle of a field")
        yield number, kind, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ValueError(f"a number that does not end, at byte {at}")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _piece(message: int | bytes) -> Piece:
    text, score, kind = "", 0.0, NORMAL
    if not isinstance(message, bytes):
        raise ValueError("a piece that is a number")
    for number, wire, value in _fields(message):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and wire == _FIXED32 and isinstance(value, bytes):
            (score,) = struct.unpack("<f", value)
        elif number == 3 and isinstance(value, int):
            kind = value
    if not text or not NORMAL <= kind <= BYTE:
        raise ValueError(f"a piece {shown(text)} of type {kind}")
    if kind == BYTE and not _BYTE_PIECE.fullmatch(text):
        raise ValueError(f"a byte piece called {shown(text)}")
    return Piece(text, score, kind)


def _piece_bytes(piece: Piece) -> bytes:
    score = struct.pack("<Bf", 2 << 3 | _FIXED32, piece.score)
    return _message(1, piece.text.encode("utf-8")) + score + _number(3, piece.type)


def _message(number: int, value: bytes) -> bytes:
    return _encode(number << 3 | _BYTES) + _encode(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _encode(number << 3 | _VARINT) + _encode(int(value) & 0xFFFF_FFFF_FFFF_FFFF)


def _encode(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
