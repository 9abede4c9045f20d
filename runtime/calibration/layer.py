"""One layer quantised against what its matrices really get, and what they should have made of it.

Two streams run through the model side by side: the source's, and that of the quantised model so far. Each matrix is
quantised for the inputs of the second and aims at the outputs of the first, so that it takes back what those before it
have done; `wo` and `w2`, which add to the residual stream, aim at the source's residual stream itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from formats.codecs.base import Parts

from .feedback import Factors, corrected, factorize, regularize
from .streams import Forward, Stream, product

PASSES = 6  # over the tokens

Streams = tuple[Stream, Stream]


@dataclass(frozen=True)
class Half:
    """Half of a layer: a norm, the matrices that read it, and the one that adds to the residual stream."""

    norm: str
    inputs: tuple[str, ...]
    output: str


ATTENTION = Half("attention_norm", ("wq", "wk", "wv"), "wo")
MLP = Half("ffn_norm", ("w1", "w3"), "w2")


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
    quantize: called with a matrix's name, its values and the factors of its inputs' H; gives the parts of its codec and
    what these are dequantised to, (out, in) float32
    folder: for what lies between the steps; progress: called after each batch
    found: the parts, by name of the matrix
    """

    forward: Forward
    tensor: Callable[[str], np.ndarray | None]
    quantize: Callable[[str, np.ndarray, Factors], tuple[Parts, np.ndarray]]
    folder: Path
    tokens: int
    progress: Callable[[], None]
    found: dict[str, Parts] = field(default_factory=dict)

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
        wide = Stream(self.folder / "work-wide", self._matrix(half.output).shape[1])
        out = self._round_output(half, self._inside(half, before, after[0], wide))
        bias = self.tensor(f"{half.output}.bias")
        for rows in self._batches():
            after[1].write(rows[0], before[1].read(*rows) + product(wide.read(*rows), out, bias))

    def _inside(self, half: Half, before: Streams, after: Stream, wide: Stream) -> Moments:
        """Quantise the first matrices of a half, which are let go of before the last one needs the memory."""
        matrices = self._round_inputs(half, self._look(half, before, after))
        return self._collect(half, before[1], after, wide, matrices)

    def _look(self, half: Half, before: Streams, after: Stream) -> Moments:
        """Move the source's stream through a half.

        returns: moments of what the first matrices get in the quantised model; wanted is what is missing of it
        """
        gain, out, bias = self._matrix(half.norm), self._matrix(half.output), self.tensor(f"{half.output}.bias")
        matrices, biases = [self._matrix(name) for name in half.inputs], self._biases(half)
        moments = Moments(len(gain), len(gain))
        for rows in self._batches():
            stream = before[0].read(*rows)
            x, own = self.forward.normalized(stream, gain), self.forward.normalized(before[1].read(*rows), gain)
            moments.add(own, x - own)
            after.write(rows[0], stream + product(self._inner(half)(x, matrices, biases), out, bias))
        return moments

    def _round_inputs(self, half: Half, moments: Moments) -> list[np.ndarray]:
        regularize(moments.hessian)
        factors = factorize(moments.hessian)
        found = []
        for name in half.inputs:
            w = self._matrix(name)
            found.append(self._round(name, corrected(w, w @ moments.wanted, factors), factors))
        return found

    def _collect(self, half: Half, before: Stream, target: Stream, wide: Stream, matrices: list[np.ndarray]) -> Moments:
        """Move the quantised model through a half up to its last matrix, whose inputs go to `wide`.

        target: the residual stream that the source has after it
        returns: moments of those inputs; wanted is what they should add to the residual stream
        """
        gain, bias, biases = self._matrix(half.norm), self.tensor(f"{half.output}.bias"), self._biases(half)
        moments = Moments(wide.width, before.width)
        for rows in self._batches():
            stream = before.read(*rows)
            inside = self._inner(half)(self.forward.normalized(stream, gain), matrices, biases)
            wide.write(rows[0], inside)
            missing = target.read(*rows) - stream
            moments.add(inside, missing if bias is None else missing - bias)
        return moments

    def _round_output(self, half: Half, moments: Moments) -> np.ndarray:
        w = self._matrix(half.output)
        rest = moments.wanted - w @ moments.hessian
        regularize(moments.hessian)
        factors = factorize(moments.hessian)
        del moments
        return self._round(half.output, corrected(w, rest, factors), factors)

    def _round(self, name: str, w: np.ndarray, factors: Factors) -> np.ndarray:
        """Quantise a matrix; returns what it is dequantised to."""
        self.found[name], values = self.quantize(name, w, factors)
        return values

    def _inner(self, half: Half) -> Callable[..., np.ndarray]:
        return self.forward.attended if half is ATTENTION else self.forward.gated

    def _matrix(self, name: str) -> np.ndarray:
        values = self.tensor(name)
        assert values is not None, name
        return values

    def _biases(self, half: Half) -> list[np.ndarray | None]:
        return [self.tensor(f"{name}.bias") for name in half.inputs]

    def _batches(self) -> Iterator[tuple[int, int]]:
        for rows in self.forward.batches(self.tokens):
            yield rows
            self.progress()
