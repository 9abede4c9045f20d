"""What may be asked: the fields of each request, and the jobs that they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..jobs import Job, chat_job, completion_job, prompts_of
from ..llama import POOLINGS, Llama
from ..model import Signal
from ..window import POLICIES
from .errors import ApiError
from .fields import Check, anything, biases, flag, ids, inner, number, only, read, text, texts, whole

MOST_TOKENS = 2**31 - 1
MOST_CHOICES = 8
MOST_PROMPTS = 16
# Checked, but of no consequence: they ask for what is done anyway, or concern others. Clients are set up with names of
# models that are not here; they are told in the answer which model gave it.
WITHOUT_EFFECT = ("model", "user", "parallel_tool_calls", "store", "service_tier", "echo", "suffix", "best_of")

SAMPLING: dict[str, Check] = {
    "temperature": number(0, 2),
    "top_p": number(0, 1),
    "top_k": whole(0, MOST_TOKENS),
    "min_p": number(0, 1),
    "repeat_penalty": number(0.01, 100),
    "repeat_last_n": whole(-1, MOST_TOKENS),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "logit_bias": biases,
    "seed": whole(-1, 2**32 - 1),
    "stop": texts(16, 1000),
    "max_tokens": whole(1, MOST_TOKENS),
    "response_format": anything,
    "overflow": only(*POLICIES),
}
COMMON: dict[str, Check] = {
    "model": text(200),
    "n": whole(1, MOST_CHOICES),
    "stream": flag,
    "stream_options": inner({"include_usage": flag, "include_obfuscation": only(False)}),
    "user": text(1000),
}
CHAT: dict[str, Check] = {
    **SAMPLING,
    **COMMON,
    "messages": anything,
    "max_completion_tokens": whole(1, MOST_TOKENS),
    "logprobs": flag,
    "top_logprobs": whole(0, 20),
    "tools": anything,
    "tool_choice": anything,
    "parallel_tool_calls": flag,  # that several may be called at once does not mean that they are
    "store": only(False),
    "service_tier": only("auto", "default"),
}
COMPLETION: dict[str, Check] = {
    **SAMPLING,
    **COMMON,
    "prompt": anything,
    "logprobs": whole(0, 20),
    "echo": only(False),
    "suffix": only(""),
    "best_of": only(1),
}
EMBEDDING: dict[str, Check] = {
    "model": text(200),
    "input": anything,
    "encoding_format": only("float", "base64"),
    "pooling": only(*POOLINGS),
    "user": text(1000),
}
TOKENIZE: dict[str, Check] = {"content": text(1 << 20), "add_special": flag, "parse_special": flag}
DETOKENIZE: dict[str, Check] = {"tokens": ids(1 << 18)}


@dataclass
class Asked:
    """What one request wants done. jobs: one for each choice of the answer; choices: to each prompt"""

    jobs: list[Job]
    choices: int
    stream: bool
    usage: bool

    def total(self, usages: list[dict[str, Any]]) -> dict[str, Any]:
        """Add up what the jobs took; a prompt counts once, however many choices it has."""
        prompts = usages[:: self.choices]
        prompt, reused = (
            sum(usage["prompt_tokens"] for usage in prompts),
            sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in prompts),
        )
        made = sum(usage["completion_tokens"] for usage in usages)
        return {
            "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": reused},
        }  # fmt: skip


def chat(llm: Llama, body: Mapping[str, Any], cancel: Signal) -> Asked:
    """Read a request for a chat completion. Raises ApiError, OptionError and the like."""
    found = read(body, CHAT, ("messages",))
    if "max_completion_tokens" in found:
        if "max_tokens" in found:
            raise ApiError(400, "max_tokens and max_completion_tokens are the same: leave one out", "max_tokens")
        found["max_tokens"] = found.pop("max_completion_tokens")
    stream, usage, choices = _take_own(found)
    messages = found.pop("messages")
    jobs = [chat_job(llm, messages, **_nth(llm, found, i), cancel=cancel) for i in range(choices)]
    return Asked(jobs, choices, stream, usage)


def completion(llm: Llama, body: Mapping[str, Any], cancel: Signal) -> Asked:
    """Read a request for completions, of one prompt or of several."""
    found = read(body, COMPLETION, ("prompt",))
    stream, usage, choices = _take_own(found)
    prompts = prompts_of(found.pop("prompt"), "prompt")
    if len(prompts) * choices > MOST_PROMPTS:
        raise ApiError(400, f"at most {MOST_PROMPTS} answers are given to one request", "prompt")
    jobs = [
        completion_job(llm, prompt, **_nth(llm, found, i), cancel=cancel)
        for prompt in prompts
        for i in range(choices)
    ]
    return Asked(jobs, choices, stream, usage)


def embedding(body: Mapping[str, Any]) -> dict[str, Any]:
    """Read a request for embeddings: the arguments of Llama.create_embedding, and "encoding_format"."""
    found = read(body, EMBEDDING, ("input",))
    for name in WITHOUT_EFFECT:
        found.pop(name, None)
    if len(prompts_of(found["input"], "input")) > 256:
        raise ApiError(400, "at most 256 texts are embedded at once", "input")
    return found


def _take_own(found: dict[str, Any]) -> tuple[bool, bool, int]:
    """Take out what is the server's business: whether to stream, with usage, and how many choices."""
    for name in WITHOUT_EFFECT:
        found.pop(name, None)
    stream, choices = found.pop("stream", False), found.pop("n", 1)
    options = found.pop("stream_options", None)
    if options is not None and not stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    return stream, bool(options and options.get("include_usage")), choices


def _nth(llm: Llama, options: Mapping[str, Any], i: int) -> dict[str, Any]:
    """The options of choice i: each has a seed of its own, or all would be the same."""
    seed = options.get("seed", llm.seed)
    return dict(options) if seed in (None, -1) else {**options, "seed": (seed + i) % 2**32}
