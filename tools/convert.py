"""Convert a checkpoint: python -m tools.convert SOURCE -o OUT.trit --quant trit4"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from formats.convert import QUANTS, Summary, convert
from formats.source import open_source
from runtime.cli import ArgumentParser, run
from runtime.progress import Bar

HELP = "convert a Hugging Face folder or a GGUF file to a .trit file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    codecs = ", ".join(QUANTS)
    parser.add_argument("source", metavar="SOURCE", help="Hugging Face folder, or GGUF file")
    parser.add_argument("-o", "--out", metavar="OUT.trit", help="the file to write")
    parser.add_argument("--quant", required=True, choices=QUANTS, metavar="CODEC", help=f"one of {codecs}")
    embed_help = "for embeddings and lm_head (default f16; with --quant keep: keep)"
    parser.add_argument("--embed", choices=QUANTS, metavar="CODEC", help=embed_help)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT.trit if it is there")
    parser.add_argument("--dry-run", action="store_true", help="say what would be written, and stop")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(_main, argv)


def _main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="tools.convert", description=HELP)
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        parser.error("the following arguments are required: -o/--out")
    started = time.perf_counter()
    source = open_source(args.source)
    out = Path(args.out or "OUT.trit")
    with Bar("convert") as bar:
        summary = convert(source, out, args.quant, args.embed, args.overwrite, args.dry_run, bar)
    for note in summary.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.dry_run:
        print_plan(summary)
    else:
        print_summary(summary, time.perf_counter() - started)
    return 0


def print_plan(summary: Summary) -> None:
    """Print a line for each tensor, then the sum."""
    for item in summary.plan:
        dtype = item.source.dtype if item.source else "-"
        shape = "x".join(str(n) for n in item.shape)
        print(f"{item.name:32} {dtype:>6} -> {item.codec:6} {shape:>14} {item.nbytes:>14,}")
    print(f"total {len(summary.plan)} tensors, {summary.nbytes:,} bytes, {summary.bpw:.2f} bits per weight")


def print_summary(summary: Summary, seconds: float) -> None:
    """Say on stderr what was written."""
    for codec, row in summary.by_codec().items():
        print(
            f"  {codec:6} {row['tensors']:5} tensors {row['bytes'] / 1e6:10.1f} MB {row['bpw']:6.2f} bpw",
            file=sys.stderr,
        )
    size = summary.path.stat().st_size
    print(
        f"{summary.path}: {len(summary.plan)} tensors, {size / 1e6:.1f} MB, "
        f"{summary.bpw:.2f} bits per weight, {seconds:.1f} s",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(main())
