"""The console script `trit`: `trit NAME ...` is `python -m tools.NAME ...`, with chat from runtime/."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from formats.version import __version__
from runtime.cli import UserError, run

COMMANDS = {
    "chat": ("runtime.chat.__main__", "talk to a model"),
    "server": ("runtime.server.__main__", "serve a model to OpenAI's clients and to a browser"),
    "convert": ("tools.convert", "make a .trit file from a checkpoint"),
    "export": ("tools.export", "make a Hugging Face folder from a .trit file"),
    "inspect": ("tools.inspect", "show or verify what is in a .trit file"),
    "perplexity": ("tools.perplexity", "measure how well a model predicts a text"),
    "needle": ("tools.needle", "test whether a fact in a long context is found again"),
    "compare": ("tools.compare", "compare files of one model, in a table and a picture"),
    "sample": ("tools.sample", "have a model write texts to calibrate with"),
    "learn_kv": ("tools.learn_kv", "learn a compression of the KV cache"),
    "make_checkpoint": ("tools.make_checkpoint", "write a checkpoint of true size with random weights"),
    "warmup": ("runtime.warmup", "compile and test the kernels now"),
    "bench": ("tools.bench", "measure the speed of a model"),
    "attention": ("tools.attention", "time attention in one layer, deep in a context"),
}
HELP = frozenset({"-h", "--help", "help"})


def usage() -> str:
    """Return the text of `trit --help`."""
    lines = [f"  {name:<16} {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: trit COMMAND [ARGUMENTS]", "", *lines, "", "trit COMMAND --help tells the arguments of one."]
    )


def dispatch(argv: Sequence[str]) -> int:
    """Run the command that the first argument names, with the rest of the arguments."""
    if not argv:
        raise UserError(f"no command given; there are {', '.join(COMMANDS)} (see trit --help)")
    name, *rest = argv
    if name in HELP:
        print(usage())
        return 0
    if name == "--version":
        print(f"tritllama {__version__}")
        return 0
    if name not in COMMANDS:
        raise UserError(f"unknown command {name!r}; there are {', '.join(COMMANDS)} (see trit --help)")
    module = importlib.import_module(COMMANDS[name][0])
    code: int = module.main(rest)
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    return run(dispatch, argv)


if __name__ == "__main__":
    sys.exit(main())
