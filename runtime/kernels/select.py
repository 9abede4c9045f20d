"""Choose the backend, once, from an argument or from TRIT_BACKEND."""

from __future__ import annotations

import logging
import os
from functools import cache

from ..errors import BackendError
from .base import Kernels

logger = logging.getLogger("tritllama")

MAX_THREADS = 256
BACKENDS = ("auto", "native", "numba", "numpy")


def get_kernels(backend: str = "auto", n_threads: int | None = None, int8: bool = True) -> Kernels:
    """Make the kernels of one backend.

    backend: "auto" takes TRIT_BACKEND if that is set, else the first that works here of native, numba, numpy
    n_threads: None for the cores that this process may use
    int8: products of trit, nf4 and q8 matrices round their activations to groups of int8; False keeps them float32
    Raises BackendError if a backend that was asked for by name cannot be had.
    """
    if backend == "auto":
        backend = os.environ.get("TRIT_BACKEND") or "auto"
    if backend not in BACKENDS:
        raise BackendError(f"there is no backend {backend!r}; there are {', '.join(BACKENDS)}")
    check_threads("n_threads", n_threads)
    for name in ("native", "numba", "numpy") if backend == "auto" else (backend,):
        try:
            return _make(name, n_threads, int8)
        except ImportError as error:
            if backend == "numba":
                raise BackendError(f"the backend 'numba' cannot be had: {error}") from error
        except BackendError as error:
            if backend != "auto" or os.environ.get("TRIT_NATIVE_ISA"):
                raise
            _tell(str(error))
    raise AssertionError("the NumPy backend works everywhere")


@cache
def _tell(why: str) -> None:
    """Say once why a backend is passed over."""
    logger.info("another backend is used: %s", why)


def check_threads(name: str, n_threads: int | None) -> None:
    """Raises BackendError for a number of threads that no backend takes."""
    if n_threads is not None and not 1 <= n_threads <= MAX_THREADS:
        raise BackendError(f"{name} is {n_threads}; it must be from 1 to {MAX_THREADS}")


def _make(name: str, n_threads: int | None, int8: bool) -> Kernels:
    if name == "native":
        from .native_lib import NativeKernels

        return NativeKernels(n_threads, int8)
    if name == "numba":
        from .numba_lib import NumbaKernels

        return NumbaKernels(n_threads, int8)
    from .numpy_backend import NumpyKernels

    return NumpyKernels(n_threads, int8)
