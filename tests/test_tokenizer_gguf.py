"""Tokenizers of GGUF files: the same as from the files that they were made of; each fault is one clear line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from formats.errors import SourceError, UnsupportedError
from formats.tokenizers.source import tokenizer_from_gguf
from formats.tokenizers.spm_model import read_pieces
from tests.tokenizer_texts import BOS, HARD_TEXTS, KJV, from_json, load, scripts, sentencepiece_tokenizer, small_json


def gguf_bpe(pre: str = "llama-bpe") -> dict[str, Any]:
    """The small tokenizer as llama.cpp's converter writes it."""
    raw = small_json()
    tokens = {i: (text, 1) for text, i in raw["model"]["vocab"].items()}
    for token in raw["added_tokens"]:
        tokens[token["id"]] = (token["content"], 3 if token["special"] else 4)
    tokens[1508] = ("[PAD1508]", 5)
    values = {
        "model": "gpt2", "pre": pre, "merges": raw["model"]["merges"],
        "tokens": [tokens[i][0] for i in range(len(tokens))],
        "token_type": [tokens[i][1] for i in range(len(tokens))],
        "bos_token_id": BOS, "eos_token_id": 1501, "eot_token_id": 1504,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()} | {"general.name": "x"}


@pytest.mark.parametrize(("name", "pre"), [("llama-bpe", "llama3"), ("smollm", "smollm"), ("gpt-2", "gpt2")])
def test_gguf_and_tokenizer_json_give_the_same(name: str, pre: str, tmp_path: Path) -> None:
    header, blobs = tokenizer_from_gguf(gguf_bpe(name))
    raw = small_json(pre)
    for token in raw["added_tokens"]:  # GGUF does not know these flags
        token.update(lstrip=False, rstrip=False, normalized=False)
    ours, theirs = load((header, blobs)), from_json(raw, tmp_path)
    for text in [*HARD_TEXTS, scripts(500)]:
        assert ours.encode(text, special=True) == theirs.encode(text, special=True)
    assert (header["pre"], header["eos_ids"], header["add_bos"]) == (pre, [1501, 1504], pre == "llama3")
    assert ours.decode([1508]) == ""


def gguf_llama() -> dict[str, Any]:
    pieces = read_pieces(KJV.read_bytes())
    values = {
        "model": "llama", "tokens": [p.text for p in pieces], "scores": [p.score for p in pieces],
        "token_type": [p.type for p in pieces], "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


def test_sentencepiece_is_rebuilt_from_gguf(tmp_path: Path) -> None:
    header, blobs = tokenizer_from_gguf(gguf_llama())
    ours, theirs = load((header, blobs)), sentencepiece_tokenizer(tmp_path)
    assert read_pieces(blobs["tokenizer.model"]) == read_pieces(KJV.read_bytes())
    assert (header["prefix"], header["add_bos"], header["special"]) == ("always", True, theirs.special)
    for text in [*HARD_TEXTS, scripts(500)]:
        assert ours.encode(text, special=True) == theirs.encode(text, special=True)


@pytest.mark.parametrize(
    ("base", "change", "error", "match"),
    [
        (gguf_bpe, {"model": "bert"}, UnsupportedError, "model is 'bert'"),
        (gguf_bpe, {"model": None}, UnsupportedError, "model is None"),
        (gguf_bpe, {"pre": "default"}, UnsupportedError, "pre is 'default'; supported are"),
        (gguf_bpe, {"pre": None}, UnsupportedError, "pre is None"),
        (gguf_bpe, {"pre": ["x"]}, UnsupportedError, "pre is"),
        (gguf_bpe, {"tokens": []}, SourceError, "tokens is not a list"),
        (gguf_bpe, {"tokens": ["a", ""]}, SourceError, "tokens is not a list"),
        (gguf_bpe, {"token_type": [1]}, SourceError, "list of 1509 numbers"),
        (gguf_bpe, {"token_type": [7] * 1509}, SourceError, "token 0 has type 7"),
        (gguf_bpe, {"token_type": [6] * 1509}, SourceError, "byte token"),
        (gguf_bpe, {"tokens": ["a"] * 1509}, SourceError, "'a' has the ids 1500 and 1501"),
        (gguf_bpe, {"merges": None}, SourceError, "merges"),
        (gguf_bpe, {"merges": ["a zzzz"]}, SourceError, "not a token"),
        (gguf_bpe, {"bos_token_id": 99999}, SourceError, "bos_token_id is 99999"),
        (gguf_bpe, {"eos_token_id": -1}, SourceError, "eos_token_id is -1"),
        (gguf_bpe, {"eos_token_id": True}, SourceError, "eos_token_id is True"),
        (gguf_bpe, {"add_bos_token": 1}, SourceError, "expected true or false"),
        (gguf_bpe, {"add_eos_token": True}, UnsupportedError, "add_eos_token"),
        (gguf_bpe, {"add_bos_token": True, "bos_token_id": None}, SourceError, "names none"),
        (gguf_llama, {"scores": None}, SourceError, "scores"),
        (gguf_llama, {"scores": ["x"] * 2048}, SourceError, "not a number"),
        (gguf_llama, {"token_type": [1] * 2048}, SourceError, "no unknown token"),
        (gguf_llama, {"token_type": [2, *[1] * 2047]}, SourceError, "no piece for byte"),
        (gguf_llama, {"precompiled_charsmap": [1, 2]}, UnsupportedError, "normalizer"),
    ],
)
def test_bad_gguf(base: Callable[[], dict[str, Any]], change: Any, error: Any, match: str) -> None:
    fields = base() | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    fields = {key: value for key, value in fields.items() if value is not None}
    with pytest.raises(error, match=match) as caught:
        tokenizer_from_gguf(fields, "model.gguf")
    assert str(caught.value).startswith("model.gguf: ") and "\n" not in str(caught.value)
