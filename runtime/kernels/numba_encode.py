"""The trit quantiser of formats/codecs/trit.py, compiled: the same bytes, several depths from one pass.

Every arithmetic step is the reference's, in the same order and precision, so nothing depends on the machine.
Groups are handled LANES at a time, one lane each, because the 16 weights of a group must be summed in order.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
from numba import njit
from numba.core import config

from formats.codecs.base import Rows, check_fits, finite_rows, row_chunks
from formats.codecs.trit import ENTRIES, GROUP, GROUPS, ROWS, UNITS, codebook, max_level
from formats.codecs.trit_codec import Encoded, TritCodec

from .compiling import folder

LANES = 64
ROUNDER = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to integer, ties to even
_one_at_a_time = threading.Lock()  # Numba is told its folder by a global
READ_ONLY = "Array(float32, 2, 'C', readonly=True)"


class Compiled:
    """A function that is compiled when it is first used. Numba keeps the code, in the kernels' folder unless
    NUMBA_CACHE_DIR says another; all that it calls is in this file."""

    def __init__(self, function: Callable[..., None], signature: str) -> None:
        self._function, self._signature = function, signature

    @cached_property
    def ready(self) -> Callable[..., None]:
        options = {"nogil": True, "error_model": "numpy"}
        with _one_at_a_time:
            chosen = config.CACHE_DIR
            config.CACHE_DIR = chosen or str(folder())
            try:
                found: Callable[..., None] = njit(self._signature, cache=True, **options)(self._function)
            except RuntimeError:  # no folder that it could be kept in
                found = njit(self._signature, **options)(self._function)
            finally:
                config.CACHE_DIR = chosen
        return found


def compiled(signature: str) -> Callable[[Callable[..., None]], Compiled]:
    return lambda function: Compiled(function, signature)


def _network() -> list[tuple[int, int]]:
    """Batcher's merge exchange for 16 numbers, less the exchanges that no candidate rank depends on."""
    pairs = []
    p = 8
    while p:
        q, r, d = 8, 0, p
        while d:
            pairs += [(i, i + d) for i in range(GROUP - d) if i & p == r]
            d, q, r = q - p, q // 2, p
        p //= 2
    needed, kept = {10, 12, 14, 15}, []
    for low, high in reversed(pairs):
        if needed & {low, high}:
            needed |= {low, high}
            kept.append((low, high))
    return kept[::-1]


EXCHANGES = np.array(_network(), np.int64)


@compiled(f"void({READ_ONLY}, float32[::1], float32[:,:,::1])")
def _find_scales(w, tops, scales):
    """Of four order statistics of |w|, keep the one with the least squared error, for each group and depth.

    w: (n, in) float32; tops: (depths,) float32, the largest levels
    scales: (depths, n, groups) float32, written
    """
    n, width = w.shape
    groups = scales.shape[2]
    x = np.empty((GROUP, LANES), np.float32)
    rank = np.empty((GROUP, LANES), np.float32)
    unit = np.empty(LANES, np.float32)
    error = np.empty(LANES, np.float64)
    best = np.empty(LANES, np.float64)
    chosen = np.empty(LANES, np.float32)
    for row in range(n):
        for first in range(0, groups, LANES):
            lanes = min(LANES, groups - first)
            for lane in range(lanes):
                start = (first + lane) * GROUP
                if start + GROUP <= width:
                    for j in range(GROUP):
                        x[j, lane] = w[row, start + j]
                else:
                    for j in range(GROUP):
                        x[j, lane] = w[row, start + j] if start + j < width else np.float32(0)
            for j in range(GROUP):
                for lane in range(LANES):
                    rank[j, lane] = abs(x[j, lane])
            for e in range(len(EXCHANGES)):
                low, high = EXCHANGES[e, 0], EXCHANGES[e, 1]
                for lane in range(LANES):
                    a, b = rank[low, lane], rank[high, lane]
                    rank[low, lane] = b if b < a else a
                    rank[high, lane] = a if b < a else b
            for depth in range(len(tops)):
                top = tops[depth]
                for lane in range(LANES):
                    best[lane] = np.inf
                    chosen[lane] = np.float32(0)
                for candidate in (10, 12, 14, 15):
                    for lane in range(LANES):
                        unit[lane] = rank[candidate, lane] / top
                        error[lane] = 0.0
                    for j in range(GROUP):
                        for lane in range(LANES):
                            q = x[j, lane] / unit[lane]
                            q = top if q > top else q
                            q = -top if q < -top else q
                            q = (q + ROUNDER) - ROUNDER
                            rest = x[j, lane] - q * unit[lane]
                            error[lane] += np.float64(rest) * np.float64(rest)
                    for lane in range(LANES):
                        better = (unit[lane] > np.float32(0)) & (error[lane] < best[lane])
                        best[lane] = error[lane] if better else best[lane]
                        chosen[lane] = rank[candidate, lane] if better else chosen[lane]
                for lane in range(lanes):
                    scales[depth, row, first + lane] = chosen[lane]


