"""The KV ring: a bounded memory of keys and values in which the first tokens stay and the oldest others give way.

Positions are absolute and never reused. The ring shows a query at position p the first `sinks` tokens and the last
`capacity - sinks` tokens up to p (StreamingLLM, Xiao et al., 2023). Keys are stored rotated for their absolute
position. RoPE depends on distances alone, so the window needs no change when it moves; the sinks are read with
queries rotated for position p - (tokens lost), which puts them at the distance they would have if the lost tokens
had never been there. Distances thus never exceed the capacity, and nothing stored is ever rotated again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from formats.kv_modules import KVModule

from .config import ModelConfig
from .errors import CacheError
from .ring_codecs import Plane, code_codec, side_codecs
from .rope import angles, frequencies

STATE_MAGIC = b"TRITKV2\n"
BLOCK = 64  # tokens that attention takes at a time; blocks begin at multiples of it


@dataclass(frozen=True)
class RingLayer:
    keys: Plane
    values: Plane


class KVRing:
    """Keys and values of the tokens that a model may look back at.

    capacity: tokens visible to one query; chunk: most tokens appended in one step; sinks: first tokens that stay.
    codec: how numbers are stored (see ring_codecs), one for all or "k=CODEC,v=CODEC"
    modules: the model's learned projections; where one is, the ring stores its codes
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
    ) -> None:
        codecs = dict(zip("kv", side_codecs(codec), strict=True))
        if capacity < 2:
            raise CacheError(f"the context holds {capacity} tokens; it must hold 2 or more")
        if chunk < 1:
            raise CacheError(f"a chunk has {chunk} tokens; it must have 1 or more")
        self.config, self.capacity, self.chunk, self.modules = config, capacity, chunk, tuple(modules)
        self.codec, self.length, self.sinks = codec, 0, sinks
        self._oldest = 0  # from this position on everything is still stored; it stays when tokens are taken back
        # While a chunk is appended its first token must still see what its last one pushes out of the window.
        self.slots = capacity + chunk - 1
        ranks = {(module.layer, module.side): module.rank for module in modules}

        def plane(layer: int, side: str) -> Plane:
            rank = ranks.get((layer, side))
            if rank is None:
                return Plane(codecs[side], config.n_kv_heads, config.head_dim, self.slots)
            return Plane(code_codec(codecs[side], rank), 1, rank, self.slots, learned=True)

        self.layers = [RingLayer(plane(i, "k"), plane(i, "v")) for i in range(config.n_layers)]
        # Cosine and sine of each slot's position, where keys are rotated after they are decoded.
        rotated = any(module.rope == "before" for module in modules)
        self.turns = np.zeros((2, self.slots if rotated else 0, config.head_dim // 2), np.float32)

    @property
    def sinks(self) -> int:
        """First tokens that never slide out; it can be set while the ring is empty."""
        return self._sinks

    @sinks.setter
    def sinks(self, value: int) -> None:
        if self.length:
            raise CacheError("the number of sinks cannot change once the ring holds tokens; reset it first")
        if not 0 <= value < self.capacity:
            raise CacheError(f"{value} sinks do not fit a context of {self.capacity}; at most {self.capacity - 1} do")
        self._sinks = value

    @property
    def dropped(self) -> int:
        """Tokens that the next query will no longer see."""
        return max(0, self.length + 1 - self.capacity)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is stored, used or not."""
        return self.turns.nbytes + sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def slot(self, positions: np.ndarray) -> np.ndarray:
        """Where the tokens at these absolute positions lie, or lay."""
        return np.where(
            positions < self.sinks, positions, self.sinks + (positions - self.sinks) % (self.slots - self.sinks)
        )

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
        """Keep the rotation of the tokens that come next, if keys are rotated when they are read.

        cosine, sine: (n, head_dim / 2) float32
        """
        if self.turns.size:
            slots = self.slot(np.arange(self.length, self.length + len(cosine)))
            self.turns[0, slots], self.turns[1, slots] = cosine, sine

    def advance(self, n: int) -> None:
        """Count n tokens whose keys and values have been written."""
        self.length += n
        self._oldest = max(self._oldest, self.length - (self.slots - self.sinks))

    def trim(self, n: int) -> None:
        """Forget all but the first n tokens, as if the others had never been appended.

        Raises CacheError if the window of the token that comes next would reach back to overwritten ones.
        """
        if not 0 <= n <= self.length:
            raise CacheError(f"cannot keep {n} tokens of {self.length}")
        oldest_needed = max(self.sinks, n + 1 - (self.capacity - self.sinks))
        if oldest_needed < min(n, self._oldest):
            raise CacheError(f"cannot go back to {n} tokens: some of those it would see have slid out of the ring")
        self.length, self._oldest = n, min(self._oldest, n)

    def reset(self) -> None:
        """Forget everything."""
        self.length = self._oldest = 0

    def copy(self) -> KVRing:
        """A ring of its own with the same tokens: what is done to the one is not seen in the other."""
        other = KVRing(self.config, self.capacity, self.chunk, self.sinks, self.codec, self.modules)
        used = min(self.length, self.slots)
        for theirs, mine in zip(other._arrays(), self._arrays(), strict=True):
            theirs[:, :used] = mine[:, :used]
        other.turns[:] = self.turns
        other.length, other._oldest = self.length, self._oldest
        return other

    # ==== State ====

    def save(self) -> bytes:
        """The ring's tokens as bytes, with a checksum; only used slots are kept."""
        used = min(self.length, self.slots)
        planes = [part[:, :used].tobytes() for part in self._arrays()]
        body = json.dumps(self._geometry(), sort_keys=True).encode() + b"\n" + b"".join(planes)
        return STATE_MAGIC + zlib.crc32(body).to_bytes(4, "little") + body

    def load(self, state: bytes) -> None:
        """Take over what `save` of a ring of the same geometry returned.

        Raises CacheError, and changes nothing, if the state is damaged or belongs to another geometry.
        """
        body = state[len(STATE_MAGIC) + 4 :]
        checksum = int.from_bytes(state[len(STATE_MAGIC) : len(STATE_MAGIC) + 4], "little")
        if not state.startswith(STATE_MAGIC) or zlib.crc32(body) != checksum:
            raise CacheError("the saved state is damaged, or was not written by this version")
        head, _, planes = body.partition(b"\n")
        saved = self._check_geometry(head)
        used = min(saved["length"], self.slots)
        sizes = [part[:, :used].nbytes for part in self._arrays()]
        if len(planes) != sum(sizes):
            raise CacheError(f"the saved state has {len(planes)} bytes of keys and values, not {sum(sizes)}")
        self.length = 0
        self.sinks = saved["sinks"]
        start = 0
        for part, size in zip(self._arrays(), sizes, strict=True):
            part[:, :used] = np.frombuffer(planes, part.dtype, size // part.dtype.itemsize, start).reshape(
                part[:, :used].shape
            )
            start += size
        self._restore_turns(saved["length"])
        self.length, self._oldest = saved["length"], saved["oldest"]

    def _check_geometry(self, head: bytes) -> dict[str, Any]:
        """Read the first line of a state. Raises CacheError if it does not fit this ring."""
        saved = json.loads(head)
        free = {key: saved.get(key) for key in ("length", "oldest", "sinks")}
        expected = {**self._geometry(), **free}
        if saved != expected:
            other = next((key for key in expected if saved.get(key) != expected[key]), "something else")
            mine = expected.get(other, "nothing of the kind")
            raise CacheError(f"the saved state has {other} = {saved.get(other)}, this context has {mine}")
        length, oldest, sinks = free.values()
        if not all(type(n) is int for n in free.values()) or not (0 <= oldest <= length and 0 <= sinks < self.capacity):
            raise CacheError(f"the saved state is damaged: it has {free}")
        return dict(saved)

    def _restore_turns(self, length: int) -> None:
        """Compute what note_turns has kept of the tokens before `length`."""
        if self.turns.size:
            oldest = max(self.sinks, length - (self.slots - self.sinks))
            positions = np.r_[0 : min(self.sinks, length), oldest:length]
            self.turns[:, self.slot(positions)] = angles(frequencies(self.config), positions)

    def _arrays(self) -> list[np.ndarray]:
        return [part for layer in self.layers for plane in (layer.keys, layer.values) for part in plane.arrays]

    def _geometry(self) -> dict[str, Any]:
        config = self.config
        return {
            "codec": self.codec,
            "modules": [[m.layer, m.side, m.rank, m.rope] for m in self.modules],
            "n_layers": config.n_layers,
            "n_kv_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "capacity": self.capacity,
            "chunk": self.chunk,
            "sinks": self.sinks,
            "length": self.length,
            "oldest": self._oldest,
        }
