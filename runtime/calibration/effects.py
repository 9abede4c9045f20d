"""What each matrix does to the output when it is quantised: measured by the divergence of the predictions.

Measuring every matrix alone would take as many passes as there are matrices. Instead all matrices of one role are
quantised together ("wv" of every layer), then all of one layer; the effect of one matrix is taken to be the product of
the shares that its role and its layer have. The quantised matrices are not calibrated, which ranks them alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from formats.codecs import CODECS
from formats.codecs.trit_codec import Encode
from formats.conversion.mixed import allocate, base_depth
from formats.conversion.plan import measure_all, rows_of
from formats.sources.source import Source

from ..config import ModelConfig
from ..evaluate import log_softmax
from ..kernels import Kernels
from .layer import ATTENTION, MLP
from .streams import Forward, product

WINDOWS = 2  # of the calibration text that are looked at
ROLES = (*ATTENTION.inputs, ATTENTION.output, *MLP.inputs, MLP.output)
ROWS = 64  # tokens whose logits are there at a time
TABLE_ROWS = 2048  # of the embeddings, read at a time

Matrices = Mapping[str, np.ndarray]
Biases = Mapping[str, np.ndarray | None]


def choose_depths(
    source: Source,
    windows: np.ndarray,
    bpw: float,
    kernels: Kernels,
    encode: Encode,
    progress: Callable[[int, int, str], None] | None = None,
) -> Mapping[str, int]:
    """Choose the depth of each matrix by its measured effect, so that all take at most `bpw` bits per weight.

    Raises OptionError if even one trit each takes more.
    """
    measured = measure_all(source, encode, progress)
    base = base_depth(measured, bpw)
    effects = measure_effects(source, windows, base, kernels, encode, progress)
    return allocate([replace(matrix, effect=(base, effects[matrix.name])) for matrix in measured], bpw)


def measure_effects(
    source: Source,
    windows: np.ndarray,
    depth: int,
    kernels: Kernels,
    encode: Encode,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, float]:
    """Give for every matrix of the layers the divergence that it causes at a depth, by name.

    windows: (windows, ctx) integer, the first WINDOWS of which are used; kernels: exact ones
    """
    config = ModelConfig.from_dict(source.config, str(source.path))
    forward = Forward(config, kernels, windows.shape[1])
    x = embedded(source, windows[:WINDOWS])
    # By what is quantised: nothing, one role in all layers, or one layer; a layer's stream begins with the layer.
    streams = {"": x, **{role: x for role in ROLES}}
    for i in range(config.n_layers):
        if progress:
            progress(i, config.n_layers, f"layer {i + 1} of {config.n_layers}")
        exact, rough, biases, gains = _read_layer(source, i, depth, encode)
        streams[f"layers.{i}"] = streams[""]
        for what, before in streams.items():
            own = {role: (rough if what in (role, f"layers.{i}") else exact)[role] for role in ROLES}
            streams[what] = _through(forward, before, own, biases, gains)
    kl = _divergences(source, forward, streams)
    total = sum(kl[role] for role in ROLES) or 1.0
    return {
        f"layers.{i}.{role}": kl[f"layers.{i}"] * kl[role] / total for i in range(config.n_layers) for role in ROLES
    }


def embedded(source: Source, windows: np.ndarray) -> np.ndarray:
    """Look up the embeddings of tokens: (tokens, dim) float32."""
    table, ids = source.tensors["tok_embeddings"], windows.reshape(-1)
    x = np.empty((len(ids), table.shape[1]), np.float32)
    for start in range(0, table.shape[0], TABLE_ROWS):
        found = np.flatnonzero((ids >= start) & (ids < start + TABLE_ROWS))
        if len(found):
            rows = table.read_rows(start, min(start + TABLE_ROWS, table.shape[0]))
            x[found] = rows[ids[found] - start]
    return x


def _read_layer(source: Source, i: int, depth: int, encode: Encode) -> tuple[Matrices, Matrices, Biases, Matrices]:
    """Read a layer: its matrices, the same quantised, biases, gains."""
    exact, rough, biases = {}, {}, {}
    for role in ROLES:
        tensor, bias = source.tensors[f"layers.{i}.{role}"], source.tensors.get(f"layers.{i}.{role}.bias")
        exact[role] = np.ascontiguousarray(tensor.read(), np.float32)
        biases[role] = None if bias is None else bias.read()
        params, parts = encode(rows_of(tensor), [depth])[depth]
        rough[role] = CODECS[f"trit{depth}"].dequantize(parts, tensor.shape, params)
    gains = {half.norm: source.tensors[f"layers.{i}.{half.norm}"].read() for half in (ATTENTION, MLP)}
    return exact, rough, biases, gains


def _through(forward: Forward, x: np.ndarray, matrices: Matrices, biases: Biases, gains: Matrices) -> np.ndarray:
    """Move a residual stream through a layer. x, returned: (tokens, dim) float32"""
    for half, inner in ((ATTENTION, forward.attended), (MLP, forward.gated)):
        first, own = [matrices[name] for name in half.inputs], [biases[name] for name in half.inputs]
        inside = inner(forward.normalized(x, gains[half.norm]), first, own)
        x = x + product(inside, matrices[half.output], biases[half.output])
    return x


def _divergences(source: Source, forward: Forward, streams: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Give the mean divergence of each stream's predictions from those of the stream "". streams: (tokens, dim)"""
    head = source.tensors["tok_embeddings" if forward.config.tied_embeddings else "output"].read()
    gain = source.tensors["norm"].read()
    found = dict.fromkeys(streams, 0.0)
    for start in range(0, len(streams[""]), ROWS):
        base = log_softmax(product(forward.normalized(streams[""][start : start + ROWS], gain), head, None))
        for what, x in streams.items():
            own = log_softmax(product(forward.normalized(x[start : start + ROWS], gain), head, None))
            found[what] += float((np.exp(base) * (base - own)).sum())
    return {what: total / len(streams[""]) for what, total in found.items()}
