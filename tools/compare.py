"""python -m tools.compare: what files of one model cost in quality, and what they take, in one table and one picture.

    python -m tools.compare f16.trit trit2.trit nf4.trit model.gguf -f TEXT --plot out.png

Files of llama.cpp (.gguf) are measured by llama.cpp itself, if llama-cpp-python is installed, on the same windows.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from formats.container import open_trit
from formats.conversion.plan import MATRICES
from runtime import evaluate
from runtime.benchmark import thread_count
from runtime.cli import ArgumentParser, UserError, run
from runtime.model import Model
from runtime.progress import Bar
from tools.arguments import add_run_arguments, positive, require_matplotlib
from tools.compare_plot import Point, draw_points
from tools.peers import LlamaCppModel, gguf_bits, k_quant
from tools.perplexity import encode_alike, read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to a parser."""
    parser.add_argument("files", nargs="+", metavar="FILE", help=".trit files, and .gguf files for llama.cpp")
    parser.add_argument("-f", "--file", required=True, metavar="TEXT", help="a text file in UTF-8")
    parser.add_argument("-c", "--ctx-size", type=positive, default=512, metavar="N", help="window (512)")
    parser.add_argument("--chunks", type=positive, metavar="N", help="score only the first N windows")
    kl_help = "the model that the others are held against (default: the .trit file with the most bits per weight)"
    parser.add_argument("--kl", metavar="BASE.trit", help=kl_help)
    quants_help = "also measure these quantisations of the first .gguf file, made by llama.cpp: Q4_K_M,Q3_K_M"
    parser.add_argument("--k-quants", type=lambda text: text.split(","), default=[], metavar="NAMES", help=quants_help)
    parser.add_argument("--plot", metavar="OUT.png", help="draw perplexity and divergence against bits per weight")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_run_arguments(parser)


def bits(path: str) -> float:
    """Give the bits per weight of the matrices of a file's layers."""
    if path.endswith(".gguf"):
        return gguf_bits(Path(path))
    with open_trit(path) as file:
        matrices = [t for name, t in file.tensors.items() if name.rsplit(".", 1)[-1] in MATRICES]
        return 8 * sum(t.nbytes for t in matrices) / max(sum(t.shape[0] * t.shape[1] for t in matrices), 1)


def measure(args: argparse.Namespace, files: Sequence[tuple[str, str]]) -> list[Point]:
    """Measure all files against the base, in the order of their bits per weight.

    files: (name to show, path)
    """
    sizes = {path: bits(path) for _, path in files}
    base_path = args.kl or max((path for path in sizes if path.endswith(".trit")), key=sizes.__getitem__, default=None)
    if base_path is None:
        raise UserError("there is no .trit file among them, whose tokenizer cuts the text; give one with --kl")
    others = [path for path in sizes if path.endswith(".trit") and path != base_path]
    ids, bos_id = encode_alike(base_path, others, read_text(args.file), args.ctx_size)
    windows = evaluate.cut_windows(ids, args.ctx_size, bos_id, args.chunks)
    base = Model.load(base_path, args.backend, args.threads, args.activations, args.kv)
    points = []
    for name, path in sorted(files, key=lambda file: sizes[file[1]]):
        about = Path(name).name, Path(path).stat().st_size, sizes[path]
        with opened(path, args, base) as model, Bar(about[0], unit="window") as bar:
            result = evaluate.perplexity(model, windows, None if path == base_path else base, bar)
        kl = result.kl
        more = (kl.mean, kl.stderr, kl.same_top1) if kl else ()
        points.append(Point(*about, result.ppl, result.stderr, *more))
    base.close()
    return points


@contextmanager
def opened(path: str, args: argparse.Namespace, base: Model) -> Iterator[Any]:
    """Open a model as `runtime.evaluate` takes one."""
    model: Any
    if path.endswith(".gguf"):
        model = LlamaCppModel(path, thread_count(base, args.threads), args.ctx_size)
    else:
        model = Model.load(path, args.backend, args.threads, args.activations, args.kv)
    try:
        yield model
    finally:
        model.close()


@contextmanager
def with_k_quants(args: argparse.Namespace) -> Iterator[list[tuple[str, str]]]:
    """Give the files to measure as (name, path), those that llama.cpp makes for this among them."""
    files = [(path, path) for path in args.files]
    source = next((path for path in args.files if path.endswith(".gguf")), None)
    if args.k_quants and source is None:
        raise UserError("--k-quants needs a .gguf file to quantise")
    with tempfile.TemporaryDirectory(prefix="tritllama-") as folder:
        for name in args.k_quants:
            target = Path(folder) / f"{name}.gguf"
            k_quant(Path(source or ""), name, target)
            files.append((name, str(target)))
        yield files


def show(points: Sequence[Point]) -> None:
    """Print the table."""
    print("| file | MB | bits per weight | perplexity | KL divergence | same top token |")
    print("|---|---|---|---|---|---|")
    for p in points:
        kl = "-" if p.kl_mean is None else f"{p.kl_mean:.4f} ± {p.kl_stderr:.4f}"
        top = "-" if p.same_top1 is None else f"{100 * p.same_top1:.1f} %"
        print(f"| {p.name} | {p.nbytes / 1e6:.1f} | {p.bpw:.2f} | {p.ppl:.3f} ± {p.stderr:.3f} | {kl} | {top} |")


def command(argv: Sequence[str]) -> int:
    """Parse the arguments, measure, print, draw."""
    description = "Compare files of one model: what they take and what that costs."
    parser = ArgumentParser(prog="python -m tools.compare", description=description)
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.plot:
        require_matplotlib()
    with with_k_quants(args) as files:
        points = measure(args, files)
    if args.json:
        print(json.dumps({"text": Path(args.file).name, "ctx": args.ctx_size, "points": [asdict(p) for p in points]}))
    else:
        show(points)
    if args.plot:
        draw_points(points, f"{Path(args.file).name}, windows of {args.ctx_size} tokens", args.plot)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
