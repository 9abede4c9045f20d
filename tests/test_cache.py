"""The KV ring against a list: what was appended is there, to the bit or the codec's bound, until it slides out."""

from __future__ import annotations

import json
import mmap
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from formats.kv_modules import KVModule
from runtime import benchmark
from runtime.config import ModelConfig
from runtime.errors import CacheError
from runtime.kernels.numpy_backend import NumpyKernels
from runtime.ring.cache import KVRing
from runtime.ring.codecs import BLOCK, CODECS, Plane
from runtime.ring.rounding import hadamard
from runtime.ring.state import MAGIC
from runtime.rope import angles, frequencies

CONFIG = ModelConfig(
    dim=8, hidden_dim=8, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=6, vocab_size=9, max_seq_len=512,
    norm_eps=1e-5, rope_theta=10000.0,
)  # fmt: skip
MODULES = (KVModule(0, "v", 5), KVModule(1, "k", 3, rope="before"))
KINDS: dict[str, dict[str, Any]] = {
    **{codec: {"codec": codec} for codec in CODECS},
    "k=q8,v=q4": {"codec": "k=q8,v=q4"},
    "learned f16": {"codec": "f16", "modules": MODULES},
    "learned q8": {"codec": "q8", "modules": MODULES},
}
# Of a group's largest number: half a step, and float16's rounding of the scale. Of q4, whose steps are fitted to all
# numbers, the root of the mean square of a group's errors is held to the same part of its range.
BOUND = {"f32": 0.0, "f16": 2.0**-11, "q8": 0.5 / 127 + 2.0**-11, "q4": 0.5 / 15 + 2.0**-10}
KERNELS = NumpyKernels()


class Listed:
    """A ring and, beside it, the list of all that was appended: the oracle."""

    def __init__(self, capacity: int, sinks: int, chunk: int, kind: str) -> None:
        self.ring = KVRing(CONFIG, capacity, chunk, sinks, **KINDS[kind])
        self.tokens: list[list[np.ndarray]] = []
        self.slots: dict[int, int] = {}  # which position each slot holds

    def planes(self) -> list[Plane]:
        return [plane for layer in self.ring.layers for plane in (layer.keys, layer.values)]

    def append(self, n: int, seed: int) -> None:
        ring, rng = self.ring, np.random.default_rng(seed)
        ring.note_turns(*angles(frequencies(CONFIG), np.arange(ring.length, ring.length + n)))
        new = [rng.standard_normal((n, p.heads * p.width)).astype(np.float32) for p in self.planes()]
        for layer in range(CONFIG.n_layers):
            KERNELS.append(new[2 * layer], new[2 * layer + 1], ring, layer)
        for i in range(n):
            self.slots[self.slot(len(self.tokens))] = len(self.tokens)
            self.tokens.append([part[i : i + 1] for part in new])
        ring.advance(n)

    def slot(self, position: int) -> int:
        base, slots = -(-self.ring.sinks // BLOCK) * BLOCK, self.ring.slots
        return position if position < base else base + (position - base) % (slots - base)

    def seen(self) -> list[int]:
        """What the next token sees besides itself."""
        oldest = max(self.ring.sinks, len(self.tokens) + 1 - (self.ring.capacity - self.ring.sinks))
        return [p for p in range(len(self.tokens)) if p < self.ring.sinks or p >= oldest]

    def trim(self, n: int) -> None:
        """Take tokens back. It must be refused exactly when something that is then seen is no longer there."""
        before, self.tokens = self.tokens, self.tokens[:n]
        there = all(self.slots[self.slot(p)] == p for p in self.seen())
        if there:
            self.ring.trim(n)
            return
        self.tokens = before
        with pytest.raises(CacheError, match="slid out"):
            self.ring.trim(n)

    def check(self) -> None:
        assert self.ring.length == len(self.tokens)
        seen = self.seen()
        assert [p for p in self.ring.visible(len(self.tokens)) if p < len(self.tokens)] == seen
        if not seen:
            return
        slots = self.ring.slot(np.array(seen))
        for i, plane in enumerate(self.planes()):
            given = np.concatenate([self.tokens[p][i] for p in seen])
            alone = Plane(plane.side, plane.codec, plane.heads, plane.width, len(seen))
            alone.write(np.arange(len(seen)), given)
            found = plane.read(slots)
            assert np.array_equal(found, alone.read(np.arange(len(seen))))
            vectors = given.reshape(len(seen), plane.heads, plane.width).swapaxes(0, 1)
            # Rotated, so that each number's error is bounded by the group's largest, as it was stored
            error, given = hadamard(found - vectors, plane.rotated), hadamard(vectors, plane.rotated)
            low, high = np.minimum(given.min(axis=2), 0), np.maximum(given.max(axis=2), 0)
            if plane.codec == "q4":
                error, largest = np.sqrt(np.square(error).sum(axis=2, keepdims=True) / plane.group), high - low
            else:
                largest = np.maximum(high, -low)
            assert (np.abs(error) <= (BOUND[plane.codec] + 1e-6) * largest[..., None]).all()
        if self.ring.turns.size:
            wanted = angles(frequencies(CONFIG), np.array(seen))
            assert np.array_equal(self.ring.turns[:, slots], np.stack(wanted))


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 7)),
        st.tuples(st.just("slide"), st.integers(1, 30)),
        st.tuples(st.just("trim"), st.integers(0, 12)),
        st.tuples(st.sampled_from(["save", "copy", "reset"]), st.just(0)),
    ),
    max_size=25,
)


