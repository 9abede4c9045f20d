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
from dataclasses import dataclass

import numpy as np

from .config import ModelConfig
from .errors import CacheError

STATE_MAGIC = b"TRITKV1\n"
RING_CODECS = {"f16": np.float16, "f32": np.float32}


@dataclass(frozen=True)
class RingLayer:
    """keys, values: (n_kv_heads, slots, padded head_dim) of the ring's codec, in C order."""

    keys: np.ndarray
    values: np.ndarray


class KVRing:
    """Keys and values of the tokens that a model may look back at.

    capacity: tokens visible to one query; chunk: most tokens appended in one step; sinks: first tokens that stay.
    codec: how a number is stored, "f16" or "f32" (exact)
    Raises CacheError if the numbers do not fit together.
    """

    def __init__(
        self, config: ModelConfig, capacity: int, chunk: int = 256, sinks: int = 4, codec: str = "f16"
    ) -> None:
        if codec not in RING_CODECS:
            raise CacheError(f"the KV ring has no codec {codec!r}; it has {', '.join(RING_CODECS)}")
        if capacity < 2:
            raise CacheError(f"the context holds {capacity} tokens; it must hold 2 or more")
        if chunk < 1:
            raise CacheError(f"a chunk has {chunk} tokens; it must have 1 or more")
        self.config, self.capacity, self.chunk = config, capacity, chunk
        self.codec, self.length, self.sinks = codec, 0, sinks
        self._oldest = 0  # from this position on everything is still stored; it stays when tokens are taken back
        # While a chunk is appended its first token must still see what its last one pushes out of the window.
        self.slots = capacity + chunk - 1
        self.padded = -(-config.head_dim // 16) * 16
        shape = (config.n_kv_heads, self.slots, self.padded)
        self.layers = [
            RingLayer(np.zeros(shape, RING_CODECS[codec]), np.zeros(shape, RING_CODECS[codec]))
            for _ in range(config.n_layers)
        ]

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
        """Bytes of all keys and values, used or not."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.layers)

    def slot(self, positions: np.ndarray) -> np.ndarray:
        """Where the tokens at these absolute positions lie, or lay."""
        return np.where(
            positions < self.sinks, positions, self.sinks + (positions - self.sinks) % (self.slots - self.sinks)
        )

    def visible(self, position: int) -> np.ndarray:
        """Positions that a query at `position` sees, oldest first."""
        oldest = max(self.sinks, position + 1 - (self.capacity - self.sinks))
        return np.r_[0 : min(self.sinks, position + 1), oldest : position + 1]

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
        if n > self.sinks and oldest_needed < self._oldest:
            raise CacheError(f"cannot go back to {n} tokens: some of those it would see have slid out of the ring")
        self.length = n
        if n <= self.sinks:
            self._oldest = 0

    def reset(self) -> None:
        """Forget everything."""
        self.length = self._oldest = 0

    # ==== State ====

    def save(self) -> bytes:
        """The ring's tokens as bytes, with a checksum; only used slots are kept."""
        used = min(self.length, self.slots)
        planes = [part[:, :used].tobytes() for layer in self.layers for part in (layer.keys, layer.values)]
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
        saved = json.loads(head)
        free = {key: saved.get(key) for key in ("length", "oldest", "sinks")}
        expected = {**self._geometry(), **free}
        if saved != expected:
            other = next(key for key in expected if saved.get(key) != expected[key])
            raise CacheError(f"the saved state has {other} = {saved.get(other)}, this context has {expected[other]}")
        used = min(saved["length"], self.slots)
        shape = (self.config.n_kv_heads, used, self.padded)
        dtype = np.dtype(RING_CODECS[self.codec])
        size = int(np.prod(shape)) * dtype.itemsize
        if len(planes) != size * 2 * len(self.layers):
            raise CacheError(f"the saved state has {len(planes)} bytes of keys and values, not {size * 2}")
        self.length = 0
        self.sinks = saved["sinks"]
        parts = [part for layer in self.layers for part in (layer.keys, layer.values)]
        for i, part in enumerate(parts):
            part[:, :used] = np.frombuffer(planes, dtype, size // dtype.itemsize, i * size).reshape(shape)
        self.length, self._oldest = saved["length"], saved["oldest"]

    def _geometry(self) -> dict[str, int | str]:
        config = self.config
        return {
            "codec": self.codec,
            "n_layers": config.n_layers,
            "n_kv_heads": config.n_kv_heads,
            "head_dim": config.head_dim,
            "capacity": self.capacity,
            "chunk": self.chunk,
            "sinks": self.sinks,
            "length": self.length,
            "oldest": self._oldest,
        }
