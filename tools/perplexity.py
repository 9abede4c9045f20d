"""python -m tools.perplexity: how well a model predicts a text, and how far it strays from another model.

The protocol is llama.cpp's (`llama-perplexity -f TEXT -c 512`): whole windows of -c tokens, each from a fresh
context with its first id replaced by BOS where the tokenizer has one, the second half scored. Perplexity of short
windows hides what a long context, or one that slides, does to predictions; --by-position and --stream show that.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from formats.container import open_trit
from formats.version import __version__
from runtime import evaluate
from runtime.benchmark import thread_count
from runtime.cli import ArgumentParser, UserError, run
from runtime.config import ModelConfig
from runtime.model import Model
from runtime.progress import Bar
from runtime.tokenizer import load_tokenizer
from tools.arguments import add_model_arguments, check_context, positive, require_matplotlib
from tools.position_plot import draw_positions

with suppress(ImportError):  # Windows
    import resource


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to a parser."""
    add_model_arguments(parser)
    parser.add_argument("-f", "--file", required=True, metavar="TEXT", help="a text file in UTF-8")
    parser.add_argument("-c", "--ctx-size", type=positive, default=512, metavar="N", help="window (512)")
    parser.add_argument("--chunks", type=positive, metavar="N", help="score only the first N windows")
    parser.add_argument("--kl", metavar="BASE.trit", help="also compare with the predictions of this model")
    parser.add_argument(
        "--stream", action="store_true",
        help="instead of windows, one stream through a ring of -c tokens, as in a long conversation",
    )  # fmt: skip
    parser.add_argument("--stream-windows", type=positive, metavar="N", help="many such streams, of N windows each")
    parser.add_argument("--by-position", action="store_true", help="tell the loss by position in the context or stream")
    parser.add_argument("--plot", metavar="OUT.png", help="draw the loss by position, and the divergence with --kl")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def read_text(path: str) -> str:
    """Read a text file. Raises OSError, or UserError if it is not UTF-8."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as exc:
        byte = exc.object[exc.start]
        raise UserError(f"{path}: not UTF-8 text: byte {exc.start} is 0x{byte:02x}") from exc


def encode(path: str, text: str, ctx: int) -> tuple[list[int], int | None]:
    """Encode a text with the tokenizer of a model, before the model itself is made ready.

    returns: the ids, with BOS where the tokenizer adds one, and the id of that BOS or None
    Raises FormatError, ConfigError, TokenizerError; UserError if the model's context is shorter than ctx."""
    with open_trit(path) as file:
        check_context(ctx, ModelConfig.from_dict(file.config, file.path), path)
        tokenizer = load_tokenizer(file)
        return tokenizer.encode(text, add_bos=tokenizer.add_bos), tokenizer.bos_id if tokenizer.add_bos else None


def encode_alike(path: str, others: Iterable[str], text: str, ctx: int) -> tuple[list[int], int | None]:
    """Encode a text as `encode` does, for models that are compared.

    Raises what `encode` does; UserError if the tokenizer of another gives other ids."""
    found = encode(path, text, ctx)
    for other in others:
        if encode(other, text, ctx) != found:
            raise UserError(f"{other}: its tokenizer gives other ids for this text than that of {path}")
    return found


def load(path: str, args: argparse.Namespace, kv: str) -> Model:
    """Open a model with the options that add_model_arguments defines."""
    return Model.load(path, args.backend, args.threads, args.activations, kv)


