"""python -m tools.bench: tokens per second, for prompts (pp) and generation (tg), beside the speed of memory.

The settings are llama-bench's: `-p 512 -n 128 -d DEPTH -r REPEATS -t THREADS`; lists have commas (`-t 1,2`).

    python -m tools.bench trit4.trit nf4.trit --peers Q6_K.gguf Q4_0.gguf --plot out.png
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
from runtime.sizes import kv_bytes_per_token, weight_bytes_per_token, weights_per_token
from tools.arguments import add_run_arguments, natural_list, path_name, positive, positive_list, require_matplotlib
from tools.peers import LlamaCpp

GIGA = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to a parser."""
    parser.add_argument("models", nargs="+", type=path_name, metavar="FILE.trit", help="the models")
    add_run_arguments(parser, threads=False)
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
    peers_help = "run llama.cpp in turn with ours, a file for each model; ratios are medians over the pairs"
    parser.add_argument(
        "--peers", "--against", nargs="+", type=path_name, default=[], metavar="FILE.gguf", help=peers_help
    )
    plot_help = "draw tokens per second against bits per weight, and what memory allows"
    parser.add_argument("--plot", type=path_name, metavar="OUT.png", help=plot_help)
    parser.add_argument("--json", action="store_true", help="print a JSON list, one object per setting")


def check(args: argparse.Namespace) -> None:
    """Raise UserError where a setting does not fit, before a model is made ready."""
    longest = max(args.n_depth) + max(*args.n_prompt, *args.n_gen)
    for model in args.models:
        with open_trit(model) as file:
            context = ModelConfig.from_dict(file.config, file.path).max_seq_len
        if longest > context:
            raise UserError(f"{model}: -d, -p and -n need {longest} tokens, but the model's context has {context}")
    if not max(args.n_prompt) and not max(args.n_gen):
        raise UserError("-p 0 and -n 0 leave nothing to measure")
    if args.peers and len(args.peers) != len(args.models):
        raise UserError(f"--peers names {len(args.peers)} files, and there are {len(args.models)} models: one for each")
    if args.plot:
        require_matplotlib()
        if not max(args.n_gen):
            raise UserError("--plot draws generation, and -n 0 leaves none")


