"""python -m tools.learn_kv: learn a compression of a model's KV cache from a text, and write it into a .trit file.

One pass over the text gathers covariances; encoders and decoders follow from them in closed form, weighing errors by
what reads them: of values, the output projection behind attention; of keys, the queries. Layers and ranks are chosen
by the divergence that each layer's compression causes. All other tensors are carried over byte for byte.

The means and the balance of the keys are written too: with them, keys are rounded better where they are stored as q4.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formats.codecs import CODECS
from formats.container import TritFile, dequantize
from formats.kv_modules import FEATURE, KEY_BALANCE, KEY_MEAN, KVModule
from formats.writer import TritWriter
from runtime import evaluate
from runtime.cli import ArgumentParser, UserError, run
from runtime.model import Model
from runtime.progress import Bar
from runtime.ring.codecs import Plane, code_codec, side_codecs
from runtime.sizes import kv_bytes_per_token
from runtime.tokenizer import load_tokenizer
from tools import kv_fit
from tools.arguments import add_model_arguments, check_context, positive
from tools.kv_statistics import LayerMoments, collect
from tools.kv_trial import CODEC, Ids, Judge, Learned, install
from tools.perplexity import read_text

Fits = dict[int, kv_fit.Fit]  # by layer

HELD_OUT = 8  # windows that no covariance is taken from, at most
TRIED = 2  # of them, those that single layers are tried on
MIN_WINDOWS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to a parser."""
    add_model_arguments(parser)
    # Where activations are rounded to int8, any change of an early layer, however small, stirs up all later ones.
    parser.set_defaults(activations="f32", kv="f16")
    add = parser.add_argument
    add("-f", "--file", required=True, nargs="+", metavar="TEXT",
        help="texts to learn from, in UTF-8, the more kinds the better; some of each is held out")  # fmt: skip
    add("-o", "--output", required=True, metavar="OUT.trit", help="the file to write")
    add("--overwrite", action="store_true", help="replace OUT.trit if it exists")
    add("--side", choices=("v", "k", "none"), default="v",
        help="compress values (default) or keys; none: learn only what q4 wants to know of keys")  # fmt: skip
    add("--ratio", type=_share, metavar="F", help="share of the side's numbers to keep, over all layers (0.75)")
    add("--rank", type=positive, metavar="R", help="numbers to keep of each layer, instead of a rank for each layer")
    add("--layers", metavar="N", help="compress the N layers that bear it best, or these: 3,5,8-11")
    add("--max-ppl-increase", type=_share, metavar="F",
        help="keep as little as raises the held-out perplexity by F at most (0.03 is 3 %%)")  # fmt: skip
    add("--tokens", type=positive, default=32768, metavar="N", help="tokens to learn from, spread over TEXT (32768)")
    add("-c", "--ctx-size", type=positive, default=512, metavar="N", help="window that the text is read in (512)")
    add("--json", action="store_true", help="print one JSON object")


@dataclass
class Task:
    """What the arguments ask for, once the model is known. step: what ranks are multiples of"""

    model: Model
    side: str
    width: int
    step: int
    layers: list[int] | int | None
    rank: int | None
    kv: str

    def learned(self, fits: Fits, ranks: dict[int, int]) -> list[Learned]:
        """The modules of these layers and ranks."""
        rope = "after" if self.side == "k" else None
        return [
            Learned(KVModule(layer, self.side, rank, rope=rope, biases=("decoder",)), fits[layer].parts(rank))
            for layer, rank in ranks.items()
        ]


def fit_layer(task: Task, layer: int, moments: LayerMoments) -> kv_fit.Fit:
    """Fit one layer's keys or values, as queries or the output projection see them."""
    config = task.model.config
    metric = np.zeros((task.width, task.width))
    if task.side == "k":
        for head, queries in enumerate(moments.queries):
            rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            metric[rows, rows] = queries.second
        return kv_fit.fit(moments.keys.covariance, metric, moments.keys.mean)
    wo = dequantize(task.model.file.tensors[f"layers.{layer}.wo"]).astype(np.float64)
    of_heads = wo.reshape(len(wo), config.n_kv_heads, -1, config.head_dim)
    # Query heads attend neither to the same tokens nor to quite different ones: half of their errors add up.
    together = of_heads.sum(axis=2).reshape(len(wo), -1)
    metric += together.T @ together / 2
    for head in range(config.n_kv_heads):
        rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
        apart = of_heads[:, head].reshape(-1, config.head_dim)
        metric[rows, rows] += apart.T @ apart / 2
    return kv_fit.fit(moments.values.covariance, metric, moments.values.mean)