def load_both(args: argparse.Namespace) -> tuple[Model, Model | None]:
    """Open the model, and the one that it is compared with."""
    return load(args.model, args, args.kv), load(args.kl, args, "auto") if args.kl else None


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the arguments say and return the object that --json prints."""
    text = read_text(args.file)
    ids, bos_id = encode_alike(args.model, [args.kl] if args.kl else [], text, args.ctx_size)
    if args.stream or args.stream_windows or args.by_position or args.plot:
        return by_position(streams_of(ids, bos_id, args), args)
    windows = evaluate.cut_windows(ids, args.ctx_size, bos_id, args.chunks)
    model, base = load_both(args)
    with Bar("perplexity", unit="window") as bar:
        result = evaluate.perplexity(model, windows, base, bar)
    return describe(model, args) | {
        "ppl": result.ppl, "stderr": result.stderr, "tokens": result.tokens, "windows": result.windows,
    } | compared(result.kl, args)  # fmt: skip


def describe(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """Tell what was measured on what, so that the figures can be repeated."""
    return {
        "model": Path(args.model).name, "fingerprint": model.file.fingerprint, "text": Path(args.file).name,
        "ctx": args.ctx_size, "activations": args.activations, "kv": model.new_cache(2).codec,
        "backend": model.kernels.name, "threads": thread_count(model, args.threads), "version": __version__,
    }  # fmt: skip


def compared(kl: evaluate.Divergence | None, args: argparse.Namespace) -> dict[str, Any]:
    """What is told of the comparison with another model, if there was one."""
    if kl is None:
        return {}
    return {
        "base": Path(args.kl).name, "base_ppl": kl.base_ppl, "kl_mean": kl.mean, "kl_stderr": kl.stderr,
        "kl_median": kl.median, "kl_p999": kl.p999, "kl_max": kl.maximum, "same_top1": kl.same_top1,
    }  # fmt: skip


def streams_of(ids: list[int], bos_id: int | None, args: argparse.Namespace) -> list[evaluate.Ids]:
    """Cut ids into what is read from an empty context each: windows, streams of several windows, or one stream."""
    ctx = args.ctx_size
    if not args.stream and not args.stream_windows:
        return evaluate.cut_windows(ids, ctx, bos_id, args.chunks)
    usable = min(len(ids), args.chunks * ctx) if args.chunks else len(ids)
    length = args.stream_windows * ctx if args.stream_windows else usable
    if usable < max(length, 2 * ctx):
        raise UserError(f"the text has {usable} tokens; these streams take {max(length, 2 * ctx)} at least")
    streams = np.array(ids[: usable // length * length], np.int64).reshape(-1, length)
    if bos_id is not None:
        streams[:, 0] = bos_id
    return list(streams)


def by_position(streams: list[evaluate.Ids], args: argparse.Namespace) -> dict[str, Any]:
    """Measure the loss by position: within windows, or before and after the ring of -c tokens has wrapped."""
    ctx, half, count = args.ctx_size, args.ctx_size // 2, len(streams)
    model, base = load_both(args)
    memory: list[tuple[int, int]] = []
    with Bar("perplexity", unit="token") as bar:

        def note(done: int, total: int, what: str) -> None:
            bar(done, total, what)
            if (size := resident_bytes()) is not None:
                memory.append((done, size))

        scores = evaluate.stream_scores(model, streams, ctx, base, note)
    scored = scores.at(count, half)
    ppl, stderr = evaluate.mean_perplexity(scored.losses)
    found = describe(model, args) | {"ppl": ppl, "stderr": stderr, "tokens": len(scored.losses), "streams": count}
    wraps = len(streams[0]) > ctx
    for name, first, stop in (("before_wrap", half, ctx), ("after_wrap", ctx, None)) if wraps else ():
        part = evaluate.mean_perplexity(scores.at(count, first, stop).losses)
        found[name] = dict(zip(("ppl", "stderr"), part, strict=True))
    width = max(1, ctx // 8) if args.by_position or args.plot else half
    found["by_position"] = [
        position(scores.at(count, start, start + width), start)
        for start in range(0, len(streams[0]) - max(1, width // 2), width)
    ]
    if memory:
        found["resident"] = [[done, size] for done, size in memory]
    return found | compared(evaluate.divergence(scored) if base else None, args)


def position(part: evaluate.Scores, start: int) -> dict[str, float]:
    """What is told of the tokens after position `start`."""
    ppl, stderr = evaluate.mean_perplexity(part.losses)
    found = {"from": start, "ppl": ppl, "stderr": stderr}
    if len(part.kl):
        found |= {"kl_mean": float(part.kl.mean()), "kl_stderr": float(part.kl.std()) / len(part.kl) ** 0.5}
    return found


def resident_bytes() -> int | None:
    """Memory that the process takes right now; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except (OSError, NameError):
        return None


def show(found: dict[str, Any]) -> None:
    """Print a result for people."""
    ctx, streams = found["ctx"], found.get("streams")
    where = f"in {found['windows']} windows of {ctx}" if "windows" in found else f"in {streams} streams"
    print(f"perplexity {found['ppl']:.4f} ± {found['stderr']:.4f} ({found['tokens']} tokens {where})")
    for key, name in (("before_wrap", "before the ring wraps"), ("after_wrap", "after the ring has wrapped")):
        if key in found:
            print(f"  {name}: {found[key]['ppl']:.4f} ± {found[key]['stderr']:.4f}")
    for part in found.get("by_position", ()):
        kl = f", KL {part['kl_mean']:.5f} ± {part['kl_stderr']:.5f}" if "kl_mean" in part else ""
        print(f"  from token {part['from']}: {part['ppl']:.4f} ± {part['stderr']:.4f}{kl}")
    if later := [size for done, size in found.get("resident", ()) if done >= ctx]:
        print(f"  resident memory: {later[0] / 1e6:.1f} MB with a full ring, {later[-1] / 1e6:.1f} MB at the end, "
              f"{max(later) / 1e6:.1f} MB at most")  # fmt: skip
    if "kl_mean" in found:
        print(f"against {found['base']} (perplexity {found['base_ppl']:.4f}):")
        print(f"  KL divergence {found['kl_mean']:.6f} ± {found['kl_stderr']:.6f}, "
              f"median {found['kl_median']:.6f}, 99.9 % {found['kl_p999']:.6f}, "
              f"largest {found['kl_max']:.6f}")  # fmt: skip
        print(f"  same top token {100 * found['same_top1']:.2f} %")


def command(argv: Sequence[str]) -> int:
    """Parse the arguments, measure, print."""
    parser = ArgumentParser(prog="python -m tools.perplexity", description="Measure how well a model predicts a text.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if args.plot:
        require_matplotlib()
    found = measure(args)
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    if args.plot:
        draw_positions(found, args.plot)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
