"""Cases for native_cases.c: jobs of every native kernel, with what they must give.

`python -m tests.native_cases FILE` writes them; the C program needs no Python to run them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from formats import CODECS
from runtime.kernels import words as w
from runtime.kernels.base import GROUP, TRITS
from runtime.kernels.compiled_backend import nf4_table
from runtime.kernels.numpy_backend import level_codes
from tests.native_attention import add_attention

ROUNDING = {"float32": 0, "float16": 1, "bfloat16": 2}
SHAPES = [(1, 1), (3, 5), (17, 83), (33, 192)]
NF4 = {"nf4": {"nested_block": 0, "dtype": "float16"}, "nf4_nested": {"dtype": "bfloat16"}}
NF4 |= {f"{name}_int8": {**options, "dtype": "float32"} for name, options in NF4.items()}


class Cases:
    """The file: a count, then the cases as native_cases.c reads them."""

    def __init__(self) -> None:
        self.count, self.body = 0, bytearray()

    def _number(self, value: int) -> None:
        self.body += int(value).to_bytes(8, "little", signed=True)

    def add(
        self,
        steps: Sequence[tuple[str, int]],
        words: Mapping[int, Any],
        out: int,
        expected: np.ndarray | None,
        limit: Any = 0.0,
    ) -> None:
        """steps: kernels and their numbers of units, to run one after another

        words: numbers and arrays by their place in the job; out: the place of the array to look at afterwards
        expected: float32 of that array's size, each within `limit`; None if the numbers do not matter
        """
        job = np.zeros(max(words) + 1, np.int64)
        buffers, places = [job], []
        for place, value in words.items():
            if isinstance(value, np.ndarray):
                job[place] = len(buffers)
                buffers.append(value)
                places.append(place)
            else:
                job[place] = value
        self.count += 1
        self._number(len(steps))
        for kernel, units in steps:
            self._number(len(kernel))
            self.body += kernel.encode()
            self._number(units)
        self._number(len(buffers))
        for buffer in buffers:
            self._number(buffer.nbytes)
            self.body += buffer.tobytes()
        self._number(len(places))
        for place in places:
            self._number(place)
        self._number(job[out])
        numbers = np.zeros(0, np.float32) if expected is None else np.asarray(expected, np.float32)
        self._number(numbers.size)
        limits = np.broadcast_to(np.asarray(limit, np.float32), numbers.shape if numbers.size else 0)
        self.body += numbers.tobytes() + limits.tobytes()

    def write(self, path: Path) -> None:
        path.write_bytes(self.count.to_bytes(8, "little") + self.body)


def packed(x: np.ndarray) -> dict[int, Any]:
    """Activations as pack_activations must leave them. x: (n, in) float32"""
    n, width = x.shape
    groups = -(-width // 160) * 160 // GROUP
    padded = np.zeros((n, groups * GROUP), np.float32)
    padded[:, :width] = x
    cut = padded.reshape(n, groups, GROUP).transpose(1, 0, 2)
    top = np.abs(cut).max(axis=2)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)
    quants = np.rint(cut * inverse[..., None]).astype(np.int8)
    sums = quants.sum(axis=2, dtype=np.int32)
    quants = np.stack((quants, quants.reshape(-1, 2, 4, 2).swapaxes(2, 3).reshape(quants.shape)))
    words: dict[int, Any] = {w.N: n, w.WIDTH: width, w.PADDED: padded, w.PADDED_STRIDE: padded.strides[0]}
    return words | {w.QUANTS: quants, w.SUMS: sums, w.SCALES: top / np.float32(127), w.MATRICES: 1}


def table(values: np.ndarray) -> np.ndarray:
    return np.concatenate((values, np.zeros(32 - len(values), np.float32)))


def matrix(codec: str, shape: tuple[int, ...], parts: dict[str, np.ndarray], params: dict[str, Any]) -> dict[int, Any]:
    """A matrix's words, from FIRST on."""
    rounding = ROUNDING[params.get("dtype", "float32")]
    words: dict[int, Any] = {w.OUTPUTS: shape[0], w.OUT_STRIDE: shape[0] * 4, w.ROUND: rounding}
    if codec in TRITS:
        return words | {w.DATA: parts["blocks"], w.TABLE: table(parts["units"])}
    if codec == "nf4":
        words |= {w.DATA: parts["codes"], w.TABLE: nf4_table(parts["levels"]), w.AUX: parts["absmax"]}
        words[w.BLOCK_SHIFT] = params["block"].bit_length() - 1
        if params["nested_block"]:
            words[w.AUX2] = parts["nested_absmax"]
            words[w.AUX3] = np.concatenate((parts["offset"], parts["nested_levels"]))
        return words
    words[w.DATA] = parts["values"]
    return words | ({w.AUX: parts["scales"]} if codec == "q8" else {})