@njit
def _round_block(w, codes, units, limit, strip, column, level, code):
    """Fill the unsigned levels and the codes of one superblock; beyond the matrix, level L and code 0.

    level: (5 groups, 4 quads, 16 rows, 4 inputs) uint8, written; code: (5 groups, 16 rows) uint8, written
    """
    n, width = w.shape
    top = np.int32(limit)
    q = np.empty(GROUP, np.uint8)
    for g in range(GROUPS):
        group = column * GROUPS + g
        start = group * GROUP
        for r in range(ROWS):
            row = strip * ROWS + r
            code[g, r] = 0
            if row < n and group < codes.shape[1]:
                code[g, r] = codes[row, group]
                unit = units[code[g, r]]
                for j in range(GROUP):
                    x = w[row, start + j] if start + j < width else np.float32(0)
                    y = x / unit if unit > np.float32(0) else np.float32(0)
                    y = limit if y > limit else y
                    y = -limit if y < -limit else y
                    q[j] = np.uint8(np.int32((y + ROUNDER) - ROUNDER) + top)
            else:
                q[:] = np.uint8(top)
            for quad in range(4):
                for k in range(4):
                    level[g, quad, r, k] = q[quad * 4 + k]


@njit
def _join(level, code, depth, out):
    """Pack the levels and codes of one superblock as `pack` of formats/codecs/trit.py does.

    level: (5, 4, 16, 4) uint8; code: (5, 16) uint8; out: (256 * depth + 48,) uint8, written
    """
    for quad in range(4):
        for r in range(ROWS):
            for k in range(4):
                q0, q1, q2 = level[0, quad, r, k], level[1, quad, r, k], level[2, quad, r, k]
                q3, q4 = level[3, quad, r, k], level[4, quad, r, k]
                i = quad * depth * 64 + r * 4 + k
                if depth == 4:
                    out[i] = q0 + 81 * (q4 // 27)
                    out[i + 64] = q1 + 81 * (q4 // 9 % 3)
                    out[i + 128] = q2 + 81 * (q4 // 3 % 3)
                    out[i + 192] = q3 + 81 * (q4 % 3)
                elif depth == 3:
                    out[i] = q0 + 27 * (q3 % 9)
                    out[i + 64] = q1 + 27 * (q4 % 9)
                    out[i + 128] = q2 + 27 * (q3 // 9 * 3 + q4 // 9)
                elif depth == 2:
                    out[i] = q0 + 9 * q1 + 81 * (q4 // 3)
                    out[i + 64] = q2 + 9 * q3 + 81 * (q4 % 3)
                else:
                    out[i] = (((q0 * 3 + q1) * 3 + q2) * 3 + q3) * 3 + q4
    at = 256 * depth
    for r in range(ROWS):
        c3, c4 = code[3, r], code[4, r]
        out[at + r] = code[0, r] + 27 * (c3 % 9)
        out[at + ROWS + r] = code[1, r] + 27 * (c4 % 9)
        out[at + 2 * ROWS + r] = code[2, r] + 27 * (c3 // 9 + 3 * (c4 // 9))


@compiled(f"void({READ_ONLY}, uint8[:,::1], float32[::1], int64, uint8[:,:,::1])")
def _pack(w, codes, units, depth, blocks):
    """Round weights to levels of the units of their groups and pack them.

    w: (n, in) float32; codes: (n, groups) uint8; units: (32,) float32
    blocks: (ceil(n / 16), ceil(in / 80), 256 * depth + 48) uint8, written
    """
    limit = np.float32((3**depth - 1) // 2)
    level = np.empty((GROUPS, 4, ROWS, 4), np.uint8)
    code = np.empty((GROUPS, ROWS), np.uint8)
    for strip in range(blocks.shape[0]):
        for column in range(blocks.shape[1]):
            _round_block(w, codes, units, limit, strip, column, level, code)
            _join(level, code, depth, blocks[strip, column])


# ==== All rows ====

Run = Callable[[Callable[[tuple[int, int]], None], Iterable[tuple[int, int]]], Iterable[None]]
Choose = Callable[[np.ndarray, int, int], np.ndarray]


def encode(w: np.ndarray | Rows, depths: Sequence[int], dtype: str = "float32", run: Run = map) -> Encoded:
    """Quantise a matrix at several depths, each as `TritCodec(depth).quantize(w, dtype=dtype)` byte for byte.

    w: (out, in) float16 or float32, read twice in chunks of rows
    run: how to call a function for all chunks: `map`, or the `map` of a ThreadPoolExecutor
    returns: {depth: (params, {"units": (32,) float32, "blocks": (strips, superblocks, bytes) uint8})}
    Raises ValueError if a value is NaN or infinite, or the largest unit does not fit the dtype.
    """
    find_scales = _find_scales.ready  # here, because threads would each compile it
    tops = np.array([max_level(depth) for depth in depths], np.float32)
    scales = np.empty((len(depths), w.shape[0], -(-w.shape[1] // GROUP)), np.float32)

    def find(chunk: tuple[int, int]) -> None:
        start, stop = chunk
        found = np.empty((len(depths), stop - start, scales.shape[2]), np.float32)
        find_scales(finite_rows(w, start, stop), tops, found)
        scales[:, start:stop] = found

    for _ in run(find, row_chunks(w.shape, ROWS)):
        pass
    units: dict[int, np.ndarray] = {}
    codes: dict[int, np.ndarray] = {}
    for depth, top, found in zip(depths, tops, scales, strict=True):
        entries, middles = codebook(found)
        units[depth] = np.zeros(UNITS, np.float32)
        units[depth][:ENTRIES] = entries / top
        codes[depth] = np.searchsorted(middles, found.astype(np.float64)).astype(np.uint8)

    def choose(values: np.ndarray, start: int, depth: int) -> np.ndarray:
        return codes[depth][start : start + len(values)]

    return pack_nearest(w, units, choose, dtype, run)


def pack_nearest(
    w: np.ndarray | Rows, units: Mapping[int, np.ndarray], choose: Choose, dtype: str, run: Run
) -> Encoded:
    """Round a matrix to the nearest levels and pack it, at every depth that has units.

    units: {depth: (32,) float32}; choose: gives the codes (n, groups) uint8 of rows (n, in) at (start, depth)
    Raises ValueError as `encode`.
    """
    pack_rows = _pack.ready
    packed: Encoded = {}
    for depth, unit in units.items():
        check_fits(unit.max() * np.float32(max_level(depth)), dtype, f"trit{depth}")
        layout = TritCodec(depth).parts(w.shape, {"dtype": dtype})
        parts = {key: np.zeros(shape, kind) for key, (kind, shape) in layout.items()}
        parts["units"][:] = unit
        packed[depth] = {"dtype": dtype}, parts

    def pack(chunk: tuple[int, int]) -> None:
        start, stop = chunk
        values = finite_rows(w, start, stop)
        for depth, (_, parts) in packed.items():
            blocks = parts["blocks"][start // ROWS : -(-stop // ROWS)]
            pack_rows(values, choose(values, start, depth), parts["units"], depth, blocks)

    for _ in run(pack, row_chunks(w.shape, ROWS)):
        pass
    return packed
