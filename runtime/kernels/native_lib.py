"""The native backend: kernels written in C, if they have been built. The only file that imports `native`."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import BackendError
from .compiled_backend import CompiledKernels
from .selftest import Checked

_BUILD = "build the library with `python -m native.build`"


@cache
def _library() -> tuple[Any, Path]:
    """The library, opened once, and the folder where kernels that passed the self-test are remembered.

    Raises BackendError.
    """
    try:
        from native.build import cache_folder, find_library
        from native.library import Library

        path = find_library()
        if path is None:
            raise BackendError(f"the native library has not been built for this version; {_BUILD}")
        return Library(path), cache_folder() / path.stem
    except ImportError as error:
        raise BackendError(f"the native backend cannot be had: {error}; install cffi") from error
    except OSError as error:
        raise BackendError(f"the native library does not load: {error}; {_BUILD} again") from error


def _from_numba(module: str, function: str) -> int:
    """Numba's code for a kernel, in place of one that the library does not have or that gives wrong results."""
    try:
        from .numba_lib import numba_kernels
    except ImportError as error:
        raise BackendError(f"the native library has no {function} for this machine, nor has Numba: {error}") from error
    return numba_kernels()(module, function)


@cache
def _native_kernels(isa: str) -> Checked:
    library, folder = _library()
    return Checked(lambda module, function: library.kernel(isa, function), "native", folder / isa, _from_numba)


class NativeKernels(CompiledKernels):
    """Kernels of the C library, for the best instruction set that it and this CPU have.

    TRIT_NATIVE_ISA: one of the library's instruction sets, to force it
    Raises BackendError if the library, cffi or that instruction set cannot be had.
    """

    name = "native"

    def __init__(self, n_threads: int | None = None, int8: bool = True) -> None:
        isas = _library()[0].isas()
        forced = os.environ.get("TRIT_NATIVE_ISA")
        self._isa = forced or isas[0]
        self._why = "TRIT_NATIVE_ISA" if forced else f"the best of {', '.join(isas)}"
        if self._isa not in isas:
            raise BackendError(f"TRIT_NATIVE_ISA is {forced!r}; this CPU and the native library have {', '.join(isas)}")
        super().__init__(_native_kernels(self._isa), n_threads, int8)

    def describe(self) -> str:
        return f"native ({self._isa}, {self._why}), {self.pool.n_threads} threads"
