"""Opening the shared library with cffi."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .build import declarations


class Library:
    """The shared library, opened.

    Raises ImportError without cffi, OSError if the file cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        from cffi import FFI

        self._ffi: Any = FFI()
        self._ffi.cdef(declarations())
        self._library: Any = self._ffi.dlopen(str(path))

    def isas(self) -> list[str]:
        """Instruction sets that the library was built for and this CPU has, best first."""
        built = self._ffi.string(self._library.trit_built_isas()).decode().split()
        return [isa for isa in built if self._library.trit_isa_works(isa.encode())]

    def kernel(self, isa: str, name: str) -> int:
        """The address of a kernel, 0 if there is none of that name."""
        return int(self._ffi.cast("intptr_t", self._library.trit_kernel(isa.encode(), name.encode())))
