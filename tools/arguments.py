"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import re
from importlib.util import find_spec

from runtime.cli import UserError
from runtime.config import ModelConfig
from runtime.options import ring_codec
from runtime.sampler import OptionError

BACKENDS = ("auto", "native", "numba", "numpy")
ACTIVATIONS = ("int8", "f32")


def positive(text: str) -> int:
    """Read a whole number of at least 1, for argparse."""
    return _at_least(text, 1)


def natural(text: str) -> int:
    """Read a whole number of at least 0, for argparse."""
    return _at_least(text, 0)


def path_name(text: str) -> str:
    """Read the name of a file or folder, for argparse: an empty one comes from a variable that was never set."""
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return text


def positive_list(text: str) -> list[int]:
    """Read numbers of at least 1 with commas between them, for argparse."""
    return [_at_least(part, 1) for part in text.split(",")]


def natural_list(text: str) -> list[int]:
    """Read numbers of at least 0 with commas between them, for argparse."""
    return [_at_least(part, 0) for part in text.split(",")]


def ring_codecs(text: str) -> list[str]:
    """Read codecs of the ring with commas between them, k=CODEC,v=CODEC among them, for argparse."""
    return [_ring_codec(part) for part in re.split(r",(?!v=)", text)]


def add_model_arguments(parser: argparse.ArgumentParser, threads: bool = True, kv: bool = True) -> None:
    """Add the model and how to run it; without `threads` or `kv` the command defines -t or --kv itself."""
    parser.add_argument("model", metavar="FILE.trit", help="the model")
    add_run_arguments(parser, threads, kv)


def add_run_arguments(parser: argparse.ArgumentParser, threads: bool = True, kv: bool = True) -> None:
    """Add how to run models."""
    if threads:
        parser.add_argument("-t", "--threads", type=positive, metavar="N", help="threads (default: all cores allowed)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="kernels to run on (auto)")
    parser.add_argument("--activations", choices=ACTIVATIONS, default="int8", help="int8: fast (default); f32: exact")
    if kv:
        parser.add_argument(
            "--kv", type=_ring_codec, default="auto", metavar="CODEC",
            help="codec of keys and values: auto, f32, f16, q8, q4, or k=CODEC,v=CODEC",
        )  # fmt: skip


def check_context(ctx: int, config: ModelConfig, path: str) -> None:
    """Raises UserError if -c asks for more tokens than a model was made for: what is measured there means nothing."""
    if ctx > config.max_seq_len:
        raise UserError(f"-c {ctx}: the context of {path} has at most {config.max_seq_len} tokens")


def require_matplotlib() -> None:
    """Raises UserError, before any work, if --plot cannot be honoured."""
    if find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'tritllama[plot]'")


def _ring_codec(text: str) -> str:
    try:
        return ring_codec(text)
    except OptionError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from None


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is less than {least}")
    return value
