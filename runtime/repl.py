"""A conversation at the terminal, in turns, over one context that keeps what was said."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from .chat_pieces import Message
from .cli import describe, is_expected
from .console import Console, stats_line
from .generate import Run, Stats
from .llama import Llama
from .sampler import Sampler

HELP = """\
/help            this list
/reset           forget the conversation (also /clear)
/system [TEXT]   tell the model TEXT first, and begin anew; without TEXT: show it
/regen           answer the last message again
/undo            take the last message and its answer back
/stats           show the figures of the last answer
/exit            leave (also /bye, Ctrl-D)
A line that ends with \\ goes on in the next; \"\"\" begins and ends a text of several lines.
//text sends /text to the model. Ctrl-C stops an answer."""


class Command(NamedTuple):
    name: str
    argument: str


class Repl:
    """One conversation. The sampler lives as long: a seed repeats the whole conversation, not each answer.

    chat: speak in the model's chat format; otherwise what is typed continues one plain text.
    """

    def __init__(
        self,
        llm: Llama,
        console: Console,
        sampler: Sampler,
        chat: bool,
        system: str | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
    ) -> None:
        self.llm, self.console, self.sampler, self.chat, self.system = llm, console, sampler, chat, system
        self.options: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop, "slide": True}
        self.messages: list[Message] = []  # chat: user and assistant in turn
        self.texts: list[list[int]] = []  # plain text: ids typed and ids generated in turn
        self.stats: Stats | None = None
        self._said_full = False
        self._terminal = console.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help, "/reset": self._reset, "/clear": self._reset, "/system": self._system,
            "/regen": self._regen, "/undo": self._undo, "/stats": self._stats,
        }  # fmt: skip

    def run(self, first: str | None = None) -> int:
        """Converse until the end of input or /exit. first: a message to begin with."""
        if self._terminal:
            _enable_line_editing()
            self.console.say("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves")
        if first is not None:
            self._ask(first)
        while (message := self._read_message()) is not None:
            if isinstance(message, Command):
                if message.name in ("/exit", "/bye", "/quit"):
                    break
                self._command(message.name, message.argument)
            elif message.strip():
                self._ask(message)
        return 0

    # ==== Reading ====

    def _read_message(self) -> str | Command | None:
        """Read a message or a command; None at the end of input, or after two Ctrl-C in a row."""
        interrupted = False
        while True:
            try:
                return self._read_lines()
            except EOFError:
                if self._terminal:
                    self.console.say("")
                return None
            except KeyboardInterrupt:
                if interrupted:
                    self.console.say("")
                    return None
                interrupted = True
                self.console.say("", "(Ctrl-C again or Ctrl-D leaves)")

    def _read_lines(self) -> str | Command:
        line = self._read_line("> ")
        if line.startswith('"""'):
            lines = [line[3:]]
            while not lines[-1].rstrip().endswith('"""'):
                lines.append(self._read_line("... "))
            return "\n".join(lines).rstrip().removesuffix('"""').strip("\n")
        if line.startswith("/") and not line.startswith("//"):
            name, _, argument = line.partition(" ")
            return Command(name, argument.strip())
        text = line.removeprefix("/")
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self._read_line("... ")
        return text

    def _read_line(self, mark: str) -> str:
        """Read a line. Raises EOFError at the end of input."""
        if self._terminal and self.console.stdout.isatty():
            return input(mark)  # the only way to line editing
        if self._terminal:
            self.console.stderr.write(mark)
            self.console.stderr.flush()
        line = self.console.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    # ==== Answering ====

    def _ask(self, text: str) -> None:
        """Answer a message; if that fails or is stopped before a word, the conversation is as it was."""
        if self.chat:
            self.messages.append(Message("user", text))
        else:
            tokenizer, begins = self.llm.tokenizer, not self.texts
            ids = tokenizer.encode(text, add_bos=begins and tokenizer.add_bos, continuation=not begins)
            self.texts.append(ids)
        if not self._answer():
            self._forget_question()

    def _answer(self) -> bool:
        cancel = threading.Event()
        try:
            run = self._prepare(cancel)
            text, ids = self.console.stream(self.llm, run, cancel)
        except Exception as exc:
            if not is_expected(exc) or isinstance(exc, BrokenPipeError):
                raise
            self.console.say(f"error: {describe(exc)}")
            return False
        self.stats = run.stats
        if run.stats.finish_reason == "cancelled":
            self.console.say("(stopped)" if text else "(stopped; the message is not kept)")
        if not text and run.stats.finish_reason == "cancelled":
            return False
        if self.chat:
            self.messages.append(Message("assistant", text, tuple(ids)))
        else:
            self.texts.append(ids)
        self.console.say(stats_line(self.llm, run.stats))
        self._say_when_full(run.stats)
        return True

    def _prepare(self, cancel: threading.Event) -> Run:
        if self.chat:
            system = [] if self.system is None else [Message("system", self.system)]
            messages = [*system, *self.messages]
            return self.llm.prepare_chat(messages, self.sampler, cancel=cancel, **self.options)
        ids = [token for part in self.texts for token in part]
        return self.llm.prepare(ids, self.sampler, cancel=cancel, **self.options)

    def _say_when_full(self, stats: Stats) -> None:
        full = stats.prompt_tokens + stats.generated_tokens > self.llm.n_ctx
        if full and not self._said_full:
            self.console.say(f"(the context of {self.llm.n_ctx} tokens is full: the oldest ones slide out)")
        self._said_full = full

    def _forget_question(self) -> None:
        (self.messages if self.chat else self.texts).pop()

    # ==== Commands ====

    def _command(self, name: str, argument: str) -> None:
        if name not in self._commands:
            self.console.say(f"error: unknown command {name} (/help lists them; //text sends /text)")
        elif argument and name != "/system":
            self.console.say(f"error: {name} takes no text")
        else:
            self._commands[name](argument)

    def _help(self, _: str) -> None:
        self.console.say(*HELP.splitlines())

    def _reset(self, _: str) -> None:
        self.messages, self.texts, self._said_full = [], [], False
        self.llm.reset()
        self.console.say("(the conversation begins anew)")

    def _system(self, text: str) -> None:
        if not self.chat:
            self.console.say("error: a plain text has no system message")
        elif text:
            self.system = text
            self._reset("")
        else:
            default = self.llm.chat_format.system if self.llm.chat_format else None
            self.console.say(self.system or default or "(no system message)")

    def _regen(self, _: str) -> None:
        turns: list[Any] = self.messages if self.chat else self.texts
        if not turns:
            self.console.say("error: there is no answer yet")
            return
        old = turns.pop()
        if not self._answer():
            turns.append(old)

    def _undo(self, _: str) -> None:
        turns: list[Any] = self.messages if self.chat else self.texts
        if not turns:
            self.console.say("error: there is nothing to take back")
            return
        del turns[-2:]
        self.console.say(f"(taken back; {len(turns) // 2} exchanges are left)")

    def _stats(self, _: str) -> None:
        if self.stats is None:
            self.console.say("(nothing was generated yet)")
        else:
            self.console.say(stats_line(self.llm, self.stats))


def _enable_line_editing() -> None:
    """Importing readline is what gives input() history and editing; not every Python has it."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
