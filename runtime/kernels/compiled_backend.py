"""The backends whose kernels are machine code, run by the project's own threads straight on the packed weights.

Numba's and the native ones differ only in where the code comes from (`resolve`); words.py has names and arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from formats import Tensor

from ..errors import KernelDiffers
from ..ring.cache import KVRing
from . import words as w
from .attention_jobs import AttentionJobs
from .base import GROUP, TRITS, Decoders, Turns, takes_int8
from .cores import usable_cores
from .exceptions import Exceptions
from .memory import address as _address
from .memory import aligned as _aligned
from .numpy_backend import NumpyLinear, level_codes, quantize_activations
from .pool import Pool
from .program import Program

_ROUNDING = {"float32": 0, "float16": 1, "bfloat16": 2}
_TABLE = 32  # entries of a lookup table


class _Workspace:
    """Activations of one product as the kernels want them; shared by all products, grown when a larger one comes."""

    def __init__(self) -> None:
        self.n, self.groups = 0, 0

    def reserve(self, n: int, width: int) -> None:
        groups = -(-width // 160) * 160 // GROUP  # both 80 and 32 divide 160: whole superblocks, whole q8 groups
        if n <= self.n and groups <= self.groups:
            return
        self.n, self.groups = max(n, self.n), max(groups, self.groups)
        self.padded = _aligned((self.n, self.groups * GROUP), np.float32)
        self.quants = _aligned((2, self.groups, self.n, GROUP), np.int8)
        self.sums = _aligned((self.groups, self.n), np.int32)
        self.scales = _aligned((self.groups, self.n), np.float32)
        self.arrays = self.padded, self.quants, self.sums, self.scales
        first, *others = (_address(array) for array in self.arrays)
        self.words = first, self.padded.strides[0], *others


class _Job:
    """The words that one matmul task reads, for the matrices of one codec; a call changes only a few of them."""

    def __init__(self, task: int, tensors: Sequence[Tensor], biases: Sequence[np.ndarray | None]) -> None:
        self.task, self.units = task, 0
        self.words = np.zeros(w.HEAD + w.MATRIX * len(tensors), np.int64)
        self.words[w.WIDTH], self.words[w.MATRICES] = tensors[0].shape[1], len(tensors)
        self.matrices = [self.words[w.HEAD + w.MATRIX * i :][: w.MATRIX] for i in range(len(tensors))]
        self._keep: list[Any] = [tensors, biases]  # what the addresses point to
        for words, tensor, bias in zip(self.matrices, tensors, biases, strict=True):
            words[w.FIRST], words[w.OUTPUTS] = self.units, tensor.shape[0]
            words[w.OUT_STRIDE] = tensor.shape[0] * 4
            words[w.BIAS] = self._pin(bias) if bias is not None else 0
            words[w.ROUND] = _ROUNDING[tensor.params.get("dtype", "float32")]
            self._describe(words, tensor)
            self.units += -(-tensor.shape[0] // w.UNIT_ROWS)

    def _pin(self, array: np.ndarray) -> int:
        self._keep.append(array)
        return _address(array)

    def _table(self, values: np.ndarray) -> int:
        table = _aligned((_TABLE,), np.float32)
        table[: len(values)] = values
        return self._pin(table)

    def _describe(self, words: np.ndarray, tensor: Tensor) -> None:
        """Fill in what depends on the codec."""
        parts, params = tensor.parts, tensor.params
        if tensor.codec in TRITS:
            words[w.DATA], words[w.TABLE] = _address(parts["blocks"]), self._table(parts["units"])
        elif tensor.codec == "nf4":
            words[w.DATA], words[w.TABLE] = _address(parts["codes"]), self._pin(nf4_table(parts["levels"]))
            words[w.AUX], words[w.BLOCK_SHIFT] = _address(parts["absmax"]), params["block"].bit_length() - 1
            if params["nested_block"]:
                words[w.AUX2] = _address(parts["nested_absmax"])
                nested = np.concatenate((parts["offset"], parts["nested_levels"]))
                words[w.AUX3] = self._pin(nested)
        else:
            words[w.DATA] = _address(parts["values"])
            words[w.AUX] = _address(parts["scales"]) if tensor.codec == "q8" else 0


class CompiledLinear:
    """Matrices of equal width, one job for each codec among them."""

    def __init__(
        self, kernels: CompiledKernels, tensors: Sequence[Tensor], biases: Sequence[np.ndarray | None]
    ) -> None:
        self.nbytes = sum(t.nbytes for t in tensors)
        self._kernels, self._width = kernels, tensors[0].shape[1]
        self._int8 = kernels.int8 and any(map(takes_int8, tensors))
        if any(t.shape[1] != self._width for t in tensors):
            raise ValueError(f"matrices of different widths cannot share activations: {[t.name for t in tensors]}")
        by_task: dict[int, list[int]] = {}
        self._wanted = 0
        for i, tensor in enumerate(tensors):
            module, kernel = _task(tensor, kernels.int8)
            by_task.setdefault(kernels.resolve(module, kernel), []).append(i)
            self._wanted |= _wanted(kernel)
        self._jobs = [
            (_Job(task, [tensors[i] for i in which], [biases[i] for i in which]), which)
            for task, which in by_task.items()
        ]
        self._exceptions = [(i, Exceptions(t)) for i, t in enumerate(tensors) if "exceptions" in t.params]

    def __call__(self, x: np.ndarray, outs: Sequence[np.ndarray], add: bool = False) -> None:
        n, space, pool = len(x), self._kernels.workspace, self._kernels.pool
        space.reserve(n, self._width)
        for i, (job, which) in enumerate(self._jobs):
            words = job.words
            words[w.N], words[w.X], words[w.X_STRIDE] = n, _address(x), x.strides[0]
            words[w.PADDED : w.SCALES + 1] = space.words
            words[w.WANTED], words[w.ADD] = self._wanted, add
            for matrix, k in zip(job.matrices, which, strict=True):
                matrix[w.OUT] = _address(outs[k])
            if i == 0:
                pool.run(self._kernels.pack_task, words, -(-n // w.TOGETHER), x, space.arrays)
            pool.run(job.task, words, job.units, job, outs, space.arrays)
        if self._exceptions:
            pool.call(partial(self._add_exceptions, x, outs))

    def _add_exceptions(self, x: np.ndarray, outs: Sequence[np.ndarray]) -> None:
        rounded = quantize_activations(x) if self._int8 else x
        for i, exceptions in self._exceptions:
            exceptions.add_product(rounded, outs[i])


class _Elsewhere:
    """Matrices whose kernel cannot be used."""

    def __init__(self, pool: Pool, linear: NumpyLinear) -> None:
        self.nbytes, self._pool, self._linear = linear.nbytes, pool, linear

    def __call__(self, x: np.ndarray, outs: Sequence[np.ndarray], add: bool = False) -> None:
        self._pool.call(partial(self._linear, x, outs, add))


def _task(tensor: Tensor, int8: bool) -> tuple[str, str]:
    """Module and name of the kernel that multiplies with a matrix."""
    if tensor.codec in TRITS:
        return "numba_trits", f"{tensor.codec}_{'int8' if int8 else 'f32'}"
    name = "nf4_nested" if tensor.codec == "nf4" and tensor.params["nested_block"] else tensor.codec
    return ("numba_int8", f"{name}_int8") if int8 and takes_int8(tensor) else ("numba_dense", name)


def _wanted(kernel: str) -> int:
    """The form of activations that a kernel reads."""
    if not kernel.endswith("_int8"):
        return w.FLOATS
    return w.QUANTS_AS_NIBBLES if kernel.startswith("nf4") else w.QUANTS_IN_ORDER


def nf4_table(levels: np.ndarray) -> np.ndarray:
    """What kernels look NF4 levels up in (words.TABLE_LEVELS). levels: (16,) float32"""
    table = _aligned((w.TABLE_STEP // 4 + 1,), np.float32)
    codes, step = level_codes(levels)
    table[:16], table[w.TABLE_STEP // 4] = levels, step
    table.view(np.int8)[w.TABLE_LEVELS : w.TABLE_STEP] = np.tile(codes, 4)
    return table


class CompiledKernels:
    """See `Kernels` for the contracts.

    resolve: gives the address of a kernel by module and function (words.KERNELS)
    """

    name: str

    def __init__(self, resolve: Callable[[str, str], int], n_threads: int | None, int8: bool) -> None:
        self.resolve, self.int8 = resolve, int8
        self.n_threads = n_threads or usable_cores()
        self.pool = Pool(self.n_threads, resolve)
        self.workspace = _Workspace()
        self.pack_task = resolve("numba_jobs", "pack_activations")
        self._rmsnorm, self._swiglu = resolve("numba_layers", "rmsnorm"), resolve("numba_layers", "swiglu")
        self._norm_job = np.zeros(w.NORM_WORDS, np.int64)
        self._glu_job = np.zeros(w.GLU_WORDS, np.int64)
        self._attention = AttentionJobs(self.pool, resolve, int8)
        self._programs: WeakKeyDictionary[KVRing, tuple[bool, Program]] = WeakKeyDictionary()

    def use_threads(self, n_threads: int) -> None:
        self.pool.use(n_threads)

    def linear(self, tensors: Sequence[Tensor], biases: Sequence[np.ndarray | None]) -> CompiledLinear | _Elsewhere:
        try:
            return CompiledLinear(self, tensors, biases)
        except KernelDiffers:  # the user has been told
            return _Elsewhere(self.pool, NumpyLinear(tensors, biases, self.int8))

    def repeat(self, work: Callable[[], object], ring: KVRing) -> None:
        deep = self._attention.is_deep(ring)
        known = self._programs.get(ring)
        if known is not None and known[0] == deep:
            known[1].run(self.pool)
        else:
            self._programs[ring] = deep, self.pool.record(work)

    def rmsnorm(self, x: np.ndarray, gain: np.ndarray, eps: float, out: np.ndarray) -> None:
        job = self._norm_job
        job[:4] = _address(x), _address(gain), _address(out), x.shape[1]
        job[w.NORM_EPS :].view(np.float32)[0] = eps
        self.pool.run(self._rmsnorm, job, len(x), x, gain, out)

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> None:
        job = self._glu_job
        job[:] = _address(gate), _address(up), gate.shape[1]
        self.pool.run(self._swiglu, job, len(gate), gate, up)

    def rope(self, q: np.ndarray, q_sink: np.ndarray, k: np.ndarray, turns: Turns, ring: KVRing) -> None:
        self._attention.rope(q, q_sink, k, turns, ring)

    def append(self, k: np.ndarray, v: np.ndarray, ring: KVRing, layer: int) -> None:
        self._attention.append(k, v, ring, layer)

    def rope_append(
        self, q: np.ndarray, q_sink: np.ndarray, k: np.ndarray, v: np.ndarray, turns: Turns, ring: KVRing, layer: int
    ) -> None:
        self._attention.rope_append(q, q_sink, k, v, turns, ring, layer)

    def attention(
        self,
        q: np.ndarray,
        q_sink: np.ndarray,
        ring: KVRing,
        layer: int,
        out: np.ndarray,
        decoders: Decoders = (None, None),
    ) -> None:
        self._attention.attention(q, q_sink, ring, layer, out, decoders)

    def close(self) -> None:
        self._programs.clear()
        self.pool.close()
