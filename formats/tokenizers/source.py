"""A checkpoint's tokenizer to header entry and blobs of a .trit file; what is not known exactly is refused.

| source | type | blob |
|---|---|---|
| tokenizer.json (byte-level BPE), GGUF model "gpt2" | bpe | tokenizer.vocab, see vocab.py |
| tokenizer.model of Llama 3 (tiktoken ranks) | tiktoken | tokenizer.vocab |
| tokenizer.model of Llama 2 (SentencePiece), GGUF model "llama" | sentencepiece | tokenizer.model, itself |

The keys that every header entry has are in special_tokens.py. "bpe" and "tiktoken" add "pre" (the name of
the pre-tokenizer), "ignore_merges" (a word that is a token as a whole is taken as it is), "unk_id" (the
token of a byte that has none; null: such bytes are dropped) and "missing_bytes" (those bytes).
"sentencepiece" adds "prefix": whether text gets a space in front, "always" (after each control token too),
"first" (at the start) or "never".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import SourceError, UnsupportedError, shown
from ..sources.source import read_json
from .byte_level import all_splits, is_rank_file, read_ranks
from .gguf import tokenizer_from_gguf
from .hf_json import bos_of_post_processor, bpe_entry, is_byte_level, listed_tokens, read_byte_level
from .settings import Settings, read_settings, with_roles
from .special_tokens import AddedToken, Ends, header_entry
from .spm_model import (
    BYTE,
    CONTROL,
    MODEL_BLOB,
    UNKNOWN,
    USER_DEFINED,
    adds_prefix,
    is_model,
    puts_spaces_last,
    read_pieces,
    with_types,
)
from .vocab import VOCAB_BLOB, pack_vocab

__all__ = ["tokenizer_from_gguf", "tokenizer_from_hf"]

Tokenizer = tuple[dict[str, Any], dict[str, bytes]]

LLAMA3_RANKS = 128_000
LLAMA3_BOS, LLAMA3_EOS = "<|begin_of_text|>", "<|end_of_text|>"
# Where they are among the 256 control tokens; the rest are <|reserved_special_token_0|> and so on.
LLAMA3_NAMES = {
    0: LLAMA3_BOS, 1: LLAMA3_EOS, 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
}  # fmt: skip


def tokenizer_from_hf(folder: Path) -> Tokenizer:
    """Read the tokenizer of a Hugging Face folder: (header entry, blobs by tensor name).

    Raises SourceError (none there, damaged), UnsupportedError (not a kind that we run exactly).
    """
    settings = read_settings(folder)
    path = folder / "tokenizer.json"
    models = [p for p in (folder / "tokenizer.model", folder / "original" / "tokenizer.model") if p.is_file()]
    if path.is_file():
        raw = read_json(path)
        if is_byte_level(raw):
            return _from_json(path, raw, settings)
        model = raw.get("model")
        kind = model.get("type") if isinstance(model, dict) else None
        if not models or not is_model(models[0].read_bytes()):
            message = f"holds a {kind!s:.60} model, not byte-level BPE; put its SentencePiece tokenizer.model here"
            raise UnsupportedError(path, message)
        if not settings.listed:
            settings = replace(settings, listed=listed_tokens(path, raw))
    if not models:
        raise SourceError(folder, "has no tokenizer.json and no tokenizer.model")
    data = models[0].read_bytes()
    if is_model(data):
        return _from_sentencepiece(models[0], data, settings)
    if is_rank_file(data):
        tokens = read_ranks(models[0], data)
        if len(tokens) != LLAMA3_RANKS:
            message = f"has {len(tokens)} tiktoken ranks; only Llama 3's {LLAMA3_RANKS} come with a known pattern"
            raise UnsupportedError(models[0], message)
        return from_ranks(models[0], tokens, settings)
    raise SourceError(models[0], f"starts with {shown(data[:16])}, expected tiktoken ranks or a SentencePiece model")


# ---- byte-level BPE and tiktoken ------------------------------------------------------------------------


def _from_json(path: Path, raw: Mapping[str, Any], settings: Settings) -> Tokenizer:
    bpe = read_byte_level(path, raw, settings)
    bpe = bpe.marked(settings.path, settings.bos).marked(settings.path, settings.eos)
    template_bos = bos_of_post_processor(path, raw)
    bos_id = _role(bpe.added, settings, settings.bos)
    if bos_id is None:
        bos_id = template_bos if template_bos is not None else settings.bos_id
    add_bos = template_bos is not None if settings.add_bos is None else settings.add_bos
    ends = _ends(bpe.added, settings, bos_id, add_bos and bos_id is not None)
    settings.check_size(path, len(bpe.tokens))
    return bpe_entry(path, bpe, ends)


def from_ranks(path: Path, tokens: list[bytes], settings: Settings) -> Tokenizer:
    """Make header entry and blob of Llama 3's tokenizer from the tokens of its rank file.

    The file names no control tokens: added_tokens_decoder does, or else they are those of Llama 3.1.
    Raises SourceError if they overlap the ranks.
    """
    base = len(tokens)
    added = with_roles(settings.listed, settings) or _llama3_controls(base)
    if min(added) < base or len({*range(base), *added}) != max(added) + 1:
        raise SourceError(settings.path, f"has control tokens {min(added)} to {max(added)}, expected {base} on")
    size = max(added) + 1
    settings.check_size(path, size)
    bos_id = _role(added, settings, settings.bos or LLAMA3_BOS)
    eos = settings.eos or (None if settings.eos_ids else LLAMA3_EOS)
    ends = _ends(added, replace(settings, eos=eos), bos_id, settings.add_bos is not False)
    extra = {"pre": "llama3", "ignore_merges": True, "unk_id": None, "missing_bytes": []}
    entry = header_entry(path, "tiktoken", size, added, ends, **extra)
    return entry, {VOCAB_BLOB: pack_vocab([*tokens, *[b""] * (size - base)], all_splits(tokens))}


def _llama3_controls(base: int) -> dict[int, AddedToken]:
    names, reserved = [], 0
    for i in range(256):
        name = LLAMA3_NAMES.get(i)
        names.append(name or f"<|reserved_special_token_{reserved}|>")
        reserved += name is None
    return {base + i: AddedToken(base + i, name, special=True) for i, name in enumerate(names)}


# ---- SentencePiece --------------------------------------------------------------------------------------


def _from_sentencepiece(path: Path, model: bytes, settings: Settings) -> Tokenizer:
    try:
        pieces = read_pieces(model)
        prefix = adds_prefix(model) and settings.add_prefix_space
        spaces_last = puts_spaces_last(model)
    except ValueError as exc:
        raise SourceError(path, f"is not a SentencePiece model that can be used: {exc}") from exc
    if spaces_last:
        raise UnsupportedError(path, "puts spaces at the end of words (treat_whitespace_as_suffix)")
    ids = {p.text: i for i, p in enumerate(pieces)}
    for token in settings.listed.values():
        if ids.get(token.text, token.id) != token.id:
            message = f"gives {shown(token.text)} the id {token.id}, the model {ids[token.text]}"
            raise SourceError(settings.path, message)
        if token.id < len(pieces) and pieces[token.id].text != token.text:
            message = f"calls id {token.id} {shown(token.text)}, the model calls it {shown(pieces[token.id].text)}"
            raise SourceError(settings.path, message)
    controls = {i: AddedToken(i, p.text, special=True) for i, p in enumerate(pieces) if p.type in (CONTROL, UNKNOWN)}
    added = with_roles({**settings.listed, **controls}, settings)
    # What we search for ourselves SentencePiece must not find: a control token typed by a user is plain text.
    ours = {t.id: CONTROL for t in added.values() if t.id < len(pieces) and _is_ours(t, pieces[t.id].type)}
    size = max(len(pieces), max(added) + 1)
    settings.check_size(path, size)
    bos_id = settings.bos_id if settings.bos is None else _role(added, settings, settings.bos)
    if bos_id is None:
        bos_id = _id_of(added, "<s>")
    add_bos = bos_id is not None and settings.add_bos is not False
    ends = _ends(added, settings, bos_id, add_bos)
    scheme = ("always" if settings.legacy else "first") if prefix else "never"
    entry = header_entry(path, "sentencepiece", size, added, ends, prefix=scheme)
    if any(pieces[i].type == BYTE for i in ours):
        raise SourceError(settings.path, "makes a byte piece of the SentencePiece model a control token")
    return entry, {MODEL_BLOB: with_types(model, ours) if ours else model}


def _is_ours(token: AddedToken, kind: int) -> bool:
    return kind == USER_DEFINED or (token.special and kind not in (CONTROL, UNKNOWN))


def _ends(added: Mapping[int, AddedToken], settings: Settings, bos_id: int | None, add_bos: bool) -> Ends:
    eos_id = _role(added, settings, settings.eos)
    if eos_id is None and settings.eos_ids:
        eos_id = settings.eos_ids[0]
    return Ends(bos_id, eos_id, settings.eos_ids, add_bos)


def _role(added: Mapping[int, AddedToken], settings: Settings, text: str | None) -> int | None:
    token = _id_of(added, text)
    if token is None and text is not None:
        raise SourceError(settings.path, f"names the token {shown(text)}, which the vocabulary does not have")
    return token


def _id_of(added: Mapping[int, AddedToken], text: str | None) -> int | None:
    return next((t.id for t in added.values() if t.text == text), None)
