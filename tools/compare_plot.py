"""The picture of tools.compare: what files of one model cost in quality against what they take."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURES = ("perplexity", "KL divergence")
TICKS = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)  # of each decade
ACROSS, UP = {-1: "right", 0: "center", 1: "left"}, {-1: "top", 0: "center", 1: "bottom"}
# Where a label may stand beside its point: steps to the right and up, the nearest first; a step is STEP / 72 inch.
PLACES = [(far * x, far * y) for far in (1, 2, 3, 4) for x, y in
          ((1, 1), (1, 0), (-1, 0), (1, -1), (-1, 1), (-1, -1), (0, 1), (0, -1))]  # fmt: skip
STEP = 6, 6


@dataclass(frozen=True)
class Point:
    """One file. bpw: bits per weight of the layers' matrices; kl_mean, kl_stderr, same_top1: None for the base"""

    name: str
    nbytes: int
    bpw: float
    ppl: float
    stderr: float
    kl_mean: float | None = None
    kl_stderr: float | None = None
    same_top1: float | None = None

    @property
    def label(self) -> str:
        """The name without its ending."""
        return Path(self.name).stem

    @property
    def series(self) -> str:
        """What files have in common whose names differ in digits only."""
        return re.sub(r"\d+", "", self.label)

    @property
    def is_peer(self) -> bool:
        """Was it measured by llama.cpp?"""
        return not self.name.endswith(".trit")

    def measure(self, what: str) -> tuple[float, float]:
        """Give one of MEASURES and its standard error."""
        return (self.ppl, self.stderr) if what == "perplexity" else (self.kl_mean or 0.0, self.kl_stderr or 0.0)


def draw_points(points: Sequence[Point], title: str, path: str) -> None:
    """Write the picture: both measures against bits per weight, the base as a line.

    Files whose names differ in digits only are of one colour and joined by a line.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    figure.suptitle(title, parse_math=False)  # names may have dollar signs
    panels = list(zip(figure.subplots(1, 2), MEASURES, strict=True))
    labels = []
    for axes, what in panels:
        axes.set_yscale("log")
        labels.append(_draw_series(axes, points, what))
        axes.set(xlabel="bits per weight of the layers' matrices", ylabel=what)
        axes.margins(x=0.1, y=0.08)
        axes.yaxis.set_major_locator(LogLocator(subs=TICKS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    panels[1][0].set_ylabel("KL divergence from the base, nats per token")
    figure.draw_without_rendering()
    for (axes, _), notes in zip(panels, labels, strict=True):
        _keep_apart(axes, notes)
    figure.savefig(path, dpi=120)


def _draw_series(axes: Axes, points: Sequence[Point], what: str) -> list[Any]:
    """Draw lines, points and error bars, and give the labels, which do not have their places yet."""
    from matplotlib.patheffects import withStroke

    labels, halo = [], [withStroke(linewidth=2.5, foreground="white")]
    base = next((point for point in points if point.kl_mean is None), None)
    if base and what == "perplexity":
        axes.axhline(base.ppl, color="black", linestyle="--", linewidth=1)
        axes.annotate(f"{base.label}: {base.ppl:.2f}", (0, base.ppl), (4, -3), fontsize=9, va="top",
                      xycoords=("axes fraction", "data"), textcoords="offset points", parse_math=False)  # fmt: skip
    for i, name in enumerate(dict.fromkeys(point.series for point in points if point is not base)):
        mine = [point for point in points if point.series == name and point is not base]
        x, (y, error) = [p.bpw for p in mine], zip(*(p.measure(what) for p in mine), strict=True)
        color, peer = f"C{i % 10}", mine[0].is_peer
        axes.errorbar(x, y, error, color=color, marker="s" if peer else "o", capsize=2,
                      linestyle=":" if peer else "-", linewidth=1)  # fmt: skip
        for point, at in zip(mine, zip(x, y, strict=True), strict=True):
            label = axes.annotate(point.label, at, (0, 0), textcoords="offset points", fontsize=9, color=color,
                                  path_effects=halo, parse_math=False)  # fmt: skip
            label.set_in_layout(False)
            labels.append(label)
    return labels


def _keep_apart(axes: Axes, labels: Sequence[Any]) -> None:
    """Move each label to the first of PLACES where it covers no point, no other label and no edge, or the least bad."""
    from matplotlib.transforms import Bbox

    frame = axes.get_window_extent()
    spots = [axes.transData.transform(label.xy) for label in labels]
    taken = [Bbox.from_bounds(x - 5, y - 5, 10, 10) for x, y in spots]
    for label in labels:

        def covered(place: tuple[int, int], label: Any = label) -> float:
            box = _put(label, place)
            return sum(_common(box, other) for other in taken) + box.width * box.height - _common(box, frame)

        taken.append(_put(label, min(PLACES, key=covered)))


def _put(label: Any, place: tuple[int, int]) -> Any:
    """Move a label to a place beside its point. returns: the box that it takes, in pixels"""
    x, y = place
    label.set_position((x * STEP[0], y * STEP[1]))
    label.set(ha=ACROSS[(x > 0) - (x < 0)], va=UP[(y > 0) - (y < 0)])
    return label.get_window_extent()


def _common(a: Any, b: Any) -> float:
    """Give the area that two boxes share."""
    width, height = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return float(max(width, 0) * max(height, 0))
