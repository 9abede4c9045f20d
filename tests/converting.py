"""What the tests of the converter share: to run it, and to see what it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.conversion.convert import Summary, convert
from formats.sources.source import open_source
from tests.checkpoints import HF_CONFIG, Weights, weights_for, write_hf
from tools.convert import main

WQ = "layers.0.wq"


def to_trit(folder: Path, quant: str = "f16", name: str = "out.trit", **options: Any) -> Summary:
    """Convert into a file beside the source."""
    return convert(open_source(folder), folder.parent / name, quant, **options)


def with_values(folder: Path, name: str, values: np.ndarray | float, dtype: str = "float32") -> Weights:
    """Rewrite the checkpoint with the first values of one tensor replaced."""
    weights = weights_for(HF_CONFIG, "float32")
    weights[name].reshape(-1)[: np.size(values)] = np.reshape(values, -1)
    write_hf(folder, dtype=dtype, weights=weights)
    return weights


def left(folder: Path) -> list[str]:
    """The names of all that lies beside the source."""
    return sorted(p.name for p in folder.parent.iterdir() if p != folder)


def command(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    """Run tools.convert in this process: its exit code, what went to stdout and to stderr."""
    code = main([str(a) for a in args])
    out, err = capsys.readouterr()
    return code, out, err
