"""python -m tools.bench: tokens per second, for prompts (pp) and generation (tg), beside the speed of memory.

The settings are llama-bench's: `-p 512 -n 128 -d DEPTH -r REPEATS -t THREADS`; lists have commas (`-t 1,2`).
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from formats.container import open_trit
from formats.version import __version__
from runtime import benchmark
from runtime.cli import ArgumentParser, UserError, run
from runtime.config import ModelConfig
from runtime.model import Model
from runtime.sizes import kv_bytes_per_token, weight_bytes_per_token
from tools.arguments import add_model_arguments, natural_list, positive, positive_list
from tools.peers import LlamaCpp

GIGA = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to a parser."""
    add_model_arguments(parser, threads=False)
    parser.add_argument("-p", "--n-prompt", type=natural_list, default=[512], metavar="N", help="prompt tokens (512)")
    parser.add_argument("-n", "--n-gen", type=natural_list, default=[128], metavar="N", help="tokens generated (128)")
    parser.add_argument(
        "-d",
        "--n-depth",
        type=natural_list,
        default=[0],
        metavar="N",
        help="tokens in the context before (0)",
    )
    parser.add_argument("-t", "--threads", type=positive_list, metavar="N", help="threads (default: all cores allowed)")
    parser.add_argument("-r", "--repetitions", type=positive, default=5, metavar="N", help="repeats of each test (5)")
    against_help = "run llama.cpp on this file in turn with ours; ratios are medians over the pairs"
    parser.add_argument("--against", metavar="FILE.gguf", help=against_help)
    parser.add_argument("--json", action="store_true", help="print a JSON list, one object per setting")


def check_lengths(args: argparse.Namespace) -> None:
    """Raise UserError where a setting does not fit the model, before that is made ready."""
    longest = max(args.n_depth) + max(*args.n_prompt, *args.n_gen)
    with open_trit(args.model) as file:
        context = ModelConfig.from_dict(file.config, file.path).max_seq_len
    if longest > context:
        raise UserError(f"-d, -p and -n need {longest} tokens, but the model's context has {context}")
    if not max(args.n_prompt) and not max(args.n_gen):
        raise UserError("-p 0 and -n 0 leave nothing to measure")


