"""Machine code for the kernels: compiled by Numba on first use, kept as object files, linked by LLVM from then on.

A kernel is named by module and function. Where its object file is there already, neither Numba nor the module is
imported, so that a program starts in a fraction of a second. The files lie in one folder per version of the kernels'
source, of Numba and of the CPU: code made from an older source is never met.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import os
import platform
import tempfile
import threading
import zlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import platformdirs

log = logging.getLogger("tritllama")
_lock = threading.RLock()
_SIGNATURE = "void(intp, intp)"  # of every kernel: address of the arguments, number of the unit
# How kernels and the functions that they call are compiled: without wrappers, which would need Python and Numba.
BARE: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
_CHECKSUM = 4  # bytes at the end of an object file


@cache
def cpu() -> tuple[str, str]:
    """LLVM's name of the CPU to compile for, and its features as "+a,-b"; Numba's variables for both are respected."""
    name = os.environ.get("NUMBA_CPU_NAME") or llvm.get_host_cpu_name()
    features = os.environ.get("NUMBA_CPU_FEATURES")
    return name, llvm.get_host_cpu_features().flatten() if features is None else features


@cache
def folder() -> Path:
    """Where this version's object files are kept; it may be one that can be read only, or not be there."""
    digest = hashlib.sha256(repr(cpu()).encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    versions = f"{version('numba')}-{version('llvmlite')}-{platform.python_version()}-{platform.machine()}"
    root = os.environ.get("TRITLLAMA_CACHE") or platformdirs.user_cache_dir("tritllama", appauthor=False)
    return Path(root) / "kernels" / f"{digest.hexdigest()[:16]}-{versions}"


@cache
def kernel(module: str, function: str) -> int:
    """The address of `int f(void *result, void *error, intptr arguments, intptr unit)`, compiled if need be.

    module: a file of this folder; function: one of its kernels. The two pointers are Numba's; any scratch will do.
    """
    with _lock:
        file = folder() / f"{module}.{function}.o"
        code = _read(file)
        if code is None:
            _announce()
            code = _compile(module, function)
            _write(file, code)
        symbol, _, machine = code.partition(b"\n")
        engine = _engine()
        engine.add_object_file(llvm.ObjectFileRef.from_data(machine))
        engine.finalize_object()
        return int(engine.get_function_address(symbol.decode()))


def _compile(module: str, function: str) -> bytes:
    """The symbol's name, a newline, and the object file."""
    from numba import njit

    source = getattr(importlib.import_module(f".{module}", __package__), function)
    compiled: Any = njit(_SIGNATURE, **BARE)(source)
    result = compiled.overloads[compiled.signatures[0]]
    _name, kind, (machine, _bitcode) = result.library.serialize_using_object_code()
    if kind != "object":
        raise RuntimeError(f"Numba gave {kind!r} for {function}, not an object file")
    return result.fndesc.llvm_func_name.encode() + b"\n" + machine


@cache
def _engine() -> Any:
    """The linker of all kernels. It lives as long as the process, like the code in it."""
    for initialize in ("initialize", "initialize_native_target", "initialize_native_asmprinter"):
        if initialize != "initialize" or tuple(map(int, version("llvmlite").split(".")[:2])) < (0, 45):
            getattr(llvm, initialize)()
    name, features = cpu()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=name, features=features, jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def _read(file: Path) -> bytes | None:
    """An object file as it was written, or None if there is none or it is damaged."""
    try:
        data = file.read_bytes()
    except OSError:
        return None
    body = data[:-_CHECKSUM]
    return body if zlib.crc32(body).to_bytes(_CHECKSUM, "little") == data[-_CHECKSUM:] else None


def _write(file: Path, code: bytes) -> None:
    """Keep an object file; several processes may do so at once."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=file.parent, prefix=".")
        with os.fdopen(handle, "wb") as out:
            out.write(code + zlib.crc32(code).to_bytes(_CHECKSUM, "little"))
        os.replace(name, file)
    except OSError as error:
        _warn(f"compiled kernels cannot be kept, so the next start compiles them again: {error.strerror or error}")


@cache
def _warn(message: str) -> None:
    """Say something once."""
    log.warning("%s", message)


@cache
def _announce() -> None:
    """Say once that there is a wait."""
    log.info("compiling kernels for this CPU; this happens once and takes up to a minute")
