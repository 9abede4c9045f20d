"""Have every kernel compiled and tested ahead of the first model: python -m runtime.warmup

Without it the first model that needs a kernel waits for that. What is made is kept (see kernels/compiling.py), so an
image that is built once, for machines with the same CPU, starts fast everywhere.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from runtime.cli import ArgumentParser, run
from runtime.kernels import get_kernels
from runtime.kernels.compiled_backend import CompiledKernels
from runtime.kernels.words import KERNELS
from runtime.progress import Bar

BACKENDS = ("auto", "native", "numba")


def _main(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="python -m runtime.warmup", description="Compile and test all kernels.")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="the backend to make ready (auto)")
    args = parser.parse_args(argv)
    started = time.perf_counter()
    kernels = get_kernels(args.backend)
    if not isinstance(kernels, CompiledKernels):
        print(f"{kernels.describe()}: has nothing to compile", file=sys.stderr)
        return 0
    every = [(module, function) for module, functions in KERNELS.items() for function in functions]
    with Bar("warm up", unit="kernel") as bar:
        for done, (module, function) in enumerate(every):
            bar(done, len(every), function)
            kernels.resolve(module, function)
    seconds = time.perf_counter() - started
    print(f"{kernels.describe()}: {len(every)} kernels are ready, {seconds:.1f} s", file=sys.stderr)
    kernels.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(_main, argv)


if __name__ == "__main__":
    sys.exit(main())
