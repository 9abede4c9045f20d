"""tokenizer.json of the library `tokenizers`: byte-level BPE; everything else is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SourceError, UnsupportedError, shown
from .byte_level import merge_table, missing_bytes, spelt_bytes, split_merges
from .settings import Settings, with_roles
from .special_tokens import AddedToken, Ends, added_token, header_entry, unique_tokens
from .vocab import MAX_TOKENS, VOCAB_BLOB, pack_vocab

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
# What the settings of a pre-tokenizer must be to be the one we know by this name.
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt2": [{**BYTE_LEVEL, "use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, {**BYTE_LEVEL, "use_regex": True}],
    "llama3": [
        {"type": "Split", "pattern": {"Regex": LLAMA3_PATTERN}, "behavior": "Isolated", "invert": False},
        {**BYTE_LEVEL, "use_regex": False},
    ],
}
DEFAULTS = {"ByteLevel": {"add_prefix_space": True, "use_regex": True}, "Split": {"invert": False}}
NO_EFFECT = {"trim_offsets"}


@dataclass(frozen=True)
class ByteLevelBPE:
    """A byte-level BPE tokenizer, checked.

    tokens: bytes of each id, b"" where `added` or nothing has the id
    merges: (n, 3) int64
    ids: the plain tokens as the file spells them
    """

    tokens: list[bytes]
    merges: np.ndarray
    pre: str
    ignore_merges: bool
    unk_id: int | None
    missing_bytes: list[int]
    added: dict[int, AddedToken]
    ids: Mapping[str, int]

    def marked(self, path: Path, text: str | None) -> ByteLevelBPE:
        """Make the token of this text a control token. Raises SourceError if there is no such token."""
        if text is None:
            return self
        token = next((t for t in self.added.values() if t.text == text), None)
        if token is None and text not in self.ids:
            raise SourceError(path, f"names the token {shown(text)}, which the vocabulary does not have")
        marked = replace(token, special=True) if token else AddedToken(self.ids[text], text, special=True)
        tokens = list(self.tokens)
        tokens[marked.id] = b""
        refuse_made_controls(path, {marked.id: marked}, self.merges)
        return replace(self, tokens=tokens, added={**self.added, marked.id: marked})


def is_byte_level(raw: Mapping[str, Any]) -> bool:
    """Say whether this is byte-level BPE; else it is most likely a SentencePiece model in other clothes."""
    model = raw.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else None
    return kind == "BPE" and isinstance(model, dict) and not model.get("byte_fallback")


def read_byte_level(path: Path, raw: Mapping[str, Any], settings: Settings) -> ByteLevelBPE:
    """Read the parsed tokenizer.json of a byte-level BPE tokenizer; the settings may add tokens and roles.

    Raises SourceError (damaged), UnsupportedError (a part that we do not know).
    """
    model = raw["model"]
    _refuse_steps(path, raw, model)
    added = unique_tokens(path, [*settings.listed.values(), *listed_tokens(path, raw).values()])
    return assemble(
        path,
        _vocabulary(path, model.get("vocab")),
        with_roles(added, settings),
        split_merges(path, model.get("merges")),
        pre=_pre_tokenizer(path, raw.get("pre_tokenizer")),
        ignore_merges=model.get("ignore_merges") is True,
        unk=model.get("unk_token"),
        fuse_unk=bool(model.get("fuse_unk")),
    )


def assemble(
    path: Path,
    ids: Mapping[str, int],
    added: dict[int, AddedToken],
    merges: list[tuple[str, str]],
    *,
    pre: str,
    ignore_merges: bool,
    unk: Any = None,
    fuse_unk: bool = False,
    unused: frozenset[int] = frozenset(),
) -> ByteLevelBPE:
    """Check a vocabulary as a whole and put it in order of ids.

    ids: spelt token -> id, added tokens may be among them; unused: ids that stand for nothing

    Raises SourceError: a gap, an id or a token twice, a byte missing, a merge of unknown tokens.
    Raises UnsupportedError: fuse_unk.
    """
    for token in added.values():
        if ids.get(token.text, token.id) != token.id:
            raise SourceError(path, f"token {shown(token.text)} has the ids {ids[token.text]} and {token.id}")
    spelt: dict[int, str] = {}
    for text, i in ids.items():
        if i in spelt or (i in added and added[i].text != text):
            other = spelt.get(i) or added[i].text
            raise SourceError(path, f"id {i} is both {shown(other)} and {shown(text)}")
        spelt[i] = text
    size = len({*spelt, *added, *unused})
    if not 0 < size <= MAX_TOKENS:
        raise SourceError(path, f"has {size} tokens, expected 1 to {MAX_TOKENS}")
    gap = next((i for i in range(size) if i not in spelt and i not in added and i not in unused), None)
    if gap is not None:
        raise SourceError(path, f"has no token with id {gap}, but higher ones: it is incomplete")
    table = merge_table(path, ids, merges)
    refuse_made_controls(path, added, table)
    merged = set(table.ravel().tolist())
    plain = {i: text for i, text in spelt.items() if i not in added or i in merged}
    tokens = [spelt_bytes(path, plain[i], i) if i in plain else b"" for i in range(size)]
    missing = missing_bytes(path, tokens)
    unk_id = _unk_id(path, ids, unk, fuse_unk) if missing else None
    return ByteLevelBPE(tokens, table, pre, ignore_merges, unk_id, missing, added, ids)


def listed_tokens(path: Path, raw: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Read the list of added tokens. Raises SourceError, UnsupportedError."""
    listed = raw.get("added_tokens", [])
    if not isinstance(listed, list):
        raise SourceError(path, f'"added_tokens" is a {type(listed).__name__}, expected a list')
    tokens = [added_token(path, t.get("id") if isinstance(t, dict) else None, t) for t in listed]
    return unique_tokens(path, tokens)


