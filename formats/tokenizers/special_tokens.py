"""Control tokens and the header entry that describes a tokenizer, whatever its type.

Keys that every type has: "type" ("tiktoken", "bpe", "sentencepiece"), "vocab_size" (ids 0 to vocab_size - 1
belong to the tokenizer), "bos_id" and "eos_id" (int or null), "eos_ids" (every id that ends a generation),
"add_bos" (whether a text starts with BOS), "special" {text: id} (control tokens: parsed only on request, no
text of their own), "added" {text: id} (ordinary text that is always one token, matched before all else).
Optional, each a list of ids from these two: "strip_left", "strip_right" (white space on that side goes with
the token), "match_last" (searched for in what the others leave).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import SourceError, UnsupportedError, shown
from .vocab import MAX_TOKENS

# Tokens that end an answer under any of these names, besides those that the checkpoint calls end tokens.
END_NAMES = (
    "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|im_end|>", "</s>", "<|end|>",
    "<|end_of_turn|>", "<end_of_turn>", "<|eot|>", "<|eom|>",
)  # fmt: skip
MAX_TEXT_CHARS = 1024
FLAGS = ("special", "lstrip", "rstrip", "normalized", "single_word")


@dataclass(frozen=True)
class AddedToken:
    """A token that is searched for in the text itself; special: a control token."""

    id: int
    text: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Ends:
    """What a checkpoint says about the start and the end of a text."""

    bos_id: int | None
    eos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool


def added_token(path: str | os.PathLike[str], token: Any, entry: Any) -> AddedToken:
    """Read an added token as tokenizer.json and tokenizer_config.json write it.

    Raises SourceError, UnsupportedError (single_word).
    """
    if type(token) is not int or token < 0 or not isinstance(entry, dict):
        raise SourceError(path, f"an added token has id {shown(token)}, expected an integer and a description")
    text = entry.get("content")
    if not isinstance(text, str) or not 0 < len(text) <= MAX_TEXT_CHARS:
        message = f"added token {token} is {shown(text)}, expected a text of 1 to {MAX_TEXT_CHARS} characters"
        raise SourceError(path, message)
    flags = {key: entry.get(key, False) for key in FLAGS}
    wrong = [key for key, value in flags.items() if not isinstance(value, bool)]
    if wrong:
        message = f"added token {token}: {wrong[0]} is {shown(flags[wrong[0]])}, expected true or false"
        raise SourceError(path, message)
    if flags.pop("single_word"):
        raise UnsupportedError(path, f"added token {shown(text)} has single_word set, which is not supported")
    return AddedToken(token, text, **flags)


def unique_tokens(path: str | os.PathLike[str], tokens: Iterable[AddedToken]) -> dict[int, AddedToken]:
    """Index added tokens by id. Raises SourceError if an id or a text is there twice."""
    out: dict[int, AddedToken] = {}
    texts: dict[str, int] = {}
    for token in tokens:
        other = out.get(token.id)
        if other is not None and other.text != token.text:
            raise SourceError(path, f"id {token.id} is both {shown(other.text)} and {shown(token.text)}")
        if texts.setdefault(token.text, token.id) != token.id:
            raise SourceError(path, f"token {shown(token.text)} has the ids {texts[token.text]} and {token.id}")
        out[token.id] = token
    return out


def header_entry(
    path: str | os.PathLike[str],
    kind: str,
    vocab_size: int,
    added: Mapping[int, AddedToken],
    ends: Ends,
    **extra: Any,
) -> dict[str, Any]:
    """Put the header entry of a tokenizer together.

    Raises SourceError if an id lies outside the vocabulary.
    """
    if not 0 < vocab_size <= MAX_TOKENS:
        raise SourceError(path, f"has ids up to {vocab_size - 1}; at most {MAX_TOKENS} tokens are supported")
    tokens = [added[i] for i in sorted(added)]
    special = {t.text: t.id for t in tokens if t.special}
    named = [special[name] for name in END_NAMES if name in special]
    eos_ids = sorted({*ends.eos_ids, *named, *([] if ends.eos_id is None else [ends.eos_id])})
    known = [("bos_token_id", ends.bos_id), *(("eos_token_id", i) for i in eos_ids)]
    for name, token in known:
        if token is not None and not 0 <= token < vocab_size:
            raise SourceError(path, f"{name} is {token}, but the tokenizer has the ids 0 to {vocab_size - 1}")
    if ends.add_bos and ends.bos_id is None:
        raise SourceError(path, "says that texts start with a BOS token, but names none")
    entry: dict[str, Any] = {
        "type": kind,
        "vocab_size": vocab_size,
        "bos_id": ends.bos_id,
        "eos_id": ends.eos_id,
        "eos_ids": eos_ids,
        "add_bos": ends.add_bos,
        "special": special,
        "added": {t.text: t.id for t in tokens if not t.special},
    }
    flags = {
        "strip_left": [t.id for t in tokens if t.lstrip],
        "strip_right": [t.id for t in tokens if t.rstrip],
        "match_last": [t.id for t in tokens if t.normalized],
    }
    return {**entry, **{key: ids for key, ids in flags.items() if ids}, **extra}
