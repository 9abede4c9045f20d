"""Stop strings: an answer ends before the first of them, however its text is cut into pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Hold text back while it could still become a stop string.

    >>> stops = StopStrings(["END"])
    >>> stops.push("the E"), stops.push("ND is near"), stops.found
    ('the ', '', True)
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = list(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Take more text, give what is certain to come before any stop string."""
        self._held += text
        places = [place for place in (self._held.find(stop) for stop in self._stops) if place >= 0]
        if places:
            self.found = True
            sure, self._held = self._held[: min(places)], ""
            return sure
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        sure, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return sure

    def flush(self) -> str:
        """Give what was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0
