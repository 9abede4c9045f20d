"""RoPE and attention for the compiled backend: what the kernels are told, and how the work is cut into units."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from ..ring.cache import KVRing
from ..ring.codecs import CODECS, Plane
from ..ring.projections import Decoder
from . import words as w
from .base import Decoders, Turns, stays_codes, weight_bits
from .memory import address, aligned
from .pool import Pool

ROWS = 64  # query heads times tokens in one unit, at most, unless one token has more
TILES = 4  # tiles of tokens in one job: what is more would only take memory
UNITS_PER_THREAD = 4  # for the threads to end together


def _fours(n: int) -> int:
    return -(-n // 4) * 4


def _padded(array: np.ndarray, *shape: int) -> np.ndarray:
    """A copy in aligned memory, filled up with zeros to a shape."""
    out = aligned(shape, np.float32)
    out[tuple(slice(n) for n in array.shape)] = array
    return out


@dataclass
class _Side:
    """The words of one side of one layer, and the arrays that they point to."""

    words: np.ndarray
    keep: list[np.ndarray]

    @property
    def shared(self) -> bool:
        return bool(self.words[w.SD_SHARED])

    def __getitem__(self, word: int) -> int:
        return int(self.words[word])


def _describe(plane: Plane, decoder: Decoder | None, ring: KVRing, is_keys: bool, int8: bool) -> _Side:
    """Describe a side. Features are what a decoder's last matrix is multiplied with; SD_SEEN wide is what scores are
    made with or values summed of: vectors as they are stored, features (shared by all heads), or rotated keys."""
    head_dim = -(-ring.config.head_dim // 16) * 16
    side = _Side(np.zeros(w.AT_WORDS - w.AT_VALUES, np.int64), [plane.memory])

    def pin(array: np.ndarray) -> int:
        side.keep.append(array)
        return address(array)

    words = side.words
    words[w.SD_CODEC], words[w.SD_HEADS], words[w.SD_WIDTH] = CODECS.index(plane.codec), plane.heads, plane.width
    words[w.SD_PADDED], words[w.SD_GROUP] = plane.padded, plane.group
    words[w.SD_CODE_BYTES], words[w.SD_SCALE_BYTES] = plane.code_bytes, plane.scale_bytes
    words[w.SD_VALUES] = not is_keys
    words[w.SD_BYTES] = -(-weight_bits(plane, decoder) // 8)
    words[w.SD_DATA], words[w.SD_HEAD_STRIDE : w.SD_BLOCK_STRIDE + 1] = address(plane.memory), plane.data.strides[:2]
    words[w.SD_SEEN] = words[w.SD_FEATURES] = plane.padded
    words[w.SD_ROTATED] = words[w.SD_TURNED] = plane.rotated
    words[w.SD_INT8] = int8 and stays_codes(plane, decoder, is_keys)
    words[w.SD_MIRROR] = 0 if plane.mirror is None else pin(plane.mirror)
    if decoder is None:
        return side
    heads = len(decoder.output)
    features = plane.padded
    if decoder.hidden is not None and decoder.hidden_bias is not None:
        features = -(-len(decoder.hidden) // 16) * 16
        words[w.SD_HIDDEN] = pin(_padded(decoder.hidden, features, plane.padded))
        words[w.SD_HIDDEN_BIAS] = pin(_padded(decoder.hidden_bias, features))
        words[w.SD_ACTIVATION] = ("gelu", "gelu_tanh").index(str(decoder.activation))
    words[w.SD_FEATURES] = features
    if decoder.hidden is not None or decoder.rotated:
        words[w.SD_TURNED] = 1  # a block is turned back before it is decoded
    words[w.SD_SHARED], words[w.SD_SEEN] = not decoder.rotated, head_dim if decoder.rotated else features
    if is_keys and not decoder.rotated:
        output = _padded(decoder.output.transpose(0, 2, 1), heads, features, head_dim)
    else:
        output = _padded(decoder.output, heads, head_dim, features)
    words[w.SD_OUTPUT], words[w.SD_OUTPUT_BIAS] = pin(output), pin(_padded(decoder.output_bias, heads, head_dim))
    if decoder.rotated:
        words[w.SD_COS], words[w.SD_SIN] = address(ring.turns[0]), address(ring.turns[1])
        side.keep.append(ring.turns)
    return side


class _LayerJob:
    """The words of one layer of one ring. Its sides are described when they are first attended to."""

    def __init__(self, ring: KVRing, layer: int, decoders: Decoders, int8: bool) -> None:
        config, planes = ring.config, ring.layers[layer]
        self.keys = _describe(planes.keys, decoders[0], ring, True, int8)
        self.values = _describe(planes.values, decoders[1], ring, False, int8)
        self.words = np.zeros(w.AT_WORDS, np.int64)
        self.words[w.AT_HEADS], self.words[w.AT_KV_HEADS] = config.n_heads, config.n_kv_heads
        self.words[w.AT_HEAD_DIM], self.words[w.AT_SLOTS] = config.head_dim, ring.slots
        self.words[w.AT_WINDOW], self.words[w.AT_CLOCK] = ring.capacity, address(ring.clock)
        self.words[w.AT_SCALE :].view(np.float32)[0] = math.log2(math.e) / math.sqrt(config.head_dim)
        self.words[w.AT_KEYS : w.AT_VALUES] = self.keys.words
        self.words[w.AT_VALUES :] = self.values.words
        self.decoders = decoders
        self.group = config.n_heads // config.n_kv_heads
        self.clock, self.shared = ring.clock, self.keys.shared or self.values.shared

    def area(self, rows: int, sets: int) -> int:
        """Lay out the scratch of a unit of `rows` rows for each of its key-value heads; returns its bytes."""
        all_rows = rows * (int(self.words[w.AT_KV_HEADS]) // sets)
        seen = max(self.keys[w.SD_SEEN], self.values[w.SD_SEEN])
        query, result = all_rows * self.keys[w.SD_SEEN], all_rows * (self.values[w.SD_SEEN] + 2)
        head_dim = -(-int(self.words[w.AT_HEAD_DIM]) // 16) * 16
        features = max(self.keys[w.SD_FEATURES], self.values[w.SD_FEATURES])
        groups = self.keys[w.SD_SEEN] // self.keys[w.SD_GROUP]
        sizes = {  # in numbers of four bytes
            w.AT_QUERY: query,
            w.AT_NEAR: query,
            w.AT_SHIFT: 2 * all_rows + 16,
            w.AT_QUANTS: query // 2,
            w.AT_STEPS: 2 * all_rows * groups * 4,
            w.AT_TOTAL: result,
            w.AT_PART: result,
            w.AT_SCORES: all_rows * w.CACHED,
            w.AT_STATE: 4 * (all_rows + 16) + 16 * all_rows,
            w.AT_CODES: w.CACHED * max(self.keys[w.SD_PADDED], self.values[w.SD_PADDED]),
            w.AT_FEATURES: max(w.CACHED * features, rows * head_dim),
            w.AT_BLOCK: (w.CACHED + 4) * seen,
            w.AT_LIFTS: 2 * w.ROUNDED,
            w.AT_PLANES: (all_rows + w.ROUNDED) * w.CACHED // 2,
            w.AT_WORTH: all_rows + w.ROUNDED,
            w.AT_BASES: all_rows * self.values[w.SD_PADDED] // 2,
        }
        at = 0
        for word, size in sizes.items():
            # Blocks that begin in the middle of four rows are read from a little before their first row on.
            self.words[word] = at + (16 * seen if word == w.AT_BLOCK else 0)
            at += -(-size // 16) * 64
        self.words[w.AT_AREA_BYTES] = at
        return at


class AttentionJobs:
    """Fills jobs and runs them; holds the scratch that units work in."""

    def __init__(self, pool: Pool, resolve: Callable[[str, str], int], int8: bool) -> None:
        """resolve: gives the address of a kernel by module and function (words.KERNELS)

        int8: whether products with codes may round what they are multiplied with
        """
        self._pool, self._int8 = pool, int8
        self._rings: WeakKeyDictionary[KVRing, dict[int, _LayerJob]] = WeakKeyDictionary()
        self._areas, self._parts = aligned((0,), np.uint8), aligned((0,), np.uint8)
        self._kernel = {name: resolve("numba_ring", name) for name in w.KERNELS["numba_ring"]}
        self._kernel |= {name: resolve("numba_attention", name) for name in w.KERNELS["numba_attention"]}

    def rope(self, q: np.ndarray, q_sink: np.ndarray, k: np.ndarray, turns: Turns, ring: KVRing) -> None:
        job = self._job(ring, 0, None, len(q))
        self._set_turns(job, q, q_sink, k, turns)
        self._run_tiles("rope", job, len(q), q, q_sink, k, turns)

    def append(self, k: np.ndarray, v: np.ndarray, ring: KVRing, layer: int) -> None:
        job = self._job(ring, layer, None, len(k))
        job.words[w.AT_K], job.words[w.AT_V] = address(k), address(v)
        self._run_tiles("append", job, len(k), k, v)

    def rope_append(
        self, q: np.ndarray, q_sink: np.ndarray, k: np.ndarray, v: np.ndarray, turns: Turns, ring: KVRing, layer: int
    ) -> None:
        job = self._job(ring, layer, None, len(q))
        self._set_turns(job, q, q_sink, k, turns)
        job.words[w.AT_V] = address(v)
        self._run_tiles("rope_append", job, len(q), q, q_sink, k, v, turns)

    def attention(
        self, q: np.ndarray, q_sink: np.ndarray, ring: KVRing, layer: int, out: np.ndarray, decoders: Decoders
    ) -> None:
        n, config = len(q), ring.config
        job = self._job(ring, layer, decoders, n)
        job.words[w.AT_Q], job.words[w.AT_Q_SINK], job.words[w.AT_OUT] = address(q), address(q_sink), address(out)
        few = config.n_kv_heads < UNITS_PER_THREAD * self._pool.n_threads
        if n == 1 and self.is_deep(ring) and (few or job.shared):
            self._cut(job, ring, q, q_sink, out)
            return
        tile = max(1, min(n, ROWS // job.group))
        job.words[w.AT_TILE], job.words[w.AT_SETS] = tile, config.n_kv_heads
        units = min(TILES, -(-n // tile)) * config.n_kv_heads
        self._reserve_areas(job, _fours(tile * job.group), config.n_kv_heads, units)
        for first in range(0, n, TILES * tile):
            job.words[w.AT_FIRST] = first
            tiles = min(TILES, -(-(n - first) // tile))
            self._run("attend_whole", job, tiles * config.n_kv_heads, q, q_sink, out)

    @staticmethod
    def is_deep(ring: KVRing) -> bool:
        """Whether the next token sees so much that its spans may be worth cutting into runs."""
        return min(ring.length + 1, ring.capacity) > w.SPAN

    def _cut(self, job: _LayerJob, ring: KVRing, *buffers: np.ndarray) -> None:
        """Attend with one token, its spans cut into runs: where heads share codes, or are too few for the threads."""
        kv_heads, words = ring.config.n_kv_heads, job.words
        sets = 1 if job.shared else kv_heads
        runs = -(-UNITS_PER_THREAD * self._pool.n_threads // sets)
        spans = ring.capacity // w.SPAN + 3  # that of the sinks and that of the others may both end in the middle
        words[w.AT_RUNS], words[w.AT_SETS], words[w.AT_FIRST], words[w.AT_TILE] = runs, sets, 0, 1
        rows = _fours(job.group)
        self._reserve_areas(job, rows, sets, max(runs * sets, kv_heads))
        part = -(-rows * (kv_heads // sets) * (job.values[w.SD_SEEN] + 2) // 16) * 64
        if part * spans * sets > self._parts.nbytes:
            self._parts = aligned((part * spans * sets,), np.uint8)
        words[w.AT_PARTS], words[w.AT_PART_BYTES] = address(self._parts), part
        self._run("attend_pack", job, sets, *buffers)
        self._run("attend_spans", job, runs * sets)
        self._run("attend_join", job, kv_heads, *buffers)

    def _run_tiles(self, kernel: str, job: _LayerJob, n: int, *buffers: Any) -> None:
        """Run a kernel on the tiles of the ring in which n new tokens lie."""
        self._run(kernel, job, (int(job.clock[w.LENGTH]) % w.TILE + n + w.TILE - 1) // w.TILE, *buffers)

    def _run(self, kernel: str, job: _LayerJob, units: int, *buffers: Any) -> None:
        self._pool.run(self._kernel[kernel], job.words, units, job, self._areas, self._parts, buffers)

    def _reserve_areas(self, job: _LayerJob, rows: int, sets: int, units: int) -> None:
        nbytes = job.area(rows, sets) * units
        if nbytes > self._areas.nbytes:
            self._areas = aligned((nbytes,), np.uint8)
        job.words[w.AT_AREA] = address(self._areas)

    def _job(self, ring: KVRing, layer: int, decoders: Decoders | None, n: int) -> _LayerJob:
        """The job of a layer, for n tokens. decoders: None where only appending is wanted"""
        jobs = self._rings.setdefault(ring, {})
        job = jobs.get(layer)
        if job is None or (decoders is not None and job.decoders != decoders):
            job = jobs[layer] = _LayerJob(ring, layer, decoders or (None, None), self._int8)
        job.words[w.AT_N] = n
        return job

    @staticmethod
    def _set_turns(job: _LayerJob, q: np.ndarray, q_sink: np.ndarray, k: np.ndarray, turns: Turns) -> None:
        words = job.words
        words[w.AT_Q], words[w.AT_Q_SINK], words[w.AT_K] = address(q), address(q_sink), address(k)
        words[w.AT_COS : w.AT_SIN_SINK + 1] = [address(part) for part in turns]
