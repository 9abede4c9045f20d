"""Serve a model to OpenAI's clients and to a browser: `python -m runtime.server MODEL.trit`."""

from __future__ import annotations

import argparse
import logging
import os
import socket
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..budget import gigabytes, machine_memory
from ..cli import ArgumentParser, UserError, run
from ..model_arguments import add_chat_format, add_model, add_running, check_model_arguments, load_model

if TYPE_CHECKING:
    from ..llama import Llama

KEY_VARIABLE = "TRIT_API_KEY"
SHUTDOWN_SECONDS = 10
MOST_CONNECTIONS = 512
LONGEST_HEADERS = 1 << 15
MISSING = "the server needs the package {}, which is not there; install it with: pip install 'tritllama[server]'"


def setup_arg_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    parser = ArgumentParser(prog="python -m runtime.server", description="Serve a model.", allow_abbrev=False)
    add_model(parser)

    group = parser.add_argument_group("where and to whom")
    add = group.add_argument
    add("--host", default="127.0.0.1", metavar="ADDRESS",
        help="address to bind to; others than this machine's own need an API key (127.0.0.1)")  # fmt: skip
    add("--port", type=int, default=8080, metavar="N", help="port, 0 takes a free one (8080)")
    add("--api-key", metavar="KEY", help=f"key that clients must send; the variable {KEY_VARIABLE} hides it better")
    add("--api-key-file", metavar="FILE", help="read the key from the first line of a file")
    add("--allowed-host", action="append", default=[], metavar="NAME", help="name that the server goes by, repeatable")
    add("--cors-origin", action="append", default=[], metavar="ORIGIN",
        help="site whose pages may ask, as https://example.org; repeatable")  # fmt: skip

    group = parser.add_argument_group("what is served")
    add = group.add_argument
    add("-np", "--parallel", type=int, default=4, metavar="N", help="answers made at a time, each in a context (4)")
    add("--queue", type=int, default=32, metavar="N", help="requests that may wait, the next gets a 503 (32)")
    add("--timeout", type=float, default=600, metavar="S", help="seconds that a request may take (600)")
    add("--max-body", type=int, default=8 << 20, metavar="BYTES", help="largest request (8388608)")
    add("-a", "--alias", metavar="NAME", help="the model's name in the API (its file's name)")
    add("-s", "--seed", type=int, metavar="N", help="seed of requests that name none (drawn each time)")
    add_chat_format(group)
    add_running(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(_main, argv)


def _main(argv: list[str]) -> int:
    args = setup_arg_parser().parse_args(argv)
    check_model_arguments(args)
    _check(args)
    key = _api_key(args)
    _check_extra()
    from .app import Settings, make_app
    from .connection import Server
    from .guard import is_loopback

    if key is None and not is_loopback(args.host):
        raise UserError(
            f"{args.host} can be reached from other machines: give an API key (--api-key-file, or the variable "
            f"{KEY_VARIABLE}), or bind to 127.0.0.1"
        )
    settings = Settings(
        parallel=args.parallel, queue=args.queue, seconds=args.timeout, largest_body=args.max_body, api_key=key,
        alias=args.alias, hosts=[*args.allowed_host, args.host], origins=args.cors_origin,
    )  # fmt: skip
    _log_to_stderr()
    with _bind(args.host, args.port) as bound:
        llm = load_model(args)
        _check_memory(llm, args.parallel, args.force)
        app = make_app(llm, settings)
        limits = {"limit_concurrency": MOST_CONNECTIONS, "h11_max_incomplete_event_size": LONGEST_HEADERS}
        server = Server(app, SHUTDOWN_SECONDS, **limits)
        bound.listen(MOST_CONNECTIONS)  # who reads the next line may connect at once
        host, port = bound.getsockname()[:2]
        print(f"model: {app.state.name}, {llm.model.kernels.describe()}", file=sys.stderr)
        needed = gigabytes(llm.memory.total + (args.parallel - 1) * llm.memory.cache)
        print(f"{args.parallel} contexts of {llm.n_ctx} tokens ({llm.cache_codec}), {needed} in all", file=sys.stderr)
        print(f"listening on http://{f'[{host}]' if ':' in host else host}:{port}", file=sys.stderr, flush=True)
        server.run(sockets=[bound])
    return 0


def _check_extra() -> None:
    """Raise UserError if a package that only the server needs is not there."""
    for name in ("prometheus_client", "starlette", "uvicorn"):
        try:
            import_module(name)
        except ImportError as exc:
            raise UserError(MISSING.format(name)) from exc


def _check(args: argparse.Namespace) -> None:
    """Find wrong options before anything is loaded. Raises UserError."""
    for name, value, low, high in (
        ("--port", args.port, 0, 65535), ("--parallel", args.parallel, 1, 64), ("--queue", args.queue, 0, 10000),
        ("--timeout", args.timeout, 0.1, 1e6), ("--max-body", args.max_body, 1, 1 << 30),
    ):  # fmt: skip
        if not low <= value <= high:
            raise UserError(f"{name} must be from {low} to {high}, got {value}")
    for origin in args.cors_origin:
        if origin == "*" or "://" not in origin:
            raise UserError(f"--cors-origin must name one site, as https://example.org, got {origin}")


def _check_memory(llm: Llama, parallel: int, force: bool) -> None:
    """Refuse more contexts than the machine's memory holds once all are full. Raises UserError."""
    needed, total = llm.memory.total + (parallel - 1) * llm.memory.cache, machine_memory()[0]
    if total is not None and needed > total and not force:
        llm.close()
        raise UserError(
            f"{parallel} contexts take {gigabytes(needed)} with the model, but there are {gigabytes(total)} of memory; "
            "take fewer (--parallel) or smaller ones (-c, --kv), or force it (--force)"
        )


def _api_key(args: argparse.Namespace) -> str | None:
    """Return the key from where it was given. Raises UserError for one that cannot be sent."""
    given = [args.api_key, os.environ.get(KEY_VARIABLE) if args.api_key_file is None else None]
    if args.api_key_file is not None:
        if args.api_key is not None:
            raise UserError("--api-key and --api-key-file both give the key: leave one out")
        given = [(Path(args.api_key_file).read_text(encoding="utf-8").splitlines() or [""])[0].strip()]
    key = next((value for value in given if value is not None), None)
    if key is not None and (len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key):
        raise UserError("an API key is 8 or more printable ASCII characters without spaces")
    return key


def _bind(host: str, port: int) -> socket.socket:
    """Bind before the model is loaded, so that a port in use is told at once; it listens later."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except OSError as exc:
        raise UserError(f"--host {host} --port {port}: {exc.strerror or exc}") from exc
    return bound


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    for name in ("tritllama", "uvicorn.error"):
        logging.getLogger(name).addHandler(handler)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # not a line for each request that is no HTTP


if __name__ == "__main__":
    sys.exit(main())
