"""The native library for tests: built once if there is a compiler, beside the tests' other caches."""

from __future__ import annotations

import pytest

from native.build import BuildError, build, find_compiler, find_library


def ensure_native_library() -> None:
    """Build the library unless it is there; skip the test that asks where there is neither it nor a compiler."""
    if find_library() is not None:
        return
    try:
        find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    build()
