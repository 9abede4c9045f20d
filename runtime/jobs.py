"""Requests in OpenAI's terms, checked before anything is read: what create_completion and the server share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

from formats.errors import shown

from .constraint import Constraint, json_grammar, schema_of
from .engine import Engine
from .generate import Run
from .messages.chat_pieces import Message
from .messages.tool_calls import read_tools
from .openai_shapes import ChatShape, CompletionShape, LogProbs, Shape
from .options import log_probs
from .sampler import OptionError, SamplingOptions
from .stream import Stream
from .window import check_length

SAMPLING = ("seed", *(field.name for field in fields(SamplingOptions)))


@dataclass
class Job:
    """An answer that can be begun: in the context that it was prepared with, or in another over the same model."""

    run: Run
    shape: Shape

    def whole(self, engine: Engine) -> dict[str, Any]:
        """Do it and return the result."""
        return self.shape.whole(self.run, engine.pieces(self.run))

    def stream(self, engine: Engine) -> Stream:
        """Do it chunk by chunk, as they are asked for."""
        return Stream(self.shape.stream(self.run, engine.pieces(self.run)), self.run.closed)


def completion_job(
    engine: Engine, prompt: str | Sequence[int], *, logprobs: int | None = None, **options: Any
) -> Job:
    """Prepare Llama.create_completion."""
    collector = log_probs(logprobs, "logprobs")
    if not isinstance(prompt, (str, Sequence)) and not hasattr(prompt, "dtype"):
        raise OptionError(f"a prompt must be a text or a list of token ids, got {type(prompt).__name__}")
    schema = schema_of(options.pop("response_format", None))
    sampler, options = _sampler(engine, options)
    if isinstance(prompt, str) and options.get("overflow", "error") == "error":
        check_length(prompt, engine.tokenizer, engine.n_ctx)
    ids = engine.tokenize(prompt) if isinstance(prompt, str) else prompt
    run = engine.prepare(ids, sampler, **options)
    return _job(engine, run, CompletionShape, collector, schema)


def chat_job(
    engine: Engine,
    messages: Sequence[Mapping[str, Any] | Message],
    *,
    logprobs: bool = False,
    top_logprobs: int | None = None,
    tools: Any = None,
    tool_choice: Any = None,
    **options: Any,
) -> Job:
    """Prepare Llama.create_chat_completion."""
    if not isinstance(logprobs, bool):
        raise OptionError(f"logprobs must be True or False here, got {shown(logprobs)}; top_logprobs says how many")
    if top_logprobs is not None and not logprobs:
        raise OptionError("top_logprobs needs logprobs=True")
    collector = log_probs(top_logprobs or 0, "top_logprobs") if logprobs else None
    schema = schema_of(options.pop("response_format", None))
    found = read_tools(tools, tool_choice)
    if found is not None and found.schema is not None:
        if schema is not None:
            raise OptionError("response_format and a tool_choice that demands a call exclude each other")
        schema = found.schema
    sampler, options = _sampler(engine, options)
    run = engine.prepare_chat(messages, sampler, tools=found.text if found else "", **options)
    return _job(engine, run, ChatShape, collector, schema, **({"functions": found.names} if found else {}))


def prompts_of(value: Any, name: str) -> list[str | Sequence[int]]:
    """Part one prompt or several, each a text or ids, as OpenAI lets them be given. Raises OptionError."""
    if isinstance(value, str):
        return [value]
    items = list(value) if isinstance(value, (list, tuple)) else []
    if items and all(isinstance(item, Integral) and not isinstance(item, bool) for item in items):
        return [items]
    if not items or not all(isinstance(item, (str, list, tuple)) for item in items):
        raise OptionError(f"{name} must be a text, a list of token ids, or a list of several of these")
    return items


def _sampler(engine: Engine, options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Part the sampler's options from the run's."""
    sampler = engine.sampler(**{name: value for name, value in options.items() if name in SAMPLING})
    rest = {name: value for name, value in options.items() if name not in SAMPLING}
    return sampler, rest


def _job(
    engine: Engine,
    run: Run,
    shape_class: type[Shape],
    collector: LogProbs | None,
    schema: Mapping[str, Any] | None,
    **details: Any,
) -> Job:
    if schema is not None:
        constraint = Constraint(engine.vocabulary(frozenset(run.stop_ids)), json_grammar(schema))
        run.processors = [*run.processors, constraint]
    run.watch = None if collector is None else collector.watch
    return Job(run, shape_class(engine.path.name, engine.fingerprint, engine.tokenizer, collector, **details))
