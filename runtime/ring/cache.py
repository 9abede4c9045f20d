"""The KV ring: a bounded memory of keys and values in which the first tokens stay and the oldest others give way.

Positions are absolute and never reused. The ring shows a query at position p the first `sinks` tokens and the last
`capacity - sinks` tokens up to p (StreamingLLM, Xiao et al., 2023). Keys are stored rotated for their absolute
position. RoPE depends on distances alone, so the window needs no change when it moves; the sinks are read with
queries rotated for position p - (tokens lost), which puts them at the distance they would have if the lost tokens
had never been there. Distances thus never exceed the capacity, and nothing stored is ever rotated again.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from formats.kv_modules import KVModule

from ..config import ModelConfig
from ..errors import CacheError
from ..rope import angles, frequencies
from .codecs import BLOCK, Plane, base_of, code_codec, side_codecs, slots_of
from .state import SavedRing, fill_ring, read_ring, ring_parts


@dataclass(frozen=True)
class RingLayer:
    keys: Plane
    values: Plane


class KVRing:
    """Keys and values of the tokens that a model may look back at.

    capacity: tokens visible to one query; chunk: most tokens appended in one step; sinks: first tokens that stay.
    codec: how numbers are stored (see codecs.py), one for all or "k=CODEC,v=CODEC"
    modules: the model's learned projections; where one is, the ring stores its codes
    key_facts: layer -> (2, n_kv_heads, head_dim) float32, where known: the means of its keys, and their balance
    Raises CacheError if the numbers do not fit together.
    """

    def __init__(
        self,
        config: ModelConfig,
        capacity: int,
        chunk: int = 256,
        sinks: int = 4,
        codec: str = "f16",
        modules: Sequence[KVModule] = (),
        key_facts: Mapping[int, np.ndarray] = MappingProxyType({}),
    ) -> None:
        codecs = dict(zip("kv", side_codecs(codec), strict=True))
        if capacity < 2:
            raise CacheError(f"the context holds {capacity} tokens; it must hold 2 or more")
        if chunk < 1:
            raise CacheError(f"a chunk has {chunk} tokens; it must have 1 or more")
        self.config, self.capacity, self.chunk, self.modules = config, capacity, chunk, tuple(modules)
        self.key_facts = key_facts
        self.clock = np.zeros(2, np.int64)  # length and sinks, where compiled kernels read them
        self.oldest = 0  # from this position on everything is still stored; it stays when tokens are taken back
        self.codec, self.length, self.sinks = codec, 0, sinks
        self.slots = slots_of(capacity, chunk)
        ranks = {(module.layer, module.side): module.rank for module in modules}
        # Layers whose heads share codes that are summed as they are: they are read together.
        shared = {module.layer for module in modules if module.rope != "before"}

        def plane(layer: int, side: str) -> Plane:
            rank, heads, together = ranks.get((layer, side)), config.n_kv_heads, layer in shared
            if rank is None:
                facts = key_facts.get(layer) if side == "k" else None
                return Plane(side, codecs[side], heads, config.head_dim, self.slots, together=together, facts=facts)
            return Plane(side, code_codec(codecs[side], rank), 1, rank, self.slots)

        self.layers = [RingLayer(plane(i, "k"), plane(i, "v")) for i in range(config.n_layers)]
        # Cosine and sine of each slot's position, where keys are rotated after they are decoded.
        rotated = any(module.rope == "before" for module in modules)
        self.turns = np.zeros((2, self.slots if rotated else 0, config.head_dim // 2), np.float32)

    @property
    def length(self) -> int:
        """Tokens appended since the last reset, those that have slid out included."""
        return int(self.clock[0])

    @length.setter
    def length(self, value: int) -> None:
        self.clock[0] = value

    @property
    def sinks(self) -> int:
        """First tokens that never slide out; it can be set while no token of the ring has slid out."""
        return int(self.clock[1])

    @sinks.setter
    def sinks(self, value: int) -> None:
        if self.length > self.capacity or self.oldest:
            raise CacheError("the number of sinks cannot change once tokens have slid out; reset the ring first")
        if not 0 <= value < self.capacity:
            raise CacheError(f"{value} sinks do not fit a context of {self.capacity}; at most {self.capacity - 1} do")
        self.clock[1] = value

    @property
    def dropped(self) -> int:
        """Tokens that the newest one could not see: they have slid out of the window."""
        return max(0, self.length - self.capacity)

    @property
    def planes(self) -> list[Plane]:
        """Keys and values of the first layer, of the second, and so on."""
        return [plane for layer in self.layers for plane in (layer.keys, layer.values)]

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored, used or not."""
        return self.turns.nbytes + sum(plane.nbytes for plane in self.planes)

    @property
    def base(self) -> int:
        """The first slot that is used again."""
        return base_of(self.sinks)

    def slot(self, positions: np.ndarray) -> np.ndarray:
        """Where the tokens at these absolute positions lie, or lay."""
        base = self.base
        return np.where(positions < base, positions, base + (positions - base) % (self.slots - base))

    def visible(self, position: int) -> np.ndarray:
        """Positions that a query at `position` sees, oldest first."""
        oldest = max(self.sinks, position + 1 - (self.capacity - self.sinks))
        return np.r_[0 : min(self.sinks, position + 1), oldest : position + 1]

    def blocks(self, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Give all that n new tokens see, block by block: first the sinks, then the window, oldest first.

        yields: (m,) positions; (n, m) bool, which of them each token sees
        """
        queries = np.arange(self.length, self.length + n)[:, None]
        oldest = np.maximum(self.sinks, queries + 1 - (self.capacity - self.sinks))
        end = self.length + n
        for first, stop in ((0, min(self.sinks, end)), (int(oldest[0, 0]), end)):
            while first < stop:
                positions = np.arange(first, min(first // BLOCK * BLOCK + BLOCK, stop))
                yield positions, (positions <= queries) & ((positions < self.sinks) | (positions >= oldest))
                first += len(positions)

    def note_turns(self, cosine: np.ndarray, sine: np.ndarray) -> None:
        """Make ready for the n tokens that come next: what they overwrite counts as lost from here on.

        cosine, sine: (n, head_dim / 2) float32, their rotation, kept where keys are rotated when they are read
        """
        self._lose(self.length + len(cosine))
        if self.turns.size:
            slots = self.slot(np.arange(self.length, self.length + len(cosine)))
            self.turns[0, slots], self.turns[1, slots] = cosine, sine

    def advance(self, n: int) -> None:
        """Count n tokens whose keys and values have been written."""
        self.length += n
        self._lose(self.length)

    def _lose(self, end: int) -> None:
        """Count as lost what tokens up to position `end` overwrite."""
        if end > self.slots:
            self.oldest = max(self.oldest, end - (self.slots - self.base))

    def _has(self, first: int, stop: int) -> bool:
        """Whether all of the positions first .. stop - 1 that were ever appended are still stored."""
        return max(first, self.base) >= min(stop, self.oldest)

    def trim(self, n: int) -> None:
        """Forget all but the first n tokens, as if the others had never been appended.

        Raises CacheError if the window of the token that comes next would reach back to overwritten ones.
        """
        if not 0 <= n <= self.length:
            raise CacheError(f"cannot keep {n} tokens of {self.length}")
        if not self._has(max(self.sinks, n + 1 - (self.capacity - self.sinks)), n):
            raise CacheError(f"cannot go back to {n} tokens: some of those it would see have slid out of the ring")
        # Before `base` nothing is ever lost, whatever number of sinks comes next.
        self.length, self.oldest = n, 0 if n <= self.base else min(self.oldest, n)

    def reset(self) -> None:
        """Forget everything."""
        self.length = self.oldest = 0

    def copy(self) -> KVRing:
        """A ring of its own with the same tokens: what is done to the one is not seen in the other."""
        other = KVRing(self.config, self.capacity, self.chunk, self.sinks, self.codec, self.modules, self.key_facts)
        for theirs, mine in zip(other.planes, self.planes, strict=True):
            used = -(-min(self.length, self.slots) // BLOCK)
            theirs.data[:, :used] = mine.data[:, :used]
        other.turns[:] = self.turns
        other.length, other.oldest = self.length, self.oldest
        return other

    # ==== State ====

    def save(self) -> bytes:
        """The ring's tokens as bytes, with a checksum; only used slots are kept."""
        return b"".join(ring_parts(self))

    def load(self, state: bytes) -> None:
        """Take over what `save` of a ring of the same model and geometry returned.

        That the model is the same (its RoPE, its projections' weights, its key_facts) is for the caller to know.
        Raises CacheError, and changes nothing, if the state is damaged or belongs to another geometry.
        """
        if not isinstance(state, (bytes, bytearray, memoryview)):
            raise CacheError(f"a state is bytes, as save returns them; got {type(state).__name__}")
        stream = io.BytesIO(state)
        self.restore(read_ring(self, stream), stream)

    def restore(self, saved: SavedRing, stream: io.BufferedIOBase) -> None:
        """Take over a state that `read_ring` has checked for this ring."""
        self.reset()
        self.sinks = saved.sinks
        fill_ring(self, saved, stream)
        self._restore_turns(saved.length)
        self.length, self.oldest = saved.length, saved.oldest

    def _restore_turns(self, length: int) -> None:
        """Compute what note_turns has kept of the tokens before `length`."""
        if self.turns.size:
            first = max(self.base, length - (self.slots - self.base))
            positions = np.r_[0 : min(self.base, length), first:length]
            self.turns[:, self.slot(positions)] = angles(frequencies(self.config), positions)
