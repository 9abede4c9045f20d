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
from formats.kv_modules import KVModule

from ..config import ModelConfig
from ..errors import KernelDiffers
from ..ring.cache import KVRing
from ..ring.codecs import CODECS as RING_CODECS
from ..ring.projections import Decoder
from ..rope import angles, frequencies
from .base import weight_bits
from .compiled_backend import CompiledKernels
from .numpy_backend import NumpyKernels
from .words import SPAN

log = logging.getLogger("tritllama")

Resolve = Callable[[str, str], int]

_SHAPES = [(33, 83), (19, 192)]
_BATCHES = (1, 3, 5, 64)
_TOLERANCE = 1e-5  # of a sum of magnitudes: float32 sums in another order
_CODES_TOLERANCE = {14: 2e-3, 8: 5e-2, 7: 5e-2}  # of attention with codes, by the bits of rounded weights


class Checked:
    """A resolver of kernels that passed the self-test.

    resolve: gives addresses of kernels by module and function; 0 if it does not have one
    name: of the backend, for the message
    stamps: folder that remembers what passed, or None if nothing can be remembered
    instead: resolver to take a kernel from if it differs or is not there
    """

    def __init__(self, resolve: Resolve, name: str, stamps: Path | None, instead: Resolve | None = None) -> None:
        self._resolve, self._name, self._stamps, self._instead = resolve, name, stamps, instead
        self._found: dict[tuple[str, str], int | KernelDiffers] = {}

    def __call__(self, module: str, function: str) -> int:
        """Raises KernelDiffers if no code for this kernel agrees with the reference."""
        if (module, function) not in self._found:
            try:
                self._found[module, function] = self._choose(module, function)
            except KernelDiffers as error:
                self._found[module, function] = error
        found = self._found[module, function]
        if isinstance(found, KernelDiffers):
            raise found
        return found

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
    int8 = function.endswith("_int8") or function == "pack_activations"
    kernels, reference = CompiledKernels(resolve, 1, int8), NumpyKernels(1, int8)
    rng = np.random.default_rng(11)
    try:
        with np.errstate(all="ignore"):
            if module in ("numba_trits", "numba_dense", "numba_int8"):
                return all(_product_agrees(kernels, reference, tensor, rng) for tensor in _tensors(function, rng))
            if function == "pack_activations":
                tensor = next(_tensors("trit4_int8", rng))
                return _product_agrees(kernels, reference, tensor, rng)
            if function in ("rmsnorm", "swiglu"):
                return all(_layer_agrees(function, kernels, reference, n, rng) for n in _BATCHES)
            if module == "numba_ring":
                return all(_ring_agrees(kernels, reference, codec, rng) for codec in RING_CODECS)
            if module == "numba_attention":
                deep = function != "attend_whole"
                return all(
                    _attention_agrees(resolve, reference, ring, deep, rng) for ring in _rings(reference, deep, rng)
                )
            return True
    finally:
        kernels.close()


def _tensors(function: str, rng: np.random.Generator) -> Iterator[Tensor]:
    """Small matrices of the codec that a kernel is for."""
    codec = "nf4" if function.startswith("nf4") else function.split("_")[0]
    options = {"nested_block": 256 if function.startswith("nf4_nested") else 0} if codec == "nf4" else {}
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


_CONFIG = ModelConfig(24, 24, 1, 4, 2, 6, 8, 64, 1e-5, 1e4)  # grouped heads of an odd width
_MODULES = (KVModule(0, "k", 3, 5, "gelu", "before"), KVModule(0, "v", 4))


def _ring_agrees(kernels: CompiledKernels, reference: NumpyKernels, codec: str, rng: np.random.Generator) -> bool:
    """Append with sinks until the ring has gone round: queries within rounding, and what is stored."""
    rings, freqs = [KVRing(_CONFIG, 40, 64, 3, codec) for _ in range(2)], frequencies(_CONFIG)
    for n in (*_BATCHES, 3):
        q, k, v = (rng.standard_normal((n, heads * 6)).astype(np.float32) for heads in (4, 2, 2))
        positions = np.arange(rings[0].length, rings[0].length + n)
        turns = angles(freqs, positions) + angles(freqs, np.minimum(positions, rings[0].capacity - 1))
        seen = []
        backends: tuple[CompiledKernels | NumpyKernels, ...] = (kernels, reference)
        for backend, ring in zip(backends, rings, strict=True):
            mine, near = q.copy(), np.zeros_like(q)
            backend.rope_append(mine, near, k.copy(), v, turns, ring, 0)
            planes, slots = (ring.layers[0].keys, ring.layers[0].values), ring.slot(positions)
            ring.advance(n)
            seen.append((mine, near if ring.length > 40 else mine, *(plane.read(slots) for plane in planes)))
            backend.rope(mine, near, k.copy(), turns, ring)
            backend.append(k, v, ring, 0)
            seen[-1] += (mine, *(plane.read(ring.slot(positions + n)) for plane in planes))
        steps = {"f32": _TOLERANCE, "f16": 2**-9, "q8": 0.1, "q4": 0.6}  # one step of a code where rounding differs
        if not all(np.allclose(a, b, rtol=0, atol=steps[codec]) for a, b in zip(*seen, strict=True)):
            return False
    return True


def _rings(reference: NumpyKernels, deep: bool, rng: np.random.Generator) -> Iterator[KVRing]:
    """Rings of every codec, and one with learned projections, that have gone round; deep: with several spans."""
    capacity = 2 * SPAN + 90 if deep else 70
    for codec, modules in (*((codec, ()) for codec in RING_CODECS), ("q8", _MODULES)):
        ring = KVRing(_CONFIG, capacity, 64, 3, codec, modules)
        planes = (ring.layers[0].keys, ring.layers[0].values)
        while ring.length < capacity + 100:
            k, v = (rng.standard_normal((64, plane.heads * plane.width)).astype(np.float32) for plane in planes)
            ring.note_turns(*angles(frequencies(_CONFIG), np.arange(ring.length, ring.length + 64)))
            reference.append(k, v, ring, 0)
            ring.advance(64)
        yield ring


def _decoders(ring: KVRing, rng: np.random.Generator) -> tuple[Decoder | None, Decoder | None]:
    if not ring.modules:
        return None, None

    def some(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) / 2

    return (
        Decoder(some(5, 3), some(5), "gelu", some(2, 6, 5), some(2, 6), True),
        Decoder(None, None, None, some(2, 6, 4), some(2, 6), False),
    )


def _attention_agrees(
    resolve: Resolve, reference: NumpyKernels, ring: KVRing, deep: bool, rng: np.random.Generator
) -> bool:
    """The last tokens of a ring look back at it: some at once, or one whose spans are cut; exactly, and as codes."""
    decoders = _decoders(ring, rng)
    end = ring.length
    for n, int8 in ((n, int8) for n in ((1,) if deep else _BATCHES) for int8 in (False, True)):
        ring.length = end - n
        q, near = rng.standard_normal((2, n, 24)).astype(np.float32)
        got, expected = np.full_like(q, np.nan), np.empty_like(q)
        kernels = CompiledKernels(resolve, 1, int8)
        kernels.attention(q, near, ring, 0, got, decoders)
        kernels.close()
        NumpyKernels(1, int8).attention(q, near, ring, 0, expected, decoders)
        rounded = _CODES_TOLERANCE[weight_bits(ring.layers[0].values, decoders[1])]
        if not np.allclose(got, expected, rtol=0, atol=rounded if int8 else 10 * _TOLERANCE):
            return False
    return True
