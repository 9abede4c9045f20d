"""Tokenizers from tokenizer.json and the settings beside it: what is read, and that nothing is guessed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from formats.errors import FormatError, SourceError, UnsupportedError
from formats.tokenizers.gguf import PRE_TOKENIZERS as GGUF_NAMES
from formats.tokenizers.hf_json import PRE_TOKENIZERS
from formats.tokenizers.source import tokenizer_from_hf
from runtime.tokenizer.pretokenize import PATTERNS
from tests.tokenizer_texts import BOS, PLAIN, from_json, load, small_json, write_json

Change = Callable[[dict[str, Any]], Any]


def test_reader_and_runtime_know_the_same_pre_tokenizers() -> None:
    assert set(PATTERNS) == set(PRE_TOKENIZERS) == {name for name, _, _ in GGUF_NAMES.values()}


def test_header_of_tokenizer_json(tmp_path: Path) -> None:
    header, blobs = tokenizer_from_hf(write_json(tmp_path, tokenizer=small_json()))
    assert list(blobs) == ["tokenizer.vocab"]
    assert header["special"]["<|begin_of_text|>"] == header["bos_id"] == BOS and header["add_bos"] is True
    assert header["added"] == {"<think>": 1505, "<|end": 1507} and header["match_last"] == [1505]
    assert header["strip_left"] == header["strip_right"] == [1506]
    assert (header["type"], header["pre"], header["ignore_merges"]) == ("bpe", "llama3", True)
    assert (header["vocab_size"], header["eos_ids"], header["missing_bytes"]) == (1508, [1501, 1504], [])


def test_settings_beside_tokenizer_json(tmp_path: Path) -> None:
    write_json(
        tmp_path,
        tokenizer=small_json() | {"post_processor": None},
        tokenizer_config={"bos_token": {"content": "<|begin_of_text|>"}, "eos_token": "<|eot_id|>"},
        special_tokens_map={"eos_token": "<|end_of_text|>", "additional_special_tokens": ["<think>"]},
        config={"eos_token_id": [1501, 1502], "vocab_size": 1600},
        generation_config={"eos_token_id": 1503},
    )
    header, _ = tokenizer_from_hf(tmp_path)
    assert (header["bos_id"], header["eos_id"], header["add_bos"]) == (BOS, 1504, False)
    assert header["eos_ids"] == [1501, 1502, 1503, 1504] and "<think>" in header["special"]
    write_json(tmp_path, tokenizer_config={"bos_token": "<|begin_of_text|>", "add_bos_token": True})
    assert tokenizer_from_hf(tmp_path)[0]["add_bos"] is True


def test_a_plain_token_that_is_eos_becomes_a_control_token(tmp_path: Path) -> None:
    raw = small_json("gpt2")
    raw["model"]["vocab"]["</stop>"] = 1508
    write_json(tmp_path, tokenizer=raw, tokenizer_config={"eos_token": "</stop>"})
    tokenizer = load(tokenizer_from_hf(tmp_path))
    assert tokenizer.eos_id == tokenizer.special["</stop>"] == 1508 and tokenizer.token_bytes(1508) == b""


def model(**change: Any) -> Change:
    return lambda raw: raw["model"].update(change)


def top(**change: Any) -> Change:
    return lambda raw: raw.update(change)


def added(token: Any) -> Change:
    return lambda raw: raw["added_tokens"].append(token)


def vocab(**change: Any) -> Change:
    return lambda raw: raw["model"]["vocab"].update(change)


def split(pattern: str) -> Change:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return lambda raw: raw["pre_tokenizer"]["pretokenizers"].__setitem__(0, step)


def nested(depth: int) -> Any:
    step: Any = {"type": "Metaspace"}
    for _ in range(depth):
        step = {"type": "Sequence", "pretokenizers": [step]}
    return step


TEMPLATE = {"type": "TemplateProcessing", "special_tokens": {}}
WITH_EOS = [{"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<|eot_id|>"}}]
BAD_JSON: list[tuple[Change, type[FormatError], str]] = [
    (top(normalizer={"type": "NFC"}), UnsupportedError, "normalizer NFC"),
    (top(normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}), UnsupportedError, "Lowercase"),
    (top(pre_tokenizer=None), UnsupportedError, "pre-tokenizer none"),
    (top(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}), UnsupportedError, "add_prefix_space=True"),
    (top(pre_tokenizer={"type": "Whitespace"}), UnsupportedError, r"pre-tokenizer Whitespace\(\)"),
    (top(pre_tokenizer=nested(150)), UnsupportedError, "pre-tokenizer Metaspace"),
    (top(pre_tokenizer=["x"]), UnsupportedError, "pre-tokenizer"),
    (split("(a+)+b"), UnsupportedError, r"Split\(.*\(a\+\)\+b"),
    (top(post_processor={"type": "RobertaProcessing"}), UnsupportedError, "post-processor RobertaProcessing"),
    (top(post_processor={**TEMPLATE, "single": WITH_EOS}), UnsupportedError, r"Sequence \+ SpecialToken"),
    (top(post_processor={**TEMPLATE, "single": WITH_EOS[::-1]}), SourceError, "does not describe"),
    (top(post_processor={**TEMPLATE, "single": 5}), FormatError, "post-processor"),
    (top(decoder={"type": "WordPiece"}), UnsupportedError, "decoder WordPiece"),
    (model(type="WordPiece"), UnsupportedError, "WordPiece model, not byte-level BPE"),
    (model(byte_fallback=True), UnsupportedError, "SentencePiece"),
    (top(model=None), UnsupportedError, "None model"),
    (model(dropout=0.1), UnsupportedError, "dropout"),
    (model(end_of_word_suffix="</w>"), UnsupportedError, "end_of_word_suffix"),
    (model(vocab=[]), SourceError, '"vocab"'),
    (model(vocab={}), SourceError, '"vocab"'),
    (vocab(xx=True), SourceError, "has id True"),
    (vocab(xx=-1), SourceError, "has id -1"),
    (vocab(xx="7"), SourceError, "has id '7'"),
    (vocab(xx=7), SourceError, "id 7 is both"),
    (vocab(xx=BOS), SourceError, "id 1500 is both"),
    (vocab(xx=1509), SourceError, "no token with id 1508"),
    (vocab(xx=10**15), SourceError, "no token with id 1508"),
    (vocab(**{"x y": 1508}), SourceError, "does not spell a byte"),
    (vocab(**{"x" * 5000: 1508}), SourceError, "5000 bytes"),
    (lambda raw: raw["model"]["vocab"].pop("A"), SourceError, "no token with id"),
    (lambda raw: raw["model"]["merges"].append("qqq zzz"), SourceError, "merge 1244 .*'qqq'.* not a token"),
    (lambda raw: raw["model"]["merges"].append("a"), SourceError, "merge 1244 is 'a'"),
    (lambda raw: raw["model"]["merges"].append(["a", "b", "c"]), SourceError, "merge 1244"),
    (lambda raw: raw["model"]["merges"].append(raw["model"]["merges"][3]), SourceError, "listed twice"),
    (model(merges="x"), SourceError, "expected a list"),
    (top(added_tokens={}), SourceError, '"added_tokens"'),
    (added("x"), SourceError, "added token has id None"),
    (added({"id": 1508, "content": "", **PLAIN}), SourceError, "added token 1508"),
    (added({"id": 1508, "content": "<a>", **PLAIN, "single_word": True}), UnsupportedError, "single_word"),
    (added({"id": 1508, "content": "<a>", **PLAIN, "special": 1}), SourceError, "special is 1"),
    (added({"id": 1508, "content": "<think>", **PLAIN}), SourceError, "has the ids 1505 and 1508"),
    (added({"id": 1505, "content": "<other>", **PLAIN}), SourceError, "1505 is both"),
    (added({"id": 300, "content": "<other>", **PLAIN}), SourceError, "300 is both"),
]


@pytest.mark.parametrize("case", range(len(BAD_JSON)))
def test_bad_tokenizer_json(case: int, tmp_path: Path) -> None:
    change, error, match = BAD_JSON[case]
    raw = small_json()
    change(raw)
    with pytest.raises(error, match=match) as caught:
        from_json(raw, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'tokenizer.json'}: ")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_control_tokens_that_plain_text_could_make_are_refused(tmp_path: Path) -> None:
    raw = small_json()
    left, right = raw["model"]["merges"][0].split(" ")
    raw["added_tokens"].append({"id": raw["model"]["vocab"][left + right], "content": left + right, **PLAIN})
    with pytest.raises(SourceError, match="takes part in merges"):
        from_json(raw, tmp_path)


def test_needed_bytes_must_have_tokens(tmp_path: Path) -> None:
    """Bytes that no text of English or code needs may be missing, as they are in SmolLM2's vocabulary."""
    raw = small_json("gpt2")
    merges = raw["model"]["merges"]
    raw["model"]["merges"] = [m for m in merges if "~" not in m]
    raw["added_tokens"].append({"id": raw["model"]["vocab"].pop("~"), "content": "<tilde>", **PLAIN})
    with pytest.raises(SourceError, match=r"no token for byte 0x7E"):
        from_json(raw, tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("config", {"vocab_size": 1500}, "ids up to 1507, but config.json has a vocab_size of 1500"),
        ("config", {"eos_token_id": 1508}, "eos_token_id is 1508"),
        ("config", {"eos_token_id": "2"}, "expected a token id"),
        ("generation_config", {"eos_token_id": [1, True]}, "expected a token id"),
        ("tokenizer_config", {"eos_token": "<none>"}, "'<none>', which the vocabulary does not have"),
        ("tokenizer_config", {"bos_token": 5}, "expected the text of a token"),
        ("tokenizer_config", {"add_bos_token": "yes"}, "expected true, false or null"),
        ("tokenizer_config", {"add_eos_token": True}, "prompts that end with EOS"),
        ("tokenizer_config", {"added_tokens_decoder": {"<0x-1>": {"content": "a"}}}, "expected a number"),
        ("tokenizer_config", {"added_tokens_decoder": {"1500": {"content": "<x>"}}}, "1500 is both"),
        ("tokenizer_config", [], "expected an object"),
    ],
)
def test_bad_settings(name: str, value: Any, match: str, tmp_path: Path) -> None:
    write_json(tmp_path, tokenizer=small_json(), **{name: value})
    with pytest.raises(FormatError, match=match) as caught:
        tokenizer_from_hf(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "[]", "\xff"])
def test_tokenizer_json_that_is_no_json(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(SourceError, match=r"tokenizer\.json"):
        tokenizer_from_hf(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no tokenizer\.json and no tokenizer\.model"):
        tokenizer_from_hf(tmp_path)
