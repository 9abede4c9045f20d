"""A picture of how well a model predicts by position, within a window or along a stream through the ring."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def draw_positions(found: Mapping[str, Any], path: str) -> None:
    """Write the picture. found: what tools.perplexity --by-position tells; the ring's wrap is a line in each panel."""
    from matplotlib.figure import Figure

    parts, ctx = found["by_position"], found["ctx"]
    starts = np.array([part["from"] for part in parts])
    at = starts + (starts[1] - starts[0] if len(starts) > 1 else 0) / 2
    ppl, stderr = (np.array([part[key] for part in parts]) for key in ("ppl", "stderr"))
    panels = [("loss", at, np.log(ppl), stderr / ppl)]
    if "kl_mean" in parts[0]:
        kl, error = (np.array([part[key] for part in parts]) for key in ("kl_mean", "kl_stderr"))
        panels.append((f"KL divergence from {found['base']}", at, kl, error))
    figure = Figure(figsize=(10, 2 + 2.5 * (len(panels) + ("resident" in found))), layout="constrained")
    figure.suptitle(f"{found['model']} on {found['text']}: a context of {ctx} tokens, {found['kv']}, "
                    f"{found['streams']} texts")  # fmt: skip
    axes = figure.subplots(len(panels) + ("resident" in found), 1, squeeze=False)[:, 0]
    wraps = range(ctx, int(starts[-1]) + 1, ctx)
    for panel, (what, x, y, error) in zip(axes, panels, strict=False):
        panel.errorbar(x, y, error, marker=".", capsize=2)
        for wrap in wraps:
            panel.axvline(wrap, color="tab:red", alpha=0.9 if wrap == ctx else 0.2)
        panel.set(xlabel="position in the text", ylabel=what)
        panel.set_xticks([0, *wraps])
        panel.grid(axis="y", alpha=0.3)
    if wraps:
        axes[0].annotate("the ring is full", (ctx, 1), (4, -12), xycoords=("data", "axes fraction"),
                         textcoords="offset points", color="tab:red")  # fmt: skip
    if "resident" in found:
        done, size = np.array(found["resident"]).T
        axes[-1].plot(done, size / 1e6)
        axes[-1].set(xlabel="tokens read in all", ylabel="resident memory, MB", ylim=(0, 1.15 * size.max() / 1e6))
        axes[-1].grid(axis="y", alpha=0.3)
    figure.savefig(path, dpi=120)
