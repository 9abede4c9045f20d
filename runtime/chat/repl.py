"""A conversation at the terminal, in turns, over one context that keeps what was said."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ..cli import describe, is_expected
from ..generate import Stats
from ..llama import Llama
from ..messages.conversation import Conversation
from ..sampler import Sampler
from .console import Console, stats_line

HELP = """\
/help            this list
/reset           forget the conversation (also /clear)
/system [TEXT]   tell the model TEXT first, and begin anew; without TEXT: show it
/regen           answer the last message again
/undo            take the last message and its answer back
/stats           show the figures of the last answer
/save FILE       write the conversation and what the model has read to a file
/load FILE       go on with a conversation that was saved
/exit            leave (also /bye, Ctrl-D)
A line that ends with \\ goes on in the next; \"\"\" begins and ends a text of several lines.
//text sends /text to the model. Ctrl-C stops an answer."""


class Command(NamedTuple):
    name: str
    argument: str


class Repl:
    """One conversation. The sampler lives as long: a seed repeats the whole conversation, not each answer.

    overflow: what to do once the conversation is longer than the context (see window.py); None lets it slide, but
    refuses a single message that is longer than that.
    """

    def __init__(
        self,
        llm: Llama,
        console: Console,
        sampler: Sampler,
        talk: Conversation,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        overflow: str | None = None,
    ) -> None:
        self.llm, self.console, self.sampler, self.talk = llm, console, sampler, talk
        self.options: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop, "overflow": overflow or "slide"}
        self._check_messages = overflow is None
        self.stats: Stats | None = None
        self._said_full = False
        self._terminal = console.stdin.isatty()
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help, "/reset": self._reset, "/clear": self._reset, "/system": self._system,
            "/regen": self._regen, "/undo": self._undo, "/stats": self._stats, "/save": self._save, "/load": self._load,
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
                if message.name in ("/exit", "/bye", "/quit") and not message.argument:
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
        if not self._try(lambda: self._add(text)):
            return
        if not self._answer():
            self.talk.turns.pop()

    def _add(self, text: str) -> None:
        if self._check_messages:
            self.llm.check_fits(text)
        self.talk.ask(self.llm, text)

    def _try(self, action: Callable[[], None]) -> bool:
        """Do something, and say in one line why it failed if that is the user's affair."""
        try:
            action()
        except Exception as exc:
            if not is_expected(exc) or isinstance(exc, BrokenPipeError):
                raise
            self.console.say(f"error: {describe(exc)}")
            return False
        return True

    def _answer(self) -> bool:
        return self._try(self._generate) and self._kept

    def _generate(self) -> None:
        """Answer the last question; afterwards _kept says whether there is an answer."""
        self._kept = False
        cancel = threading.Event()
        run = self.talk.prepare(self.llm, self.sampler, cancel=cancel, **self.options)
        text, ids = self.console.stream(self.llm, run, cancel)
        self.stats = run.stats
        cancelled = run.stats.finish_reason == "cancelled"
        if cancelled:
            self.console.say("(stopped)" if text else "(stopped; the message is not kept)")
        if not text and cancelled:
            return
        self._kept = True
        self.talk.answered(text, ids)
        self.console.say(stats_line(self.llm, run.stats))
        self._say_when_full(run.stats)

    def _say_when_full(self, stats: Stats) -> None:
        full = stats.dropped_tokens > 0
        if full and not self._said_full:
            self.console.say(f"(the context of {self.llm.n_ctx} tokens is full: the oldest ones slide out)")
        self._said_full = full

    # ==== Commands ====

    def _command(self, name: str, argument: str) -> None:
        if name in ("/exit", "/bye", "/quit"):
            self.console.say(f"error: {name} takes no text")
        elif name not in self._commands:
            self.console.say(f"error: unknown command {name} (/help lists them; //text sends /text)")
        elif argument and name not in ("/system", "/save", "/load"):
            self.console.say(f"error: {name} takes no text")
        else:
            self._commands[name](argument)

    def _help(self, _: str) -> None:
        self.console.say(*HELP.splitlines())

    def _reset(self, _: str) -> None:
        self.talk, self._said_full = Conversation(self.talk.chat, self.talk.system), False
        self.llm.reset()
        self.console.say("(the conversation begins anew)")

    def _system(self, text: str) -> None:
        if not self.talk.chat:
            self.console.say("error: a plain text has no system message")
        elif text:
            self.talk.system = text
            self._reset("")
        else:
            default = self.llm.chat_format.system if self.llm.chat_format else None
            self.console.say(self.talk.system or default or "(no system message)")

    def _regen(self, _: str) -> None:
        turns = self.talk.turns
        if not turns:
            self.console.say("error: there is no answer yet")
            return
        old = turns.pop()
        if not self._answer():
            turns.append(old)

    def _undo(self, _: str) -> None:
        turns = self.talk.turns
        if not turns:
            self.console.say("error: there is nothing to take back")
            return
        del turns[-2:]
        self.console.say(f"(taken back; {self.talk.size} left)")

    def _stats(self, _: str) -> None:
        if self.stats is None:
            self.console.say("(nothing was generated yet)")
        else:
            self.console.say(stats_line(self.llm, self.stats))

    def _save(self, path: str) -> None:
        if not path:
            self.console.say("error: /save FILE takes the name of a file")
        elif self._try(lambda: self.talk.save(self.llm, path)):
            self.console.say(f"(saved {self.talk.size})")

    def _load(self, path: str) -> None:
        if not path:
            self.console.say("error: /load FILE takes the name of a file")
        else:
            self._try(lambda: self._go_on(path))

    def _go_on(self, path: str) -> None:
        self.talk = Conversation.load(self.llm, path, self.talk.chat)
        self.console.say(f"(loaded {self.talk.size})")


def _enable_line_editing() -> None:
    """Importing readline is what gives input() history and editing; not every Python has it."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
