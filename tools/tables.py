"""Tables of tensors for people: aligned columns, and the layers that have the same kind of tensor in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from runtime.cli import one_line

LAYER = re.compile(r"layers\.(\d+)\.(.+)")
Details = tuple[str, ...]


def by_kind(items: Iterable[tuple[str, Details, int]]) -> list[tuple[str, int, Details, int]]:
    """Group tensors that differ in nothing but their layer.

    items: name, whatever else tells kinds apart, bytes; returns: name, number of tensors, the same details, their bytes

    >>> by_kind([(f"layers.{i}.wq", ("f16",), 8) for i in (0, 1, 2, 5)])
    [('layers.0-2,5.wq', 4, ('f16',), 32)]
    """
    groups: dict[tuple[str, Details], list[tuple[str, int]]] = {}
    for name, details, nbytes in items:
        match = LAYER.fullmatch(name)
        layer, kind = (match[1], match[2]) if match else ("", name)
        groups.setdefault((kind, details), []).append((layer, nbytes))
    return [
        (_named(kind, [layer for layer, _ in found]), len(found), details, sum(nbytes for _, nbytes in found))
        for (kind, details), found in groups.items()
    ]


def _named(kind: str, layers: Sequence[str]) -> str:
    return kind if "" in layers else f"layers.{_ranges(sorted(map(int, layers)))}.{kind}"


def _ranges(numbers: Sequence[int]) -> str:
    """Write rising numbers in short: "0-3,7"."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def table(rows: Iterable[Sequence[object]], right: Iterable[int]) -> list[str]:
    """Align columns; `right` names those of numbers."""
    cells = [[one_line(str(cell)) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    aligned = set(right)
    align = [str.rjust if i in aligned else str.ljust for i in range(len(widths))]
    return ["  ".join(f(c, w) for f, c, w in zip(align, row, widths, strict=True)).rstrip() for row in cells]