def measure(model: Model, threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every combination of depth, prompt and generation lengths with one model."""
    bandwidth = benchmark.read_bandwidth(threads)
    about = describe(model, threads, args)
    found = []
    done: dict[tuple[str, int, int], list[dict[str, Any] | None]] = {}
    for depth, n_prompt, n_gen in itertools.product(args.n_depth, args.n_prompt, args.n_gen):
        for what, n in (("pp", n_prompt), ("tg", n_gen)):
            if (what, n, depth) not in done:
                done[what, n, depth] = timed(model, threads, args, what, n, depth) if n else [None, None]
        (pp, peer_pp), (tg, peer_tg) = done["pp", n_prompt, depth], done["tg", n_gen, depth]
        result = about | {"pp": pp, "tg": tg} | traffic(model, tg, n_gen, depth, bandwidth)
        if args.against:
            peer = Path(args.against)
            size = peer.stat().st_size
            result["against"] = {"model": peer.name, "model_bytes": size, "pp": peer_pp, "tg": peer_tg}
        found.append(result)
    return found


def timed(
    model: Model, threads: int, args: argparse.Namespace, what: str, n: int, depth: int
) -> list[dict[str, Any] | None]:
    """Run one test. returns: the objects under "pp" or "tg" for the model and for what it is compared with"""
    ours = benchmark.Ours(model, n, depth)
    ids = benchmark.synthetic_ids(model, n)
    if not args.against:
        (speeds,) = benchmark.compare([ours], ids, what == "tg", args.repetitions)
        return [as_json(speeds, n, depth), None]
    peer = LlamaCpp(args.against, threads, depth + n, benchmark.synthetic_ids(model, depth))
    try:
        speeds, theirs = benchmark.compare([ours, peer], ids, what == "tg", args.repetitions)
    finally:
        peer.close()
    ratio = statistics.median(a / b for a, b in zip(speeds, theirs, strict=True))
    return [as_json(speeds, n, depth), as_json(theirs, n, depth) | {"ratio": ratio}]


def as_json(speeds: Sequence[float], n: int, depth: int) -> dict[str, Any]:
    """Give the object under "pp" or "tg"."""
    speed = benchmark.summarize(speeds)
    return {"n": n, "depth": depth, "tok_s": speed.tok_s, "std": speed.std}


def traffic(model: Model, tg: dict[str, Any] | None, n_gen: int, depth: int, bandwidth: float) -> dict[str, Any]:
    """Tell what decoding one token reads, and how near to the speed of memory that comes."""
    weights = weight_bytes_per_token(model.file, model.config)
    kv = kv_bytes_per_token(model.config, model.new_cache(2).codec, model.modules)
    total = weights + kv * (depth + n_gen // 2)
    per_second = 0.0 if tg is None else total * tg["tok_s"]
    return {
        "read_gb_s": bandwidth / GIGA, "bytes_per_token": total, "weight_bytes_per_token": weights,
        "tg_gb_s": per_second / GIGA if tg else None,
        "tg_fraction": per_second / bandwidth if tg else None,
    }  # fmt: skip


def describe(model: Model, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Tell what was measured on what, so that the figures can be repeated."""
    path = Path(args.model)
    return {
        "model": path.name, "model_bytes": path.stat().st_size, "fingerprint": model.file.fingerprint,
        "backend": model.kernels.name, "kernels": model.kernels.describe(), "activations": args.activations,
        "kv": model.new_cache(2).codec, "threads": threads, "cpu": benchmark.cpu_name(),
        "repetitions": args.repetitions,
        "versions": {"tritllama": __version__, "python": platform.python_version(),
                     "numpy": metadata.version("numpy"), "numba": metadata.version("numba")},
    }  # fmt: skip


def show(results: list[dict[str, Any]]) -> None:
    """Print a table in Markdown, one line per test."""
    first = results[0]
    against = "against" in first
    print(f"{first['cpu']}; {first['kernels']}; activations {first['activations']}\n")
    columns = "| model | MB | backend | threads | test | tok/s | GB/s | of memory's GB/s |"
    print(f"{columns} {first['against']['model']} | ratio |" if against else columns)
    print("|---" * (10 if against else 8) + "|")
    lines: dict[str, None] = {}  # a test that stands in several results is printed once
    for result in results:
        start = f"| {result['model']} | {result['model_bytes'] / 1e6:.0f} | {result['backend']} | {result['threads']} |"
        for what in ("pp", "tg"):
            if result[what] is None:
                continue
            memory = f"{result['tg_gb_s']:.1f} | {result['tg_fraction']:.0%} of {result['read_gb_s']:.1f}"
            line = f"{start} {what}{_cells(result[what])} | {memory if what == 'tg' else '|'} |"
            if against:
                line += f" {rate(theirs := result['against'][what])} | {theirs['ratio']:.2f} |"
            lines[line] = None
    print("\n".join(lines))


def _cells(test: dict[str, Any]) -> str:
    depth = f" @ d{test['depth']}" if test["depth"] else ""
    return f"{test['n']}{depth} | {rate(test)}"


def rate(test: dict[str, Any]) -> str:
    """Give tokens per second with their deviation."""
    return f"{test['tok_s']:.2f} ± {test['std']:.2f}"


def command(argv: Sequence[str]) -> int:
    """Parse the arguments, measure, print."""
    parser = ArgumentParser(prog="python -m tools.bench", description="Measure the speed of a model.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    check_lengths(args)
    results: list[dict[str, Any]] = []
    for asked in args.threads or [None]:
        model = Model.load(args.model, args.backend, asked, args.activations, args.kv)
        try:
            results += measure(model, benchmark.thread_count(model, asked), args)
        finally:
            model.close()
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
