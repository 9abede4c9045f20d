"""What happens to a prompt that is longer than the context.

The ring keeps the first tokens, the sinks, and slides over the rest: StreamingLLM (Xiao et al., 2023), who found that
a model stays fluent for millions of tokens if its first few stay in sight, and loses its way if they do not. Positions
are absolute and RoPE is applied once, when a token is read; what the window shows is never rotated again, because
RoPE depends on distances alone. Only the sinks are looked at as if the lost tokens had never been there (cache.py).

| policy | a prompt longer than the context |
|---|---|
| error | is refused, a very long one before it is tokenised |
| slide | is read to its end, and its oldest tokens but the sinks slide out |
| truncate-middle | loses its middle before it is read; the sinks, the newest tokens and room for an answer are left |
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from formats.errors import shown

from .sampler import OptionError

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

QUICK = 1 << 16  # characters that are tokenised in no time
POLICIES = ("error", "slide", "truncate-middle")


class ContextOverflowError(ValueError):
    """A prompt does not fit into the context."""


def check_length(text: str, tokenizer: Tokenizer, n_ctx: int) -> None:
    """Refuse a long text that cannot fit, by its bytes: tokenising megabytes to tell would take a minute.

    Raises ContextOverflowError.
    """
    if len(text) < QUICK:
        return
    least = -(-len(text.strip().encode("utf-8", "replace")) // tokenizer.longest_token)
    if least > n_ctx:
        raise overflow_error(f"at least {least}", n_ctx)


def overflow_error(tokens: object, n_ctx: int) -> ContextOverflowError:
    return ContextOverflowError(
        f"the prompt has {tokens} tokens, the context holds {n_ctx}; shorten it, raise n_ctx (-c), "
        "or let it slide or be cut (overflow, --overflow)"
    )


def fit(ids: list[int], overflow: str, n_ctx: int, sinks: int, max_tokens: int | None) -> list[int]:
    """Return the ids to read of a prompt, as the policy says.

    A cut one leaves room for an answer of max_tokens: a quarter of the context if that is not known, half at most.
    Raises ContextOverflowError, or OptionError for an unknown policy.
    """
    if overflow not in POLICIES:
        raise OptionError(f"overflow must be {', '.join(POLICIES[:-1])} or {POLICIES[-1]}, got {shown(overflow)}")
    if len(ids) <= n_ctx or overflow == "slide":
        return ids
    if overflow == "error":
        raise overflow_error(len(ids), n_ctx)
    room = n_ctx // 4 if max_tokens is None or max_tokens < 0 else max_tokens
    size = n_ctx - min(room, n_ctx // 2)
    first = min(sinks, size - 1)
    return [*ids[:first], *ids[len(ids) - (size - first) :]]
