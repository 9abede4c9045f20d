"""Talk to a model at a terminal, or have one prompt answered: `python -m runtime.chat`.

stdout carries only generated text, or one JSON object with --json; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from formats.unfinished import check_writable

from ..cli import ArgumentParser, UserError, run
from ..generate import Run
from ..llama import Llama
from ..messages.conversation import Conversation
from ..model_arguments import add_chat_format, add_model, add_running, check_model_arguments, load_model
from ..openai_shapes import finished
from ..options import check_max_tokens, check_stop
from ..sampler import SamplingOptions
from ..window import POLICIES
from .console import Console, about_model, memory, stats_line
from .repl import Repl

# Our names of the options that shape sampling, and those of the command line
SAMPLING: dict[str, tuple[tuple[str, ...], Any, str]] = {
    "temperature": (("--temp", "--temperature"), float, "0 takes the likeliest token (the file's, else 0.8)"),
    "top_k": (("--top-k",), int, "choose among the N likeliest tokens, 0 is off (40)"),
    "top_p": (("--top-p",), float, "choose among the likeliest that hold this probability, 1 is off (0.95)"),
    "min_p": (("--min-p",), float, "least probability relative to the likeliest token (0.05)"),
    "repeat_penalty": (("--repeat-penalty",), float, "divide logits of tokens already there, 1 is off (1)"),
    "repeat_last_n": (("--repeat-last-n",), int, "how far back penalties look, -1 is all the way (64)"),
    "presence_penalty": (("--presence-penalty",), float, "subtracted once for a token already there (0)"),
    "frequency_penalty": (("--frequency-penalty",), float, "subtracted for each time a token is there (0)"),
}


def setup_arg_parser() -> argparse.ArgumentParser:
    """Build the parser of this command."""
    parser = ArgumentParser(prog="python -m runtime.chat", description="Talk to a model.", allow_abbrev=False)
    add_model(parser)

    group = parser.add_argument_group("what is asked")
    add = group.add_argument
    add("-p", "--prompt", metavar="TEXT", help="answer this and exit; - reads it from stdin")
    add("-f", "--file", metavar="FILE", help="answer the text in a file and exit")
    add("-sys", "--system-prompt", metavar="TEXT", help="what the model is told before the conversation")
    add("-i", "--interactive", action="store_true", help="converse, also after -p and without a terminal")
    add("--raw", action="store_true", help="continue the text as it is, without the chat format")
    add_chat_format(group)
    add("--session", metavar="FILE", help="go on with the conversation in FILE, if it is there, and save it at the end")
    add("--json", action="store_true", help="print one JSON object: the text and what is known about the run")

    group = parser.add_argument_group("how it is answered")
    add = group.add_argument
    add("-n", "--predict", "--n-predict", "--max-tokens", dest="max_tokens", type=int, metavar="N",
        help="at most N tokens, -1 until a stop (until a stop or until the context is full)")  # fmt: skip
    add("-s", "--seed", type=int, metavar="N", help="seed, -1 draws one (default)")
    for name, (flags, kind, text) in SAMPLING.items():
        add(*flags, dest=name, type=kind, metavar="N" if kind is int else "F", help=text)
    add("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated")

    add_running(parser)
    parser.add_argument(
        "--overflow",
        choices=POLICIES,
        help="what to do with a prompt longer than the context (error; a conversation slides)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run(_main, argv)


def _main(argv: list[str]) -> int:
    # Bytes of an argument that are no text arrive as lone surrogates, which no tokenizer takes.
    args = setup_arg_parser().parse_args([os.fsencode(a).decode("utf-8", "replace") for a in argv])
    _check(args)
    console = Console.of_process()
    prompt = _read_prompt(args, console.stdin)
    interactive = args.interactive or prompt is None
    if args.json and interactive:
        raise UserError("--json answers one prompt: give it with -p, -f or on stdin, and without -i")
    with console.logging(), load_model(args) as llm:
        chat = not args.raw and not (llm.is_base and args.system_prompt is None)
        if chat:
            llm.require_chat_format()
        console.say(*about_model(llm))
        if not chat and not args.raw:
            console.say("no chat template in this model: what you type is continued as plain text")
        talk = _begin(llm, console, args, chat)
        if not interactive:
            assert prompt is not None
            return _answer_once(llm, console, args, prompt, talk)
        options = {"max_tokens": args.max_tokens, "stop": args.stop, "overflow": args.overflow}
        repl = Repl(llm, console, llm.sampler(**_sampling(args)), talk, **options)
        try:
            return repl.run(prompt)
        finally:
            if args.session is not None:
                repl.talk.save(llm, args.session)


def _begin(llm: Llama, console: Console, args: argparse.Namespace, chat: bool) -> Conversation:
    """Begin a conversation, or go on with that of --session. Raises CacheError or OSError if it cannot be read."""
    if args.session is None or not os.path.lexists(args.session):
        return Conversation(chat, args.system_prompt)
    talk = Conversation.load(llm, args.session, chat)
    console.say(f"session: {args.session}, {talk.size}")
    if args.system_prompt is not None and args.system_prompt != talk.system:
        console.say("note: the system message of -sys takes the place of the session's")
        talk.system = args.system_prompt
    return talk


def _answer_once(llm: Llama, console: Console, args: argparse.Namespace, prompt: str, talk: Conversation) -> int:
    cancel = threading.Event()
    overflow = args.overflow or ("slide" if talk.turns else "error")
    if overflow == "error" or args.overflow is None:
        llm.check_fits(prompt)
    talk.ask(llm, prompt)
    options = {"max_tokens": args.max_tokens, "stop": args.stop, "cancel": cancel, "overflow": overflow}
    job = talk.prepare(llm, llm.sampler(**_sampling(args)), **options)
    if args.json:
        with console.interruptible(cancel):
            pieces = list(llm.pieces(job))
        text = "".join(piece.text for piece in pieces)
        ids = [token for piece in pieces for token, _ in piece.tokens]
        console.write(json.dumps(_as_json(llm, job, text)) + "\n")
    else:
        text, ids = console.stream(llm, job, cancel)
    if text or job.stats.finish_reason != "cancelled":
        talk.answered(text, ids)
    if args.session is not None:
        talk.save(llm, args.session)
    console.say(stats_line(llm, job.stats))
    return 130 if job.stats.finish_reason == "cancelled" else 0


def _as_json(llm: Llama, job: Run, text: str) -> dict[str, Any]:
    return {
        "text": text,
        "finish_reason": job.stats.finish_reason,
        "model": llm.path.name,
        "fingerprint": llm.fingerprint,
        "backend": llm.model.kernels.name,
        "n_ctx": llm.n_ctx,
        **finished(job),
        "memory": memory(llm),
    }


def _check(args: argparse.Namespace) -> None:
    """Find wrong options before anything is loaded. Raises OptionError, UserError or OSError."""
    given = _sampling(args)
    given.pop("seed")
    SamplingOptions(**{name: value for name, value in given.items() if value is not None})
    check_model_arguments(args)
    if args.max_tokens is not None:
        check_max_tokens(args.max_tokens)
    check_stop(args.stop)
    if args.raw and (args.system_prompt is not None or args.chat_format or args.jinja):
        raise UserError("--raw uses no chat format: leave out -sys, --chat-format and --jinja")
    if args.session == "":
        raise UserError("--session takes the name of a file")
    if args.session is not None:
        check_writable(args.session)  # else what is said would be lost at the end
    if args.prompt is not None and args.file is not None:
        raise UserError("-p and -f both give the prompt: leave one out")


def _sampling(args: argparse.Namespace) -> dict[str, Any]:
    return {"seed": args.seed, **{name: getattr(args, name) for name in SAMPLING}}


def _read_prompt(args: argparse.Namespace, stdin: TextIO) -> str | None:
    """Return the one prompt to answer; None if there is none and a conversation is wanted."""
    if args.file is not None and args.file != "-":
        try:
            prompt = Path(args.file).read_text(encoding="utf-8")
        except UnicodeDecodeError as exc:
            raise UserError(f"{args.file}: is not UTF-8 text: {exc}") from exc
    elif "-" in (args.prompt, args.file):
        prompt = stdin.read()
    elif args.prompt is not None:
        prompt = args.prompt
    elif args.interactive or stdin.isatty():
        return None
    else:
        prompt = stdin.read()
    prompt = prompt.removesuffix("\n").removesuffix("\r")
    if not prompt.strip():
        raise UserError("the prompt is empty")
    return prompt


if __name__ == "__main__":
    sys.exit(main())
