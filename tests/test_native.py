"""The native backend: its build, its choice of instruction set, its memory safety, and the self-test."""

from __future__ import annotations

import ast
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from native import build as native_build
from native.build import BuildError, build, compile_all, find_compiler, find_library, machine
from native.library import Library
from runtime.errors import BackendError, KernelDiffers
from runtime.kernels import get_kernels, words
from runtime.kernels.selftest import Checked, agrees
from tests.native_cases import all_cases
from tests.native_library import ensure_native_library

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def library() -> Library:
    ensure_native_library()
    path = find_library()
    assert path is not None
    return Library(path)


def test_the_words_are_those_of_python() -> None:
    """Every enum of words.h that words.py knows, and the other way round for jobs and the pool."""
    value, seen = 0, {}
    text = (ROOT / "native/words.h").read_text(encoding="ascii")
    for body in re.findall(r"enum \{([^}]*)\}", text):
        value = 0
        for item in body.split(","):
            name, _, given = item.partition("=")
            value = int(given) if given else value
            seen[name.strip()] = value
            value += 1
    ours = {name: number for name, number in vars(words).items() if name.isupper() and isinstance(number, int)}
    assert {name: ours.get(name) for name in seen} == seen
    product = [n for n in ours if not n.startswith(("AT_", "NORM_", "GLU_"))]
    assert set(product) <= set(seen)


def test_every_instruction_set_was_built_and_has_the_same_kernels(library: Library) -> None:
    isas = library.isas()
    assert isas[-1] == "generic"
    products = ("numba_jobs", "numba_trits", "numba_dense", "numba_int8")
    names = ("serve", "run_jobs", *(name for module in products for name in words.KERNELS[module]))
    for isa in isas:
        assert all(library.kernel(isa, name) for name in names)
        assert library.kernel(isa, "no such kernel") == 0
    assert library.kernel("no such isa", "f16") == 0


def test_a_forced_instruction_set_is_obeyed_or_refused(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIT_NATIVE_ISA", "generic")
    assert get_kernels("native", 1).describe().startswith("native (generic, TRIT_NATIVE_ISA)")
    monkeypatch.setenv("TRIT_NATIVE_ISA", "vax")
    for backend in ("native", "auto"):
        monkeypatch.delenv("TRIT_BACKEND", raising=False)
        with pytest.raises(BackendError, match=r"TRIT_NATIVE_ISA is 'vax'; .* have .*generic"):
            get_kernels(backend, 1)


def test_without_a_compiler_the_build_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "native.build", "-o", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PATH": str(tmp_path), "CC": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("native.build: no C compiler was found; install gcc or clang")


def test_a_failing_compiler_is_quoted(tmp_path: Path) -> None:
    compiler = tmp_path / "broken-cc"
    compiler.write_text("#!/bin/sh\necho 'x.c:1: error: no' >&2\nexit 1\n")
    compiler.chmod(0o755)
    with pytest.raises(BuildError, match=r"broken-cc failed: x\.c:1: error: no"):
        build(tmp_path, str(compiler))
    assert list(tmp_path.iterdir()) == [compiler]


def test_without_the_library_native_is_an_error_and_auto_is_not(tmp_path: Path) -> None:
    code = """
import logging, sys
import native.build
native.build.find_library = lambda: None
logging.getLogger("tritllama").addHandler(logging.StreamHandler(sys.stdout))
logging.getLogger("tritllama").setLevel(logging.INFO)
from runtime.errors import BackendError
from runtime.kernels import get_kernels
try:
    get_kernels("native")
except BackendError as error:
    print(error)
print(get_kernels("auto", 1).name, get_kernels("auto", 1).name)
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRIT_")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    error, told, *_, names = done.stdout.splitlines()
    assert error == (
        "the native library has not been built for this version; build the library with `python -m native.build`"
    )
    assert told == f"another backend is used: {error}" and names == "numba numba"
    assert done.stdout.count("another backend") == 1


def test_native_imports_nothing_heavy_before_it_is_used() -> None:
    tree = ast.parse((ROOT / "native/build.py").read_text(encoding="utf-8"))
    top = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    assert top <= set(sys.stdlib_module_names)


# ==== The self-test ====


def test_a_kernel_that_differs_is_replaced_and_the_user_told(
    library: Library, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    isa = library.isas()[0]

    def swapped(module: str, function: str) -> int:
        return library.kernel(isa, {"trit1_int8": "trit2_int8", "swiglu": "rmsnorm"}.get(function, function))

    def right(module: str, function: str) -> int:
        return library.kernel(isa, function)

    with caplog.at_level(logging.WARNING):
        checked = Checked(swapped, "native", tmp_path / "stamps", right)
        assert checked("numba_trits", "trit1_int8") == library.kernel(isa, "trit1_int8")
        assert "the native kernel trit1_int8 gives wrong results on this machine" in caplog.text
        caplog.clear()
        alone = Checked(swapped, "numba", None)
        for _ in range(2):
            with pytest.raises(KernelDiffers, match="the numba kernel trit1_int8"):
                alone("numba_trits", "trit1_int8")
        assert len(caplog.records) == 1
    assert checked("numba_trits", "trit2_int8")
    assert [p.name for p in (tmp_path / "stamps").iterdir()] == ["numba_trits.trit2_int8.passed"]


def test_a_kernel_that_passed_is_not_tested_again(tmp_path: Path, library: Library) -> None:
    (tmp_path / "numba_trits.trit1_int8.passed").touch()
    assert Checked(lambda module, function: 4711, "native", tmp_path)("numba_trits", "trit1_int8") == 4711


def test_the_self_test_sees_every_native_kernel_pass(library: Library) -> None:
    for isa in library.isas():
        for module, functions in words.KERNELS.items():
            for function in functions:
                if library.kernel(isa, function):
                    assert agrees(lambda m, f, isa=isa: library.kernel(isa, f), module, function), (isa, function)


# ==== Memory ====


@pytest.mark.slow
def test_cases_hold_outside_of_python(library: Library, tmp_path: Path) -> None:
    """The C runner agrees with NumPy under AddressSanitizer and UndefinedBehaviorSanitizer."""
    flags = ["-O1", "-g0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    compiler = find_compiler()
    objects = compile_all(compiler, tmp_path, native_build.ISAS[machine()], flags)
    cases, program = tmp_path / "cases", tmp_path / "run"
    all_cases().write(cases)
    runner = str(ROOT / "tests/native_cases.c")
    subprocess.run([compiler, *flags, runner, *map(str, objects), "-o", str(program), "-lm"], check=True)
    done = subprocess.run([str(program), str(cases)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(", 0 wrong\n")


def test_a_job_of_no_tokens_is_no_work(library: Library) -> None:
    kernels = get_kernels("native", 2)
    kernels.rmsnorm(np.zeros((0, 16), np.float32), np.ones(16, np.float32), 1e-5, np.zeros((0, 16), np.float32))
    kernels.close()
