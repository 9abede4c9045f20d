"""The options of every command that runs a model: which one, and how."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from formats.version import __version__

from .cli import UserError
from .options import DEFAULT_N_BATCH, check_arguments

if TYPE_CHECKING:
    from .llama import Llama


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add MODEL.trit, -m and --version."""
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL.trit", help="the model (default: a demo model, fetched once)")
    add("-m", "--model", dest="model_option", metavar="MODEL.trit", help="the model, as an option")
    add("--version", action="version", version=f"tritllama {__version__}")


def add_chat_format(group: argparse._ActionsContainer) -> None:
    """Add --chat-format and --jinja."""
    group.add_argument("--chat-format", metavar="NAME", help="llama3, chatml or llama2 instead of the model's own")
    group.add_argument("--jinja", action="store_true", help="run the model's own chat template, in a sandbox")


def add_running(parser: argparse.ArgumentParser) -> None:
    """Add how a model is run: context, threads, cache, backend."""
    group = parser.add_argument_group("how it is run")
    add = group.add_argument
    add("-c", "--ctx-size", dest="n_ctx", type=int, metavar="N",
        help="tokens of context (the model's, up to 4096)")  # fmt: skip
    add("-b", "--batch-size", dest="n_batch", type=int, default=DEFAULT_N_BATCH, metavar="N",
        help="prompt tokens read in one step (256)")  # fmt: skip
    add("-t", "--threads", dest="n_threads", type=int, metavar="N", help="threads (all cores allowed)")
    add("-tb", "--threads-batch", dest="n_threads_batch", type=int, metavar="N",
        help="threads for reading prompts (those of -t)")  # fmt: skip
    add("--keep", type=int, metavar="N",
        help="first tokens that stay when the context is full (the system prompt)")  # fmt: skip
    add("--kv", default="auto", metavar="CODEC",
        help="codec of keys and values: auto, f32, f16, q8, q4, or k=CODEC,v=CODEC")  # fmt: skip
    add("--force", action="store_true", help="run though it takes more memory than there is")
    add("--backend", choices=("auto", "native", "numba", "numpy"), default="auto", help="kernels to run on")
    add("--activations", choices=("int8", "f32"), default="int8", help="int8: fast; f32: exact")


def check_model_arguments(args: argparse.Namespace) -> None:
    """Find wrong options before anything is loaded. Raises OptionError or UserError."""
    check_arguments(n_ctx=args.n_ctx, n_batch=args.n_batch, n_threads=args.n_threads,
                    n_threads_batch=args.n_threads_batch, keep=args.keep,
                    kv=args.kv, seed=args.seed)  # fmt: skip
    if args.model is not None and args.model_option is not None:
        raise UserError("the model is named twice, as an argument and with -m")
    if args.jinja and args.chat_format:
        raise UserError("--jinja runs the model's own template: leave out --chat-format")


def load_model(args: argparse.Namespace) -> Llama:
    """Open the model that the options name, or the demo model."""
    from .llama import Llama

    path = args.model if args.model is not None else args.model_option
    if path is None:
        from .demo import demo_model

        path = demo_model()
    return Llama(
        path, n_ctx=args.n_ctx, n_batch=args.n_batch, n_threads=args.n_threads,
        n_threads_batch=args.n_threads_batch, backend=args.backend, kv=args.kv, seed=args.seed,
        activations=args.activations, chat_format=args.chat_format, jinja=args.jinja, keep=args.keep, force=args.force,
    )  # fmt: skip
