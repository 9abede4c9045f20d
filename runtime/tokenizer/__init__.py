"""Text to token ids and back, from what a .trit file carries: no network, no other file."""

from __future__ import annotations

import codecs
import re
import zlib
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from formats.errors import ChecksumError, TensorError, UnsupportedError
from formats.tokenizers.spm_model import MODEL_BLOB
from formats.tokenizers.vocab import VOCAB_BLOB, unpack_vocab
from runtime.tokenizer.bpe import BytePairEncoder
from runtime.tokenizer.control_text import ControlText
from runtime.tokenizer.header import TokenizerHeader, read_header
from runtime.tokenizer.pretokenize import PATTERNS, pre_tokenizer
from runtime.tokenizer.spm import SentencePieceEncoder

if TYPE_CHECKING:
    from formats.container import TritFile

_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")


class TokenizerError(ValueError):
    """The model's file carries no tokenizer, but one is needed."""


class Encoder(Protocol):
    """What turns plain text into ids; missing_bytes: those that have no token."""

    missing_bytes: frozenset[int]

    def encode(self, text: str, at_start: bool = True) -> list[int]: ...

    def encode_inside(self, text: str) -> list[int]: ...

    def encode_bytes(self, data: bytes) -> list[int]: ...


class Tokenizer:
    """A model's tokenizer. Safe to use from several threads.

    bos_id, eos_id: may be None; eos_ids: all ids that end a generation
    add_bos: whether the model wants a text to start with BOS
    special: control token -> id; vocab_size: ids from this on are padding of the embedding matrix
    """

    def __init__(self, header: TokenizerHeader, encoder: Encoder | None, tokens: list[bytes]) -> None:
        self.bos_id, self.eos_id, self.eos_ids = header.bos_id, header.eos_id, header.eos_ids
        self.add_bos, self.special, self.vocab_size = header.add_bos, dict(header.special), header.vocab_size
        self.type = header.type
        self._encoder, self._tokens = encoder, tokens
        self._shown = {token: text.encode("utf-8") for text, token in header.special.items()}
        self._strip_first_space = header.prefix in ("always", "first")
        self._controls = ControlText(
            header.special, header.added, header.strip_left, header.strip_right, header.match_last
        )

    # ---- encoding ---------------------------------------------------------------------------------------

    def encode(self, text: str, add_bos: bool = False, special: bool = False, continuation: bool = False) -> list[int]:
        """Encode a text.

        add_bos: put BOS in front, where there is one and the text does not give it already
        special: read the text of a control token as that token; else it is plain text
        continuation: tokens come before this text, so a SentencePiece model that puts a space in front of the
        first text only (prefix "first") puts none; one that does so after every control token puts one

        Halves of surrogate pairs that stand alone become U+FFFD, as no UTF-8 text can hold them.
        Raises TokenizerError if the file carries no tokenizer.
        """
        encoder = self._need_encoder()
        ids: list[int] = []
        at_start = not continuation
        for part in self._controls.split(_without_surrogates(text), special):
            ids += [part] if isinstance(part, int) else encoder.encode(part, at_start)
            at_start = False
        if add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encode bytes that need not be UTF-8, so that decode_bytes gives them back; nothing is a control token.

        Only bytes in `missing_bytes` are lost: the checkpoint has no token for them. Raises TokenizerError.
        """
        encoder = self._need_encoder()
        ids: list[int] = []
        for part in filter(None, _NOT_UTF8.split(data.decode("utf-8", "surrogateescape"))):
            if _NOT_UTF8.fullmatch(part):
                ids += encoder.encode_bytes(part.encode("utf-8", "surrogateescape"))
            else:
                ids += encoder.encode_inside(part) if ids else encoder.encode(part)
        return ids

    @property
    def missing_bytes(self) -> frozenset[int]:
        """The bytes that no token stands for; they are left out of what is encoded."""
        return self._encoder.missing_bytes if self._encoder else frozenset()

    # ---- decoding ---------------------------------------------------------------------------------------

    def decode(self, ids: Iterable[int], special: bool = False, continuation: bool = False) -> str:
        """Decode ids to text; bytes that are not UTF-8 become U+FFFD.

        special: show control tokens, which are left out otherwise
        continuation: the ids go on from earlier ones, so the space before a first word of SentencePiece stays

        Ids that no token has give nothing.
        """
        return self.decode_bytes(ids, special, continuation).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int], special: bool = False, continuation: bool = False) -> bytes:
        """Decode ids to the bytes that they stand for."""
        data = b"".join(self.token_bytes(i, special) for i in ids)
        return data[1:] if self._strip_first_space and not continuation and data[:1] == b" " else data

    def token_bytes(self, token: int, special: bool = False) -> bytes:
        """The bytes of one token; special: show control tokens, which are b"" otherwise."""
        if token in self._shown:
            return self._shown[token] if special else b""
        return self._tokens[token] if 0 <= token < len(self._tokens) else b""

    @cached_property
    def longest_token(self) -> int:
        """Most bytes of plain text that one token stands for."""
        return max(map(len, self._tokens), default=1) or 1

    @property
    def strips_first_space(self) -> bool:
        """Whether a space at the start of a decoded text was put there by the tokenizer."""
        return self._strip_first_space

    def _need_encoder(self) -> Encoder:
        if self._encoder is None:
            raise TokenizerError("the model carries no tokenizer; convert it again with its tokenizer files")
        return self._encoder


class StreamDecoder:
    """Decodes ids one by one: never a broken character, and all pieces together are decode() of all ids.

    >>> stream = StreamDecoder(tokenizer)
    >>> print(*map(stream.push, ids), stream.flush(), sep="")
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = False, continuation: bool = False) -> None:
        self._tokenizer, self._special = tokenizer, special
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._strip = tokenizer.strips_first_space and not continuation

    def push(self, token: int) -> str:
        """Take one id; return the text that is certain now, often "" in the middle of a character."""
        data = self._tokenizer.token_bytes(token, self._special)
        if self._strip and data:
            data = data[1:] if data[:1] == b" " else data
            self._strip = False
        return self._decode(data)

    def flush(self) -> str:
        """End the text: return U+FFFD for a character that was never finished, else ""."""
        return self._decode(b"", True)


