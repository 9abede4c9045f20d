"""A chat format that renders the model's own template, in jinja2's immutable sandbox and only when asked to.

A template mixes control tokens and the text of the messages into one string. To keep them apart it is
rendered twice: with the real contents, and with a random mark in place of each content (spaces around it are
kept, so that trimming does the same). Putting the contents where the marks are must give the first rendering;
then only what the template itself wrote is searched for control tokens. A template that rewrites contents is
refused.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from .chat_format import ChatFormat
from .chat_pieces import (
    ChatFormatError,
    Control,
    Message,
    Piece,
    encode_pieces,
)

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class JinjaFormat(ChatFormat):
    """Any chat template. Raises ChatFormatError if jinja2 is missing or the template is not valid."""

    template: str = ""

    name: ClassVar[str] = "jinja"

    def __init__(self, template: str) -> None:
        object.__setattr__(self, "system", None)
        object.__setattr__(self, "template", template)
        _compile(template)

    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Piece]:
        raise NotImplementedError("a template's control tokens are known only with a tokenizer: see encode")

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any] | Message],
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the ids of the rendered conversation; contents are plain text, whatever they look like.

        Raises ChatFormatError if the template fails or rewrites the contents.
        """
        values = {
            "add_generation_prompt": add_generation_prompt,
            "bos_token": _text_of(tokenizer, tokenizer.bos_id),
            "eos_token": _text_of(tokenizer, tokenizer.eos_id),
            "tools": None,
            "documents": None,
        }
        texts = self.split(self.check(messages), values)
        return encode_pieces(tokenizer, _find_controls(texts, tokenizer.special))

    def split(self, messages: Sequence[Message], values: Mapping[str, Any]) -> list[tuple[str, bool]]:
        """Render; return the text in parts, each with whether it is a message's content."""
        nonce = secrets.token_hex(12)
        cores = [message.content.strip() for message in messages]
        marks = [f"m{nonce}x{i}e" if core else "" for i, core in enumerate(cores)]
        marked = [
            Message(message.role, message.content.replace(core, mark, 1) if core else message.content)
            for message, core, mark in zip(messages, cores, marks, strict=True)
        ]
        real, rendered = self._render(messages, values), self._render(marked, values)
        parts: list[tuple[str, bool]] = []
        for i, part in enumerate(re.split(f"m{nonce}x([0-9]+)e", rendered)):
            parts.append((cores[int(part)], True) if i % 2 else (part, False))
        if "".join(text for text, _ in parts) != real:
            raise ChatFormatError(
                "the chat template rewrites the text of a message, so that it cannot be kept apart from "
                "control tokens; name a built-in chat format instead"
            )
        return parts

    def _render(self, messages: Sequence[Message], values: Mapping[str, Any]) -> str:
        listed = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(_compile(self.template).render(messages=listed, **values))
        except Exception as exc:  # a template is a program: it can fail in any way
            raise ChatFormatError(f"the chat template failed: {str(exc) or type(exc).__name__}") from exc


@lru_cache(maxsize=4)
def _compile(template: str) -> Any:
    """Compile with the settings that Hugging Face templates are written for."""
    try:
        import jinja2.sandbox
    except ImportError as exc:
        raise ChatFormatError("jinja2 is missing; install it with: pip install 'tritllama[jinja]'") from exc
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    try:
        return environment.from_string(template)
    except Exception as exc:  # compiling folds constants, so this too can fail in any way
        raise ChatFormatError(f"the chat template is not valid jinja: {str(exc) or type(exc).__name__}") from exc


def _refuse(message: object) -> NoReturn:
    from jinja2 import TemplateError

    raise TemplateError(str(message))


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _text_of(tokenizer: Tokenizer, token: int | None) -> str:
    return "" if token is None else tokenizer.token_bytes(token, special=True).decode(errors="replace")


def _find_controls(parts: Sequence[tuple[str, bool]], special: Mapping[str, int]) -> list[Piece]:
    """Make control tokens of those written by the template, and leave contents as they are."""
    names = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
    pieces: list[Piece] = []
    for text, is_content in parts:
        if is_content or not names:
            pieces.append(text)
            continue
        for i, found in enumerate(re.split(f"({names})", text)):
            pieces.append(Control(found) if i % 2 else found)
    return pieces
