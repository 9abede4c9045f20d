"""The terminal: streaming an answer, stopping it with Ctrl-C, and what is said about model and run."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from ..cli import one_line
from ..generate import Run, Stats
from ..progress import Bar
from ..sizes import weight_bytes

if TYPE_CHECKING:
    from ..llama import Llama


@dataclass
class Console:
    """The three streams. Only generated text and --json go to stdout."""

    stdin: TextIO
    stdout: TextIO
    stderr: TextIO

    @classmethod
    def of_process(cls) -> Console:
        """Take the process's streams, and let none of them fail on a character it cannot express."""
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            with suppress(AttributeError, ValueError):
                stream.reconfigure(errors="replace")  # type: ignore[union-attr]
        return cls(sys.stdin, sys.stdout, sys.stderr)

    def write(self, text: str) -> None:
        self.stdout.write(text)
        self.stdout.flush()

    def say(self, *lines: str) -> None:
        for line in lines:
            self.stderr.write(line + "\n")
        self.stderr.flush()

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Show the library's messages as lines."""
        logger, handler = logging.getLogger("tritllama"), logging.StreamHandler(self.stderr)
        level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(handler)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)

    def stream(self, llm: Llama, run: Run, cancel: threading.Event) -> tuple[str, list[int]]:
        """Do a run, show its text as it comes, end it with a newline; returns the text and its ids.

        Ctrl-C sets `cancel`, which ends the run and leaves the context in order.
        """
        text, ids = "", []
        bar = Bar("prompt", unit="tok", enabled=self.stderr.isatty() and len(run.prompt) > 256)
        run.progress = bar
        with self.interruptible(cancel), bar:
            for piece in llm.pieces(run):
                bar.close()
                text += piece.text
                ids += [token for token, _ in piece.tokens]
                self.write(piece.text)
        if not text.endswith("\n"):
            self.write("\n")
        return text, ids

    @contextmanager
    def interruptible(self, cancel: threading.Event) -> Iterator[None]:
        """Let the first Ctrl-C set `cancel`, which a long prompt heeds between its chunks; a second one interrupts."""

        def stop(signum: int, frame: FrameType | None) -> None:
            if cancel.is_set():
                raise KeyboardInterrupt
            cancel.set()
            self.say("(stopping)")

        try:
            before = signal.signal(signal.SIGINT, stop)
        except ValueError:  # not the main thread
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def about_model(llm: Llama) -> list[str]:
    """What is said at the start: model, backend, context, licence."""
    file = llm.model.file
    name = one_line(str((file.header.get("source") or {}).get("name") or llm.path.name))
    size = weight_bytes(file)
    weights: Counter[str] = Counter()
    for tensor in file.tensors.values():
        if not tensor.name.startswith("tokenizer."):
            weights[tensor.codec] += _count(tensor.shape)
    codecs = ", ".join(f"{_short(count)} {codec}" for codec, count in weights.most_common())
    chat = f"chat format {llm.chat_format.name}" if llm.chat_format else "no chat format"
    lines = [
        f"model: {name}, {_megabytes(size)}, {8 * size / weights.total():.2f} bits per weight ({codecs})",
        f"backend: {llm.model.kernels.describe()}",
        f"context: {llm.n_ctx} tokens, {_megabytes(llm.cache_nbytes)} ({llm.cache_codec}); {chat}",
        f"memory: {llm.memory}",
    ]
    if (file.header.get("licence") or {}).get("llama"):
        lines.append("Built with Llama")
    return lines


def stats_line(llm: Llama, stats: Stats) -> str:
    """The line that ends an answer."""
    used = memory(llm)
    peak = f", peak {_megabytes(used['peak_rss'])}" if used["peak_rss"] else ""
    lost = (("cut", stats.truncated_tokens), ("slid out", stats.dropped_tokens))
    more = "".join(f", {count} {what}" for what, count in lost if count)
    return (
        f"[prompt {stats.prompt_tokens} tokens ({stats.reused_tokens} reused){more}, {stats.prompt_rate:.1f} tok/s"
        f" | generated {stats.generated_tokens} tokens, {stats.rate:.1f} tok/s, {stats.finish_reason}"
        f" | memory: weights {_megabytes(used['weights'])}, cache {_megabytes(used['cache'])}{peak}"
        f" | context {min(stats.prompt_tokens + stats.generated_tokens, llm.n_ctx)} of {llm.n_ctx} ({llm.cache_codec})"
        f" | seed {stats.seed} | {llm.model.kernels.name}]"
    )


def memory(llm: Llama) -> dict[str, int | None]:
    """Bytes: of the weights in the mapped file, of the cache, and of the process at its peak."""
    return {"weights": weight_bytes(llm.model.file), "cache": llm.cache_nbytes, "peak_rss": _peak_rss()}


def _peak_rss() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _count(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _short(count: int) -> str:
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{name}"
    return str(count)


def _megabytes(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
