"""python -m tools.needle: is a fact found again in a long context, at each depth, with each codec of the KV ring?

A number is told in one sentence at some depth of a long text and asked for at its end. It is retrieved if greedy
decoding would say it. The log-probability of the right answer tells more than that where a model is too small to
retrieve anything, or finds everything.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from runtime.benchmark import thread_count
from runtime.cli import ArgumentParser, UserError, run
from runtime.evaluate import log_softmax
from runtime.model import Model
from runtime.progress import Bar
from runtime.ring.cache import KVRing
from runtime.sizes import kv_bytes_per_token
from runtime.tokenizer import Tokenizer, load_tokenizer
from tools.arguments import add_model_arguments, check_context, positive, positive_list, ring_codecs
from tools.perplexity import read_text

NEEDLE = "The secret number of {place} is {number}."
QUESTION = "Question: What is the secret number of {place}? Answer: The secret number of {place} is"
PLACES = ("Oslo", "Lima", "Cairo", "Delhi", "Paris", "Quebec", "Nairobi", "Sydney")
LONGEST = 40  # words that are taken for one sentence, where a text has no full stops


@dataclass(frozen=True)
class Haystack:
    """A prompt and its answer. depth: share of the filler that stands before the fact"""

    depth: float
    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Cell:
    """What was found. tokens: of the longest prompt; logprob: of the whole answer, mean over `tries` (natural)"""

    ctx: int
    tokens: int
    kv: str
    bytes_per_token: int
    depth: float
    retrieved: int
    tries: int
    logprob: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command to a parser."""
    add_model_arguments(parser, kv=False)
    add = parser.add_argument
    add("-c", "--ctx-size", type=positive_list, default=[1024], metavar="N,...", help="tokens of context (1024)")
    add("--kv", type=ring_codecs, default=["auto"], metavar="CODEC,...",
        help="codecs of keys and values, as in f16,q8,k=q8,v=q4 (auto)")  # fmt: skip
    add("--depth", type=_shares, default=[0.1, 0.5, 0.9], metavar="F,...", help="where the fact stands (0.1,0.5,0.9)")
    add("--repeats", type=positive, default=4, metavar="N", help="different facts at each depth (4)")
    add("-f", "--file", metavar="TEXT", help="text to hide it in, in UTF-8 (default: made-up sentences)")
    add("--json", action="store_true", help="print one JSON object")


def made_up() -> Iterator[str]:
    """Sentences without end, always the same ones."""
    rng = random.Random(1)
    who = ("the old miller", "a young teacher", "the night train", "my neighbour", "the grey cat", "a tired sailor")
    does = ("went past", "looked at", "remembered", "liked", "had never seen", "waited for", "painted", "talked about")
    what = ("the harbour", "a wooden bridge", "the market", "the long road", "an empty garden", "the lighthouse")
    when = ("before dawn", "in the rain", "every winter", "without a word", "after the feast", "for many years")
    while True:
        text = " ".join(rng.choice(words) for words in (who, does, what, when))
        yield f"{text[0].upper()}{text[1:]}."


def sentences_of(text: str) -> Iterator[str]:
    """The sentences of a text, again and again. Raises UserError if there are none."""
    found = []
    for sentence in re.split(r"(?<=[.!?])\s+", text):
        words = sentence.split()
        found += [" ".join(words[i : i + LONGEST]) for i in range(0, len(words), LONGEST)]
    if not found:
        raise UserError("the text to hide the fact in is empty")
    return itertools.cycle(found)


