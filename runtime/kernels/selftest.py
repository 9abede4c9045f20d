"""The self-test: a compiled kernel is compared with the NumPy reference before it is used for the first time.

Once per machine and version: a kernel that passed leaves a stamp in the cache folder. One that differs is not used:
the user is told, and the next backend's code, in the end NumPy's, takes its place.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from formats import CODECS, Tensor

from ..cache import KVRing
from ..config import ModelConfig
from ..errors import KernelDiffers
from ..rope import angles, frequencies
from .numba_backend import CompiledKernels
from .numpy_backend import NumpyKernels

log = logging.getLogger("tritllama")

Resolve = Callable[[str, str], int]

_SHAPES = [(33, 83), (19, 192)]
_BATCHES = (1, 3, 5, 64)
_TOLERANCE = 1e-5  # of a sum of magnitudes: float32 sums in another order
_HALF = 2**-7  # the same where the last bit of a float32 may round to another float16 in the ring


class Checked:
    """A resolver of kernels that passed the self-test.

    resolve: gives addresses of kernels by module and function; 0 if it does not have one
    name: of the backend, for the message
    stamps: folder that remembers what passed, or None if nothing can be remembered
    instead: resolver to take a kernel from if it differs or is not there
    """

    def __init__(self, resolve: Resolve, name: str, stamps: Path | None, instead: Resolve | None = None) -> None:
        self._resolve, self._name, self._stamps, self._instead = resolve, name, stamps, instead
        self._addresses: dict[tuple[str, str], int] = {}

    def __call__(self, module: str, function: str) -> int:
        """Raises KernelDiffers if no code for this kernel agrees with the reference."""
        if (module, function) not in self._addresses:
            self._addresses[module, function] = self._choose(module, function)
        return self._addresses[module, function]

    def _choose(self, module: str, function: str) -> int:
        address = self._resolve(module, function)
        if not address and self._instead:
            return self._instead(module, function)
        stamp = self._stamps / f"{module}.{function}.passed" if self._stamps else None
        if stamp and stamp.exists():
            return address
        if agrees(self._resolve, module, function):
            _leave(stamp)
            return address
        message = f"the {self._name} kernel {function} gives wrong results on this machine and is not used"
        log.warning("%s; please report this", message)
        if self._instead is None:
            raise KernelDiffers(message)
        return self._instead(module, function)


def _leave(stamp: Path | None) -> None:
    if stamp:
        try:
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.touch()
        except OSError:  # it will be tested again
            pass


def agrees(resolve: Resolve, module: str, function: str) -> bool:
    """Whether a kernel gives what the reference gives, on small odd sizes. The pool has nothing to compare."""
    int8 = not function.endswith("_f32")
    kernels, reference = CompiledKernels(resolve, 1, int8), NumpyKernels(1, int8)
    rng = np.random.default_rng(11)
    try:
        with np.errstate(all="ignore"):
            if module in ("numba_trits", "numba_dense"):
                return all(_product_agrees(kernels, reference, tensor, rng) for tensor in _tensors(function, rng))
            if function == "pack_activations":
                tensor = next(_tensors("trit4_int8", rng))
                return _product_agrees(kernels, reference, tensor, rng)
            if function in ("rmsnorm", "swiglu"):
                return all(_layer_agrees(function, kernels, reference, n, rng) for n in _BATCHES)
            if function in ("rope_append_f16", "rope_append_f32", "attention_f16", "attention_f32"):
                return _attention_agrees(kernels, reference, function[-3:], rng)
            return True
    finally:
        kernels.close()


def _tensors(function: str, rng: np.random.Generator) -> Iterator[Tensor]:
    """Small matrices of the codec that a kernel is for."""
    codec = "nf4" if function.startswith("nf4") else function.split("_")[0]
    options = {"nested_block": 256 if function == "nf4_nested" else 0} if codec == "nf4" else {}
    for shape in _SHAPES:
        values = rng.standard_normal(shape).astype(np.float32)
        params, parts = CODECS[codec].quantize(values, **options)
        yield Tensor(codec, codec, shape, params, parts, 0, 0, 0, "self-test")


def _product_agrees(
    kernels: CompiledKernels, reference: NumpyKernels, tensor: Tensor, rng: np.random.Generator
) -> bool:
    bias = rng.standard_normal(tensor.shape[0]).astype(np.float32)
    for n in _BATCHES:
        x = rng.standard_normal((n, tensor.shape[1])).astype(np.float32)
        got, expected = (np.full((n, tensor.shape[0]), np.nan, np.float32) for _ in range(2))
        kernels.linear([tensor], [bias])(x, [got])
        reference.linear([tensor], [bias])(x, [expected])
        largest = np.abs(expected).max() * tensor.shape[1] ** 0.5
        if not (np.abs(got - expected) <= _TOLERANCE * largest).all():
            return False
    return True


def _layer_agrees(
    name: str, kernels: CompiledKernels, reference: NumpyKernels, n: int, rng: np.random.Generator
) -> bool:
    x, other = (rng.standard_normal((n, 47)).astype(np.float32) for _ in range(2))
    if name == "rmsnorm":
        got, expected = np.empty_like(x), np.empty_like(x)
        kernels.rmsnorm(x, other[0], 1e-5, got)
        reference.rmsnorm(x, other[0], 1e-5, expected)
    else:
        got, expected = x * 9, x * 9
        kernels.swiglu(got, other)
        reference.swiglu(expected, other)
    return bool(np.allclose(got, expected, rtol=_TOLERANCE, atol=_TOLERANCE))


def _attention_agrees(kernels: CompiledKernels, reference: NumpyKernels, codec: str, rng: np.random.Generator) -> bool:
    """Grouped heads of an odd width, with sinks, until the ring has gone round."""
    config = ModelConfig(24, 24, 1, 4, 2, 6, 8, 64, 1e-5, 1e4)
    rings, freqs = [KVRing(config, 40, 64, 3, codec) for _ in range(2)], frequencies(config)
    for n in (*_BATCHES, 3):
        q, k, v = (rng.standard_normal((n, heads * 6)).astype(np.float32) for heads in (4, 2, 2))
        positions = np.arange(rings[0].length, rings[0].length + n)
        turns = angles(freqs, positions) + angles(freqs, np.minimum(positions, rings[0].capacity - 1))
        outs = []
        backends: tuple[CompiledKernels | NumpyKernels, ...] = (kernels, reference)
        for backend, ring in zip(backends, rings, strict=True):
            mine, near, out = q.copy(), np.zeros_like(q), np.zeros_like(q)
            backend.rope_append(mine, near, k.copy(), v.copy(), turns, ring, 0)
            backend.attention(mine, near, ring, 0, out)
            ring.advance(n)
            outs.append(out)
        if not np.allclose(outs[0], outs[1], rtol=0, atol=_TOLERANCE if codec == "f32" else _HALF):
            return False
    return True