def measure(model: Model, peer: str | None, threads: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run every combination of depth, prompt and generation lengths with one model."""
    bandwidth = benchmark.read_bandwidth(threads)  # it swings on a shared machine: before and after, the better one
    about = describe(model, threads, args)
    found = []
    done: dict[tuple[str, int, int], list[dict[str, Any] | None]] = {}
    settings = list(itertools.product(args.n_depth, args.n_prompt, args.n_gen))
    for depth, n_prompt, n_gen in settings:
        for what, n in (("pp", n_prompt), ("tg", n_gen)):
            if (what, n, depth) not in done:
                repeats = args.repetitions
                done[what, n, depth] = timed(model, peer, threads, repeats, what, n, depth) if n else [None, None]
    bandwidth = max(bandwidth, benchmark.read_bandwidth(threads))
    for depth, n_prompt, n_gen in settings:
        (pp, peer_pp), (tg, peer_tg) = done["pp", n_prompt, depth], done["tg", n_gen, depth]
        result = about | {"pp": pp, "tg": tg} | traffic(model, tg, n_gen, depth, bandwidth)
        if peer:
            file = Path(peer)
            result["against"] = {"model": file.name, "model_bytes": file.stat().st_size, "pp": peer_pp, "tg": peer_tg}
        found.append(result)
    return found


def timed(
    model: Model, peer: str | None, threads: int, repeats: int, what: str, n: int, depth: int
) -> list[dict[str, Any] | None]:
    """Run one test. returns: the objects under "pp" or "tg" for the model and for what it is compared with

    Beside generation deep in a context stand generation without one and reading of memory: each swings by more than the
    context costs, so that only differences between neighbours tell it."""
    subjects: list[benchmark.Subject] = [benchmark.Ours(model, n, depth)]
    if deep := what == "tg" and depth > 0:
        memory = benchmark.Memory(threads)
        subjects += [benchmark.Ours(model, n, 0), memory]
    ids = benchmark.synthetic_ids(model, n)
    other = None
    if peer is not None:
        other = LlamaCpp(peer, threads, depth + n, benchmark.synthetic_ids(model, depth), model.new_cache(2).codec)
        subjects.append(other)
    try:
        speeds = benchmark.compare(subjects, ids, what == "tg", repeats)
    finally:
        if other is not None:
            other.close()
    found = as_json(speeds[0], n, depth)
    if deep:
        cached = kv_bytes_per_token(model.config, model.new_cache(2).codec, model.modules) * depth
        bandwidth = [memory.nbytes * x for x in speeds[2]]
        found["depth_cost"] = benchmark.depth_cost(speeds[0], speeds[1], bandwidth, cached)
    if other is None:
        return [found, None]
    ratio = statistics.median(a / b for a, b in zip(speeds[0], speeds[-1], strict=True))
    theirs = as_json(speeds[-1], n, depth) | {"bits_per_weight": other.bits_per_weight, "ratio": ratio}
    return [found, theirs]


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
    count = weights_per_token(model.file, model.config)
    return {
        "read_gb_s": bandwidth / GIGA, "bytes_per_token": total, "weight_bytes_per_token": weights,
        "weights_per_token": count, "bits_per_weight": 8 * weights / count,
        "tg_gweights_s": count * tg["tok_s"] / GIGA if tg else None,
        "tg_gb_s": per_second / GIGA if tg else None,
        "tg_fraction": per_second / bandwidth if tg else None,
    }  # fmt: skip


def describe(model: Model, threads: int, args: argparse.Namespace) -> dict[str, Any]:
    """Tell what was measured on what, so that the figures can be repeated."""
    path = Path(model.file.path)
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
    columns = "| model | MB | backend | threads | test | tok/s | Gw/s | GB/s | of memory's GB/s |"
    print(f"{columns} llama.cpp | tok/s | ratio |" if against else columns)
    print("|---" * (12 if against else 9) + "|")
    lines: dict[str, None] = {}  # a test that stands in several results is printed once
    for result in results:
        start = f"| {result['model']} | {result['model_bytes'] / 1e6:.0f} | {result['backend']} | {result['threads']} |"
        for what in ("pp", "tg"):
            if result[what] is None:
                continue
            memory = "| |"
            if what == "tg":
                memory = f"{result['tg_gweights_s']:.1f} | {result['tg_gb_s']:.1f} | "
                memory += f"{result['tg_fraction']:.0%} of {result['read_gb_s']:.1f}"
            line = f"{start} {what}{_cells(result[what])} | {memory} |"
            if against:
                theirs = result["against"][what]
                line += f" {result['against']['model']} | {rate(theirs)} | {theirs['ratio']:.2f} |"
            lines[line] = None
    print("\n".join(lines))
    costs: dict[str, None] = {}
    for result in results:
        tg = result["tg"]
        if tg and "depth_cost" in tg:
            start = f"{result['model']} (-t {result['threads']} -n {tg['n']})"
            cost = f"{tg['depth']} tokens in the context cost {tg['depth_cost']:.2f} times what reading them takes"
            costs[f"{start}: {cost}"] = None
    if costs:
        print("\n" + "\n".join(costs))


def _cells(test: dict[str, Any]) -> str:
    depth = f" @ d{test['depth']}" if test["depth"] else ""
    return f"{test['n']}{depth} | {rate(test)}"


def rate(test: dict[str, Any]) -> str:
    """Give tokens per second with their deviation."""
    return f"{test['tok_s']:.2f} ± {test['std']:.2f}"


def plot(results: Sequence[dict[str, Any]], path: str) -> None:
    """Draw generation: tokens per second against bits per weight, and the line that the speed of memory draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    first = results[0]
    for result in results:
        about = f", {result['threads']} threads" if len({r["threads"] for r in results}) > 1 else ""
        _point(axes, result["bits_per_weight"], result["tg"], result["model"] + about, "C0", "o")
        if "against" in result:
            peer = result["against"]
            _point(axes, peer["tg"]["bits_per_weight"], peer["tg"], peer["model"], "C1", "s")
    bits = [x / 10 for x in range(10, 180)]
    speed = max(result["read_gb_s"] for result in results)
    limit = [speed * GIGA * 8 / (b * first["weights_per_token"]) for b in bits]
    axes.plot(bits, limit, color="0.6", label=f"reading weights at {speed:.1f} GB/s")
    axes.plot([], [], "C0o", label="tritllama")
    if any("against" in result for result in results):
        axes.plot([], [], "C1s", label="llama.cpp")
    axes.set_ylim(0, 1.15 * max(r["tg"]["tok_s"] / max(r["tg_fraction"], 0.1) for r in results))
    axes.set_xlim(1, 1.25 * max(r["bits_per_weight"] for r in results))
    axes.set(xlabel="bits per weight", ylabel="tokens per second", title=f"{first['cpu']}, {first['kernels']}")
    axes.legend()
    figure.savefig(path, dpi=110)


def _point(axes: Any, bits: float, test: dict[str, Any], name: str, colour: str, marker: str) -> None:
    axes.errorbar([bits], [test["tok_s"]], [test["std"]], color=colour, marker=marker)
    axes.annotate(name, (bits, test["tok_s"]), xytext=(5, 5), textcoords="offset points", fontsize=8)


def command(argv: Sequence[str]) -> int:
    """Parse the arguments, measure, print."""
    parser = ArgumentParser(prog="python -m tools.bench", description="Measure the speed of models.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    check(args)
    results: list[dict[str, Any]] = []
    for path, peer in itertools.zip_longest(args.models, args.peers):
        for asked in args.threads or [None]:
            model = Model.load(path, args.backend, asked, args.activations, args.kv)
            try:
                results += measure(model, peer, benchmark.thread_count(model, asked), args)
            finally:
                model.close()
    if args.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)
    if args.plot:
        plot(results, args.plot)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