def choose(task: Task, fits: Fits, damage: dict[int, float], tried: int, kept: float) -> dict[int, int]:
    """Choose layers and ranks so that `kept` of all numbers remain. damage: of each layer alone, at rank `tried`"""
    layers = sorted(damage)
    if isinstance(task.layers, int):
        layers = kv_fit.cheapest(damage, task.layers)
    numbers = round((1 - kept) * len(task.model.layers) * task.width)
    if task.rank is None:
        some = {layer: (fits[layer], tried, damage[layer]) for layer in layers}
        return kv_fit.plan(some, task.width, task.step, numbers)
    count = len(layers) if task.layers is not None else numbers // (task.width - task.rank)
    return dict.fromkeys(kv_fit.cheapest({layer: damage[layer] for layer in layers}, count), task.rank)


def within(
    task: Task, judge: Judge, fits: Fits, damage: dict[int, float], tried: int, most: float, bar: Bar
) -> dict[int, int]:
    """Choose layers and ranks that raise the perplexity by `most` at most: by halving what may be kept."""
    low, high, found = 0.0, 1.0, {}
    for _ in range(6):
        middle = (low + high) / 2
        ranks = choose(task, fits, damage, tried, middle)
        if judge.increase(task.learned(fits, ranks), bar) <= most:
            high, found = middle, ranks
        else:
            low = middle
    if not found:
        raise UserError(f"no compression that was tried raises the perplexity by {most:.1%} or less")
    return found


