"""Tokenizers from tokenizer.model, be it tiktoken's ranks or SentencePiece: what is read, and what is refused."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from formats.errors import SourceError, UnsupportedError
from formats.tokenizers.byte_level import read_ranks
from formats.tokenizers.settings import Settings
from formats.tokenizers.source import from_ranks, tokenizer_from_hf
from formats.tokenizers.spm_model import BYTE, CONTROL, NORMAL, USER_DEFINED, read_pieces, with_types
from tests.tokenizer_texts import DATA, KJV, PLAIN, load, sentencepiece_tokenizer, write_json

# ---- tiktoken ranks -----------------------------------------------------------------------------------------


def test_control_tokens_of_llama3() -> None:
    """The rank file does not name them; the ids are those of Llama 3.1 with 1,500 ranks in place of 128,000."""
    path = DATA / "small.tiktoken"
    header, _ = from_ranks(path, read_ranks(path, path.read_bytes()), Settings(path))
    names = {i - 1500 + 128_000: text for text, i in header["special"].items()}
    assert [names[128_000 + i] for i in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 255)] == [
        "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
        "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", "<|reserved_special_token_3|>", "<|reserved_special_token_247|>",
    ]  # fmt: skip
    assert header["vocab_size"] == 1756 and header["bos_id"] == 1500 and header["add_bos"] is True
    assert header["eos_ids"] == [1501, 1508, 1509]


def test_ranks_of_another_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((DATA / "small.tiktoken").read_bytes())
    with pytest.raises(UnsupportedError, match="1500 tiktoken ranks"):
        tokenizer_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda lines: lines[:700] + lines[701:], "rank 700 is missing"),
        (lambda lines: lines[1:], "rank 0 is missing"),
        (lambda lines: [*lines, lines[5]], "line 1501: token .* there twice"),
        (lambda lines: [*lines, b"!!! 1500"], "line 1501 is"),
        (lambda lines: [*lines, b"QUJD"], "line 1501 is"),
        (lambda lines: [*lines, b"QUJDRA== -1"], "line 1501 is"),
        (lambda lines: [*lines, b"QUJDRA== 99999999999999999999"], "line 1501 is"),
        (lambda lines: [*lines, b"=" + lines[5]], "line 1501 is"),
        (lambda lines: [base64.b64encode(b"A" * 9) + b" 0", *lines[1:]], "no token for byte"),
        (lambda lines: [*lines, base64.b64encode(b"A" * 5000) + b" 1500"], "too long"),
    ],
)
def test_bad_ranks(change: Callable[[list[bytes]], list[bytes]], match: str, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    data = b"\n".join(change((DATA / "small.tiktoken").read_bytes().splitlines()))
    with pytest.raises(SourceError, match=match):
        read_ranks(path, data)


def test_a_model_file_that_is_neither(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(SourceError, match=r"starts with b'version https://', expected"):
        tokenizer_from_hf(tmp_path)


# ---- SentencePiece ------------------------------------------------------------------------------------------


def test_header_of_sentencepiece(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(KJV.read_bytes())
    header, blobs = tokenizer_from_hf(tmp_path)
    assert blobs["tokenizer.model"] == KJV.read_bytes() and header["prefix"] == "always"
    assert header["special"] == {"<unk>": 0, "<s>": 1, "</s>": 2} and header["vocab_size"] == 2048
    assert (header["bos_id"], header["eos_ids"], header["add_bos"]) == (1, [2], True)


def test_tokens_added_to_sentencepiece(tmp_path: Path) -> None:
    tokens = {"2048": {"content": "<|im_start|>", **PLAIN}, "2049": {"content": "<note>", **PLAIN, "special": False}}
    tokenizer = sentencepiece_tokenizer(tmp_path, added_tokens_decoder=tokens)
    assert tokenizer.encode("<note>", special=False) == [2049] and tokenizer.decode([2049]) == "<note>"
    assert 2048 not in tokenizer.encode("<|im_start|>") and tokenizer.encode("<|im_start|>", special=True) == [2048]


def test_control_tokens_that_sentencepiece_would_parse_itself_stay_text(tmp_path: Path) -> None:
    """A user-defined piece is found in any text; if it is a control token it must not be."""
    pieces = read_pieces(KJV.read_bytes())
    token = next(i for i, p in enumerate(pieces) if p.text == "▁Israel")
    tokens = {str(token): {"content": "▁Israel", **PLAIN}}
    write_json(tmp_path, tokenizer_config={"added_tokens_decoder": tokens})
    (tmp_path / "tokenizer.model").write_bytes(with_types(KJV.read_bytes(), {token: USER_DEFINED}))
    tokenizer = load(tokenizer_from_hf(tmp_path))
    assert token not in tokenizer.encode("of Israel") and tokenizer.decode(tokenizer.encode("of Israel")) == "of Israel"
    assert tokenizer.encode("▁Israel", special=True) == [token]


def test_bad_sentencepiece_files(tmp_path: Path) -> None:
    data = KJV.read_bytes()
    pieces = read_pieces(data)
    byte, word = (next(i for i, p in enumerate(pieces) if p.type == kind) for kind in (BYTE, NORMAL))
    cases = {
        "middle of a field": data[:-3], "no piece for byte": with_types(data, {byte: NORMAL}),
        "called": with_types(data, {word: BYTE}), "unknown piece": with_types(data, {0: CONTROL}),
        "there twice": data + data, "of type 9": with_types(data, {word: 9}),
    }  # fmt: skip
    for match, bad in cases.items():
        (tmp_path / "tokenizer.model").write_bytes(bad)
        with pytest.raises(SourceError, match=match):
            tokenizer_from_hf(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(data + b"\x12\x03\xc0\x01\x01")
    with pytest.raises(UnsupportedError, match="treat_whitespace_as_suffix"):
        tokenizer_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"added_tokens_decoder": {"1": {"content": "<t>", **PLAIN}}}, "calls id 1 '<t>', the model calls it '<s>'"),
        ({"added_tokens_decoder": {"2048": {"content": "<s>", **PLAIN}}}, "'<s>' .*1"),
        ({"added_tokens_decoder": {"3": {"content": "<0x00>", **PLAIN}}}, "byte piece"),
        ({"added_tokens_decoder": {"99999999": {"content": "<t>", **PLAIN}}}, "ids up to 99999999"),
        ({"eos_token": "<end>"}, "'<end>'"),
        ({"bos_token": "<begin>"}, "'<begin>'"),
    ],
)
def test_bad_settings_of_sentencepiece(settings: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=match):
        sentencepiece_tokenizer(tmp_path, **settings)
