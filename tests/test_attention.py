"""Attention over the ring, by itself: every backend against float64, and the compiled one against itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from formats.kv_modules import KVModule
from runtime.config import ModelConfig
from runtime.kernels import Kernels, get_kernels
from runtime.kernels.numpy_backend import round_queries
from runtime.ring.cache import KVRing
from runtime.ring.codecs import CODECS
from runtime.ring.projections import Decoder
from runtime.rope import angles, frequencies
from tests.native_library import ensure_native_library

Shape = tuple[int, int, int]
Case = tuple[int, int, int, int]

# Of the largest output: what float32 sums may differ from float64 ones, of vectors that both read from the ring.
SUM_ERROR = 4e-6
# The same where values stay codes, by the bits that weights have of the largest in a block: those of q8, of q4
# and of projections. And a query's number that lies between two integers may be rounded to either.
CODES_ERROR = {14: 5e-4, 8: 4e-2, 7: 6e-2}
PROJECTION_ERROR = 2e-2  # weights of 7 bits, but codes of eight
# (heads, key-value heads, head_dim): nothing a power of two; grouped; more queries than a tile has rows
SHAPES = [(6, 2, 10), (9, 3, 64), (8, 8, 34), (70, 1, 16)]
# capacity, sinks, tokens in the ring, new tokens: before the wrap, at it, long after it; one span, several; sinks
# that fill more than a span; one token whose spans are cut
RINGS = [
    (40, 4, 0, 1), (40, 4, 3, 2), (40, 4, 36, 7), (40, 0, 39, 2), (24, 4, 200, 9), (24, 23, 200, 9), (300, 4, 250, 41),
    (1300, 4, 1299, 1), (1300, 4, 1299, 3), (1500, 600, 4000, 1), (1500, 600, 4000, 5),
]  # fmt: skip


@pytest.fixture(scope="module", params=["numpy", "numba", "native"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    if request.param == "native":
        ensure_native_library()
    made = get_kernels(request.param, n_threads=2, int8=False)
    yield made
    made.close()


def config_of(shape: Shape) -> ModelConfig:
    heads, kv_heads, head_dim = shape
    return ModelConfig(
        dim=8, hidden_dim=8, n_layers=1, n_heads=heads, n_kv_heads=kv_heads, head_dim=head_dim, vocab_size=9,
        max_seq_len=4096, norm_eps=1e-5, rope_theta=10000.0,
    )  # fmt: skip


def fill(ring: KVRing, kernels: Kernels, count: int, seed: int = 1) -> None:
    """Append `count` random tokens to the only layer, in chunks."""
    rng = np.random.default_rng(seed)
    planes = ring.layers[0]
    freqs = frequencies(ring.config)
    while ring.length < count:
        n = min(ring.chunk, count - ring.length)
        k, v = (rng.standard_normal((n, p.heads * p.width)).astype(np.float32) for p in (planes.keys, planes.values))
        ring.note_turns(*angles(freqs, np.arange(ring.length, ring.length + n)))
        kernels.append(k, v, ring, 0)
        ring.advance(n)


def a_ring(kernels: Kernels, shape: Shape, case: Case, **how: Any) -> tuple[KVRing, np.ndarray, np.ndarray]:
    """A ring with all its tokens and n new ones, and the queries of these."""
    capacity, sinks, length, n = case
    ring = KVRing(config_of(shape), capacity, min(64, capacity), sinks, **how)
    fill(ring, kernels, length + n)
    ring.length = length
    q, near = np.random.default_rng(7).standard_normal((2, n, shape[0] * shape[2])).astype(np.float32)
    return ring, q, q if length + n <= capacity else near


def attend(kernels: Kernels, ring: KVRing, q: np.ndarray, near: np.ndarray, *decoders: Any) -> np.ndarray:
    out = np.full_like(q, np.nan)
    kernels.attention(q, near, ring, 0, out, *decoders)
    return out


def expected(ring: KVRing, q: np.ndarray, near: np.ndarray, decoders: Any = (None, None)) -> np.ndarray:
    """The same in float64, all at once, from what the ring says that it holds."""
    config = ring.config
    group = config.n_heads // config.n_kv_heads
    out = np.empty(q.shape)
    for i in range(len(q)):
        seen = ring.visible(ring.length + i)
        slots = ring.slot(seen)
        sides = []
        for plane, decoder in zip((ring.layers[0].keys, ring.layers[0].values), decoders, strict=True):
            x = plane.read(slots).astype(np.float64)
            sides.append(np.repeat(decoder(x[0]) if decoder else x, group, axis=0))
        if decoders[0] and decoders[0].rotated:
            sides[0] = rotated(sides[0], seen, frequencies(config))
        of_window, of_sinks = (
            np.einsum("hd,hkd->hk", x[i].reshape(config.n_heads, -1), sides[0]) / np.sqrt(config.head_dim)
            for x in (q.astype(np.float64), near.astype(np.float64))
        )
        scores = np.where(seen < ring.sinks, of_sinks, of_window)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        out[i] = np.einsum("hk,hkd->hd", weights, sides[1]).reshape(-1)
    return out


def rotated(x: np.ndarray, positions: np.ndarray, freqs: np.ndarray) -> np.ndarray:
    """x: (heads, n, head_dim)"""
    low, high = np.split(x, 2, axis=2)
    cos, sin = np.cos(np.outer(positions, freqs)), np.sin(np.outer(positions, freqs))
    return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=2)


def assert_near(found: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(found - wanted).max() <= SUM_ERROR * np.abs(wanted).max()


@pytest.mark.parametrize("case", RINGS, ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_it_is_what_float64_says(kernels: Kernels, shape: Shape, case: Case) -> None:
    ring, q, near = a_ring(kernels, shape, case, codec="f32")
    assert_near(attend(kernels, ring, q, near), expected(ring, q, near))


@pytest.mark.parametrize("codec", [*CODECS, "k=q8,v=q4"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_every_codec_is_read_in_place(kernels: Kernels, shape: Shape, codec: str) -> None:
    for case in ((24, 4, 200, 9), (1300, 4, 1299, 1)):
        ring, q, near = a_ring(kernels, shape, case, codec=codec)
        assert_near(attend(kernels, ring, q, near), expected(ring, q, near))


@pytest.fixture(scope="module", params=["numpy", "numba", "native"])
def int8_kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    if request.param == "native":
        ensure_native_library()
    made = get_kernels(request.param, n_threads=2, int8=True)
    yield made
    made.close()


def rounded(ring: KVRing, *queries: np.ndarray) -> list[np.ndarray]:
    """Queries as they are rounded beside keys that stay codes."""
    cut = (len(queries[0]), ring.config.n_kv_heads, -1, ring.config.head_dim)
    of_heads = (x.reshape(cut).transpose(1, 2, 0, 3) for x in queries)
    found = (round_queries(x, ring.layers[0].keys) for x in of_heads)
    return [x.transpose(2, 0, 1, 3).reshape(queries[0].shape) for x in found]


@pytest.mark.parametrize("codec", ["q8", "q4", "k=q8,v=q4", "k=q4,v=q8"])
@pytest.mark.parametrize("shape", [*SHAPES, (8, 2, 128), (6, 2, 96), (4, 4, 320)], ids=lambda s: "x".join(map(str, s)))
def test_int8_activations_round_queries(int8_kernels: Kernels, shape: Shape, codec: str) -> None:
    for case in ((24, 4, 200, 9), (1300, 4, 1299, 1), (300, 70, 1000, 3)):
        ring, q, near = a_ring(int8_kernels, shape, case, codec=codec)
        wanted = expected(ring, *rounded(ring, q, near))
        found = attend(int8_kernels, ring, q, near)
        assert np.abs(found - wanted).max() <= CODES_ERROR[8 if codec.endswith("q4") else 14] * np.abs(wanted).max()
        assert np.abs(expected(ring, q, near) - wanted).max() > 1e-3 * np.abs(wanted).max()  # rounding does matter


@pytest.mark.parametrize("codec", ["k=f16,v=q8", "q8"])
@pytest.mark.parametrize("rank", [40, 64, 128, 256, 576])
def test_int8_activations_sum_codes_of_values(int8_kernels: Kernels, rank: int, codec: str) -> None:
    shape = (9, 3, 64)
    decoders = (None, a_decoder(shape, (rank, None), False, 1))
    for case in ((24, 4, 200, 9), (1300, 4, 1299, 1)):
        ring, q, near = a_ring(int8_kernels, shape, case, codec=codec, modules=[KVModule(0, "v", rank)])
        queries = rounded(ring, q, near) if codec == "q8" else (q, near)
        found, wanted = attend(int8_kernels, ring, q, near, decoders), expected(ring, *queries, decoders)
        assert np.abs(found - wanted).max() <= PROJECTION_ERROR * np.abs(wanted).max()


@pytest.mark.parametrize("codec", ["q8", "k=q8,v=q4", "q4"])
def test_rounding_weights_costs_less_than_half_of_what_codes_cost(int8_kernels: Kernels, codec: str) -> None:
    """Beside attention to vectors that are not rounded at all."""
    for n in (300, 4000):
        given: dict[str, np.ndarray] = {}
        for kv in ("f32", codec):
            ring, q, near = a_ring(int8_kernels, (8, 2, 128), (n + 4, 4, n - 1, 1), codec=kv)
            given[kv] = expected(ring, *(rounded(ring, q, near) if kv == codec else (q, near)))
        off = np.linalg.norm(attend(int8_kernels, ring, q, near) - given[codec])
        assert off < 0.5 * np.linalg.norm(given[codec] - given["f32"])


FORMS = {"linear": (7, None), "wide": (40, None), "gelu": (4, 9), "wide-gelu": (33, 20)}


def a_decoder(shape: Shape, form: tuple[int, int | None], rotated: bool, seed: int) -> Decoder:
    (rank, hidden), rng = form, np.random.default_rng(seed)
    features = hidden or rank

    def some(*sizes: int) -> np.ndarray:
        return (rng.standard_normal(sizes) / np.sqrt(sizes[-1])).astype(np.float32)

    return Decoder(
        some(hidden, rank) if hidden else None,
        some(hidden) if hidden else None,
        ("gelu", "gelu_tanh")[seed] if hidden else None,
        some(shape[1], shape[2], features),
        some(shape[1], shape[2]),
        rotated,
    )


@pytest.mark.parametrize("codec", ["f32", "q8"])
@pytest.mark.parametrize("sides", ["v", "k after", "k before", "k+v after", "k+v before"])
@pytest.mark.parametrize("form", FORMS)
def test_codes_are_decoded(kernels: Kernels, form: str, sides: str, codec: str) -> None:
    rank, hidden = FORMS[form]
    order = "before" if "before" in sides else "after"
    names = [side for side in "kv" if side in sides.split()[0]]
    modules = [KVModule(0, side, rank, hidden, rope=order if side == "k" else None) for side in names]
    for shape in SHAPES[:2]:
        decoders = (
            a_decoder(shape, FORMS[form], order == "before", 0) if "k" in names else None,
            a_decoder(shape, FORMS[form], False, 1) if "v" in names else None,
        )
        for case in ((40, 4, 36, 7), (24, 4, 200, 9), (1300, 4, 1299, 1)):
            ring, q, near = a_ring(kernels, shape, case, codec=codec, modules=modules)
            assert_near(attend(kernels, ring, q, near, decoders), expected(ring, q, near, decoders))


# ---- one order of summation -------------------------------------------------------------------------------


@pytest.fixture(params=["numba", "native"])
def compiled(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        ensure_native_library()
    return str(request.param)


@pytest.mark.parametrize("int8", [False, True], ids=["f32", "int8"])
@pytest.mark.parametrize("codec", ["f16", "q8", "q4"])
@pytest.mark.parametrize("shared", [False, True])
def test_a_token_gets_the_same_bits_alone_and_in_a_chunk(codec: str, shared: bool, compiled: str, int8: bool) -> None:
    """Alone its spans are cut and shared by the threads; in a chunk it has neighbours in its tile."""
    shape = (9, 3, 64)
    kernels = [get_kernels(compiled, n, int8=int8) for n in (1, 2)]
    modules = [KVModule(0, "v", 40), KVModule(0, "k", 12, 9, rope="after")] if shared else []
    decoders = (None, None)
    if shared:
        decoders = a_decoder(shape, (12, 9), False, 0), a_decoder(shape, (40, None), False, 1)  # type: ignore[assignment]
    for case in ((1300, 4, 1250, 40), (1300, 600, 2000, 40)):
        ring, q, near = a_ring(kernels[0], shape, case, codec=codec, modules=modules)
        together = attend(kernels[0], ring, q, near, decoders)
        assert np.array_equal(attend(kernels[1], ring, q, near, decoders), together)
        start = ring.length
        for i in range(len(q)):
            ring.length = start + i
            for each in kernels:
                assert np.array_equal(attend(each, ring, q[i : i + 1], near[i : i + 1], decoders)[0], together[i])
    for each in kernels:
        each.close()


@pytest.mark.parametrize("int8", [False, True], ids=["f32", "int8"])
@pytest.mark.parametrize("codec", ["f16", "q8", "q4"])
def test_it_does_not_matter_where_in_the_ring_a_token_lies(compiled: str, codec: str, int8: bool) -> None:
    """Rings of the same capacity but other chunks have other numbers of slots, so they wrap elsewhere."""
    kernels = get_kernels(compiled, 2, int8=int8)
    results = []
    for chunk in (1, 7, 64):
        ring = KVRing(config_of((6, 2, 10)), 150, chunk, 5, codec)
        rng = np.random.default_rng(3)
        x = rng.standard_normal((700, 2, 20)).astype(np.float32)
        while ring.length < 700:
            n = min(chunk, 700 - ring.length)
            k, v = (np.ascontiguousarray(x[ring.length : ring.length + n, side]) for side in (0, 1))
            kernels.append(k, v, ring, 0)
            ring.advance(n)
        ring.length -= 1
        q = rng.standard_normal((1, 60)).astype(np.float32)
        results.append(attend(kernels, ring, q, q))
    assert all(np.array_equal(each, results[0]) for each in results)
    kernels.close()


# ---- appending --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [*CODECS, "k=q8,v=q4"])
def test_what_memory_held_before_does_not_matter(int8_kernels: Kernels, codec: str) -> None:
    """Slots that no token has taken yet may hold scales that are no numbers."""
    for length, n in ((20, 1), (20, 7), (1290, 1)):
        found = []
        for byte in (0, 255):
            ring = KVRing(config_of((8, 2, 64)), 1400, 64, 4, codec=codec)
            for plane in (ring.layers[0].keys, ring.layers[0].values):
                plane.memory[:] = byte
            fill(ring, int8_kernels, length + n)
            ring.length = length
            q = np.random.default_rng(7).standard_normal((n, 8 * 64)).astype(np.float32)
            found.append(attend(int8_kernels, ring, q, q))
        np.testing.assert_array_equal(found[0], found[1])


@pytest.mark.parametrize("codec", CODECS)
def test_backends_store_the_same_bits(codec: str, compiled: str) -> None:
    """Numbers of every size, groups of one value, zeros, and numbers too large for float16."""
    rng = np.random.default_rng(5)
    for shape, learned in [*((shape, False) for shape in SHAPES), ((2, 9, 64), True), ((2, 3, 32), True)]:
        width = shape[1] * shape[2]
        modules = [KVModule(0, "k", width, rope="after"), KVModule(0, "v", width)] if learned else []
        rings = [KVRing(config_of(shape), 30, 30, codec=codec, modules=modules) for _ in range(2)]
        x = (rng.standard_normal((2, 30, width)) * rng.lognormal(0, 4, (2, 30, 1))).astype(np.float32)
        x[:, 3] = 0
        x[:, 4] = 7.25
        x[:, 5, ::3] = 1e6
        x[:, 6] *= 1e-9
        for ring, backend in zip(rings, ("numpy", compiled), strict=True):
            made = get_kernels(backend, 2)
            made.append(x[0], x[1], ring, 0)
            made.close()
        for one, other in zip(rings[0].layers, rings[1].layers, strict=True):
            for a, b in ((one.keys, other.keys), (one.values, other.values)):
                assert all(np.array_equal(p, q) for p, q in zip(a.arrays, b.arrays, strict=True))
                assert np.isfinite(a.read(np.arange(30))).all()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_infinity_that_spreads_is_read_as_no_number_on_every_backend(compiled: str) -> None:
    """Numbers for q4 are rotated, all of a head together: nothing finite may be made of them."""
    x = np.ones((2, 3, 2 * 64), np.float32)
    x[:, 0, 0], x[:, 1, 70], x[:, 2, 5] = np.inf, -np.inf, np.nan
    read = []
    for backend in ("numpy", compiled):
        ring, made = KVRing(config_of((4, 2, 64)), 30, 30, codec="q4"), get_kernels(backend, 2)
        made.append(x[0], x[1], ring, 0)
        made.close()
        read.append([plane.read(np.arange(3)) for plane in (ring.layers[0].keys, ring.layers[0].values)])
    np.testing.assert_array_equal(read[0], read[1])
    assert not np.isfinite(read[0][0][0, 0]).any()
