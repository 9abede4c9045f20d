"""The native backend: kernels written in C, if they have been built. The only file that imports `native`."""

from __future__ import annotations

import os

from ..errors import BackendError
from .numba_backend import CompiledKernels

_BUILD = "build the library with `python -m native.build`"


class NativeKernels(CompiledKernels):
    """Kernels of the C library, for the best instruction set that it and this CPU have.

    TRIT_NATIVE_ISA: one of the library's instruction sets, to force it
    Raises BackendError if the library, cffi or that instruction set cannot be had.
    """

    name = "native"

    def __init__(self, n_threads: int | None = None, int8: bool = True) -> None:
        try:
            from native.build import find_library
            from native.library import Library

            path = find_library()
            if path is None:
                raise BackendError(f"the native library has not been built for this version; {_BUILD}")
            self._library = Library(path)
        except ImportError as error:
            raise BackendError(f"the native backend cannot be had: {error}; install cffi") from error
        except OSError as error:
            raise BackendError(f"the native library does not load: {error}; {_BUILD} again") from error
        self._isas = self._library.isas()
        self.isa = os.environ.get("TRIT_NATIVE_ISA") or self._isas[0]
        if self.isa not in self._isas:
            raise BackendError(
                f"TRIT_NATIVE_ISA is {self.isa!r}; this CPU and the native library have {', '.join(self._isas)}"
            )
        super().__init__(self._address, n_threads, int8)

    def _address(self, module: str, function: str) -> int:
        address = self._library.kernel(self.isa, function)
        if not address:
            raise BackendError(f"the native library has no kernel {function!r}; use the backend numba")
        return address

    def describe(self) -> str:
        reason = "TRIT_NATIVE_ISA" if os.environ.get("TRIT_NATIVE_ISA") else f"best of {', '.join(self._isas)}"
        return f"native ({self.isa}: {reason}), {self.pool.n_threads} threads"
