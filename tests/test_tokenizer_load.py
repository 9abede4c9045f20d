"""Loading a tokenizer from a .trit file: what is damaged is refused in one clear line."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.container import open_trit
from formats.errors import ChecksumError, FormatError, HeaderError, TensorError, UnsupportedError
from formats.tokenizers.source import tokenizer_from_hf
from formats.tokenizers.vocab import VOCAB_BLOB, check_merges, pack_vocab
from formats.writer import TritWriter
from runtime.tokenizer import TokenizerError, load_tokenizer
from runtime.tokenizer.control_text import ControlText
from tests.tokenizer_texts import DATA, HARD_TEXTS, KJV, in_memory, load


def test_a_file_carries_its_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((DATA / "tokenizer.json").read_bytes())
    header, blobs = tokenizer_from_hf(tmp_path)
    path = tmp_path / "model.trit"
    with TritWriter(path, {"tokenizer": header, "config": {"vocab_size": 2000}}, list(blobs)) as writer:
        for name, data in blobs.items():
            values = np.frombuffer(data, np.uint8)
            writer.add(name, "u8", values.shape, {}, {"values": values})
    with open_trit(path) as file:
        tokenizer = load_tokenizer(file)
        assert tokenizer.encode(HARD_TEXTS[-3]) == load((header, blobs)).encode(HARD_TEXTS[-3])
    raw = bytearray(path.read_bytes())
    raw[-100] ^= 1
    path.write_bytes(raw)
    with open_trit(path) as file, pytest.raises(ChecksumError, match=r"tokenizer\.vocab"):
        load_tokenizer(file)


def test_no_tokenizer_in_the_file() -> None:
    header = {"type": "none", "bos_id": 1, "eos_ids": [2], "add_bos": False, "special": {}}
    tokenizer = load_tokenizer(in_memory(header, {}))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.decode([1, 2])) == (1, {2}, "")
    with pytest.raises(TokenizerError, match="no tokenizer"):
        tokenizer.encode("a")


def small_made() -> tuple[dict[str, Any], dict[str, bytes]]:
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"abc", b""]
    header = {
        "type": "bpe", "vocab_size": 259, "bos_id": 258, "eos_ids": [258], "add_bos": True, "special": {"<s>": 258},
        "added": {}, "pre": "gpt2", "ignore_merges": False, "unk_id": None, "missing_bytes": [],
    }  # fmt: skip
    return header, {VOCAB_BLOB: pack_vocab(tokens, np.array([[97, 98, 256], [256, 99, 257]]))}


BAD_HEADERS: list[tuple[dict[str, Any], type[FormatError], str]] = [
    ({"type": 1}, HeaderError, "type"),
    ({"type": "wordpiece"}, UnsupportedError, "wordpiece"),
    ({"pre": "qwen9"}, UnsupportedError, "qwen9"),
    ({"pre": None}, HeaderError, "pre"),
    ({"vocab_size": 0}, HeaderError, "vocab_size"),
    ({"vocab_size": True}, HeaderError, "vocab_size"),
    ({"vocab_size": 2**63}, HeaderError, "vocab_size"),
    ({"vocab_size": 301}, HeaderError, "at most 300"),
    ({"vocab_size": 260}, TensorError, "259 tokens"),
    ({"bos_id": 259}, HeaderError, "bos_id"),
    ({"bos_id": -1}, HeaderError, "bos_id"),
    ({"bos_id": 1.0}, HeaderError, "bos_id"),
    ({"eos_ids": 258}, HeaderError, "eos_ids"),
    ({"eos_ids": ["258"]}, HeaderError, "eos_ids"),
    ({"add_bos": 1}, HeaderError, "add_bos"),
    ({"special": []}, HeaderError, "special"),
    ({"special": {"": 258}}, HeaderError, "special"),
    ({"special": {"x" * 2000: 258}}, HeaderError, "special"),
    ({"special": {"\ud800": 258}}, HeaderError, "special"),
    ({"special": {"<s>": 259}}, HeaderError, "special"),
    ({"special": {"<s>": 258, "<t>": 258}}, HeaderError, "every id once"),
    ({"added": {"<s>": 3}}, HeaderError, "overlap"),
    ({"added": {"<t>": 258}}, HeaderError, "overlap"),
    ({"strip_left": [999]}, HeaderError, "strip_left"),
    ({"missing_bytes": [256]}, HeaderError, "missing_bytes"),
    ({"unk_id": "0"}, HeaderError, "unk_id"),
]


@pytest.mark.parametrize(("change", "error", "match"), BAD_HEADERS, ids=lambda v: str(v)[:30])
def test_bad_header(change: dict[str, Any], error: type[FormatError], match: str) -> None:
    header, blobs = small_made()
    assert load((header, blobs)).encode("abcab") == [257, 256]
    with pytest.raises(error, match=match) as caught:
        load_tokenizer(in_memory({**header, **change}, blobs, vocab_size=300))
    assert str(caught.value).startswith("model.trit: ") and "\n" not in str(caught.value)


def bad_blobs() -> dict[str, tuple[bytes, str]]:
    good = small_made()[1][VOCAB_BLOB]
    tokens = [bytes([b]) for b in range(256)] + [b"ab", b"abc", b""]

    def packed(tokens: list[bytes], *merges: list[int]) -> bytes:
        return pack_vocab(tokens, np.array(merges).reshape(-1, 3))

    def patched(at: int, value: int) -> bytes:
        return good[:at] + value.to_bytes(4, "little") + good[at + 4 :]

    return {
        "empty": (b"", "0 bytes"),
        "magic": (b"X" + good[1:], "starts with"),
        "cut": (good[:-1], "do not fit"),
        "longer": (good + b"x", "do not fit"),
        "cut in the tables": (good[:50], "its tables need"),
        "no tokens": (patched(8, 0), "0 tokens"),
        "many tokens": (patched(8, 2**32 - 1), "4294967295 tokens"),
        "many merges": (patched(12, 2**32 - 1), "its tables need"),
        "falling offsets": (patched(16 + 4, 2**31), "do not fit"),
        "byte missing": (packed([*tokens[:65], b"", *tokens[66:]]), "byte 0x41"),
        "token twice": (packed([*tokens[:256], b"ab", b"ab", b""]), "same bytes"),
        "merge of no token": (packed(tokens, [97, 300, 256]), "names token 300"),
        "merge of a control token": (packed(tokens, [258, 97, 97]), "as long as its two parts"),
        "merge cycle": (packed(tokens, [97, 98, 97]), "as long as its two parts"),
        "merge of other bytes": (packed(tokens, [97, 99, 256]), "is not its two parts"),
        "control token with bytes": (packed([*tokens[:258], b"x" * 9]), "bytes for the control token '<s>'"),
        "merge twice": (packed(tokens, [97, 98, 256], [97, 98, 256]), "twice"),
    }


@pytest.mark.parametrize("name", bad_blobs())
def test_bad_vocabulary(name: str) -> None:
    blob, match = bad_blobs()[name]
    with pytest.raises(TensorError, match=match) as caught:
        load((small_made()[0], {VOCAB_BLOB: blob}))
    assert str(caught.value).startswith("model.trit: tensor tokenizer.vocab: ")


def test_a_vocabulary_cut_anywhere_is_refused() -> None:
    header, blobs = small_made()
    blob = blobs[VOCAB_BLOB]
    for size in [*range(40), *range(40, len(blob), 37)]:
        with pytest.raises(TensorError):
            load((header, {VOCAB_BLOB: blob[:size]}))


def test_bad_sentencepiece_models(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(KJV.read_bytes())
    header, blobs = tokenizer_from_hf(tmp_path)
    model = blobs["tokenizer.model"]
    for bad in (b"", b"\x00" * 100, model[:-5], model[:20000], b"\xff" * 64, model + model):
        with pytest.raises(TensorError, match="SentencePiece"):
            load((header, {"tokenizer.model": bad}))
    with pytest.raises(TensorError, match="2048 pieces, the header says 2000"):
        load(({**header, "vocab_size": 2000}, blobs))


def test_a_long_token_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="5000 bytes"):
        pack_vocab([b"a", b"b" * 5000], np.zeros((0, 3)))


def test_packages_are_loaded_only_when_needed() -> None:
    packages = {"tiktoken", "sentencepiece", "regex", "tokenizers", "numba"}
    code = f"import sys, runtime.tokenizer; print({packages} & set(sys.modules))"
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_added_tokens_keep_their_text() -> None:
    header, blobs = small_made()
    tokenizer = load(({**header, "added": {"\x00": 0, "tö ken": 257}, "special": {}}, blobs))
    assert tokenizer.encode("a tö ken b") == [97, 32, 257, 32, 98]
    assert tokenizer.decode([257]) == "tö ken"


def test_merges_of_any_length_must_spell_their_token() -> None:
    rng = np.random.default_rng(4)
    for size in (2, 7, 8, 9, 15, 16, 17, 40):
        for cut in {1, size // 2, size - 1}:
            whole = rng.bytes(size)
            for wrong in (-1, 0, cut - 1, cut, size - 1):
                parts = bytearray(whole)
                if wrong >= 0:
                    parts[wrong] ^= 1
                data, ends = b"x" + whole + parts, np.array([0, 1, 1 + size, 1 + size + cut, 1 + 2 * size])
                found = check_merges(data, ends, np.array([[2, 3, 1]]))
                assert found == (None if wrong < 0 else "a merge whose result is not its two parts")


def test_tokens_are_found_as_by_a_plain_alternation() -> None:
    """Leftmost, and there the longest; the expression shares what the texts have in common."""
    rng = random.Random(1)
    for _ in range(300):
        alphabet = rng.choice(["ab", "abc.*", "<|a"])
        words = ("".join(rng.choices(alphabet, k=rng.randint(1, rng.choice([3, 8, 60])))) for _ in range(9))
        texts = {text: i for i, text in enumerate(sorted(set(words)))}
        plain = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))))
        text = "".join(rng.choices(alphabet, k=200))
        found = [part for part in ControlText({}, texts).split(text, False) if isinstance(part, int)]
        assert found == [texts[match[0]] for match in plain.finditer(text)]


def test_thousands_of_tokens_with_one_beginning() -> None:
    many = {f"<|reserved_{i}|>": i for i in range(5000)} | {"a" * n: 5000 + n for n in range(1, 1000)}
    split = ControlText(many, {}).split("<|reserved_77|>x" + "a" * 700 + "<|reserved_", True)
    assert split == [77, "x", 5700, "<|reserved_"]