def hide(
    tokenizer: Tokenizer, sentences: Iterator[str], ctx: int, depths: Sequence[float], repeats: int
) -> list[Haystack]:
    """Make prompts that fit a context with their answers; those that begin alike follow each other.

    Raises UserError if the context is too short."""
    longest = max(len(tokenizer.encode(f"{NEEDLE}\n\n{QUESTION}".replace("{place}", place))) for place in PLACES)
    room, filler, counts = ctx - longest - 24, [], [0]  # 24: two numbers, BOS, and a seam or two
    while counts[-1] < room:
        filler.append(next(sentences))
        counts.append(counts[-1] + len(tokenizer.encode(f" {filler[-1]}")))
    count = len(counts) - 2
    if count < 2:
        raise UserError(f"-c {ctx}: the context has no room for the fact, the question and a text between them")
    rng, found = random.Random(2), []
    facts = [(PLACES[i % len(PLACES)], str(rng.randrange(10000, 100000))) for i in range(repeats)]
    for depth in sorted(depths, reverse=True):  # a ring is taken back to where two prompts part
        before = min(range(count + 1), key=lambda i: abs(counts[i] - depth * counts[count]))
        for place, number in facts:
            fact, question = NEEDLE.format(place=place, number=number), QUESTION.format(place=place)
            prompt = f"{' '.join([*filler[:before], fact, *filler[before:count]])}\n\n{question}"
            ids = tokenizer.encode(prompt, add_bos=tokenizer.add_bos)
            whole = tokenizer.encode(f"{prompt} {number}", add_bos=tokenizer.add_bos)
            parted = shared(ids, whole)
            found.append(Haystack(depth, whole[:parted], whole[parted:]))
    return found


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def ask(model: Model, ring: KVRing, read: list[int], hay: Haystack) -> tuple[bool, float]:
    """Whether greedy decoding gives the answer, and the answer's log-probability.

    read: the ids that the ring holds; it is brought up to date"""
    given = hay.prompt + hay.answer[:-1]
    kept = min(shared(read, given), len(hay.prompt) - 1)
    ring.trim(kept)
    if len(hay.prompt) - 1 > kept:
        model.forward(given[kept : len(hay.prompt) - 1], ring, None)
    logits = model.forward(given[len(hay.prompt) - 1 :], ring, "all")
    assert logits is not None
    read[:] = given
    likely = log_softmax(logits)[np.arange(len(hay.answer)), hay.answer]
    return bool((logits.argmax(axis=1) == hay.answer).all()), float(likely.sum())


def measure(model: Model, args: argparse.Namespace) -> list[Cell]:
    """Fill the tables that the arguments ask for: by context, then codec, then depth."""
    tokenizer = load_tokenizer(model.file)
    text = read_text(args.file) if args.file else None
    cells: list[Cell] = []
    with Bar("needle", unit="row") as bar:
        for ctx in args.ctx_size:
            check_context(ctx, model.config, args.model)
            sentences = made_up() if text is None else sentences_of(text)
            hays = hide(tokenizer, sentences, ctx, args.depth, args.repeats)
            for kv in args.kv:
                cells += search(model, hays, ctx, kv)
                bar(len(cells) // len(args.depth), len(args.ctx_size) * len(args.kv), f"{ctx} {kv}")
    return cells


def search(model: Model, hays: Sequence[Haystack], ctx: int, kv: str) -> list[Cell]:
    """Ask for all facts through a ring of one codec; returns a cell for each depth, the least one first."""
    ring = model.new_cache(ctx, kv=kv)
    read: list[int] = []
    found: dict[float, list[tuple[bool, float]]] = {}
    for hay in hays:
        found.setdefault(hay.depth, []).append(ask(model, ring, read, hay))
    tokens = max(len(hay.prompt) for hay in hays)
    nbytes = kv_bytes_per_token(model.config, ring.codec, model.modules)
    return [
        Cell(ctx, tokens, ring.codec, nbytes, depth, sum(right for right, _ in answers), len(answers),
             float(np.mean([logprob for _, logprob in answers])))
        for depth, answers in sorted(found.items())
    ]  # fmt: skip


def show(cells: Sequence[Cell]) -> None:
    """Print a table for each context."""
    for ctx, group in itertools.groupby(cells, key=lambda cell: cell.ctx):
        table = list(group)
        depths = sorted({cell.depth for cell in table})
        print(f"{table[0].tokens} tokens in a context of {ctx}: facts retrieved (log-probability of the answer)\n")
        print("| cache | bytes per token |" + "".join(f" at {depth:.0%} |" for depth in depths))
        print("|---|---|" + "---|" * len(depths))
        for kv, row in itertools.groupby(table, key=lambda cell: (cell.kv, cell.bytes_per_token)):
            print(f"| {kv[0]} | {kv[1]} |"
                  + "".join(f" {c.retrieved} of {c.tries} ({c.logprob:.2f}) |" for c in row))  # fmt: skip
        print()


def command(argv: Sequence[str]) -> int:
    """Parse the arguments, measure, print."""
    parser = ArgumentParser(prog="python -m tools.needle", description="Test whether a fact in a long text is found.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    model = Model.load(args.model, args.backend, args.threads, args.activations)
    try:
        cells = measure(model, args)
        about = {"model": Path(args.model).name, "fingerprint": model.file.fingerprint,
                 "text": Path(args.file).name if args.file else None, "backend": model.kernels.name,
                 "activations": args.activations, "threads": thread_count(model, args.threads)}  # fmt: skip
    finally:
        model.close()
    if args.json:
        print(json.dumps(about | {"cells": [asdict(cell) for cell in cells]}))
    else:
        show(cells)
    return 0


def _shares(text: str) -> list[float]:
    """Read numbers from 0 to 1 with commas between them, for argparse."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers") from None
    if not all(0 <= value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"{text}: depths go from 0 to 1")
    return sorted(set(values))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    return run(command, argv)


if __name__ == "__main__":
    sys.exit(main())
