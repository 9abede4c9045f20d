"""One layer quantised against what its matrices really get, and what they should have made of it.

Two streams run through the model side by side: the source's, and that of the quantised model so far. Each matrix is
quantised for the inputs of the second and aims at the outputs of the first, so that it takes back what those before it
have done; `wo` and `w2`, which add to the residual stream, aim at the source's residual stream itself.

Inputs of one group share a unit, so those that weigh more than their neighbours are made finer: their column is
multiplied by a factor, and what makes them is divided by it (AWQ: Lin et al., 2023): the norm before, or the rows of
the matrix before. The model computes the same as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from formats.trit import GROUP

from .feedback import DAMPING, Factors, Rounded, corrected, factorize
from .streams import Forward, Stream, product

PASSES = 6  # over the tokens
BALANCE = 0.25  # exponent of an input's mean square: best if weights are normal and errors independent

Matrices = list[np.ndarray]
Streams = tuple[Stream, Stream]


@dataclass(frozen=True)
class Half:
    """Half of a layer: a norm, matrices that read it, and one that adds to the residual stream.

    maker: the one of `inputs` in whose outputs the inputs of `output` are linear
    """

    norm: str
    inputs: tuple[str, ...]
    maker: str
    output: str


ATTENTION = Half("attention_norm", ("wq", "wk", "wv"), "wv", "wo")
MLP = Half("ffn_norm", ("w1", "w3"), "w3", "w2")


class Moments:
    """Sums over tokens. hessian: of x x^T, (in, in); wanted: of y x^T, (any, in); both float32"""

    def __init__(self, width: int, wanted: int) -> None:
        self.hessian = np.zeros((width, width), np.float32)
        self.wanted = np.zeros((wanted, width), np.float32)

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """x: (n, in) float32, inputs in the quantised stream; y: (n, any) float32"""
        self.hessian += x.T @ x
        self.wanted += y.T @ x


@dataclass
class LayerRun:
    """Quantises the matrices of one layer and moves both streams through it.

    tensor: gives the source's by name as float32, None for a bias that is not there
    quantize: called with a matrix's name, its values and the factors of its inputs' H
    folder: for what lies between the steps; progress: called after each batch
    rounded, gains: what comes out, by name
    """

    forward: Forward
    tensor: Callable[[str], np.ndarray | None]
    quantize: Callable[[str, np.ndarray, Factors], Rounded]
    folder: Path
    tokens: int
    progress: Callable[[], None]
    rounded: dict[str, Rounded] = field(default_factory=dict)
    gains: dict[str, np.ndarray] = field(default_factory=dict)

    def run(self, source: Stream, quantized: Stream) -> Streams:
        """Go through the layer.

        source, quantized: the residual streams before it
        returns: the same after it, in files of `folder`
        """
        dim = self.forward.config.dim
        after = Stream(self.folder / "work-source", dim), Stream(self.folder / "work-quantized", dim)
        self._half(ATTENTION, (source, quantized), after)
        self._half(MLP, after, after)
        return after

    def _half(self, half: Half, before: Streams, after: Streams) -> None:
        made_by = self.forward.made_by(half.maker)
        moments, power = self._look(half, before, after[0])
        scale = self._balance_maker(half, power, made_by)
        gain, matrices = self._round_inputs(half, moments, scale)
        wide = Stream(self.folder / "work-wide", len(made_by))
        moments = self._collect(half, before[1], after[0], wide, gain, matrices)
        out = self._round_output(half, moments, scale[made_by])
        bias = self.tensor(f"{half.output}.bias")
        for rows in self._batches():
            after[1].write(rows[0], before[1].read(*rows) + product(wide.read(*rows), out, bias))

    def _look(self, half: Half, before: Streams, after: Stream) -> tuple[Moments, np.ndarray]:
        """Move the source's stream through a half.

        returns: moments of the inputs, those that the source has less those that the quantised model has being wanted;
        mean squares of the inputs of the last matrix
        """
        gain, out, bias = self._matrix(half.norm), self._matrix(half.output), self.tensor(f"{half.output}.bias")
        matrices, biases = [self._matrix(name) for name in half.inputs], self._biases(half)
        moments, power = Moments(len(gain), len(gain)), np.zeros(out.shape[1])
        for rows in self._batches():
            stream = before[0].read(*rows)
            x, own = self.forward.normalized(stream, gain), self.forward.normalized(before[1].read(*rows), gain)
            moments.add(own, x - own)
            inside = self.forward.inner(half.maker, x, matrices, biases)
            power += np.einsum("ij,ij->j", inside, inside)
            after.write(rows[0], stream + product(inside, out, bias))
        return moments, power / self.tokens

    def _collect(
        self, half: Half, before: Stream, target: Stream, wide: Stream, gain: np.ndarray, matrices: Matrices
    ) -> Moments:
        """Move the quantised model through a half up to its last matrix, whose inputs go to `wide`.

        target: the residual stream that the source has after it
        returns: moments of those inputs and of what they should add to the residual stream
        """
        bias, biases = self.tensor(f"{half.output}.bias"), self._biases(half)
        moments = Moments(wide.width, before.width)
        for rows in self._batches():
            stream = before.read(*rows)
            inside = self.forward.inner(half.maker, self.forward.normalized(stream, gain), matrices, biases)
            wide.write(rows[0], inside)
            missing = target.read(*rows) - stream
            moments.add(inside, missing if bias is None else missing - bias)
        return moments

    def _round_inputs(self, half: Half, moments: Moments, scale: np.ndarray) -> tuple[np.ndarray, Matrices]:
        """Quantise the matrices that read the norm. scale: of the maker's rows; returns: the norm's gain, matrices"""
        columns = balanced(np.diagonal(moments.hessian) / self.tokens)
        self.gains[half.norm] = gain = (self._matrix(half.norm) / columns).astype(np.float32)
        hessian = moments.hessian / columns / columns[:, None]
        factors = factorize(hessian)
        matrices = []
        for name in half.inputs:
            w = self._matrix(name)
            rest = w @ moments.wanted.T / columns
            rows = scale[:, None] if name == half.maker else np.float32(1)
            better = corrected(w * columns, rest, hessian) / rows
            matrices.append(self._round(name, better, factors))
        return gain, matrices

    def _round_output(self, half: Half, moments: Moments, columns: np.ndarray) -> np.ndarray:
        w = self._matrix(half.output) * columns
        better = corrected(w, moments.wanted - w @ moments.hessian, moments.hessian)
        return self._round(half.output, better, factorize(moments.hessian))

    def _round(self, name: str, w: np.ndarray, factors: Factors) -> np.ndarray:
        """Quantise a matrix; returns what it is dequantised to."""
        self.rounded[name] = levels, codes, units = self.quantize(name, w, factors)
        return levels * np.repeat(units[codes], GROUP, axis=1)[:, : levels.shape[1]]

    def _balance_maker(self, half: Half, power: np.ndarray, made_by: np.ndarray) -> np.ndarray:
        """Choose what the maker's rows are divided by. made_by: (in,) which row makes which input"""
        rows = self._matrix(half.maker).shape[0]
        if self.tensor(f"{half.maker}.bias") is not None:
            return np.ones(rows, np.float32)
        return balanced(np.bincount(made_by, power, rows) / np.bincount(made_by, minlength=rows))

    def _matrix(self, name: str) -> np.ndarray:
        values = self.tensor(name)
        assert values is not None, name
        return values

    def _biases(self, half: Half) -> Sequence[np.ndarray | None]:
        return [self.tensor(f"{name}.bias") for name in half.inputs]

    def _batches(self) -> Iterator[tuple[int, int]]:
        for rows in self.forward.batches(self.tokens):
            yield rows
            self.progress()


def balanced(power: np.ndarray) -> np.ndarray:
    """Give factors for inputs, the larger for those with the larger mean square; their geometric mean is 1 in a group.

    power: (in,); returns: (in,) float32
    """
    damped = power + (DAMPING * power.mean() or 1.0)
    logs = BALANCE * np.log(np.concatenate([damped, np.repeat(damped[-1:], -len(damped) % GROUP)])).reshape(-1, GROUP)
    return np.exp(logs - logs.mean(axis=1, keepdims=True)).reshape(-1)[: len(power)].astype(np.float32)
