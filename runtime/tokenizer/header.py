"""The header entry of a tokenizer, every field checked. What the fields mean: formats/tokenizers/special_tokens.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from formats.errors import HeaderError
from formats.tokenizers.special_tokens import MAX_TEXT_CHARS
from formats.tokenizers.vocab import MAX_TOKENS

PREFIXES = ("always", "first", "never")


@dataclass(frozen=True)
class TokenizerHeader:
    """The entry, checked; fields that another type of tokenizer has are left at their defaults."""

    type: str
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]
    add_bos: bool
    special: Mapping[str, int]
    added: Mapping[str, int]
    strip_left: frozenset[int]
    strip_right: frozenset[int]
    match_last: frozenset[int]
    pre: str = ""
    ignore_merges: bool = False
    unk_id: int | None = None
    missing_bytes: frozenset[int] = frozenset()
    prefix: str = ""


def read_header(entry: Any, path: str, embeddings: Any = None) -> TokenizerHeader:
    """Check a tokenizer's header entry.

    embeddings: the model's vocab_size, if it is known

    Raises HeaderError naming the field.
    """
    if not isinstance(entry, dict):
        raise HeaderError(path, f"tokenizer is {entry!r:.60}, expected an object; convert the model again")
    fields = _Fields(entry, path)
    kind = fields.text("type")
    if kind == "none":
        fields.size = MAX_TOKENS
    else:
        fields.size = fields.integer("vocab_size", 1, MAX_TOKENS)
        if type(embeddings) is int and fields.size > embeddings:
            raise fields.bad("vocab_size", fields.size, f"at most {embeddings}, the model's embeddings")
    special, added = fields.texts("special"), fields.texts("added")
    if set(special) & set(added) or set(special.values()) & set(added.values()):
        raise HeaderError(path, "tokenizer.special and tokenizer.added overlap; convert the model again")
    return TokenizerHeader(
        type=kind,
        vocab_size=0 if kind == "none" else fields.size,
        bos_id=fields.token("bos_id"),
        eos_id=fields.token("eos_id"),
        eos_ids=fields.tokens("eos_ids"),
        add_bos=fields.flag("add_bos"),
        special=special,
        added=added,
        strip_left=fields.tokens("strip_left"),
        strip_right=fields.tokens("strip_right"),
        match_last=fields.tokens("match_last"),
        pre=fields.text("pre") if kind in ("bpe", "tiktoken") else "",
        ignore_merges=kind == "tiktoken" or fields.flag("ignore_merges"),
        unk_id=fields.token("unk_id"),
        missing_bytes=frozenset() if kind == "tiktoken" else fields.numbers("missing_bytes", 256),
        prefix=fields.prefix() if kind == "sentencepiece" else "",
    )


class _Fields:
    """Reads one entry; size: ids must be below it."""

    def __init__(self, raw: dict[str, Any], path: str) -> None:
        self.raw, self.path, self.size = raw, path, 0

    def bad(self, key: str, value: Any, expected: str) -> HeaderError:
        message = f"tokenizer.{key} is {value!r:.60}, expected {expected}; convert the model again"
        return HeaderError(self.path, message)

    def text(self, key: str) -> str:
        value = self.raw.get(key)
        if not isinstance(value, str):
            raise self.bad(key, value, "a text")
        return value

    def prefix(self) -> str:
        value = self.text("prefix")
        if value not in PREFIXES:
            raise self.bad("prefix", value, f"one of {', '.join(PREFIXES)}")
        return value

    def flag(self, key: str) -> bool:
        value = self.raw.get(key, False)
        if not isinstance(value, bool):
            raise self.bad(key, value, "true or false")
        return value

    def integer(self, key: str, first: int, last: int) -> int:
        value = self.raw.get(key)
        if type(value) is not int or not first <= value <= last:
            raise self.bad(key, value, f"an integer from {first} to {last}")
        return value

    def token(self, key: str) -> int | None:
        return None if self.raw.get(key) is None else self.integer(key, 0, self.size - 1)

    def tokens(self, key: str) -> frozenset[int]:
        return self.numbers(key, self.size)

    def numbers(self, key: str, limit: int) -> frozenset[int]:
        values = self.raw.get(key, [])
        if not isinstance(values, list) or not all(type(v) is int and 0 <= v < limit for v in values):
            raise self.bad(key, values, f"a list of integers from 0 to {limit - 1}")
        return frozenset(values)

    def texts(self, key: str) -> dict[str, int]:
        """Read {text: id}: no text empty, too long or with half a surrogate pair, no id twice."""
        values = self.raw.get(key, {})
        if not isinstance(values, dict):
            raise self.bad(key, values, "an object {text: id}")
        for text, token in values.items():
            if type(token) is not int or not 0 <= token < self.size:
                raise self.bad(f"{key}[{text!r:.60}]", token, f"an id from 0 to {self.size - 1}")
            if not 0 < len(text) <= MAX_TEXT_CHARS or any("\ud800" <= c <= "\udfff" for c in text):
                raise self.bad(key, text, f"texts of 1 to {MAX_TEXT_CHARS} characters")
        if len(set(values.values())) != len(values):
            raise self.bad(key, values, "every id once")
        return values
