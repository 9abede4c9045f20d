"""Results in the shape of OpenAI's API: completions, chat completions, and their chunks when streamed.

Beyond OpenAI's keys each finished result has "seed" and "options" (what was in effect), "timings" (in
llama.cpp's names), "context" (prompt tokens that were cut, tokens that had slid out at the end), and
usage.prompt_tokens_details.cached_tokens: prompt tokens that were still in the ring.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .generate import Run, TextPiece
from .messages.tool_calls import read_calls
from .sampler import Floats, log_probabilities

if TYPE_CHECKING:
    from .tokenizer import Tokenizer


@dataclass
class LogProbs:
    """Collects log probabilities as tokens are chosen, in O(top) memory for each token."""

    top: int
    found: list[tuple[float, list[tuple[int, float]]]] = field(default_factory=list)
    taken: int = 0

    def watch(self, token: int, logits: Floats) -> None:
        self.found.append(log_probabilities(logits, token, self.top))

    def take(self, count: int) -> list[tuple[float, list[tuple[int, float]]]]:
        """The next `count` tokens' values."""
        start, self.taken = self.taken, self.taken + count
        return self.found[start : self.taken]


class Shape:
    """Builds one result, whole or in chunks. Subclasses say what a choice looks like."""

    prefix = object_name = chunk_name = ""

    def __init__(self, model: str, fingerprint: str, tokenizer: Tokenizer, logprobs: LogProbs | None) -> None:
        self._tokenizer, self._logprobs = tokenizer, logprobs
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, run: Run, pieces: Iterator[TextPiece]) -> dict[str, Any]:
        """Run to the end and return the result."""
        text, tokens = "", []
        for piece in pieces:
            text += piece.text
            tokens += piece.tokens
        choice = {**self._text(text), "logprobs": self._logprobs_of(tokens)}
        choice["finish_reason"] = self._reason(run, choice)
        head = {**self._head, "object": self.object_name}
        return {**head, "choices": [{"index": 0, **choice}], **finished(run)}

    def stream(self, run: Run, pieces: Iterator[TextPiece]) -> Generator[dict[str, Any], None, None]:
        """Yield chunks; the last has finish_reason, usage and what else is known at the end."""
        head = {**self._head, "object": self.chunk_name or self.object_name}

        def chunk(choice: dict[str, Any], reason: str | None = None) -> dict[str, Any]:
            return {**head, "choices": [{"index": 0, "logprobs": None, "finish_reason": reason, **choice}]}

        with closing(pieces):  # type: ignore[type-var]
            if first := self._first():
                yield chunk(first)
            for piece in self._ready(pieces):
                yield chunk({**self._delta(piece.text), "logprobs": self._logprobs_of(piece.tokens)})
        last = self._last()
        yield {**chunk(last, self._reason(run, last)), **finished(run)}

    def _text(self, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, Any]:
        return self._text(text)

    def _first(self) -> dict[str, Any]:
        return {}

    def _last(self) -> dict[str, Any]:
        return self._text("")

    def _ready(self, pieces: Iterator[TextPiece]) -> Iterator[TextPiece]:
        """Give the pieces that may be shown as they come."""
        return pieces

    def _reason(self, run: Run, choice: dict[str, Any]) -> str:
        return run.stats.finish_reason

    def _logprobs_of(self, tokens: list[tuple[int, int]]) -> dict[str, Any] | None:
        raise NotImplementedError


class CompletionShape(Shape):
    """text_completion, whose chunks look like the whole."""

    prefix, object_name = "cmpl", "text_completion"

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs_of(self, tokens: list[tuple[int, int]]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        values = self._logprobs.take(len(tokens))
        return {
            "tokens": [self._name(token) for token, _ in tokens],
            "token_logprobs": [own for own, _ in values],
            "top_logprobs": [{self._name(i): p for i, p in best} for _, best in values],
            "text_offset": [offset for _, offset in tokens],
        }

    def _name(self, token: int) -> str:
        """The token's text, or as OpenAI writes the bytes of a part of a character."""
        raw = self._tokenizer.token_bytes(token, special=True)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class ChatShape(Shape):
    """chat.completion with a message, chat.completion.chunk with deltas.

    functions: names of those that the model may call; a call is held back until it is whole
    """

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, functions: Sequence[str] = ()) -> None:
        super().__init__(*args)
        self._functions = tuple(functions)
        self._calls: list[dict[str, Any]] = []

    def _text(self, text: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if calls := read_calls(text, self._functions):
            message |= {"content": None, "tool_calls": calls}
        return {"message": message}

    def _ready(self, pieces: Iterator[TextPiece]) -> Iterator[TextPiece]:
        text, tokens = "", list[tuple[int, int]]()
        for piece in pieces:
            text, tokens = text + piece.text, tokens + piece.tokens
            if not self._functions or text.lstrip()[:1] not in ("", "{"):
                yield TextPiece(text, tokens)
                text, tokens = "", []
                self._functions = ()
        if text or tokens:
            self._calls = read_calls(text, self._functions)
            yield TextPiece("" if self._calls else text, tokens)

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text}}

    def _first(self) -> dict[str, Any]:
        return {"delta": {"role": "assistant", "content": ""}}

    def _last(self) -> dict[str, Any]:
        calls = [{"index": i, **call} for i, call in enumerate(self._calls)]
        return {"delta": {"tool_calls": calls} if calls else {}}

    def _reason(self, run: Run, choice: dict[str, Any]) -> str:
        called = "tool_calls" in (choice.get("message") or choice.get("delta") or {})
        return "tool_calls" if called and run.stats.finish_reason == "stop" else run.stats.finish_reason

    def _logprobs_of(self, tokens: list[tuple[int, int]]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        values = self._logprobs.take(len(tokens))
        content = [
            {**self._entry(token, own), "top_logprobs": [self._entry(i, p) for i, p in best]}
            for (token, _), (own, best) in zip(tokens, values, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token, special=True)
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}


def finished(run: Run) -> dict[str, Any]:
    """What a result says about its run."""
    stats, options = run.stats, run.sampler.options
    return {
        "usage": {
            "prompt_tokens": stats.prompt_tokens,
            "completion_tokens": stats.generated_tokens,
            "total_tokens": stats.prompt_tokens + stats.generated_tokens,
            "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
        },
        "seed": stats.seed,
        "options": {**vars(options), "logit_bias": dict(options.logit_bias), "max_tokens": run.max_tokens},
        "context": {"truncated_tokens": stats.truncated_tokens, "dropped_tokens": stats.dropped_tokens},
        "timings": {
            "prompt_n": stats.prompt_tokens - stats.reused_tokens,
            "prompt_ms": stats.prompt_seconds * 1e3,
            "prompt_per_second": stats.prompt_rate,
            "predicted_n": stats.generated_tokens,
            "predicted_ms": stats.seconds * 1e3,
            "predicted_per_second": stats.rate,
        },
    }
