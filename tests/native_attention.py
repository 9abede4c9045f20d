"""Cases of RoPE, the ring and attention for native_cases.c: what the backend asks its pool for, written down."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from formats.kv_modules import KVModule
from runtime.config import ModelConfig
from runtime.kernels import words as w
from runtime.kernels.attention_jobs import AttentionJobs
from runtime.kernels.base import Decoders, weight_bits
from runtime.kernels.memory import address
from runtime.kernels.numpy_backend import NumpyKernels
from runtime.ring.cache import KVRing
from runtime.ring.codecs import CODECS
from runtime.ring.projections import Decoder
from runtime.rope import angles, frequencies
from tests.test_attention import CODES_ERROR

if TYPE_CHECKING:
    from tests.native_cases import Cases

HEADS, KV_HEADS = 4, 2
MODULES = (KVModule(0, "k", 3, 5, "gelu", "before"), KVModule(0, "v", 40))


def flat(arrays: Any) -> Iterator[np.ndarray]:
    """The arrays of nested lists and tuples."""
    if isinstance(arrays, np.ndarray):
        yield arrays
    else:
        for part in arrays:
            yield from flat(part)


def pointed_at(word: int, arrays: list[np.ndarray]) -> np.ndarray | int:
    """A copy of what a word of a job points to, up to the end of its array; the word itself if it is no address."""
    for array in arrays:
        start = word - address(array)
        if 0 <= start < max(array.nbytes, 1):
            return array.reshape(-1).view(np.uint8)[start:].copy()
    assert abs(word) < 1 << 32, "a job points to an array that is not kept"
    return word


class Notes:
    """In place of a pool: keeps the kernels it should run, the job, and the arrays that the job points to."""

    n_threads = 1

    def __init__(self) -> None:
        self.names: list[str] = []
        self.steps: list[tuple[str, int]] = []
        self.words: dict[int, Any] = {}

    def resolve(self, module: str, function: str) -> int:
        """Kernels have numbers instead of addresses."""
        self.names.append(function)
        return len(self.names) - 1

    def run(self, task: int, words: np.ndarray, units: int, job: Any, *arrays: Any) -> None:
        if not self.steps:
            found = list(flat((job.clock, job.keys.keep, job.values.keep, arrays)))
            self.words = {i: pointed_at(int(word), found) for i, word in enumerate(words)}
        self.steps.append((self.names[task], units))


def config_of(head_dim: int) -> ModelConfig:
    return ModelConfig(24, 24, 1, HEADS, KV_HEADS, head_dim, 8, 64, 1e-5, 1e4)


def some(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def filled(ring: KVRing, length: int, rng: np.random.Generator) -> KVRing:
    """A ring with that many tokens."""
    while ring.length < length:
        n = min(ring.chunk, length - ring.length)
        k, v = (some(rng, n, plane.heads * plane.width) for plane in ring.planes)
        ring.note_turns(*angles(frequencies(ring.config), np.arange(ring.length, ring.length + n)))
        NumpyKernels(1).append(k, v, ring, 0)
        ring.advance(n)
    return ring


def decoders_of(ring: KVRing, rng: np.random.Generator) -> Decoders:
    if not ring.modules:
        return None, None
    dim = ring.config.head_dim
    return (
        Decoder(some(rng, 5, 3), some(rng, 5), "gelu", some(rng, KV_HEADS, dim, 5), some(rng, KV_HEADS, dim), True),
        Decoder(None, None, None, some(rng, KV_HEADS, dim, 40), some(rng, KV_HEADS, dim), False),
    )


def add_append(cases: Cases, ring: KVRing, n: int, rng: np.random.Generator) -> None:
    """Tokens are stored, and the very bits are looked at."""
    notes, (k, v) = Notes(), (some(rng, n, plane.heads * plane.width) for plane in ring.planes)
    AttentionJobs(notes, notes.resolve, False).append(k, v, ring, 0)  # type: ignore[arg-type]
    NumpyKernels(1).append(k, v, ring, 0)
    for side, plane in zip((w.AT_KEYS, w.AT_VALUES), ring.planes, strict=True):
        cases.add(notes.steps, notes.words, side + w.SD_DATA, plane.memory.view(np.float32))


def add_rope(cases: Cases, ring: KVRing, n: int, rng: np.random.Generator) -> None:
    dim = ring.config.head_dim
    q, k, v = (some(rng, n, heads * dim) for heads in (HEADS, KV_HEADS, KV_HEADS))
    near, positions = np.zeros_like(q), np.arange(ring.length, ring.length + n)
    freqs = frequencies(ring.config)
    turns = angles(freqs, positions) + angles(freqs, np.minimum(positions, ring.capacity - 1))
    both, alone = Notes(), Notes()
    AttentionJobs(both, both.resolve, False).rope_append(q, near, k, v, turns, ring, 0)  # type: ignore[arg-type]
    AttentionJobs(alone, alone.resolve, False).rope(q, near, k, turns, ring)  # type: ignore[arg-type]
    NumpyKernels(1).rope(q, near, k, turns, ring)
    for notes in (both, alone):
        for place, expected in ((w.AT_Q, q), (w.AT_Q_SINK, near), (w.AT_K, k)):
            cases.add(notes.steps, notes.words, place, expected, 1e-5)


def add_look(cases: Cases, ring: KVRing, n: int, int8: bool, rng: np.random.Generator) -> None:
    """The last n tokens of a ring look back at it."""
    decoders, end = decoders_of(ring, rng), ring.length
    ring.length = end - n
    q, near = (some(rng, n, HEADS * ring.config.head_dim) for _ in range(2))
    notes, expected = Notes(), np.zeros_like(q)
    AttentionJobs(notes, notes.resolve, int8).attention(q, near, ring, 0, np.zeros_like(q), decoders)  # type: ignore[arg-type]
    NumpyKernels(1, int8).attention(q, near, ring, 0, expected, decoders)
    ring.length = end
    bits = weight_bits(ring.layers[0].values, decoders[1])
    rounded = int8 and ring.codec in ("q8", "q4")
    limit = CODES_ERROR[bits] * np.abs(expected).max() if rounded else 1e-4
    cases.add(notes.steps, notes.words, w.AT_OUT, expected, limit)


def rings(rng: np.random.Generator, capacity: int) -> Iterator[KVRing]:
    """Of every codec, of heads of odd and of whole widths, and with learned projections; all have gone round."""
    for codec in CODECS:
        for head_dim in (6, 64):
            yield filled(KVRing(config_of(head_dim), capacity, 32, 3, codec), capacity + 205, rng)
    for codec in ("f32", "q8"):
        yield filled(KVRing(config_of(6), capacity, 32, 3, codec, MODULES), capacity + 205, rng)


def add_attention(cases: Cases, rng: np.random.Generator) -> None:
    """Small rings for some tokens at a time; deep ones for one whose spans are cut."""
    for ring in rings(rng, 70):
        for int8 in (False, True):
            for n in (1, 21):
                add_look(cases, ring, n, int8, rng)
        for n in (1, 21):
            add_append(cases, ring, n, rng)
            if not ring.modules:
                add_rope(cases, ring, n, rng)
    for ring in rings(rng, 2 * w.SPAN + 90):
        for int8 in (False, True):
            add_look(cases, ring, 1, int8, rng)
