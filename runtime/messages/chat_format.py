"""Messages to token ids, so that nothing in a message can act as a control token.

A format turns messages into pieces: plain text, and Control for a token that is only ever added as an id.
Built in are llama3 (with the dates of 3.1 and later), chatml and llama2; each equals what the model's own
template renders. Other templates are code: see jinja_format.py, used only when asked for.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from .chat_pieces import (
    BOS,
    EOS,
    ChatFormatError,
    Control,
    Message,
    Piece,
    Spoken,
    check_messages,
    encode_pieces,
)

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer



@dataclass(frozen=True)
class ChatFormat(ABC):
    """How a model wants a conversation written. system: used where the messages begin without one."""

    system: str | None = None

    name: ClassVar[str] = ""
    ends_turn: ClassVar[Control | None] = None

    def with_tools(self, text: str) -> ChatFormat:
        """Return a format that tells the model of functions; text: what it is told (see tool_calls.py).

        Raises ChatFormatError if the model's format has no place for functions.
        """
        raise ChatFormatError(f"the chat format {self.name} has no functions to call; llama3 has (chat_format)")

    def check(self, messages: Sequence[Mapping[str, Any] | Message]) -> list[Message]:
        """Check messages, also for calls of functions where the format has none. Raises ChatFormatError."""
        checked = check_messages(messages)
        if any(message.calls for message in checked):
            self.with_tools("")
        return checked

    @abstractmethod
    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Piece]:
        """Write the messages as text and control tokens. Raises ChatFormatError if the format has no place
        for a message."""

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any] | Message],
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Return the ids of a conversation, ready for the model to answer.

        Raises ChatFormatError for bad messages, or if the tokenizer lacks a control token of the format.
        """
        return encode_pieces(tokenizer, self.pieces(self.check(messages), add_generation_prompt))

    def stop_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """Return the id that ends a turn: some files name only the end of the text as end token."""
        token = None if self.ends_turn is None else tokenizer.special.get(self.ends_turn.text)
        return frozenset() if token is None else frozenset({token})


@dataclass(frozen=True)
class Llama3Format(ChatFormat):
    """Llama 3; with `dates`, the preamble of the system message that 3.1, 3.2 and 3.3 have.

    tools: what the model is told of functions, in front of the first message after the system's
    """

    dates: str | None = None
    trim: bool = True
    tools: str = ""

    name: ClassVar[str] = "llama3"
    ends_turn: ClassVar[Control | None] = Control("<|eot_id|>")

    def with_tools(self, text: str) -> Llama3Format:
        return replace(self, tools=text)

    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Piece]:
        messages = _with_system(messages, self.system)
        out: list[Piece] = [BOS]
        if self.dates is not None:
            system = ""
            if messages[0].role == "system":
                system, messages = messages[0].content, messages[1:]
            out += self._turn("system", "Environment: ipython\n" * bool(self.tools) + self.dates + self._text(system))
        told = self.tools
        for message in messages:
            if told and message.role != "system":
                out += self._turn("user", told + self._text(message.content))
                told = ""
            elif message.role == "tool":
                out += self._turn("ipython", json.dumps(message.content, ensure_ascii=False))
            else:
                out += self._turn(message.role, self._text(message.content), message.ids)
        if told:
            raise ChatFormatError("functions are told of in the first user message, and there is none")
        return out + (self._header("assistant") if add_generation_prompt else [])

    def _text(self, content: str) -> str:
        return content.strip() if self.trim else content

    def _header(self, role: str) -> list[Piece]:
        return [Control("<|start_header_id|>"), role, Control("<|end_header_id|>"), "\n\n"]

    def _turn(self, role: str, text: str, ids: tuple[int, ...] = ()) -> list[Piece]:
        return [*self._header(role), Spoken(text, ids), Control("<|eot_id|>")]


@dataclass(frozen=True)
class ChatMLFormat(ChatFormat):
    """ChatML, as SmolLM2 and many others use it. bos: the template begins with the BOS token."""

    bos: bool = False
    trim: bool = False

    name: ClassVar[str] = "chatml"
    ends_turn: ClassVar[Control | None] = Control("<|im_end|>")

    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Piece]:
        out: list[Piece] = [BOS] if self.bos else []
        for message in _with_system(messages, self.system):
            text = message.content.strip() if self.trim else message.content
            out += [Control("<|im_start|>"), f"{message.role}\n", Spoken(text, message.ids)]
            out += [Control("<|im_end|>"), "\n"]
        if add_generation_prompt:
            out += [Control("<|im_start|>"), "assistant\n"]
        return out


@dataclass(frozen=True)
class Llama2Format(ChatFormat):
    """Llama 2: instructions between [INST] and [/INST] as plain text, each exchange with a BOS and an EOS."""

    name: ClassVar[str] = "llama2"

    def pieces(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[Piece]:
        messages = _with_system(messages, self.system)
        preamble = ""
        if messages[0].role == "system":
            preamble = f"<<SYS>>\n{messages[0].content}\n<</SYS>>\n\n"
            messages = messages[1:]
        out: list[Piece] = []
        for index, message in enumerate(messages):
            if message.role != ("user", "assistant")[index % 2]:
                raise ChatFormatError(
                    "the chat format llama2 takes a system message at most, then user and assistant in turn; "
                    f"message {index + 1} of these is from {message.role}"
                )
            if message.role == "user":
                text = preamble + message.content if index == 0 else message.content
                out += [BOS, f"[INST] {text.strip()} [/INST]"]
            else:
                out += [Spoken(f" {message.content.strip()}", message.ids), " ", EOS]
        if not out:
            raise ChatFormatError("the chat format llama2 needs a user message after the system message")
        return out


FORMATS: dict[str, type[ChatFormat]] = {
    format_class.name: format_class for format_class in (Llama3Format, ChatMLFormat, Llama2Format)
}


def _with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    if system is None or messages[0].role == "system":
        return list(messages)
    return [Message("system", system), *messages]
