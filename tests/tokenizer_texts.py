"""Text that is hard on tokenizers, and tokenizers without a file around them."""

from __future__ import annotations

import json
import pydoc_data.topics
import random
import sysconfig
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from formats.tokenizers.byte_level import read_ranks
from formats.tokenizers.hf_json import PRE_TOKENIZERS
from formats.tokenizers.settings import Settings
from formats.tokenizers.source import from_ranks, tokenizer_from_hf
from runtime.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).parent / "data" / "tokenizers"
KJV = DATA / "kjv.model"
BOS = 1500  # of the small tokenizers
# What Hugging Face's files say of a control token that is nothing else.
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}

HARD_TEXTS = [
    "", " ", "  ", "\n", "a", " a", "a ", "  a  b   c", "\ta\t\tb", "a\n\n\nb\n", "a \n b", "x\r\ny\r\n\r\nz\r", "\r",
    "It's I'm you'll we've they'd he's THEY'RE I'M don't 'sx 'tis 'ſ o'ſ rock'n'roll ''s", "1 12 123 1234 12345 3.14",
    "a1b22c333 x²y½z Ⅷ ٣٤٥ १२३ 𝟙𝟚", "foo_bar(baz[0], **kw) -> {'k': v}; // !== <=> ::", "https://a.b/c?d=e&f=%20#g",
    "naïve café ÅÅ e\u0301 e\u0301\u0323 Ω\u0301", "Привет, мир! Γειά σου 你好，世界。 こんにちは 안녕 ᄒ\u1161ᆫ",
    "مرحبا بالعالم שלום עולם नमस्ते क्षि สวัสดี ကြ ខ្មែរ", "👩\u200d👩\u200d👧 🏳️\u200d🌈 👍🏽 🇫🇷🇩🇪 ☺️ 1️⃣ 😀😀😀",
    "\u00a0\u2003\u3000\u1680x\u2028y\u2029z\u0085w\u200b\ufeff", "\x00\x01\x1b\x1c\x1d\x1e\x1f\x7f\x80\x9f", "ſKÅﬀﬆß",
    "\u0378\u0558\U00011de5\U000323b0\U000e0041\U0010ffff\ufffe\ufffd", "z̸a̶l̴g̵o̷ ̴t̸e̷x̵t̶",
    " " * 100 + "x", "\n" * 77, "ab" * 300, "的" * 200, "a" * 1000, "!?" * 99 + "\n", "-" * 500, "\t \n" * 50,
    "<|begin_of_text|><|eot_id|> <think>x</think> <|end_of_text|> <|end <|pad|>", "<s>[INST] hi [/INST]</s><unk><0x41>",
]  # fmt: skip

# Ranges with letters of many scripts, symbols and unassigned characters between them.
SCRIPTS = [
    (0x41, 0x7A), (0xC0, 0x24F), (0x370, 0x3FF), (0x400, 0x52F), (0x530, 0x5FF), (0x600, 0x6FF), (0x900, 0x97F),
    (0x980, 0x9FF), (0xB80, 0xBFF), (0xC00, 0xC7F), (0xE00, 0xE7F), (0x1000, 0x109F), (0x10A0, 0x10FF),
    (0x1100, 0x11FF), (0x1200, 0x137F), (0x1780, 0x17FF), (0x1E00, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0x30FF),
    (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xFB00, 0xFDFF), (0xFF00, 0xFFEF), (0x10000, 0x10FFF), (0x1D400, 0x1D7FF),
    (0x1F000, 0x1FAFF), (0x20000, 0x2A6DF), (0xE000, 0xE0FF),
]  # fmt: skip
GLUE = [" ", " ", " ", "  ", "\n", "\t", "'", "'s", "-", ", ", ".\n", "\r\n", "7", "42", "\u200d", "\ufe0f", "\u0301"]


def every_character() -> str:
    """All of Unicode but the surrogates, in order."""
    return "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))


def scripts(n_words: int, seed: int = 0) -> str:
    """Words of random characters, each of one script, with all kinds of things between them."""
    rng = random.Random(seed)
    out = []
    for _ in range(n_words):
        first, last = rng.choice(SCRIPTS)
        start = rng.randint(first, last)
        spread = min(last, start + 40)
        out += [chr(rng.randint(start, spread)) for _ in range(rng.randint(1, 9))]
        out.append(rng.choice(GLUE))
    return "".join(out)


def megabyte() -> str:
    """A megabyte of mixed text: English prose, Python code, many scripts, emoji, odd white space."""
    prose = "\n".join(pydoc_data.topics.topics.values())[:400_000]
    library = Path(sysconfig.get_paths()["stdlib"])
    names = ("argparse.py", "inspect.py", "pathlib.py", "textwrap.py", "uuid.py", "_pydecimal.py", "turtle.py")
    code = "".join(p.read_text(encoding="utf-8") for name in names if (p := library / name).is_file())[:350_000]
    rng = random.Random(1)
    spaces = "".join(rng.choice(" \t\n\r\v\f\x85\xa0\u2003\u3000x1.'s") for _ in range(50_000))
    return prose + code + scripts(30_000) + spaces + "\n".join(HARD_TEXTS)


def in_memory(header: dict[str, Any], blobs: dict[str, bytes], vocab_size: int | None = None) -> Any:
    """What load_tokenizer needs of an open .trit file; the header goes through JSON as in one."""
    return SimpleNamespace(
        path="model.trit",
        tokenizer=json.loads(json.dumps(header)),
        config={} if vocab_size is None else {"vocab_size": vocab_size},
        blob=blobs.__getitem__,
        tensors={name: SimpleNamespace(crc32=zlib.crc32(data)) for name, data in blobs.items()},
    )


def load(made: tuple[dict[str, Any], dict[str, bytes]]) -> Tokenizer:
    """Load what tokenizer_from_hf or tokenizer_from_gguf made."""
    return load_tokenizer(in_memory(*made))


def small_json(pre: str = "llama3", **model: Any) -> dict[str, Any]:
    """The small tokenizer.json with one of the pre-tokenizers."""
    raw = json.loads((DATA / "tokenizer.json").read_text(encoding="utf-8"))
    steps = [{**s, "trim_offsets": True} if s["type"] == "ByteLevel" else s for s in PRE_TOKENIZERS[pre]]
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    raw["model"] |= {"ignore_merges": pre == "llama3", **model}
    return raw


def write_json(folder: Path, **files: Any) -> Path:
    """Write NAME.json for each keyword argument."""
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


def from_json(raw: dict[str, Any], folder: Path) -> Tokenizer:
    return load(tokenizer_from_hf(write_json(folder, tokenizer=raw)))


def from_small_ranks() -> Tokenizer:
    path = DATA / "small.tiktoken"
    return load(from_ranks(path, read_ranks(path, path.read_bytes()), Settings(path)))


def sentencepiece_tokenizer(folder: Path, **settings: Any) -> Tokenizer:
    (folder / "tokenizer.model").write_bytes(KJV.read_bytes())
    return load(tokenizer_from_hf(write_json(folder, tokenizer_config=settings)))
