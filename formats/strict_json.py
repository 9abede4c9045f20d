"""JSON as the header of a .trit file has it: stricter than `json`, and bounded before anything is made of it."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from .errors import HeaderError, shown

MAX_VALUES = 250_000
MAX_DEPTH = 32
MAX_INT = 1 << 63


class DuplicateKeyError(ValueError):
    """An object has a key twice: which of its values is meant, nobody can tell."""


def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its pairs; `object_pairs_hook` of `json.loads`. Raises DuplicateKeyError."""
    result = dict(items)
    if len(result) != len(items):
        twice = Counter(key for key, _ in items).most_common(1)[0][0]
        raise DuplicateKeyError(f"key {shown(twice)} stands twice")
    return result


def parse_json(data: bytes, path: str) -> Any:
    """Parse JSON more strictly than `json` does: no duplicate keys, finite numbers, bounded size and depth.

    Raises HeaderError.
    """
    # Commas and brackets bound the number of values before any object is made.
    if sum(data.count(mark) for mark in (b",", b"[", b"{")) > MAX_VALUES:
        raise HeaderError(path, f"the header holds more than {MAX_VALUES} values")

    def integer(text: str) -> int:
        # The length comes first: converting a million digits takes seconds.
        if len(text) > 20 or not -MAX_INT <= int(text) < MAX_INT:
            raise HeaderError(path, f"number {text[:24]}... in the header does not fit 64 bits")
        return int(text)

    def real(text: str) -> float:
        value = float(text)
        if not math.isfinite(value):
            raise HeaderError(path, f"number {text[:24]} in the header is not finite")
        return value

    try:
        text = data.decode("utf-8")
        value = json.loads(text, object_pairs_hook=unique, parse_int=integer, parse_float=real, parse_constant=real)
    except UnicodeDecodeError as e:
        raise HeaderError(path, f"the header is not UTF-8 ({e.reason} at byte {e.start})") from e
    except json.JSONDecodeError as e:
        raise HeaderError(path, f"the header is not JSON ({e.msg} at character {e.pos})") from e
    except DuplicateKeyError as e:
        raise HeaderError(path, f"{e} in the header") from e
    except RecursionError as e:
        raise HeaderError(path, f"the header is nested deeper than {MAX_DEPTH} levels") from e
    _check_strings_and_depth(value, b"\\u" in data, path)
    return value


def _check_strings_and_depth(value: Any, escapes: bool, path: str) -> None:
    """Refuse deep nesting, and half surrogates, which JSON can escape but no text can hold."""
    level = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
                if escapes:
                    below += item
            elif isinstance(item, list):
                below += item
            elif escapes and isinstance(item, str) and any("\ud800" <= c <= "\udfff" for c in item):
                raise HeaderError(path, "a text in the header holds half of a surrogate pair")
        level = below
        if not level:
            return
    raise HeaderError(path, f"the header is nested deeper than {MAX_DEPTH} levels")