@pytest.mark.parametrize("kind", KINDS)
@given(steps=steps, capacity=st.integers(2, 14), sinks=st.integers(0, 5), chunk=st.integers(7, 9))
def test_a_ring_is_a_list(kind: str, steps: list[tuple[str, int]], capacity: int, sinks: int, chunk: int) -> None:
    made = Listed(capacity, min(sinks, capacity - 1), chunk, kind)
    for i, (what, n) in enumerate(steps):
        if what == "append":
            made.append(n, seed=i)
        elif what == "slide":  # one by one, far beyond the capacity
            for k in range(n):
                made.append(1, seed=1000 * i + k)
        elif what == "trim":
            made.trim(max(0, len(made.tokens) - n))
        elif what == "reset":
            made.ring.reset()
            made.tokens = []
        elif what == "copy":
            other, tokens, slots = made.ring.copy(), list(made.tokens), dict(made.slots)
            made.append(3, seed=100 + i)  # what is done to the one must not be seen in the other
            made.ring, made.tokens, made.slots = other, tokens, slots
        else:
            other = KVRing(CONFIG, capacity, chunk, made.ring.sinks, **KINDS[kind])
            other.load(made.ring.save())
            made.ring = other
        made.check()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("side", ["k", "v"])
def test_what_a_block_has_of_a_head_lies_in_one_piece(side: str, codec: str) -> None:
    heads, blocks, block = 3, 4, 2
    for together in (False, True):
        plane = Plane(side, codec, heads, 64, blocks * BLOCK - 56, together=together)
        x = np.random.default_rng(0).standard_normal((1, heads * 64)).astype(np.float32)
        plane.write(np.array([block * BLOCK + 2]), x)
        pieces = np.flatnonzero(plane.memory) // (plane.nbytes // (heads * blocks))
        assert set(pieces) == {block * heads + h if together else h * blocks + block for h in range(heads)}


