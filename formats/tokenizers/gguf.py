"""The tokenizer in a GGUF file's metadata: byte-level BPE ("gpt2") and SentencePiece ("llama")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SourceError, UnsupportedError, shown
from .byte_level import split_merges
from .hf_json import assemble, bpe_entry
from .special_tokens import MAX_TEXT_CHARS, AddedToken, Ends, header_entry, unique_tokens
from .spm_model import (
    BYTE,
    CONTROL,
    MODEL_BLOB,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    build_bpe_model,
    read_pieces,
)

PREFIX = "tokenizer.ggml."
# llama.cpp's name -> (our pre-tokenizer, ignore_merges, whether texts start with BOS if nothing is said).
PRE_TOKENIZERS = {
    "gpt-2": ("gpt2", False, False),
    "gpt2": ("gpt2", False, False),
    "phi-2": ("gpt2", False, False),
    "smollm": ("smollm", False, False),
    "starcoder": ("smollm", False, False),
    "refact": ("smollm", False, False),
    "llama-bpe": ("llama3", True, True),
    "llama3": ("llama3", True, True),
    "llama-v3": ("llama3", True, True),
}


def tokenizer_from_gguf(
    fields: Mapping[str, object], path: Path | str = "the GGUF file"
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Read the tokenizer from GGUF metadata (key -> plain value): (header entry, blobs by tensor name).

    Raises SourceError (damaged), UnsupportedError (a model or pre-tokenizer that we do not run exactly).
    """
    path = Path(path)
    own = {key[len(PREFIX) :]: value for key, value in fields.items() if key.startswith(PREFIX)}
    model = own.get("model")
    if model not in ("gpt2", "llama"):
        raise UnsupportedError(path, f"{PREFIX}model is {shown(model)}; supported are 'gpt2' and 'llama'")
    tokens = own.get("tokens")
    if not isinstance(tokens, list) or not tokens or not all(isinstance(t, str) and t for t in tokens):
        raise SourceError(path, f"{PREFIX}tokens is not a list of texts")
    types = _numbers(path, own, "token_type", len(tokens))
    wrong = next((i for i, t in enumerate(types) if t not in range(NORMAL, BYTE + 1)), None)
    if wrong is not None:
        raise SourceError(path, f"token {wrong} has type {shown(types[wrong])}, expected 1 to 6")
    return _from_gpt2(path, own, tokens, types) if model == "gpt2" else _from_llama(path, own, tokens, types)


def _from_gpt2(
    path: Path, own: Mapping[str, Any], tokens: list[str], types: Sequence[int]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    pre = own.get("pre")
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        message = f"{PREFIX}pre is {shown(pre)}; supported are {', '.join(PRE_TOKENIZERS)}"
        raise UnsupportedError(path, message)
    name, ignore_merges, bos_first = PRE_TOKENIZERS[pre]
    for i, kind in enumerate(types):
        if kind == BYTE:
            raise SourceError(path, f"token {i} ({shown(tokens[i])}) is a byte token; byte-level BPE has none")
    added = _added(path, tokens, types)
    ids: dict[str, int] = {}
    for i, text in enumerate(tokens):
        if types[i] == NORMAL and ids.setdefault(text, i) != i:
            raise SourceError(path, f"token {shown(text)} has the ids {ids[text]} and {i}")
    unused = frozenset(i for i, kind in enumerate(types) if kind == UNUSED)
    merges = split_merges(path, own.get("merges"))
    bpe = assemble(path, ids, added, merges, pre=name, ignore_merges=ignore_merges, unused=unused)
    return bpe_entry(path, bpe, _ends(path, own, bos_first))


def _from_llama(
    path: Path, own: Mapping[str, Any], tokens: list[str], types: Sequence[int]
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Rebuild the SentencePiece model; user-defined pieces are matched before it, as llama.cpp does."""
    if own.get("precompiled_charsmap"):
        message = "has a SentencePiece model with a normalizer, which cannot be rebuilt exactly"
        raise UnsupportedError(path, message)
    scores = _numbers(path, own, "scores", len(tokens))
    prefix = _flag(path, own, "add_space_prefix", True)
    squeeze = _flag(path, own, "remove_extra_whitespaces", False)
    kinds = [CONTROL if kind == USER_DEFINED else kind for kind in types]
    pieces = [Piece(text, float(score), kind) for text, score, kind in zip(tokens, scores, kinds, strict=True)]
    if UNKNOWN not in kinds:
        raise SourceError(path, "has no unknown token (type 2), so the SentencePiece model cannot be rebuilt")
    ends = _ends(path, own, True)
    roles = {"unk": kinds.index(UNKNOWN), "bos": ends.bos_id, "eos": ends.eos_id}
    known = {name: i for name, i in roles.items() if i is not None and i < len(pieces)}
    model = build_bpe_model(pieces, add_prefix=prefix, squeeze=squeeze, ids=known)
    try:
        read_pieces(model)
    except ValueError as exc:
        raise SourceError(path, f"has a vocabulary that is no SentencePiece model: {exc}") from exc
    added = _added(path, tokens, types)
    entry = header_entry(path, "sentencepiece", len(tokens), added, ends, prefix="always" if prefix else "never")
    return entry, {MODEL_BLOB: model}


def _added(path: Path, tokens: list[str], types: Sequence[int]) -> dict[int, AddedToken]:
    chosen = [(i, t) for i, t in enumerate(tokens) if types[i] in (CONTROL, UNKNOWN, USER_DEFINED)]
    too_long = next((i for i, text in chosen if len(text) > MAX_TEXT_CHARS), None)
    if too_long is not None:
        raise SourceError(path, f"control token {too_long} has more than {MAX_TEXT_CHARS} characters")
    return unique_tokens(path, [AddedToken(i, t, types[i] != USER_DEFINED) for i, t in chosen])


def _ends(path: Path, own: Mapping[str, Any], bos_first: bool) -> Ends:
    bos_id, eos_id = _token(path, own, "bos_token_id"), _token(path, own, "eos_token_id")
    more = [_token(path, own, key) for key in ("eot_token_id", "eom_token_id")]
    add_bos = _flag(path, own, "add_bos_token", bos_first and bos_id is not None)
    if _flag(path, own, "add_eos_token", False):
        raise UnsupportedError(path, f"{PREFIX}add_eos_token is set: prompts would end with EOS")
    return Ends(bos_id, eos_id, tuple(i for i in (eos_id, *more) if i is not None), add_bos)


def _token(path: Path, own: Mapping[str, Any], key: str) -> int | None:
    value = own.get(key)
    if value is not None and (type(value) is not int or value < 0):
        raise SourceError(path, f"{PREFIX}{key} is {shown(value)}, expected a token id")
    return value


def _flag(path: Path, own: Mapping[str, Any], key: str, default: bool) -> bool:
    value = own.get(key, default)
    if not isinstance(value, bool):
        raise SourceError(path, f"{PREFIX}{key} is {shown(value)}, expected true or false")
    return value


def _numbers(path: Path, own: Mapping[str, Any], key: str, count: int) -> list[Any]:
    value = own.get(key)
    values = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(values, list) or len(values) != count:
        raise SourceError(path, f"{PREFIX}{key} is not a list of {count} numbers, one for each token")
    if not all(type(v) in (int, float) for v in values):
        raise SourceError(path, f"{PREFIX}{key} holds something that is not a number")
    return values
