"""Write a .trit file as a Hugging Face folder: python -m tools.export FILE.trit -o DIR"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from formats import open_trit
from formats.conversion.hf_export import DTYPES, export_hf
from runtime.cli import ArgumentParser, run
from runtime.progress import Bar

HELP = "write a .trit file as a Hugging Face folder that transformers loads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("model", metavar="FILE.trit", help="the file")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="the folder to write; it must not exist")
    dtype_help = "type of all values (default: what most of the source's tensors were)"
    parser.add_argument("--dtype", choices=tuple(DTYPES), help=dtype_help)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(_main, argv)


def _main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m tools.export", description=HELP)
    add_arguments(parser)
    args = parser.parse_args(argv)
    started = time.perf_counter()
    with open_trit(args.model) as file, Bar("export") as bar:
        made = export_hf(file, args.out, args.dtype, progress=bar)
    for note in made.notes:
        print(f"note: {note}", file=sys.stderr)
    seconds = time.perf_counter() - started
    print(f"{args.out}: {made.dtype}, {', '.join(made.files)}, {seconds:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