def add_product(
    cases: Cases, kernel: str, shape: tuple[int, int], n: int, fill: int | None, rng: np.random.Generator
) -> None:
    """One product. fill: the byte that all weight data is made of (-1: random bytes), or None for real weights."""
    codec = kernel.split("_")[0]
    params, parts = CODECS[codec].quantize(rng.standard_normal(shape).astype(np.float32), **NF4.get(kernel, {}))
    x = rng.standard_normal((n, shape[1])).astype(np.float32)
    activations, bias = packed(x), rng.standard_normal(shape[0]).astype(np.float32)
    expected, limit = None, 0.0
    if fill is None:
        if kernel.endswith("int8"):
            steps = activations[w.QUANTS][0] * activations[w.SCALES][..., None]
            x = steps.transpose(1, 0, 2).reshape(n, -1)[:, : shape[1]]
        exact = dict(parts)
        if kernel.startswith("nf4") and kernel.endswith("int8"):
            codes, step = level_codes(parts["levels"])
            exact["levels"] = codes * step
        values = CODECS[codec].dequantize(exact, shape, params).astype(np.float64)
        expected = x @ values.T + bias
        limit = 3e-6 * (np.abs(x) @ np.abs(values).T + np.abs(bias))
    else:
        for name, part in parts.items():
            raw = rng.integers(0, 256, part.nbytes) if fill < 0 else np.full(part.nbytes, fill)
            parts[name] = raw.astype(np.uint8).view(part.dtype).reshape(part.shape)
    words = matrix(codec, shape, parts, params) | {w.BIAS: bias, w.OUT: np.zeros((n, shape[0]), np.float32)}
    head = {w.HEAD + place: value for place, value in words.items()}
    cases.add([(kernel, -(-shape[0] // w.UNIT_ROWS))], activations | head, w.HEAD + w.OUT, expected, limit)


def add_layers(cases: Cases, n: int, dim: int, rng: np.random.Generator) -> None:
    x, up = (rng.standard_normal((n, dim)).astype(np.float32) for _ in range(2))
    eps = int(np.float32(1e-5).view(np.int32))
    norm = {w.NORM_X: x, w.NORM_GAIN: up[0].copy(), w.NORM_OUT: np.zeros_like(x), w.NORM_DIM: dim, w.NORM_EPS: eps}
    expected = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-5) * up[0]
    cases.add([("rmsnorm", n)], norm, w.NORM_OUT, expected, 1e-5)
    gate = {w.GLU_GATE: x * 9, w.GLU_UP: up, w.GLU_DIM: dim}
    cases.add([("swiglu", n)], gate, w.GLU_GATE, x * 9 / (1 + np.exp(-9 * x.astype(np.float64))) * up, 1e-4)
    words = packed(x) | {w.X: x, w.X_STRIDE: dim * 4, w.WANTED: w.FLOATS | w.QUANTS_IN_ORDER | w.QUANTS_AS_NIBBLES}
    blank = {place: np.zeros_like(words[place]) for place in (w.PADDED, w.QUANTS, w.SUMS, w.SCALES)}
    blank[w.PADDED] += np.float32(7)
    for place in (w.PADDED, w.SCALES):
        cases.add([("pack_activations", -(-n // w.TOGETHER))], words | blank, place, words[place], 1e-6)


def all_cases() -> Cases:
    """Every kernel but the pool's; of products the weights right, then all-zero, all-one and random bytes."""
    cases, rng = Cases(), np.random.default_rng(5)
    for kernel in (*w.KERNELS["numba_trits"], *w.KERNELS["numba_dense"], *w.KERNELS["numba_int8"]):
        for shape in SHAPES:
            if kernel.startswith("nf4") and kernel.endswith("int8"):  # whole blocks of 64
                shape = (shape[0], -(-shape[1] // 64) * 64)
            for n in (1, 5):
                add_product(cases, kernel, shape, n, None, rng)
            for fill in (0, 0x7F, 0xF3, 0xFF, -1):
                add_product(cases, kernel, shape, 5, fill, rng)
        add_product(cases, kernel, (70, 128 if kernel.startswith("nf4") else 97), 66, None, rng)
    for n, dim in ((1, 1), (3, 47), (2, 200)):
        add_layers(cases, n, dim, rng)
    add_attention(cases, rng)
    return cases


if __name__ == "__main__":
    all_cases().write(Path(sys.argv[1]))
