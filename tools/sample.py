"""python -m tools.sample: texts of many kinds that the model writes by itself, to calibrate a conversion with.

A model that was calibrated with one text is better at that kind of text than at others. What it says unasked is a
sample of all that it was trained on: given beside the text (`--calibrate TEXT --calibrate SAMPLE`), it keeps the rest.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from formats.unfinished import unfinished
from runtime import Llama
from runtime.cli import ArgumentParser, UserError, run
from runtime.progress import Bar
from tools.arguments import add_model_arguments, natural, path_name, positive

BLANK = " "  # a model need not have a token that begins a text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to a parser."""
    add_model_arguments(parser, kv=False)
    parser.add_argument("-o", "--out", required=True, type=path_name, metavar="TEXT", help="the file to write")
    parser.add_argument("-n", "--texts", type=positive, default=64, metavar="N", help="how many texts (64)")
    parser.add_argument("--tokens", type=positive, default=256, metavar="N", help="of each text, at most (256)")
    parser.add_argument("--seed", type=natural, default=0, metavar="N", help="of the first text (0)")
    parser.add_argument("--overwrite", action="store_true", help="replace TEXT if it is there")


def texts(llm: Llama, count: int, tokens: int, seed: int) -> Iterator[str]:
    """Have the model write, each text from nothing and with a seed of its own."""
    for i in range(count):
        answer = llm.create_completion(
            BLANK, max_tokens=tokens, seed=seed + i, temperature=1, top_k=0, top_p=1, min_p=0, repeat_penalty=1
        )
        assert isinstance(answer, dict)
        yield answer["choices"][0]["text"]


def command(argv: Sequence[str]) -> int:
    """Parse the arguments, write the texts, one after another with line ends in between."""
    parser = ArgumentParser(prog="python -m tools.sample", description="Texts that a model writes by itself.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    if os.path.exists(args.out) and not args.overwrite:
        raise UserError(f"{args.out}: exists already (--overwrite replaces it)")
    found = []
    llm = Llama(
        args.model, n_ctx=args.tokens + 16, n_threads=args.threads, backend=args.backend, activations=args.activations
    )
    with llm, Bar("sample", unit="text", lines=True) as bar, unfinished(args.out) as temporary:
        for text in texts(llm, args.texts, args.tokens, args.seed):
            found.append(text)
            bar(len(found), args.texts)
        Path(temporary).write_text("\n".join(found), encoding="utf-8")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