def learn(task: Task, learning: Sequence[Ids], held_out: Sequence[Ids], args: argparse.Namespace) -> dict[str, Any]:
    """Do what the arguments say on a loaded model; returns what is told, with the modules under "learned"."""
    with Bar("reading", unit="window", lines=True) as bar:
        moments = collect(task.model, learning, bar)
    facts = {f"layers.{i}{KEY_MEAN}": one.keys.mean.astype(np.float32) for i, one in enumerate(moments)}
    facts |= {f"layers.{i}{KEY_BALANCE}": one.balance for i, one in enumerate(moments)}
    if task.side == "none":
        return {"side": "none", "layers": [], "ppl_increase": 0.0, "learned": [], "facts": facts}
    layers = task.layers if isinstance(task.layers, list) else range(len(task.model.layers))
    fits = {layer: fit_layer(task, layer, moments[layer]) for layer in layers}
    del moments
    tried = task.rank or max(task.step, task.width // 2 // task.step * task.step)
    judge = Judge(task.model, held_out, TRIED, task.kv)
    trials = {layer: task.learned(fits, {layer: tried})[0] for layer in layers}
    with Bar("trying layers", unit="layer", lines=True) as bar:
        damage = judge.damage(trials, bar)
    with Bar("choosing", unit="window", lines=True) as bar:
        if args.max_ppl_increase is not None:
            ranks = within(task, judge, fits, damage, tried, args.max_ppl_increase, bar)
        else:
            ranks = choose(task, fits, damage, tried, 0.75 if args.ratio is None else args.ratio)
        if not ranks:
            raise UserError("no layer can be compressed so little: keep less (--ratio), or name --layers")
        learned = task.learned(fits, ranks)
        increase = judge.increase(learned, bar)
    install(task.model, [])
    rows = [
        {"layer": layer, "rank": rank, "kept": 1 - float(fits[layer].lost[rank]), "kl_alone": damage[layer],
         "rank_alone": tried}
        for layer, rank in ranks.items()
    ]  # fmt: skip
    return {"side": task.side, "layers": rows, "ppl_increase": increase, "learned": learned, "facts": facts}


def write(
    file: TritFile, learned: Sequence[Learned], facts: Mapping[str, kv_fit.Floats], path: str, overwrite: bool
) -> None:
    """Write a model with these modules and facts of keys; its other tensors are carried over byte for byte."""
    ordered = sorted(learned, key=lambda one: (one.module.layer, one.module.side))
    tensors = {name: entry for one in ordered for name, entry in one.tensors().items()}
    tensors |= {name: (values.shape, *CODECS[CODEC].quantize(values)) for name, values in facts.items()}
    header = {key: value for key, value in file.header.items() if key != "tensors"}
    if ordered:
        header |= {FEATURE: [one.module.to_dict() for one in ordered], "requires": [FEATURE]}
    carried = [t for t in file.tensors.values() if t.name not in tensors]
    with TritWriter(path, header, [*(t.name for t in carried), *tensors], overwrite) as writer, Bar("writing") as bar:
        done, total = 0, sum(t.nbytes for t in carried)
        for t in carried:
            writer.add(t.name, t.codec, t.shape, t.params, t.parts)
            done += t.nbytes
            bar(done, total, t.name)
        for name, (shape, params, parts) in tensors.items():
            writer.add(name, CODEC, shape, params, parts)


def windows_of(model: Model, args: argparse.Namespace) -> tuple[list[Ids], list[Ids]]:
    """Cut the texts into windows to learn from and windows held out, both spread over all of them."""
    tokenizer = load_tokenizer(model.file)
    windows: list[Ids] = []
    for path in args.file:
        ids = tokenizer.encode(read_text(path), add_bos=tokenizer.add_bos)
        if len(ids) < MIN_WINDOWS * args.ctx_size:
            least = MIN_WINDOWS * args.ctx_size
            raise UserError(f"{path}: the text has {len(ids)} tokens; it takes {least} at least")
        windows += evaluate.cut_windows(ids, args.ctx_size, tokenizer.bos_id if tokenizer.add_bos else None)
    count = min(len(windows), max(MIN_WINDOWS, args.tokens // args.ctx_size))
    windows = [windows[i] for i in np.linspace(0, len(windows) - 1, count).astype(int)]
    held_out = {int(i) for i in np.linspace(1, count - 2, min(HELD_OUT, count // 3))}
    return [w for i, w in enumerate(windows) if i not in held_out], [windows[i] for i in sorted(held_out)]


def check(args: argparse.Namespace, model: Model) -> Task:
    """Hold the arguments to the model. Raises UserError."""
    config = model.config
    width = config.n_kv_heads * config.head_dim
    check_context(args.ctx_size, config, args.model)
    if model.modules:
        raise UserError(f"{args.model}: has learned projections already; learn from the file that it was made of")
    if args.rank is not None and args.rank >= width:
        raise UserError(f"--rank {args.rank}: a layer has {width} numbers; keep fewer")
    if args.max_ppl_increase is not None and args.ratio is not None:
        raise UserError("--ratio and --max-ppl-increase are two budgets: leave one out")
    if Path(args.output).exists() and not args.overwrite:
        raise UserError(f"{args.output} exists already; choose another name, or --overwrite")
    try:
        layers = None if args.layers is None else kv_fit.parse_layers(args.layers, config.n_layers)
    except ValueError as exc:
        raise UserError(f"--layers {args.layers}: give a number, or layers as in 3,5,8-11 ({exc})") from exc
    codec = side_codecs(model.new_cache(2).codec)[0 if args.side == "k" else 1]
    group = Plane(args.side, code_codec(codec, width // 2), 1, width // 2, 1).group
    step = min(group, 64, max(1, width // 8))  # codes are stored in whole groups
    return Task(model, args.side, width, step, layers, args.rank, args.kv)


def show(found: dict[str, Any]) -> None:
    """Print a result for people."""
    if not found["layers"]:
        print(f"{found['output']}: tells of its keys what --kv q4 rounds them better with")
        return
    print("| layer | rank | variance kept | KL alone | bytes per token |")
    print("|---|---|---|---|---|")
    for row in found["layers"]:
        print(f"| {row['layer']} | {row['rank']} of {found['width']} | {row['kept']:.2%} | {row['kl_alone']:.5f}"
              f" (rank {row['rank_alone']}) | {row['bytes']} |")  # fmt: skip
    before, after = found["bytes_per_token"]
    print(f"{found['side']} of {len(found['layers'])} layers: perplexity {found['ppl_increase']:+.2%} on held-out text,"
          f" {before} -> {after} bytes per token ({found['kv']})")  # fmt: skip


def command(argv: Sequence[str]) -> int:
    """Parse the arguments, learn, write, print."""
    parser = ArgumentParser(prog="python -m tools.learn_kv", description="Learn to compress a model's KV cache.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    model = Model.load(args.model, args.backend, args.threads, args.activations, args.kv)
    try:
        task = check(args, model)
        found = learn(task, *windows_of(model, args), args)
        learned = found.pop("learned")
        write(model.file, learned, found.pop("facts"), args.output, args.overwrite)
        codec, modules = model.new_cache(2).codec, [one.module for one in learned]
        sizes = [kv_bytes_per_token(model.config, codec, some) for some in ([], modules)]
        of_side = side_codecs(codec)[0 if task.side == "k" else 1]
        for row in found["layers"]:
            plane = Plane(task.side, code_codec(of_side, row["rank"]), 1, row["rank"], 1)
            row["bytes"] = plane.code_bytes + plane.scale_bytes
        found |= {"width": task.width, "kv": codec, "bytes_per_token": sizes, "output": args.output}
    finally:
        model.close()
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0


def _share(text: str) -> float:
    """Read a number between 0 and 1, for argparse."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
