"""The native library for tests: built once where there is a compiler."""

from __future__ import annotations

import pytest

from native.build import ISAS, BuildError, build, find_compiler, find_library, machine
from native.library import Library

LESSER_ISAS = list(ISAS.get(machine(), {}))[1:]


def ensure_native_library(isa: str = "") -> None:
    """Build the library unless it is there.

    Skips the test that asks where there is neither it nor a compiler, and where the CPU lacks the instruction set.
    """
    if find_library() is None:
        try:
            find_compiler()
        except BuildError as error:
            pytest.skip(str(error))
        build()
    path = find_library()
    assert path is not None
    if isa and isa not in Library(path).isas():
        pytest.skip(f"this CPU has no {isa}")
