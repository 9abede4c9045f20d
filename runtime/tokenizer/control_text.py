"""Finding the tokens that are searched for in the text: control tokens if asked for, and added tokens."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from functools import cached_property

# White_Space of Unicode: str.strip() without arguments takes the separators U+001C to U+001F too.
WHITE_SPACE = (
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u2028\u2029\u202f\u205f\u3000"
)
MAX_DEPTH = 30  # the compiler of `re` is recursive
_SPACES = re.compile(f"[{WHITE_SPACE}]*")


class ControlText:
    """Splits a text at these tokens, as `tokenizers` does: leftmost first, of several there the longest.

    special, added: text -> id; strip_left, strip_right: ids that take the white space beside them along;
    match_last: ids that are searched for in what the others leave
    """

    def __init__(
        self,
        special: Mapping[str, int],
        added: Mapping[str, int],
        strip_left: Collection[int] = (),
        strip_right: Collection[int] = (),
        match_last: Collection[int] = (),
    ) -> None:
        self._special = frozenset(special.values())
        self._has_added = bool(added)
        self._strip_left, self._strip_right = frozenset(strip_left), frozenset(strip_right)
        last = frozenset(match_last)
        groups: tuple[dict[str, int], dict[str, int]] = ({}, {})
        for text, token in {**special, **added}.items():
            groups[token in last][text] = token
        self._groups = [group for group in groups if group]

    def split(self, text: str, special: bool) -> list[str | int]:
        """Cut a text into plain texts and ids; special: whether control tokens are parsed too."""
        parts: list[str | int] = [text] if text else []
        if special or self._has_added:
            for pattern, ids in self._passes:
                cut = (self._cut(p, pattern, ids, special) if isinstance(p, str) else [p] for p in parts)
                parts = [piece for pieces in cut for piece in pieces]
        return parts

    @cached_property
    def _passes(self) -> list[tuple[re.Pattern[str], dict[str, int]]]:
        return [(re.compile(_any_of(group)), group) for group in self._groups]

    def _cut(self, text: str, pattern: re.Pattern[str], ids: Mapping[str, int], special: bool) -> list[str | int]:
        out: list[str | int] = []
        done = 0
        for match in pattern.finditer(text):
            token, (start, stop) = ids[match[0]], match.span()
            if token in self._special and not special:  # plain text, in which no shorter token is searched for
                continue
            before = text[done:start]
            if token in self._strip_left:
                before = before.rstrip(WHITE_SPACE)
            if token in self._strip_right:
                stop = _SPACES.match(text, stop).end()  # type: ignore[union-attr]  # it matches nothing too
            if before:
                out.append(before)
            out.append(token)
            done = stop
        return [*out, text[done:]] if done < len(text) else out


def _any_of(texts: Iterable[str], depth: int = MAX_DEPTH) -> str:
    """Write the expression that finds the longest of some texts, common beginnings once: "ab(?:cd|e)?".

    So what it costs depends on the length of the texts, not on their number. depth: of groups within each other
    """
    groups: dict[str, list[str]] = {}
    for text in sorted(texts, key=len, reverse=True):
        groups.setdefault(text[:1] if depth else text, []).append(text)
    alternatives = []
    for group in groups.values():
        first, last = min(group), max(group)
        start = first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]
        rest = [text[len(start) :] for text in group]
        alternatives.append(re.escape(start) + (f"(?:{_any_of(rest, depth - 1)})" if len(rest) > 1 else ""))
    return "|".join(alternatives)
