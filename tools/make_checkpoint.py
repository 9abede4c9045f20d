"""Write a checkpoint of true size with random weights: python -m tools.make_checkpoint --shape llama3.1-8b -o DIR"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from formats.conversion.synthetic import FORMS, KV_FORMS, SHAPES, make_checkpoint
from runtime.cli import ArgumentParser, UserError, run
from runtime.encoder import fast_encoder
from runtime.progress import Bar
from tools.arguments import natural, positive

HELP = "write a Hugging Face folder of true size with random weights, to rehearse a conversion"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this command."""
    parser.add_argument("--shape", choices=tuple(SHAPES), required=True, help="the sizes of the model")
    parser.add_argument("-o", "--out", metavar="DIR", required=True, help="the folder to write; it must not exist")
    form_help = "how the weights are stored (default f16); released-trit4: as float16 values that were trits"
    parser.add_argument("--form", choices=FORMS, default="f16", help=form_help)
    kv_help = "learned KV modules in half of the layers: linear ones for the values, or GELU autoencoders for both"
    parser.add_argument("--kv-modules", choices=KV_FORMS, help=kv_help)
    rank_help = "numbers that linear modules keep of a token's values (half of them)"
    parser.add_argument("--kv-rank", type=positive, metavar="R", help=rank_help)
    parser.add_argument("--layers", type=positive, metavar="N", help="layers, if not as many as the model has")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="other weights for every number (0)")
    parser.add_argument("--tokenizer", metavar="DIR", type=Path, help="a folder whose tokenizer files are copied")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(_main, argv)


def _main(argv: list[str]) -> int:
    parser = ArgumentParser(prog="python -m tools.make_checkpoint", description=HELP)
    add_arguments(parser)
    args = parser.parse_args(argv)
    shape = SHAPES[args.shape]
    width = shape["num_key_value_heads"] * shape["head_dim"]
    if args.kv_rank and args.kv_modules != "v":
        raise UserError("--kv-rank is for --kv-modules v")
    if args.kv_rank and args.kv_rank >= width:
        raise UserError(f"--kv-rank {args.kv_rank}: {args.shape} has {width} values of a token; fewer are expected")
    started, out = time.perf_counter(), Path(args.out)
    with Bar("write") as bar, fast_encoder() as encode:
        make_checkpoint(
            out, args.shape, args.form, args.layers, args.seed, args.tokenizer, args.kv_modules, encode, bar,
            kv_rank=args.kv_rank,
        )  # fmt: skip
    size = sum(path.stat().st_size for path in out.iterdir())
    seconds = time.perf_counter() - started
    print(f"{out}: {args.shape} as {args.form}, {size / 1e9:.2f} GB, {seconds:.1f} s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
