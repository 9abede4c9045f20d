"""One matrix onto the trit grid so that its products, not its weights, come out right.

What is minimised is the sum over calibration tokens of |(W - Q) x|^2 = tr((W - Q) H (W - Q)^T), H = sum of x x^T.
Columns are rounded one after another, and each takes over the error that those before it have made (GPTQ: Frantar et
al., 2022; in the form of LDLQ: Chee et al., 2023). With H = U D U^T, U unit upper triangular, column k is rounded from

    t_k = w_k + sum over i < k of (w_i - q_i) U_ik,    at a loss of D_k (t_k - q_k)^2.

Sixteen inputs share a unit, so groups stay whole: they are taken in the order of their mean diagonal of H, their
columns by their own, so that what matters most is rounded first and the rest makes up for it. The unit of a group is
the one of all 27 with the least loss when its sixteen columns are rounded with it, feedback included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from formats.codecs.best_units import Search, fit_units, search_reference
from formats.codecs.trit import ENTRIES, GROUP, max_level

# Without these the encoder learns the calibration text by heart: correlations of inputs are taken to be smaller than
# they were found by a share SHRINKAGE, and DAMPING times the mean of H's diagonal is added to it.
SHRINKAGE, DAMPING = 0.2, 0.2
WIDEST_DOUBLE = 4096  # columns up to which the factors are computed in float64
BLOCK = 512

Rounded = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Factors:
    """H of one or more matrices with the same inputs, ready for `round_columns`; inputs are padded to whole groups.

    order: (n,) which input is taken when; weights: (n,) float32, D; feedback: (n, n) float32, U; both in that order
    """

    order: np.ndarray
    weights: np.ndarray
    feedback: np.ndarray

    @property
    def importance(self) -> np.ndarray:
        """Weights for the fit of the units, in the order of the inputs, mean 1: (groups, 16) float32"""
        in_place = np.empty_like(self.weights)
        in_place[self.order] = self.weights
        return (in_place / in_place.mean()).reshape(-1, GROUP)


class RoundColumns(Protocol):
    """Rounds all rows of a matrix; `round_columns_reference` defines what it gives."""

    def __call__(
        self, w: np.ndarray, factors: Factors, units: np.ndarray, depth: int
    ) -> tuple[np.ndarray, np.ndarray]: ...


def regularize(hessian: np.ndarray) -> None:
    """Pull H towards a multiple of the identity, in place, so that what it leads to holds for other texts too.

    hessian: (in, in) float32
    """
    diagonal = np.diagonal(hessian).copy()
    hessian *= np.float32(1 - SHRINKAGE)
    # Inputs that are always zero leave everything open.
    hessian[np.diag_indices(len(hessian))] = diagonal + (np.float32(DAMPING) * diagonal.mean() or np.float32(1))


def factorize(hessian: np.ndarray) -> Factors:
    """Choose the order of the columns and decompose H.

    hessian: (in, in) floating point, symmetric, positive definite
    """
    n = len(hessian)
    padded = -(-n // GROUP) * GROUP
    diagonal = np.zeros(padded)
    diagonal[:n] = np.diagonal(hessian)
    groups = diagonal.reshape(-1, GROUP)
    inside = np.argsort(-groups, axis=1, kind="stable") + np.arange(0, padded, GROUP)[:, None]
    order = inside[np.argsort(-groups.mean(axis=1), kind="stable")].reshape(-1)
    real = np.flatnonzero(order < n)
    h = np.eye(padded, dtype=np.float64 if n <= WIDEST_DOUBLE else np.float32)
    for first in range(0, n, BLOCK):
        rows = real[first : first + BLOCK]
        h[np.ix_(rows, real)] = hessian[np.ix_(order[rows], order[real])]
    cholesky_upper(h)
    scale = np.diagonal(h).copy()
    h /= scale
    return Factors(order, (scale * scale).astype(np.float32), h.astype(np.float32, copy=False))


def cholesky_upper(h: np.ndarray) -> None:
    """Replace H by the upper triangular R with H = R R^T, in place: at 8B shape there is no room for copies.

    h: (n, n) float32 or float64, symmetric, positive definite
    """
    for stop in range(len(h), 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        # NumPy's lower triangle of the reversed block is, reversed again, the upper one.
        own = np.linalg.cholesky(h[start:stop, start:stop][::-1, ::-1])[::-1, ::-1]
        h[start:stop, start:stop] = own
        h[start:stop, :start] = 0
        h[:start, start:stop] = np.linalg.solve(own, h[:start, start:stop].T).T
        for row in range(0, start, BLOCK):
            rows = slice(row, min(row + BLOCK, start))
            h[rows, row:start] -= h[rows, start:stop] @ h[row:start, start:stop].T


def round_columns_reference(
    w: np.ndarray, factors: Factors, units: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Round a matrix with feedback. Sums run in float32 and in order, so the result does not depend on the machine.

    w: (out, n) float32, inputs padded to whole groups and in the order of `factors`; units: (27,) float32
    returns: levels (out, n) int8, codes (out, groups) uint8, both in that order
    """
    top, d, u = np.float32(max_level(depth)), factors.weights, factors.feedback
    levels, codes = np.empty(w.shape, np.int8), np.zeros((len(w), w.shape[1] // GROUP), np.uint8)
    x = np.ascontiguousarray(w.T)
    error = np.empty_like(x)
    for first in range(0, len(x), GROUP):
        start = x[first : first + GROUP].copy()
        for i in range(first):
            start += error[i] * u[i, first : first + GROUP, None]
        best = np.full(len(w), np.inf, np.float32)
        q_best = np.zeros((GROUP, len(w)), np.float32)
        unit_best = np.zeros(len(w), np.float32)
        for k in range(ENTRIES):
            unit = units[k]
            if unit <= 0:
                continue
            t, q, loss = start.copy(), np.empty_like(start), np.zeros(len(w), np.float32)
            for j in range(GROUP):
                q[j] = np.rint(np.clip(t[j] / unit, -top, top))
                rest = t[j] - q[j] * unit
                loss += rest * rest * d[first + j]
                wrong = x[first + j] - q[j] * unit
                t[j + 1 :] += wrong * u[first + j, first + j + 1 : first + GROUP, None]
            better = loss < best
            best[better], q_best[:, better], unit_best[better] = loss[better], q[:, better], unit
            codes[better, first // GROUP] = k
        levels[:, first : first + GROUP] = q_best.T
        error[first : first + GROUP] = x[first : first + GROUP] - q_best * unit_best
    return levels, codes


def quantize(
    w: np.ndarray,
    factors: Factors,
    depth: int,
    round_columns: RoundColumns = round_columns_reference,
    search: Search = search_reference,
) -> Rounded:
    """Quantise a matrix so that its products come out right.

    w: (out, in) float32; returns: levels (out, in) int8, codes (out, groups) uint8, units (32,) float32
    """
    padded = np.zeros((len(w), len(factors.order)), np.float32)
    padded[:, : w.shape[1]] = w
    units = fit_units(padded.reshape(-1, GROUP), factors.importance, float(np.abs(w).max()), depth, search)
    found, own = round_columns(np.ascontiguousarray(padded[:, factors.order]), factors, units, depth)
    levels, codes = np.empty_like(found), np.empty_like(own)
    levels[:, factors.order] = found
    codes[:, factors.order[::GROUP] // GROUP] = own
    return np.ascontiguousarray(levels[:, : w.shape[1]]), codes, units


def corrected(w: np.ndarray, rest: np.ndarray, factors: Factors) -> np.ndarray:
    """Move a matrix so that from the inputs that it will get it makes the outputs that it should.

    The inputs are wrong already, because what comes before is quantised. This is the least squares solution, pulled
    towards the matrix itself as far as H was regularised: W + (sum of (y - W x) x^T) H^-1.

    w: (out, in) float32; rest: (out, in), that sum over the inputs x and the wanted outputs y
    returns: (out, in) float32
    """
    n, u = len(factors.order), factors.feedback
    padded = np.zeros((len(rest), n), np.float32)
    padded[:, : rest.shape[1]] = rest
    z = padded[:, factors.order]
    for stop in range(n, 0, -BLOCK):  # H = U D U^T: first what U^T makes to this,
        start = max(stop - BLOCK, 0)
        z[:, start:stop] = np.linalg.solve(u[start:stop, start:stop], z[:, start:stop].T).T
        z[:, :start] -= z[:, start:stop] @ u[:start, start:stop].T
    z /= factors.weights
    for start in range(0, n, BLOCK):  # then what U makes to that
        stop = min(start + BLOCK, n)
        z[:, start:stop] = np.linalg.solve(u[start:stop, start:stop].T, z[:, start:stop].T).T
        z[:, stop:] -= z[:, start:stop] @ u[start:stop, stop:]
    padded[:, factors.order] = z
    return np.asarray(w + padded[:, : w.shape[1]])
