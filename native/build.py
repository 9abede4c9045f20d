"""Build the native kernels: `python -m native.build`.

One C compiler call for each instruction set, one to link. The library's name holds a hash of the sources and of the
machine, so a library of an older version is never loaded. It is put beside this file, or, where that cannot be
written, into the user's cache folder.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

# Sums must come out as they are written: no contraction to fused operations, no reordering. Numbers made from
# arbitrary bytes may wrap.
FLAGS = [
    "-std=c11",
    "-O3",
    "-fPIC",
    "-ffp-contract=off",
    "-fwrapv",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"]
# Instruction sets of each machine, best first, as in dispatch.c.
ISAS = {
    "x86_64": {"avx512": [*_AVX2, *_AVX512], "avxvnni": [*_AVX2, "-mavxvnni"], "avx2": _AVX2, "generic": []},
    "aarch64": {"neon": ["-march=armv8.2-a+dotprod"], "generic": []},
}
ONCE = ("dispatch.c", "pool.c")  # sources that are the same for all


class BuildError(RuntimeError):
    """The library cannot be built; the message says why in one line."""


def machine() -> str:
    """The architecture's name as the keys of ISAS spell it."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def library_name() -> str:
    """The file name of the library made from these sources for this machine."""
    digest = hashlib.sha256(machine().encode())
    for source in sorted([*HERE.glob("*.[ch]"), HERE / "build.py"]):
        digest.update(source.read_bytes())
    return f"kernels-{digest.hexdigest()[:16]}{SUFFIX}"


def folders() -> Iterator[Path]:
    """Where the library may lie: beside this file, then in the user's cache folder."""
    yield HERE
    yield cache_folder()


def cache_folder() -> Path:
    """This user's folder for libraries, and for what is known of them. TRITLLAMA_CACHE moves it."""
    root = os.environ.get("TRITLLAMA_CACHE")
    if not root:
        import platformdirs

        root = platformdirs.user_cache_dir("tritllama", appauthor=False)
    return Path(root) / "native"


def find_library() -> Path | None:
    """The library of these sources, if it was built."""
    return next((path for folder in folders() if (path := folder / library_name()).is_file()), None)


def find_compiler() -> str:
    """$CC, else cc, gcc or clang.

    Raises BuildError if there is none.
    """
    for name in [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]:
        if found := shutil.which(name):
            return found
    raise BuildError("no C compiler was found; install gcc or clang (Debian: apt install gcc), or set CC to one")


def build(folder: Path | None = None, compiler: str | None = None, extra: Sequence[str] = ()) -> Path:
    """Compile and link the library.

    folder: where to put it; None for the first of `folders` that can be written
    extra: flags for the compiler and the linker, after our own
    Raises BuildError.
    """
    compiler = compiler or find_compiler()
    if folder is None:
        folder = next(filter(_writable, folders()), None)
        if folder is None:
            raise BuildError(f"none of these folders can be written: {', '.join(map(str, folders()))}")
    with tempfile.TemporaryDirectory() as scratch:
        objects = compile_all(compiler, Path(scratch), ISAS.get(machine(), {"generic": []}), extra)
        made = Path(scratch) / library_name()
        _run([compiler, "-shared", "-o", str(made), *map(str, objects), *extra])
        # Within the folder the last step is a rename, so that no process ever opens half a library.
        folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=".kernels-")
        os.close(handle)
        shutil.copyfile(made, temporary)
        os.chmod(temporary, 0o755)
        os.replace(temporary, folder / library_name())
    if (folder / "kernels.h").is_file():  # beside the sources, libraries of older ones are of no use to anyone
        for old in set(folder.glob(f"kernels-*{SUFFIX}")) - {folder / library_name()}:
            old.unlink(missing_ok=True)
    return folder / library_name()


def compile_all(compiler: str, scratch: Path, isas: dict[str, list[str]], extra: Sequence[str]) -> list[Path]:
    """Object files of all sources. An instruction set that an old compiler does not know is left out."""
    command = [compiler, *FLAGS, *extra, "-c"]

    def compile_isa(isa: str) -> BuildError | None:
        try:
            _run([*command, *isas[isa], f"-DISA={isa}", str(HERE / "isa.c"), "-o", str(scratch / f"{isa}.o")])
        except BuildError as error:
            return error
        return None

    with ThreadPoolExecutor() as threads:
        errors = dict(zip(isas, threads.map(compile_isa, isas), strict=True))
    if error := errors["generic"]:
        raise error
    for isa, error in errors.items():
        if error:
            print(f"left out {isa}: {error}", file=sys.stderr)
    built = [isa for isa in isas if not errors[isa]]
    for source in ONCE:
        flags = [f"-DBUILT_{isa}" for isa in built]
        _run([*command, *flags, str(HERE / source), "-o", str(scratch / f"{source}.o")])
    return [scratch / f"{name}.o" for name in (*built, *ONCE)]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()[-300:]]
        raise BuildError(f"{command[0]} failed: {lines[0]}")


def _writable(folder: Path) -> bool:
    """Whether files can be made there; the folder is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def declarations() -> str:
    """The C declarations of kernels.h, as cffi reads them."""
    lines = (HERE / "kernels.h").read_text(encoding="ascii").splitlines()
    return "\n".join(line for line in lines if not line.startswith("#"))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m native.build", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, help="folder for the library")
    parser.add_argument("--cc", help="compiler (default: $CC, cc, gcc, clang)")
    args = parser.parse_args()
    try:
        print(build(args.output, args.cc))
    except BuildError as error:
        print(f"native.build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
