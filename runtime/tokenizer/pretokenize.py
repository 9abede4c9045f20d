"""Cutting text into words before byte-pair merging: the pre-tokenizers of byte-level BPE, by name.

The patterns are built in, never taken from a file, and each runs in linear time. They are matched on a
shadow of the text in which every character above U+007F is replaced by one of a few that stand for its
class (letter, number, space, other), so the classes are those of unicode16.py whatever version Python has,
and plain `re` is enough.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np

from runtime.tokenizer import unicode16

# The characters of the shadow that stand for a class, all below U+0100: the shadow is one byte a character.
_LETTER, _LONG_S, _NUMBER, _LATE_NUMBER, _SPACE, _OTHER = "\xaa\xba\xb2\xb9\xa0\xa7"
_L, _N, _S = f"A-Za-z{_LETTER}{_LONG_S}", f"0-9{_NUMBER}", f"\t-\r {_SPACE}"
_D = _N + _LATE_NUMBER

# 's matches 'ſ (U+017F) too where case is ignored: it folds to s.
_ANY_CASE = f"'(?:[sStTmMdD{_LONG_S}]|[rR][eE]|[vV][eE]|[lL][lL])"
_LOWER_CASE = "'(?:[stmd]|re|ve|ll)"

# SmolLM2 cuts every digit off first and then each piece between as GPT-2 does; here that is one pattern, in
# which white space before a digit is at the end of its piece.
PATTERNS = {
    "gpt2": f"{_LOWER_CASE}| ?[{_L}]+| ?[{_N}]+| ?[^{_S}{_L}{_N}]+|[{_S}]+(?![^{_S}])|[{_S}]+",
    "smollm": f"[{_D}]|{_LOWER_CASE}| ?[{_L}]+| ?[^{_S}{_L}{_D}]+|[{_S}]+(?![^{_S}{_D}])|[{_S}]+",
    "llama3": (
        f"{_ANY_CASE}|[^\r\n{_L}{_N}]?[{_L}]+|[{_N}]{{1,3}}| ?[^{_S}{_L}{_N}]+[\r\n]*"
        f"|[{_S}]*[\r\n]+|[{_S}]+(?![^{_S}])|[{_S}]+"
    ),
}


def pre_tokenizer(name: str) -> Callable[[str], list[str]]:
    """Return the function that cuts a text into words; joined again they are the text.

    >>> pre_tokenizer("llama3")("It's 2024!")
    ['It', "'s", ' ', '202', '4', '!']

    The text must hold no surrogates. Raises KeyError for a name that is not in PATTERNS.
    """
    find = re.compile(PATTERNS[name]).findall

    def split(text: str) -> list[str]:
        if text.isascii():
            return find(text)
        return list(_cut(text, find(shadow(text))))

    return split


def shadow(text: str) -> str:
    """Replace each character above U+007F by the one that stands for its class."""
    codes = np.frombuffer(text.encode("utf-32-le"), "<u4")
    return _class_table()[codes].tobytes().decode("latin-1")


def _cut(text: str, like: list[str]) -> Iterator[str]:
    start = 0
    for part in like:
        stop = start + len(part)
        yield text[start:stop]
        start = stop


@lru_cache(maxsize=1)
def _class_table() -> np.ndarray:
    """Build the shadow of every code point: (0x110000,) uint8."""
    table = np.full(0x110000, ord(_OTHER), dtype=np.uint8)
    table[:128] = np.arange(128)
    for runs, char in ((unicode16.LETTERS, _LETTER), (unicode16.NUMBERS, _NUMBER)):
        numbers = [int(n, 36) for n in runs.split()]
        bounds = 128 + np.cumsum(numbers)
        for first, stop in zip(bounds[::2], bounds[1::2], strict=True):
            table[first:stop] = ord(char)
    for spans, char in ((unicode16.SPACES, _SPACE), (unicode16.LATE_NUMBERS, _LATE_NUMBER)):
        for first, last in spans:
            table[first : last + 1] = ord(char)
    table[0x17F] = ord(_LONG_S)
    return table
