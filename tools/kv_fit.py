"""Linear encoders and decoders in closed form, and which layers get which rank."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

RIDGE = 1e-3  # of the metric's mean eigenvalue: directions that nothing looks at must not blow up the decoder


@dataclass(frozen=True, eq=False)
class Fit:
    """Reduced-rank regression of vectors on themselves: of every rank, from one eigendecomposition.

    Its error is measured in a metric, and is the least that any linear encoder and decoder of a rank can have.
    encoder: (width, width), the first rows are a smaller rank's; decoder: (width, width), its first columns
    mean: (width,) of the vectors, which the decoder's bias restores
    lost: (width + 1,) share of the weighted variance that is lost with each rank, lost[width] == 0
    """

    encoder: Doubles
    decoder: Doubles
    mean: Doubles
    lost: Doubles

    def parts(self, rank: int) -> dict[str, Floats]:
        """The tensors of a module of this rank: encoder (rank, width), decoder (width, rank), its bias (width,)."""
        encoder, decoder = self.encoder[:rank], self.decoder[:, :rank]
        bias = self.mean - decoder @ (encoder @ self.mean)
        parts = {"encoder": encoder, "decoder": decoder, "decoder.bias": bias}
        return {name: np.ascontiguousarray(values, np.float32) for name, values in parts.items()}


def fit(covariance: Doubles, metric: Doubles, mean: Doubles) -> Fit:
    """Fit vectors of this covariance so that what is lost, seen through `metric`, is least.

    covariance, metric: (width, width), symmetric, no negative eigenvalues: the error of x is x metric x
    """
    width = len(metric)
    values, vectors = np.linalg.eigh(metric + RIDGE * np.trace(metric) / width * np.eye(width))
    scale = np.sqrt(np.maximum(values, np.finfo(np.float64).tiny))
    root, inverse = (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T
    variances, basis = np.linalg.eigh(root @ covariance @ root)
    variances, basis = np.maximum(variances[::-1], 0), basis[:, ::-1]
    left = np.append(np.cumsum(variances[::-1])[::-1], 0.0)
    # Codes as large as what they stand for: both matrices are then far from the ends of float16's range.
    size = np.sqrt(np.trace(covariance) / max(variances.sum(), np.finfo(np.float64).tiny))
    return Fit(size * basis.T @ root, inverse @ basis / size, mean, left / max(left[0], np.finfo(np.float64).tiny))


def plan(damage: Mapping[int, tuple[Fit, int, float]], width: int, step: int, numbers: int) -> dict[int, int]:
    """Choose ranks so that `numbers` fewer are stored for each token, where that does the least damage.

    damage: layer -> its fit, the rank that was tried, and the damage measured with it. Damage grows as the lost
    variance does, so that one measurement tells that of every rank.
    returns: layer -> rank, of the layers that are compressed
    """
    ranks = dict.fromkeys(damage, width)

    def next_step(layer: int) -> tuple[float, int]:
        """Damage for each number that is saved by one step more, for the heap."""
        fitted, tried, measured = damage[layer]
        lost, rank = fitted.lost, ranks[layer]
        more = float(lost[max(rank - step, 1)] - lost[rank])
        return measured * more / max(float(lost[tried]), np.finfo(np.float64).tiny), layer

    heap = [next_step(layer) for layer in damage]
    heapq.heapify(heap)
    saved = 0
    while saved < numbers and heap:
        _, layer = heapq.heappop(heap)
        rank = max(ranks[layer] - step, 1)
        saved += ranks[layer] - rank
        ranks[layer] = rank
        if rank > step:
            heapq.heappush(heap, next_step(layer))
    return {layer: rank for layer, rank in sorted(ranks.items()) if rank < width}


def cheapest(damage: Mapping[int, float], count: int) -> list[int]:
    """The `count` layers of the least damage, in order of layers."""
    return sorted(sorted(damage, key=lambda layer: damage[layer])[:count])


def parse_layers(text: str, n_layers: int) -> list[int] | int:
    """Read "15", a number of layers, or "3,5,8-11", these layers ("=3" for one). Raises ValueError."""
    if not set(text) & set("=,-"):
        count = int(text)
        if not 1 <= count <= n_layers:
            raise ValueError(f"there are {n_layers} layers")
        return count
    layers: set[int] = set()
    for part in text.removeprefix("=").split(","):
        first, dash, last = part.partition("-")
        layers |= set(range(int(first), int(last if dash else first) + 1))
    if not layers or not 0 <= min(layers) <= max(layers) < n_layers:
        raise ValueError(f"layers go from 0 to {n_layers - 1}")
    return sorted(layers)
