"""A picture of a file, layer by layer: bits per weight of each matrix, and its error where a report tells it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formats.container import TritFile
from formats.conversion.plan import MATRICES
from runtime.cli import UserError

_NAME = re.compile(r"layers\.(\d+)\.(\w+)")


def read_errors(path: str, file: TritFile) -> dict[str, float]:
    """Read rel_rmse by tensor from what `tools.convert --report` wrote of this file.

    Raises UserError if the report is not one, or is that of another file.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        lines = {line["name"]: line for line in report["tensors"]}
        errors = {name: float(line["rel_rmse"]) for name, line in lines.items()}
    except (ValueError, KeyError, TypeError) as exc:
        raise UserError(f"{path}: is not the report of one conversion (tools.convert --report)") from exc
    for name, line in lines.items():
        tensor = file.tensors.get(name)
        if tensor is None or (tensor.codec, tensor.nbytes) != (line.get("codec"), line.get("bytes")):
            raise UserError(f"{path}: tells of {name} as it is not in {file.path}: the report of another conversion")
    return errors


def draw_layers(file: TritFile, path: str, errors: Mapping[str, float] | None = None) -> None:
    """Write the picture. errors: rel_rmse by tensor; the matrices in the layers are drawn, a line for each kind."""
    from matplotlib.figure import Figure

    bits = {name: 8 * t.nbytes / (t.shape[0] * t.shape[1]) for name, t in file.tensors.items() if len(t.shape) == 2}
    panels: list[tuple[str, Mapping[str, Any]]] = [("bits per weight", bits)]
    if errors is not None:
        panels.append(("relative RMS error", errors))
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    figure.suptitle(Path(file.path).name)
    for axes, (what, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for kind, line in _by_kind(values).items():
            axes.plot(list(line), list(line.values()), marker=".", label=kind)
        axes.set(xlabel="layer", ylabel=what)
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
        axes.grid(alpha=0.3)
        axes.legend(ncols=2)
    figure.savefig(path, dpi=120)


def _by_kind(values: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Sort values of layers.N.KIND by kind, then layer."""
    found: dict[str, dict[int, float]] = {kind: {} for kind in sorted(MATRICES)}
    for name, value in values.items():
        match = _NAME.fullmatch(name)
        if match and match[2] in found:
            found[match[2]][int(match[1])] = value
    return {kind: dict(sorted(line.items())) for kind, line in found.items() if line}
