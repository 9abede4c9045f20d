"""Answers that are JSON, or JSON of a schema: llguidance says at each token which may follow."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .sampler import OptionError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

Floats = npt.NDArray[np.float32]

DEEPEST_SCHEMA = 64
LARGEST_SCHEMA = 1 << 16  # characters
# Spaces where the model likes are where small models stay for ever.
COMPACT: Any = {"whitespace_flexible": False, "lenient": False}


class Constraint:
    """A logits processor that lets through only tokens with which the text can still become what it must be."""

    def __init__(self, vocabulary: Any, grammar: str) -> None:
        """vocabulary: of `vocabulary()`; grammar: of `json_grammar()`"""
        from llguidance import LLMatcher

        self._matcher = LLMatcher(vocabulary, grammar, log_level=0)
        self._read: int | None = None
        if self._matcher.is_error():
            raise OptionError(f"the JSON schema cannot be used: {_first_line(self._matcher.get_error())}")

    def __call__(self, ids: Sequence[int], logits: Floats) -> Floats:
        new = [] if self._read is None else [int(i) for i in ids[self._read :]]
        self._read = len(ids)
        if new:
            self._matcher.consume_tokens(new)
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise OptionError(f"the JSON schema cannot be followed: {_first_line(self._matcher.get_error())}")
        allowed = np.unpackbits(mask, bitorder="little")[: len(logits)]
        logits[: len(allowed)][allowed == 0] = -np.inf
        logits[len(allowed) :] = -np.inf
        return logits


def vocabulary(tokenizer: Tokenizer, vocab_size: int, ends: Collection[int]) -> Any:
    """Prepare a tokenizer for Constraint: about a second for 128 thousand tokens, so keep it.

    ends: ids that end an answer. Raises OptionError if llguidance is missing or nothing ends an answer.
    """
    try:
        from llguidance import LLTokenizer, TokenizerWrapper
    except ImportError as exc:
        raise OptionError("JSON answers need llguidance; install it with: pip install 'tritllama[json]'") from exc
    if not ends:
        raise OptionError("the model has no token that ends an answer, which JSON answers need")
    return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, min(ends))), eos_token=sorted(ends))


class _Vocabulary:
    """What TokenizerWrapper asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end: int) -> None:
        self.eos_token_id, self.bos_token_id = end, tokenizer.bos_id
        self.special_token_ids = sorted(tokenizer.special.values())
        self.tokens = [tokenizer.token_bytes(i, special=True) for i in range(vocab_size)]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)


def json_grammar(schema: Mapping[str, Any] | bool) -> str:
    """Return the grammar of a JSON schema. Raises OptionError for one that is too large or not JSON."""
    from llguidance import LLMatcher

    if _depth(schema) > DEEPEST_SCHEMA:
        raise OptionError(f"the JSON schema is nested more than {DEEPEST_SCHEMA} deep")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (TypeError, ValueError) as exc:
        raise OptionError(f"the JSON schema is not JSON: {exc}") from exc
    if len(text) > LARGEST_SCHEMA:
        raise OptionError(f"the JSON schema has {len(text)} characters; at most {LARGEST_SCHEMA} are read")
    try:
        return str(LLMatcher.grammar_from_json_schema(text, overrides=COMPACT))
    except ValueError as exc:
        raise OptionError(f"the JSON schema cannot be used: {_first_line(str(exc))}") from exc


def schema_of(response_format: Any) -> Mapping[str, Any] | None:
    """Return the schema that OpenAI's response_format asks for, None for plain text. Raises OptionError."""
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise OptionError(f'response_format must be {{"type": ...}}, got {response_format!r:.60}')
    kind = response_format.get("type")
    wanted = {"type", "json_schema"} if kind == "json_schema" else {"type"}
    if kind not in ("text", "json_object", "json_schema"):
        raise OptionError(f"response_format.type must be text, json_object or json_schema, got {kind!r:.60}")
    if extra := set(response_format) - wanted:
        raise OptionError(f"response_format has the unknown field {sorted(map(str, extra))[0]!r:.60}")
    if kind == "json_schema":
        return _named_schema(response_format.get("json_schema"))
    return None if kind == "text" else {"type": "object"}


def _named_schema(named: Any) -> Mapping[str, Any]:
    schema = named.get("schema") if isinstance(named, Mapping) else None
    if not isinstance(schema, Mapping):
        raise OptionError('response_format.json_schema must be {"name": ..., "schema": {...}}')
    if extra := set(named) - {"name", "schema", "strict", "description"}:
        raise OptionError(f"response_format.json_schema has the unknown field {sorted(map(str, extra))[0]!r:.60}")
    return schema


def _depth(value: Any) -> int:
    """How deep lists and objects are nested, counted no further than matters."""
    depth, level = 0, [value]
    while level and depth <= DEEPEST_SCHEMA:
        depth += 1
        inner = [part for outer in level for part in (outer.values() if isinstance(outer, Mapping) else outer)]
        level = [part for part in inner if isinstance(part, (Mapping, list, tuple))]
    return depth


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else "llguidance gives no reason"
