"""What became of each tensor in a conversion: codec, bits, and how far its values are from the source's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..codecs import CODECS
from ..codecs.base import Rows, Streamed, row_chunks
from .plan import Planned, Summary


def errors_of(item: Planned, parts: Mapping[str, np.ndarray | Streamed], rows: Rows) -> dict[str, float]:
    """Compare what is written with the source.

    returns: rel_rmse, the root of the squared error relative to the squared values, and the cosine of the two
    """
    codec = CODECS[item.codec]
    arrays = {key: part for key, part in parts.items() if isinstance(part, np.ndarray)}
    error = power = found = both = 0.0
    for start, stop in row_chunks(item.shape, 16):
        w = rows[start:stop].astype(np.float64)
        if len(arrays) < len(parts):  # its rows are made as they are written, each by itself
            _, made = codec.quantize(rows[start:stop])
            again = codec.dequantize(made, w.shape, {}).astype(np.float64)
        else:
            again = codec.dequantize_range(arrays, item.shape, item.params, start, stop).astype(np.float64)
        error += float(np.square(w - again).sum())
        power += float(np.square(w).sum())
        found += float(np.square(again).sum())
        both += float((w * again).sum())
    norm = math.sqrt(power * found)
    return {"rel_rmse": math.sqrt(error / power) if power else 0.0, "cosine": both / norm if norm else 1.0}


def report_of(summary: Summary) -> dict[str, Any]:
    """Give the report of one file as JSON values: the sums, and a line for every tensor but the tokenizer's."""
    return {
        "file": str(summary.path),
        "bytes": summary.nbytes,
        "weights": summary.weights,
        "bpw": summary.bpw,
        "matrix_bpw": summary.matrix_bpw,
        "codecs": summary.by_codec(),
        "notes": summary.notes,
        "tensors": [
            {
                "name": item.name,
                "source": item.source.theirs,
                "source_dtype": item.source.dtype,
                "codec": item.codec,
                "shape": list(item.shape),
                "bytes": item.nbytes,
                "bpw": 8 * item.nbytes / item.weights,
                **item.facts,
                **({"remark": item.remark} if item.remark else {}),
            }
            for item in summary.plan
            if item.source
        ],
    }
