"""python -m tools.attention: how long attention takes in one layer, deep in a context, by codec of the KV ring.

Layers that store their cache alike are one line; those of a model with learned projections (`tools.learn_kv`) so stand
beside those without. All lines take turns with each other and with reading of memory, whose speed swings on a shared
machine: what is to be compared is the last two columns, medians over the rounds.

    python -m tools.attention model.trit -d 32000 --kv f16,q8,q4
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from formats.container import open_trit
from formats.kv_modules import describe_form
from runtime import benchmark
from runtime.cli import ArgumentParser, UserError, run
from runtime.config import ModelConfig
from runtime.model import Model
from runtime.progress import Bar
from runtime.ring.cache import KVRing
from tools.arguments import add_run_arguments, path_name, positive, ring_codecs

ENOUGH = 1 << 28  # bytes of all rings together, which no cache of the processor holds
MOST = 256  # copies of a ring, where few tokens make it small


@dataclass(frozen=True)
class Line:
    """What the command tells of some layers that store their cache alike.

    layers: their numbers; ms: of one layer and token; reading: that time over what reading the cached bytes takes;
    first: over the time of the first line
    """

    model: str
    kv: str
    learned: str
    layers: tuple[int, ...]
    bytes_per_token: int
    ms: float
    gb_s: float
    reading: float
    first: float


class Subject:
    """One or more copies of a layer's ring, full of noise, and a query.

    layers: which layers of the model it stands for, the first for all; nbytes: that the copies may take
    """

    def __init__(self, model: Model, kv: str, layers: Sequence[int], depth: int, nbytes: int) -> None:
        self.layers, self._model, first = tuple(layers), model, layers[0]
        modules = [m for m in model.modules if m.layer == first]
        facts, codec = model.key_facts.get(first), model.new_cache(2, kv=kv).codec

        def ring(copies: int, tokens: int) -> KVRing:
            config = replace(model.config, n_layers=copies)
            mine = [replace(m, layer=i) for m in modules for i in range(copies)]
            known = {} if facts is None else dict.fromkeys(range(copies), facts)
            return KVRing(config, tokens, 1, min(4, tokens - 1), codec, mine, known)

        one = ring(1, depth + 1)
        self.bytes_per_token = one.nbytes // one.slots
        self.ring = ring(min(max(1, nbytes // one.nbytes), MOST), depth + 1)
        benchmark.fill(self.ring, depth)
        projections = model.layers[first].projections
        self._decoders = projections.decoders if projections else (None, None)
        width = model.config.n_heads * model.config.head_dim
        self._q = np.random.default_rng(0).standard_normal((1, width)).astype(np.float32)
        self._out = np.empty_like(self._q)

    def seconds(self) -> float:
        """Attend once in each copy of the layer; returns: the time of one."""
        start, copies = time.perf_counter(), len(self.ring.layers)
        for i in range(copies):
            self._model.kernels.attention(self._q, self._q, self.ring, i, self._out, self._decoders)
        return (time.perf_counter() - start) / copies


def forms(model: Model) -> dict[str, list[int]]:
    """Group layers by how they store their cache: what is learned of it, "" for nothing -> the layers' numbers."""
    found: dict[str, list[int]] = {}
    for layer in range(model.config.n_layers):
        learned = "; ".join(describe_form(m) for m in model.modules if m.layer == layer)
        found.setdefault(learned, []).append(layer)
    return dict(sorted(found.items()))


def measure(models: Sequence[Model], args: argparse.Namespace) -> list[Line]:
    """Time all kinds of layers with all codecs by turns."""
    kinds = [(model, *form, kv) for model in models for form in forms(model).items() for kv in args.kv]
    share = ENOUGH // len(kinds)
    subjects = [Subject(model, kv, layers, args.n_depth, share) for model, _, layers, kv in kinds]
    memory = benchmark.Memory(benchmark.thread_count(models[0], args.threads))
    rounds = []
    with Bar("attention", " rounds") as bar:
        for number in range(args.repetitions + 1):
            start = time.perf_counter()
            memory.read([0])
            bandwidth = memory.nbytes / (time.perf_counter() - start)
            times = [subject.seconds() for subject in subjects]
            if number:  # the first is a warm-up
                rounds.append((bandwidth, times))
            bar(number + 1, args.repetitions + 1)
    lines = []
    for i, (subject, (model, learned, _, _)) in enumerate(zip(subjects, kinds, strict=True)):
        per_token, own = subject.bytes_per_token, statistics.median(times[i] for _, times in rounds)
        nbytes = per_token * args.n_depth
        reading = statistics.median(times[i] * bandwidth / nbytes for bandwidth, times in rounds)
        first = statistics.median(times[i] / times[0] for _, times in rounds)
        name, kv = Path(model.file.path).name, subject.ring.codec
        lines.append(Line(name, kv, learned, subject.layers, per_token, own * 1e3, nbytes / own / 1e9, reading, first))
    return lines


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to a parser."""
    parser.add_argument("models", nargs="+", type=path_name, metavar="FILE.trit", help="the models")
    add_run_arguments(parser, kv=False)
    kv_help = "codecs of keys and values, with commas between them (auto)"
    parser.add_argument("--kv", type=ring_codecs, default=["auto"], metavar="CODEC,...", help=kv_help)
    depth_help = "tokens in the context (32000)"
    parser.add_argument("-d", "--n-depth", type=positive, default=32000, metavar="N", help=depth_help)
    parser.add_argument("-r", "--repetitions", type=positive, default=40, metavar="N", help="rounds (40)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def show(lines: Sequence[Line]) -> None:
    """Print a table in Markdown."""
    print("| model | cache | layers | bytes per token | ms | GB/s | times reading | of the first |")
    print("|---" * 8 + "|")
    for line in lines:
        cache = f"{line.kv}, {line.learned}" if line.learned else line.kv
        print(f"| {line.model} | {cache} | {len(line.layers)} | {line.bytes_per_token} | {line.ms:.3f} | "
              f"{line.gb_s:.1f} | {line.reading:.2f} | {line.first:.2f} |")  # fmt: skip


def command(argv: Sequence[str]) -> int:
    """Parse the arguments, measure, print."""
    about = "Time attention in one layer, deep in a context."
    parser = ArgumentParser(prog="python -m tools.attention", description=about)
    add_arguments(parser)
    args = parser.parse_args(argv)
    for path in args.models:
        with open_trit(path) as file:
            context = ModelConfig.from_dict(file.config, file.path).max_seq_len
        if args.n_depth >= context:
            raise UserError(f"{path}: -d {args.n_depth} and a token need more than the model's context of {context}")
    models: list[Model] = []
    try:
        for path in args.models:
            models.append(Model.load(path, args.backend, args.threads, args.activations))
        lines = measure(models, args)
        settings: dict[str, Any] = {
            "depth": args.n_depth, "rounds": args.repetitions,
            "threads": benchmark.thread_count(models[0], args.threads), "cpu": benchmark.cpu_name(),
            "kernels": models[0].kernels.describe(), "activations": args.activations,
        }  # fmt: skip
    finally:
        for model in models:
            model.close()
    if args.json:
        print(json.dumps(settings | {"lines": [vars(line) for line in lines]}))
    else:
        print("{cpu}; {kernels}; {depth} tokens in the context\n".format(**settings))
        show(lines)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