# ---- loading --------------------------------------------------------------------------------------------


def load_tokenizer(trit_file: TritFile) -> Tokenizer:
    """Make the tokenizer that a .trit file carries.

    A file without tokenizer gives one that knows its end tokens but can encode nothing.
    Raises HeaderError, TensorError, ChecksumError (damaged), UnsupportedError (a newer type or pre-tokenizer).
    """
    embeddings = trit_file.config.get("vocab_size")
    return make_tokenizer(trit_file.tokenizer, lambda name: _blob(trit_file, name), trit_file.path, embeddings)


def make_tokenizer(entry: Any, blob: Callable[[str], bytes], path: str, embeddings: Any = None) -> Tokenizer:
    """Make a tokenizer from its header entry and its data. Raises as `load_tokenizer`.

    blob: gives the bytes of a tensor; path: for messages; embeddings: the model's vocab_size, if it is known
    """
    header = read_header(entry, path, embeddings)
    tokens: list[bytes]
    if header.type == "none":
        return Tokenizer(header, None, [])
    if header.type == "sentencepiece":
        encoder, tokens = _sentencepiece(header, blob(MODEL_BLOB), path)
    elif header.type in ("bpe", "tiktoken"):
        encoder, tokens = _byte_pairs(header, blob(VOCAB_BLOB), path)
    else:
        raise UnsupportedError(path, f"has a tokenizer of type {header.type!r:.60}; update tritllama")
    tokens += [b""] * (header.vocab_size - len(tokens))
    for text, token in header.added.items():
        tokens[token] = text.encode("utf-8")
    return Tokenizer(header, encoder, tokens)


def _byte_pairs(header: TokenizerHeader, blob: bytes, path: str) -> tuple[Encoder, list[bytes]]:
    if header.pre not in PATTERNS:
        raise UnsupportedError(path, f"has the pre-tokenizer {header.pre!r:.60}; update tritllama")
    vocab = unpack_vocab(blob, path)
    if len(vocab.tokens) != header.vocab_size:
        message = f"has {len(vocab.tokens)} tokens, the header says {header.vocab_size}; convert the model again"
        raise TensorError(path, message, VOCAB_BLOB)
    for text, token in header.special.items():
        if vocab.tokens[token]:  # then plain text could become a control token
            message = f"has bytes for the control token {text!r:.60}; convert the model again"
            raise TensorError(path, message, VOCAB_BLOB)
    encoder = BytePairEncoder(
        vocab.ids,
        len(vocab.tokens),
        vocab.merges,
        pre_tokenizer(header.pre),
        by_result=header.type == "tiktoken",
        ignore_merges=header.ignore_merges,
        unk_id=header.unk_id,
    )
    undeclared = encoder.missing_bytes - header.missing_bytes
    if undeclared:
        message = f"has no token for byte 0x{min(undeclared):02X}; convert the model again"
        raise TensorError(path, message, VOCAB_BLOB)
    if encoder.n_merges != len(vocab.merges):
        raise TensorError(path, "lists a merge twice; convert the model again", VOCAB_BLOB)
    return encoder, vocab.tokens


def _sentencepiece(header: TokenizerHeader, blob: bytes, path: str) -> tuple[Encoder, list[bytes]]:
    try:
        encoder = SentencePieceEncoder(blob, header.prefix)
    except ValueError as exc:
        message = f"is not a SentencePiece model that can be used: {exc}; convert the model again"
        raise TensorError(path, message, MODEL_BLOB) from exc
    if len(encoder.pieces) > header.vocab_size:
        message = f"has {len(encoder.pieces)} pieces, the header says {header.vocab_size}; convert it again"
        raise TensorError(path, message, MODEL_BLOB)
    return encoder, [piece.to_bytes() for piece in encoder.pieces]


def _blob(trit_file: TritFile, name: str) -> bytes:
    data = trit_file.blob(name)
    if zlib.crc32(data) != trit_file.tensors[name].crc32:
        message = "its bytes are not those that were written; convert the model again"
        raise ChecksumError(trit_file.path, message, name)
    return data


def _without_surrogates(text: str) -> str:
    """Join surrogate pairs, replace halves that stand alone by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
