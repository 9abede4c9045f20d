"""Tokenizers of checkpoints: what is read, and that nothing is guessed; each fault is one clear line."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from formats.errors import FormatError, SourceError, UnsupportedError
from formats.tokenizers.byte_level import read_ranks
from formats.tokenizers.gguf import PRE_TOKENIZERS as GGUF_NAMES
from formats.tokenizers.hf_json import PRE_TOKENIZERS
from formats.tokenizers.settings import Settings
from formats.tokenizers.source import from_ranks, tokenizer_from_gguf, tokenizer_from_hf
from formats.tokenizers.spm_model import BYTE, CONTROL, NORMAL, USER_DEFINED, read_pieces, with_types
from runtime.tokenizer.pretokenize import PATTERNS
from tests.tokenizer_texts import DATA, HARD_TEXTS, KJV, from_json, load, scripts, sentencepiece_tokenizer, small_json

Change = Callable[[dict[str, Any]], Any]
BOS, PLAIN = 1500, {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def test_reader_and_runtime_know_the_same_pre_tokenizers() -> None:
    assert set(PATTERNS) == set(PRE_TOKENIZERS) == {name for name, _, _ in GGUF_NAMES.values()}


# ---- tokenizer.json ---------------------------------------------------------------------------------------


def write(folder: Path, **files: Any) -> Path:
    """Write NAME.json for each keyword argument."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def test_header_of_tokenizer_json(tmp_path: Path) -> None:
    header, blobs = tokenizer_from_hf(write(tmp_path, tokenizer=small_json()))
    assert list(blobs) == ["tokenizer.vocab"]
    assert header["special"]["<|begin_of_text|>"] == header["bos_id"] == BOS and header["add_bos"] is True
    assert header["added"] == {"<think>": 1505, "<|end": 1507} and header["match_last"] == [1505]
    assert header["strip_left"] == header["strip_right"] == [1506]
    assert (header["type"], header["pre"], header["ignore_merges"]) == ("bpe", "llama3", True)
    assert (header["vocab_size"], header["eos_ids"], header["missing_bytes"]) == (1508, [1501, 1504], [])


def test_settings_beside_tokenizer_json(tmp_path: Path) -> None:
    write(
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
    write(tmp_path, tokenizer_config={"bos_token": "<|begin_of_text|>", "add_bos_token": True})
    assert tokenizer_from_hf(tmp_path)[0]["add_bos"] is True


def test_a_plain_token_that_is_eos_becomes_a_control_token(tmp_path: Path) -> None:
    raw = small_json("gpt2")
    raw["model"]["vocab"]["</stop>"] = 1508
    write(tmp_path, tokenizer=raw, tokenizer_config={"eos_token": "</stop>"})
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
    write(tmp_path, tokenizer=small_json(), **{name: value})
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


# ---- tiktoken ranks ---------------------------------------------------------------------------------------


def test_control_tokens_of_llama3(tmp_path: Path) -> None:
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


# ---- SentencePiece ----------------------------------------------------------------------------------------


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
    write(tmp_path, tokenizer_config={"added_tokens_decoder": tokens})
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


# ---- GGUF -------------------------------------------------------------------------------------------------


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
