"""Tokenizers: ids exactly those of the reference implementations, streaming, control text, any bytes, bad data."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.tokenizers.byte_level import read_ranks
from formats.tokenizers.hf_json import PRE_TOKENIZERS
from formats.tokenizers.settings import Settings
from formats.tokenizers.source import from_ranks
from formats.tokenizers.vocab import VOCAB_BLOB, unpack_vocab
from runtime.tokenizer import StreamDecoder, Tokenizer
from runtime.tokenizer.bpe import BytePairEncoder
from runtime.tokenizer.pretokenize import PATTERNS, pre_tokenizer
from tests.tokenizer_texts import (
    DATA,
    HARD_TEXTS,
    KJV,
    every_character,
    from_json,
    from_small_ranks,
    scripts,
    sentencepiece_tokenizer,
    small_json,
)

tokenizers = pytest.importorskip("tokenizers")


def reference(raw: dict[str, Any]) -> Any:
    made = tokenizers.Tokenizer.from_str(json.dumps(raw))
    made.encode_special_tokens = True  # control text is text
    return made


@pytest.fixture(params=["bpe", "tiktoken", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    """A tokenizer of each type."""
    if request.param == "tiktoken":
        return from_small_ranks()
    return from_json(small_json(), tmp_path) if request.param == "bpe" else sentencepiece_tokenizer(tmp_path)


# ---- the same ids as the reference ------------------------------------------------------------------------


@pytest.mark.parametrize("pre", PATTERNS)
def test_ids_are_those_of_tokenizers(pre: str, tmp_path: Path) -> None:
    raw = small_json(pre)
    ours, theirs = from_json(raw, tmp_path), reference(raw)
    for text in [*HARD_TEXTS, scripts(8000), "".join(HARD_TEXTS)]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text[:80])


@pytest.mark.parametrize("pre", PATTERNS)
def test_every_character_is_cut_as_tokenizers_cuts_it(pre: str) -> None:
    text = every_character()
    step = reference(small_json(pre)).pre_tokenizer
    theirs = [text[a:b] for _, (a, b) in step.pre_tokenize_str(text)]
    assert pre_tokenizer(pre)(text) == theirs


@pytest.mark.parametrize("pre", PATTERNS)
@given(text=st.text(st.sampled_from("  \n\r\t'sStTlLrReEvVdDmM019.,!\x1c\x85\xa0ſ²½éñ的\u0301\U00011de5"), max_size=40))
def test_words_are_cut_as_tokenizers_cuts_them(pre: str, text: str) -> None:
    step = reference(small_json(pre)).pre_tokenizer
    assert pre_tokenizer(pre)(text) == [text[a:b] for _, (a, b) in step.pre_tokenize_str(text)]


def test_control_tokens_are_parsed_as_tokenizers_parses_them(tmp_path: Path) -> None:
    raw = small_json()
    ours, theirs = from_json(raw, tmp_path), tokenizers.Tokenizer.from_str(json.dumps(raw))
    parts = [*ours.special, "<think>", "<|end", "<|pad|>", " ", "\n", "\u2003", "x", "<|", "|>", "<think"]
    rng = random.Random(7)
    for _ in range(500):
        text = "".join(rng.choices(parts, k=rng.randint(1, 7)))
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids, repr(text)


def test_bytes_without_a_token_are_left_out_as_tokenizers_does(tmp_path: Path) -> None:
    raw = small_json("gpt2")
    ids = raw["model"]["vocab"]
    swap = {"\u0104": "\u01ff", "\u0106": "\u01fe", "\u00c0": "\u01fd"}  # bytes 0x04, 0x06, 0xC0: another spelling
    assert set(swap) <= set(ids)
    raw["model"]["vocab"] = {t: i for t, i in ids.items() if t not in swap}
    for spelling in swap:
        raw["added_tokens"].append({"id": ids[spelling], "content": f"<x{ids[spelling]}>", "special": True})
    for token in raw["added_tokens"]:
        for flag in ("single_word", "lstrip", "rstrip", "normalized"):
            token.setdefault(flag, False)
    ours, theirs = from_json(raw, tmp_path), reference(raw)
    assert ours.missing_bytes == {0x04, 0x06, 0xC0}
    text = "a\x04b\x06\x06 c\x05\x04"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.decode(ours.encode(text)) == "ab c\x05"


def test_ranks_give_the_ids_of_tiktoken() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    path = DATA / "small.tiktoken"
    ranks = {token: i for i, token in enumerate(read_ranks(path, path.read_bytes()))}
    pattern = PRE_TOKENIZERS["llama3"][0]["pattern"]["Regex"]
    theirs = tiktoken.Encoding("small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    ours = from_small_ranks()
    for text in [*HARD_TEXTS, scripts(8000)]:
        assert ours.encode(text) == theirs.encode_ordinary(text), repr(text[:80])


def test_sentencepiece_gives_its_own_ids(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    ours, theirs = sentencepiece_tokenizer(tmp_path), SentencePieceProcessor(model_file=str(KJV))
    for text in [*HARD_TEXTS, scripts(2000)]:
        assert ours.encode(text) == theirs.encode(text), repr(text[:80])
    # What transformers 5.23 gives for this model.
    assert ours.encode("And God said,", add_bos=True) == [1, 300, 391, 396, 2001]


@pytest.mark.parametrize(
    ("settings", "spaces"),
    [({}, (True, True)), ({"legacy": False}, (True, False)), ({"add_prefix_space": False}, (False, False))],
)
def test_sentencepiece_prefix_follows_the_settings(settings: Any, spaces: tuple[bool, bool], tmp_path: Path) -> None:
    """A space in front of the text, and after a control token: both, the first only, none."""
    tokenizer = sentencepiece_tokenizer(tmp_path, **settings)
    ids = tokenizer.encode("And</s>God", special=True)
    assert ids == [*tokenizer.encode("And"), 2, *tokenizer.encode("God", continuation=True)]
    first, second = (b" " if space else b"" for space in spaces)
    assert b"".join(map(tokenizer.token_bytes, ids)) == first + b"And" + second + b"God"
    assert tokenizer.decode(tokenizer.encode(" And")) == " And"


def test_short_and_long_words_merge_alike() -> None:
    path = DATA / "small.tiktoken"
    vocab = unpack_vocab(from_ranks(path, read_ranks(path, path.read_bytes()), Settings(path))[1][VOCAB_BLOB], "x")
    rng = random.Random(3)
    for by_result in (False, True):
        encoder = BytePairEncoder(
            vocab.ids, len(vocab.tokens), vocab.merges, pre_tokenizer("gpt2"), by_result=by_result
        )
        for size in [*range(40), *(rng.randint(90, 400) for _ in range(40))]:
            ids = [vocab.ids[bytes([b])] for b in rng.choices(b"theandofi \n", k=size)]
            assert encoder._merge(list(ids)) == encoder._merge_long(list(ids))


# ---- text in, text out ------------------------------------------------------------------------------------


def test_text_comes_back(tokenizer: Tokenizer) -> None:
    for text in [*HARD_TEXTS, scripts(500)]:
        spaces = tokenizer.type == "sentencepiece"  # U+2581 is how it spells a space
        expected = text.replace("\u2581", " ") if spaces else text
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_any_bytes_come_back(tokenizer: Tokenizer) -> None:
    rng = random.Random(5)
    cases = [bytes(range(256)), b"\xf0\x9f", b" \xff x \xfe", b"\xc3 a", b"\xed\xa0\x80", b"", rng.randbytes(5000)]
    for data in cases:
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data


def test_single_ids_decode_to_their_bytes(tokenizer: Tokenizer) -> None:
    for i in range(tokenizer.vocab_size):
        data = tokenizer.token_bytes(i)
        assert tokenizer.decode([i], continuation=True) == data.decode("utf-8", "replace")
        assert (data == b"") == (i in tokenizer.special.values() or tokenizer.token_bytes(i, special=True) == b"")
    assert tokenizer.decode([tokenizer.vocab_size, 10**9, -1]) == ""


def test_stream_is_decode_of_everything_and_never_breaks_a_character(tokenizer: Tokenizer) -> None:
    rng = random.Random(11)
    random_ids = [[rng.randrange(tokenizer.vocab_size) for _ in range(200)] for _ in range(20)]
    texts = [*HARD_TEXTS, "👩\u200d👩\u200d👧é的", " two  spaces"]
    for ids in [*random_ids, *map(tokenizer.encode, texts)]:
        for options in ({}, {"special": True}, {"continuation": True}):
            stream = StreamDecoder(tokenizer, **options)
            pieces = [*map(stream.push, ids), stream.flush()]
            assert "".join(pieces) == tokenizer.decode(ids, **options)
    stream = StreamDecoder(tokenizer)
    assert all("\ufffd" not in stream.push(i) for i in tokenizer.encode("👩\u200d👧 é 的 𝕏"))


def test_unfinished_character_appears_at_the_end(tokenizer: Tokenizer) -> None:
    stream = StreamDecoder(tokenizer)
    assert "".join(map(stream.push, tokenizer.encode_bytes(b"\xf0\x9f\x98"))) == ""
    assert stream.flush() == "\ufffd"


def test_control_text_of_a_user_stays_text(tokenizer: Tokenizer) -> None:
    controls = frozenset(tokenizer.special.values())
    for text in [*tokenizer.special, "x".join(tokenizer.special), f" {next(iter(tokenizer.special))}\n"]:
        ids = tokenizer.encode(text)
        assert not controls & set(ids) and tokenizer.decode(ids) == text
        assert controls & set(tokenizer.encode(text, special=True))


def test_bos_is_added_once_and_only_on_request(tokenizer: Tokenizer) -> None:
    bos = next(text for text, i in tokenizer.special.items() if i == tokenizer.bos_id)
    assert tokenizer.add_bos and tokenizer.bos_id not in tokenizer.encode("a")
    assert tokenizer.encode("a", add_bos=True) == [tokenizer.bos_id, *tokenizer.encode("a")]
    twice = tokenizer.encode(f"{bos}a", add_bos=True, special=True)
    assert [i for i in twice if i == tokenizer.bos_id] == [tokenizer.bos_id]
    assert tokenizer.decode(tokenizer.encode("a", add_bos=True), special=True).startswith(bos)


def test_surrogates_are_joined_or_replaced(tokenizer: Tokenizer) -> None:
    for text, same in [("\ud83d\ude00", "😀"), ("a\ud800b", "a\ufffdb"), ("\udfff", "\ufffd")]:
        assert tokenizer.encode(text) == tokenizer.encode(same)


def test_end_tokens(tokenizer: Tokenizer, tmp_path: Path) -> None:
    ends = {"</s>"} if tokenizer.type == "sentencepiece" else {"<|end_of_text|>", "<|eot_id|>"}
    names = {text for text, i in tokenizer.special.items() if i in tokenizer.eos_ids}
    assert ends <= names and "<|start_header_id|>" not in names


@pytest.mark.parametrize("text", ["a" * 300_000, " " * 300_000, "!" * 300_000 + "\n", " \n" * 150_000, "的" * 100_000])
def test_a_single_long_word_takes_linear_time(text: str) -> None:
    """A quadratic merge or pattern would take minutes."""
    tokenizer = from_small_ranks()
    start = time.process_time()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - start < 20


def test_the_word_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.tokenizer.bpe.CACHED_WORDS", 8)
    tokenizer = from_small_ranks()
    first = tokenizer.encode("the end of it")
    tokenizer.encode(" ".join(map(str, range(2000))) + "x" * 1000)
    encoder = tokenizer._encoder
    assert isinstance(encoder, BytePairEncoder) and len(encoder._cache) <= 8
    assert tokenizer.encode("the end of it") == first
