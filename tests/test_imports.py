"""The house rules: imports go one way, heavy packages stay in their places, libraries do not print."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"formats", "runtime", "native", "tools", "tests"}
MAY_IMPORT = {
    "formats": {"formats"},
    "native": {"native"},
    "runtime": {"runtime", "formats"},
    "tools": {"tools", "runtime", "formats"},
}
NATIVE_USER = "runtime/kernels/native_lib.py"
NUMBA_HOME = "runtime/kernels/"
PRINTERS = {
    "runtime/warmup.py", "runtime/progress.py", "runtime/server/__main__.py", "runtime/chat/__main__.py",
    "runtime/cli.py",
}  # fmt: skip
SLOW_TO_IMPORT = (
    "numba", "sentencepiece", "tiktoken", "gguf", "safetensors", "jinja2", "tokenizers", "cffi", "llguidance",
)  # fmt: skip


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported(path: Path) -> Iterator[str]:
    """Yield the full name of each module that a file imports, relative imports resolved."""
    package = name_of(path).split("/")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield ".".join([*base, *([node.module] if node.module else [])])


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_go_one_way(folder: str) -> None:
    for path in sources(folder):
        allowed = MAY_IMPORT[folder] | ({"native"} if name_of(path) == NATIVE_USER else set())
        wrong = {m for m in imported(path) if m.split(".")[0] in OURS - allowed}
        assert not wrong, f"{name_of(path)} imports {sorted(wrong)}"


def test_numba_stays_among_the_kernels() -> None:
    for folder in MAY_IMPORT:
        for path in sources(folder):
            uses = any(m.split(".")[0] in ("numba", "llvmlite") for m in imported(path))
            assert not uses or name_of(path).startswith(NUMBA_HOME), name_of(path)


def test_torch_and_transformers_are_never_needed() -> None:
    for folder in [*MAY_IMPORT, "tests"]:
        for path in sources(folder):
            assert not {m.split(".")[0] for m in imported(path)} & {"torch", "transformers", "bitsandbytes"}


def test_what_only_a_server_needs_stays_there() -> None:
    for folder in MAY_IMPORT:
        for path in sources(folder):
            uses = {m.split(".")[0] for m in imported(path)} & {"starlette", "uvicorn", "prometheus_client"}
            assert not uses or name_of(path).startswith("runtime/server/"), f"{name_of(path)} imports {uses}"


def test_libraries_do_not_print() -> None:
    for folder in ("formats", "runtime"):
        for path in sources(folder):
            if name_of(path) in PRINTERS:
                continue
            tree = ast.parse(path.read_text(encoding="utf-8"))
            calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
            printing = [n.lineno for n in calls if isinstance(n.func, ast.Name) and n.func.id == "print"]
            assert not printing, f"{name_of(path)} prints in line {printing}"


def test_every_package_is_in_the_distribution() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for folder in ("formats", "runtime", "tools"):
        for path in sources(folder):
            package = ".".join(path.relative_to(ROOT).parts[:-1])
            assert f'"{package}"' in text, f"{package} is not listed in pyproject.toml"


def test_reading_a_file_needs_nothing_but_numpy() -> None:
    """What only converting or running needs must not be loaded by `from formats import open_trit`."""
    code = f"import sys, formats; print(sorted(set(sys.modules) & set({SLOW_TO_IMPORT!r})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