def bpe_entry(path: Path, bpe: ByteLevelBPE, ends: Ends) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Make header entry and blob of a checked byte-level BPE tokenizer. Raises SourceError."""
    entry = header_entry(
        path,
        "bpe",
        len(bpe.tokens),
        bpe.added,
        ends,
        pre=bpe.pre,
        ignore_merges=bpe.ignore_merges,
        unk_id=bpe.unk_id,
        missing_bytes=bpe.missing_bytes,
    )
    return entry, {VOCAB_BLOB: pack_vocab(bpe.tokens, bpe.merges)}


def refuse_made_controls(path: Path, added: Mapping[int, AddedToken], merges: np.ndarray) -> None:
    """Raise SourceError if plain text could become a control token."""
    made = set(merges.ravel().tolist())
    for token in added.values():
        if token.special and token.id in made:
            raise SourceError(path, f"the control token {shown(token.text)} takes part in merges of plain text")


def _unk_id(path: Path, ids: Mapping[str, int], unk: Any, fuse: bool) -> int | None:
    if unk in (None, ""):
        return None
    if unk not in ids:
        raise SourceError(path, f'"unk_token" is {shown(unk)}, which is not a token')
    if fuse:
        raise UnsupportedError(path, "fuse_unk is set, which is not supported")
    return ids[unk]


def _vocabulary(path: Path, vocab: Any) -> dict[str, int]:
    if not isinstance(vocab, dict) or not vocab:
        raise SourceError(path, 'has no "vocab" {token: id}')
    for text, token in vocab.items():
        if type(token) is not int or token < 0:
            raise SourceError(path, f"token {shown(text)} has id {shown(token)}, expected an integer from 0 on")
    return vocab


# ---- the steps around the model -------------------------------------------------------------------------


def _refuse_steps(path: Path, raw: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for a step that would change the ids and that we do not run."""
    for step in _steps(raw.get("normalizer"), "normalizers"):
        raise UnsupportedError(path, f"normalizer {_name(step)}; supported is none")
    for step in _steps(raw.get("decoder"), "decoders"):
        if _name(step) != "ByteLevel":
            raise UnsupportedError(path, f"decoder {_name(step)}; supported is ByteLevel")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(path, f"{key} is {shown(model[key])}; supported is none")


def _pre_tokenizer(path: Path, raw: Any) -> str:
    steps = [
        {k: v for k, v in {**DEFAULTS.get(_name(step), {}), **step}.items() if k not in NO_EFFECT}
        for step in _steps(raw, "pretokenizers")
    ]
    for name, wanted in PRE_TOKENIZERS.items():
        if steps == wanted:
            return name
    what = " + ".join(_describe(step) for step in steps) or "none"
    raise UnsupportedError(path, f"pre-tokenizer {what}; supported are {', '.join(PRE_TOKENIZERS)}")


def _describe(step: dict[str, Any]) -> str:
    settings = {k: v for k, v in step.items() if k != "type"}
    return f"{_name(step)}({', '.join(f'{k}={shown(v)}' for k, v in settings.items())})"


def bos_of_post_processor(path: Path, raw: Mapping[str, Any]) -> int | None:
    """Give the id that the post-processor puts in front of a text, or None.

    Raises UnsupportedError for one that does anything else.
    """
    found = None
    for step in _steps(raw.get("post_processor"), "processors"):
        if _name(step) == "ByteLevel":  # offsets only
            continue
        if _name(step) != "TemplateProcessing" or found is not None:
            raise UnsupportedError(path, f"post-processor {_name(step)}; supported is a template that adds BOS")
        found = _bos_of_template(path, step)
    return found


def _bos_of_template(path: Path, step: Mapping[str, Any]) -> int | None:
    single = step.get("single")
    parts = single if isinstance(single, list) else []
    kinds = [str(next(iter(p)))[:60] if isinstance(p, dict) and len(p) == 1 else "?" for p in parts[:9]]
    if kinds == ["Sequence"]:
        return None
    if kinds != ["SpecialToken", "Sequence"]:
        message = f"post-processor template of {' + '.join(kinds) or 'nothing'}; supported is [BOS +] text"
        raise UnsupportedError(path, message)
    try:
        (token,) = step["special_tokens"][parts[0]["SpecialToken"]["id"]]["ids"]
    except (KeyError, TypeError, ValueError) as exc:
        raise SourceError(path, "the post-processor's template names a token that it does not describe") from exc
    if type(token) is not int:
        raise SourceError(path, f"the post-processor's token has id {shown(token)}, expected an integer")
    return token


def _steps(raw: Any, key: str) -> list[dict[str, Any]]:
    """Flatten a step that may be none, one, or a sequence of them."""
    out, todo = [], [raw]
    while todo:
        step = todo.pop()
        if isinstance(step, dict) and step.get("type") == "Sequence" and isinstance(step.get(key), list):
            todo += reversed(step[key])
        elif step is not None:
            out.append(step if isinstance(step, dict) else {"type": repr(step)[:60]})
    return out


def _name(step: Mapping[str, Any]) -> str:
    return str(step.get("type"))[:60]
