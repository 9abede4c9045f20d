"""python -m tools.perplexity: how well a model predicts a text, and how far it strays from another model.

The protocol is llama.cpp's (`llama-perplexity -f TEXT -c 512`): whole windows of -c tokens, each from a fresh
context with its first id replaced by BOS where the tokenizer has one, the second half scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from formats.container import open_trit
from formats.version import __version__
from runtime import evaluate
from runtime.benchmark import thread_count
from runtime.cli import ArgumentParser, UserError, run
from runtime.config import ModelConfig
from runtime.model import Model
from runtime.progress import Bar
from runtime.tokenizer import load_tokenizer
from tools.arguments import add_model_arguments, positive


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
        longest = ModelConfig.from_dict(file.config, file.path).max_seq_len
        if ctx > longest:
            raise UserError(f"-c {ctx}: the context of {path} has at most {longest} tokens")
        tokenizer = load_tokenizer(file)
        return tokenizer.encode(text, add_bos=tokenizer.add_bos), tokenizer.bos_id if tokenizer.add_bos else None


def load(path: str, args: argparse.Namespace, kv: str) -> Model:
    """Open a model with the options that add_model_arguments defines."""
    return Model.load(path, args.backend, args.threads, args.activations, kv)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Do what the arguments say and return the object that --json prints."""
    text = read_text(args.file)
    ids, bos_id = encode(args.model, text, args.ctx_size)
    if args.stream:
        return stream(ids, args)
    windows = evaluate.cut_windows(ids, args.ctx_size, bos_id, args.chunks)
    if args.kl and encode(args.kl, text, args.ctx_size) != (ids, bos_id):
        raise UserError(f"{args.kl}: its tokenizer gives other ids for this text; the two cannot be compared")
    model = load(args.model, args, args.kv)
    base = load(args.kl, args, "auto") if args.kl else None
    with Bar("perplexity", unit="window") as bar:
        result = evaluate.perplexity(model, windows, base, bar)
    found = describe(model, args) | {
        "ppl": result.ppl, "stderr": result.stderr, "tokens": result.tokens, "windows": result.windows,
    }  # fmt: skip
    if result.kl is not None:
        kl = result.kl
        found |= {
            "base": Path(args.kl).name, "base_ppl": kl.base_ppl, "kl_mean": kl.mean, "kl_stderr": kl.stderr,
            "kl_median": kl.median, "kl_p999": kl.p999, "kl_max": kl.maximum, "same_top1": kl.same_top1,
        }  # fmt: skip
    return found


def describe(model: Model, args: argparse.Namespace) -> dict[str, Any]:
    """Tell what was measured on what, so that the figures can be repeated."""
    return {
        "model": Path(args.model).name, "fingerprint": model.file.fingerprint, "text": Path(args.file).name,
        "ctx": args.ctx_size, "activations": args.activations, "kv": model.new_cache(2).codec,
        "backend": model.kernels.name, "threads": thread_count(model, args.threads), "version": __version__,
    }  # fmt: skip


def stream(ids: list[int], args: argparse.Namespace) -> dict[str, Any]:
    """Measure the loss before and after the ring of -c tokens has wrapped."""
    if args.kl:
        raise UserError("--stream and --kl cannot be combined")
    ids = ids[: args.chunks * args.ctx_size] if args.chunks else ids
    if len(ids) < 2 * args.ctx_size:
        raise UserError(f"the text has {len(ids)} tokens; --stream takes twice the context at least")
    model = load(args.model, args, args.kv)
    with Bar("perplexity", unit="token") as bar:
        losses = evaluate.stream_losses(model, ids, args.ctx_size, bar)
    half = args.ctx_size // 2
    ppl, stderr = evaluate.mean_perplexity(losses[half:])
    before, before_stderr = evaluate.mean_perplexity(losses[half : args.ctx_size])
    after, after_stderr = evaluate.mean_perplexity(losses[args.ctx_size :])
    return describe(model, args) | {
        "ppl": ppl, "stderr": stderr, "tokens": len(losses) - half,
        "before_wrap": {"ppl": before, "stderr": before_stderr},
        "after_wrap": {"ppl": after, "stderr": after_stderr},
        "by_position": [
            dict(zip(("from", "ppl", "stderr"), (start, *evaluate.mean_perplexity(losses[start : start + half])),
                     strict=True))
            for start in range(0, len(losses) - half + 1, half)
        ],
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    """Print a result for people."""
    where = f"in {found['windows']} windows of {found['ctx']}" if "windows" in found else "in one stream"
    print(f"perplexity {found['ppl']:.4f} ± {found['stderr']:.4f} ({found['tokens']} tokens {where})")
    for key, name in (("before_wrap", "before the ring wraps"), ("after_wrap", "after the ring has wrapped")):
        if key in found:
            print(f"  {name}: {found[key]['ppl']:.4f} ± {found[key]['stderr']:.4f}")
    for part in found.get("by_position", ()):
        print(f"  from token {part['from']}: {part['ppl']:.4f} ± {part['stderr']:.4f}")
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
    found = measure(args)
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