def squares_lost(x: np.ndarray, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Squared errors of each group of 32: as q4 stores it, and rounded between its ends. x: (n, 32) float32"""
    plane = Plane("v", "q4", 1, 32, len(x))
    plane.write(np.arange(len(x)), hadamard(x, plane.rotated))  # which is rotated back before it is stored
    found = hadamard(plane.read(np.arange(len(x)))[0], plane.rotated).astype(np.float64)
    low = x.min(axis=1, keepdims=True).astype(np.float16).astype(np.float64)
    step = ((x.max(axis=1, keepdims=True) - x.min(axis=1, keepdims=True)) / 15).astype(np.float16).astype(np.float64)
    between = low + np.clip(np.rint((x - low) / np.where(step > 0, step, 1)), 0, 15) * step
    # A number between two codes may fall to either, in float32; and sums are no better than their largest part.
    return np.square(found - x).sum(axis=1), np.square(between - x).sum(axis=1) + 1e-6 * spread**2


@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(1e-3, 1e3), mean=st.floats(-10, 10), tail=st.booleans())
def test_q4_never_loses_more_than_between_the_ends(seed: int, spread: float, mean: float, tail: bool) -> None:
    rng = np.random.default_rng(seed)
    noise = rng.standard_t(3, (50, 32)) if tail else rng.standard_normal((50, 32))
    lost, between = squares_lost((spread * (noise + mean)).astype(np.float32), spread)
    assert (lost <= 1.001 * between).all()


def test_q4_fits_its_steps() -> None:
    lost, between = squares_lost(np.random.default_rng(1).standard_normal((2000, 32)).astype(np.float32), 0)
    assert lost.mean() < 0.9 * between.mean()


# ---- refusals ---------------------------------------------------------------------------------------------


FULL, HELD = 3 * BLOCK + 16, 2 * BLOCK + 16  # tokens of a ring that has gone round, and the oldest that it holds


def a_full_one(kind: str = "q8", **how: Any) -> KVRing:
    made = Listed(**{"capacity": 8, "sinks": 2, "chunk": 4, "kind": kind, **how})
    for i in range(FULL // 4):
        made.append(4, i)
    return made.ring


def test_a_damaged_state_is_refused_and_changes_nothing() -> None:
    state = a_full_one().save()
    ring = a_full_one()
    before = ring.save()
    for bad in (b"", state[:-1], state + b"\0", state[:40] + bytes([state[40] ^ 1]) + state[41:], b"x" + state[1:]):
        with pytest.raises(CacheError, match="damaged"):
            ring.load(bad)
    assert ring.save() == before == state


@pytest.mark.parametrize(
    "other", [{"kind": "f16"}, {"capacity": 9}, {"chunk": 5}, {"kind": "learned q8"}], ids=lambda o: str(*o.values())
)
def test_a_state_of_another_geometry_is_refused(other: dict[str, Any]) -> None:
    with pytest.raises(CacheError, match="this context has"):
        a_full_one().load(a_full_one(**other).save())


def test_a_state_of_another_size_says_which_option_asks_for_it() -> None:
    with pytest.raises(CacheError, match=r"capacity = 9, this context has 8 \(see n_ctx, -c\)"):
        a_full_one().load(a_full_one(capacity=9).save())


def forged(ring: KVRing, head: bytes | dict[str, Any], planes: bytes | None = None) -> bytes:
    """A state with a right checksum that was made on purpose. head: the line of JSON, or what to change in it"""
    line, _, stored = ring.save()[len(MAGIC) : -4].partition(b"\n")
    if isinstance(head, dict):
        head = json.dumps({**json.loads(line), **head}).encode()
    body = MAGIC + head + b"\n" + (stored if planes is None else planes)
    return body + zlib.crc32(body).to_bytes(4, "little")


FORGED: list[bytes | dict[str, Any]] = [
    b"", b"{", b"[]", b"null", b"1" * 5000, b"[" * 100_000, b"\xff\xfe", b'{"length": 1}',
    {"length": -1}, {"length": float(FULL)}, {"length": None}, {"length": True}, {"length": 10**30},
    {"length": str(FULL)}, {"length": 1e400}, {"length": [FULL]}, {"length": 2**40 - 1}, {"length": 3},
    {"sinks": 8}, {"sinks": -1}, {"sinks": 1.0}, {"oldest": 999}, {"oldest": 0}, {"oldest": HELD - 1},
    {"oldest": FULL}, {"more": 1}, {"modules": {}}, {"codec": 7},
]  # fmt: skip


@pytest.mark.parametrize("head", FORGED, ids=lambda h: str(h)[:20])
def test_a_state_that_was_forged_is_refused_and_changes_nothing(head: bytes | dict[str, Any]) -> None:
    ring = a_full_one()
    before = ring.save()
    with pytest.raises(CacheError):
        ring.load(forged(a_full_one(), head))
    assert ring.save() == before
    ring.load(forged(a_full_one(), {}))


@pytest.mark.parametrize("state", [None, "state", 3, [b"x"], b"TRITKV3", MAGIC, MAGIC + b"{}\n"], ids=repr)
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(CacheError):
        a_full_one().load(state)


json_values = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists)


@given(junk=json_values, key=st.integers(0, 9))
def test_any_json_in_place_of_a_number_is_refused_or_harmless(junk: Any, key: int) -> None:
    ring = a_full_one()
    before = ring.save()
    name = sorted(json.loads(before[len(MAGIC) :].partition(b"\n")[0]))[key]
    try:
        ring.load(forged(ring, {name: junk}))
    except CacheError:
        assert ring.save() == before


def test_an_interrupted_chunk_cannot_be_undone_past_what_it_overwrote() -> None:
    """Its first layer was written, then came Ctrl-C: the length is as before, but old tokens are gone."""
    ring = a_full_one()
    assert ring.length == FULL and ring.oldest == HELD
    ring.note_turns(*angles(frequencies(CONFIG), np.arange(FULL, FULL + 4)))
    KERNELS.append(np.ones((4, 12), np.float32), np.ones((4, 12), np.float32), ring, 0)
    with pytest.raises(CacheError, match="slid out"):
        ring.trim(HELD + 8)
    ring.trim(FULL)
    copy = a_full_one()
    copy.load(ring.save())
    assert copy.oldest == ring.oldest == HELD + 4


def test_sinks_can_change_until_something_has_slid_out() -> None:
    made = Listed(8, 2, 4, "f16")
    for i in range(2):
        made.append(4, i)
    made.ring.sinks = 5
    for i in range(4):
        made.append(4, i)
        made.check()
    with pytest.raises(CacheError, match="slid out"):
        made.ring.sinks = 2


def test_fewer_sinks_after_going_back_to_what_is_all_there() -> None:
    """The first block of tokens stays as long as it has a sink."""
    made = Listed(200, 4, 50, "f16")
    for i in range(20):
        made.append(50, i)
    made.trim(BLOCK)
    made.ring.sinks = 0
    made.check()
    other = KVRing(CONFIG, 200, 50, 0, "f16")
    other.load(made.ring.save())
    made.ring = other
    made.trim(30)
    made.check()
    assert made.ring.length == 30


@pytest.mark.parametrize(
    ("capacity", "sinks"),
    [(BLOCK + 1, BLOCK), (BLOCK + 2, BLOCK), (2 * BLOCK + 1, 2 * BLOCK), (3 * BLOCK + 1, 3 * BLOCK)],
)
def test_fewer_sinks_never_show_what_was_overwritten(capacity: int, sinks: int) -> None:
    """Where almost all are sinks, going back to a full ring needs nothing of the window; other sinks would."""
    ring = KVRing(CONFIG, capacity, 1, sinks, "f16")
    for i in range(ring.slots + 1):
        for layer in range(CONFIG.n_layers):
            KERNELS.append(np.full((1, 12), i, np.float32), np.zeros((1, 12), np.float32), ring, layer)
        ring.advance(1)
    ring.trim(capacity)
    with pytest.raises(CacheError, match="slid out"):
        ring.sinks = 1
    assert ring.sinks == sinks
    ring.trim(sinks)
    ring.sinks = 1
    assert (ring.layers[0].keys.read(ring.slot(np.arange(sinks)))[0, :, 0] == np.arange(sinks)).all()


def test_bad_arguments_are_refused() -> None:
    for wrong in ({"capacity": 1}, {"chunk": 0}, {"sinks": 8}, {"sinks": -1}, {"codec": "q5"}, {"codec": "k=q8"}):
        with pytest.raises(CacheError):
            KVRing(CONFIG, **{"capacity": 8, "sinks": 2, "chunk": 4, **wrong})
    ring = a_full_one()
    for n in (-1, FULL + 1):
        with pytest.raises(CacheError, match="cannot keep"):
            ring.trim(n)


@pytest.mark.parametrize("capacity", [10**15, 10**18, 1 << 62, 10**30])
def test_a_ring_that_no_memory_holds_is_refused(capacity: int) -> None:
    for kind in KINDS.values():
        with pytest.raises(MemoryError, match=r"for \d+ bytes of keys and values; take a smaller context"):
            KVRing(CONFIG, capacity, **kind)


def test_a_kernel_without_large_pages_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)  # an advice that no kernel knows
    if hasattr(mmap.mmap, "madvise"):
        with mmap.mmap(-1, 1) as raw, pytest.raises(OSError):
            raw.madvise(-1)
    ring = a_full_one()
    assert ring.length > 0


def test_bytes_for_each_token() -> None:
    """Of a layer of the 8B shape: 8 heads of 128 numbers on each side."""
    config = ModelConfig(
        dim=8, hidden_dim=8, n_layers=1, n_heads=32, n_kv_heads=8, head_dim=128, vocab_size=9, max_seq_len=512,
        norm_eps=1e-5, rope_theta=10000.0,
    )  # fmt: skip
    sizes = {"f32": 8192, "f16": 4096, "q8": 2080, "k=q8,v=q4": 1680, "q4": 1280}
    for codec, size in sizes.items():
        ring = KVRing(config, 10, chunk=1, codec=codec)
        assert ring.nbytes == ring.slots * size
    learned = KVRing(config, 10, chunk=1, codec="q8", modules=[KVModule(0, "v", 256)])
    assert learned.nbytes == learned.slots * (1040 + 258)


@pytest.mark.parametrize("kind", KINDS)
def test_a_ring_filled_for_a_benchmark_is_like_any_other(kind: str) -> None:
    ring = KVRing(CONFIG, 700, 8, 4, **KINDS[kind])
    benchmark.fill(ring, 600)
    assert ring.length == 600 and ring.oldest == 0
    slots = ring.slot(np.arange(600))
    for plane in ring.planes:
        x = plane.read(slots)
        assert np.array_equal(x[:, :88], x[:, 512:]) and 0.5 < x.std() < 1.5
    if ring.turns.size:
        assert np.array_equal(ring.turns[:, slots], np.stack(angles(frequencies(CONFIG), np.arange(600))))
