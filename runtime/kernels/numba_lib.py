"""The backend that every user has: kernels compiled by Numba for this CPU."""

from __future__ import annotations

from functools import cache
from importlib.metadata import version

from .compiled_backend import CompiledKernels
from .compiling import cpu, folder, kernel
from .selftest import Checked


@cache
def numba_kernels() -> Checked:
    """The resolver of Numba's kernels."""
    return Checked(kernel, "numba", folder())


class NumbaKernels(CompiledKernels):
    """Raises KernelDiffers if one of the kernels that every model needs gives wrong results."""

    name = "numba"

    def __init__(self, n_threads: int | None = None, int8: bool = True) -> None:
        super().__init__(numba_kernels(), n_threads, int8)

    def describe(self) -> str:
        features = cpu()[1].split(",")
        known = ("avx512vnni", "avxvnni", "avx512f", "avx2", "dotprod", "neon")
        best = next((name for name in known if f"+{name}" in features), "plain vectors")
        return f"numba {version('numba')} ({best}), {self.pool.n_threads} threads"
