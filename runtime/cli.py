"""What every command shares: an argument parser with one-line errors, and exceptions turned into exit codes.

Exit codes: 0 fine, 2 the user's input was wrong, 1 our fault, 130 Ctrl-C, 141 the reader of our output has
gone, 143 or 129 asked to end. Every failure is one line on stderr; `--debug` shows the traceback instead.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

OUR_PACKAGES = frozenset({"formats", "runtime", "tools", "native"})


class UserError(Exception):
    """The user asked for something that cannot be done; the text is the one line to show."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with a `--debug` option and errors of one line (argparse prints the whole usage)."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        add_debug(self)

    def error(self, message: str) -> NoReturn:
        self.exit(2, one_line(f"error: {message} (see {self.prog} --help)") + "\n")


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Add the option that `run` looks for; ArgumentParser above has it already."""
    parser.add_argument("--debug", action="store_true", help="show the traceback when something fails")


def one_line(text: str) -> str:
    """Fold whitespace, show control characters: names in a hostile file must not drive the terminal."""
    folded = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in folded)


def is_expected(error: BaseException) -> bool:
    """Tell whether an error is about the user's input: each class of our own, OSError, and too little memory."""
    ours = any(cls.__module__.split(".")[0] in OUR_PACKAGES for cls in type(error).__mro__)
    return ours or isinstance(error, (OSError, MemoryError))


def describe(error: BaseException) -> str:
    """Give the one line to show for an error."""
    if isinstance(error, OSError) and error.strerror:
        name = error.filename
        where = f"{os.fsdecode(name)}: " if isinstance(name, (str, bytes, os.PathLike)) else ""
        return one_line(f"{where}{error.strerror}")
    if isinstance(error, MemoryError):
        return one_line(f"out of memory {error}")
    if is_expected(error):
        return one_line(str(error)) or type(error).__name__
    return one_line(f"internal error: {type(error).__name__}: {error} (--debug shows the traceback)")


def run(main_func: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command and turn whatever happens into an exit code.

    main_func: takes the list of arguments, returns the exit code (None is 0); argv: default sys.argv[1:].
    """
    args = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    try:
        with _terminate_as_exit():
            code = main_func(args) or 0
        sys.stdout.flush()
        return code
    except SystemExit as exc:
        return _exit_code(exc)
    except KeyboardInterrupt:
        _say("interrupted")
        return 130
    except BrokenPipeError:
        _silence_stdout()
        return 141
    except Exception as exc:
        if "--debug" in args:
            traceback.print_exc()
        else:
            _say(f"error: {describe(exc)}")
        return 2 if is_expected(exc) else 1


def _open_closed_streams() -> None:
    """Give a process that was started without some standard streams empty ones, before a file gets their numbers."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - kept open


def _exit_code(exc: SystemExit) -> int:
    if exc.code is None:
        return 0
    if isinstance(exc.code, int):
        return exc.code
    _say(f"error: {one_line(str(exc.code))}")
    return 1


def _say(text: str) -> None:
    with suppress(OSError):  # nobody may be left to read it
        print(text, file=sys.stderr, flush=True)


def _silence_stdout() -> None:
    """Point stdout at nothing, or the interpreter complains about the broken pipe once more at exit."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


@contextmanager
def _terminate_as_exit() -> Iterator[None]:
    """Make SIGTERM and SIGHUP an ordinary exit, so that `with` blocks remove their temporary files."""

    def leave(signum: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + signum)

    before: dict[int, Any] = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        with suppress(ValueError, OSError):  # not the main thread
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:  # nohup stays in force
                before[number] = signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
