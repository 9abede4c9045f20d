"""SentencePiece: the package does the work; this keeps prefix spaces and raw bytes in order."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from formats.tokenizers.spm_model import BYTE, Piece, read_pieces, without_prefix


class SentencePieceEncoder:
    """Turns text into ids with a SentencePiece model.

    model: the bytes of a ModelProto
    prefix: "always" (every text gets a space in front), "first" (only the text at the start), "never"

    Raises ValueError if the package cannot use the model, or it is not what we can run (see read_pieces).
    """

    missing_bytes: frozenset[int] = frozenset()

    def __init__(self, model: bytes, prefix: str) -> None:
        self.pieces: list[Piece] = read_pieces(model)
        self._model, self._prefix = model, prefix
        self._main = self._bare if prefix == "never" else _processor(model)
        if self._main.get_piece_size() != len(self.pieces):
            raise ValueError(f"{self._main.get_piece_size()} pieces are loaded of {len(self.pieces)}")
        self._byte_ids = {p.to_bytes()[0]: i for i, p in enumerate(self.pieces) if p.type == BYTE}

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        """Encode text that holds no control tokens and no surrogates."""
        if not text:
            return []
        with_prefix = self._prefix == "always" or (self._prefix == "first" and at_start)
        return list((self._main if with_prefix else self._bare).encode(text))

    def encode_inside(self, text: str) -> list[int]:
        """Encode text that goes on in the middle of another: no space in front, whatever the model's rule."""
        return list(self._bare.encode(text))

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encode any bytes one by one."""
        return [self._byte_ids[b] for b in data]

    @cached_property
    def _bare(self) -> Any:
        return _processor(without_prefix(self._model))


def _processor(model: bytes) -> Any:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_proto=model)
    except (RuntimeError, TypeError) as exc:
        raise ValueError(f"the package sentencepiece cannot load it: {str(exc)[:200]}") from exc
