"""Messages checked, and pieces of text and control tokens turned into ids: what every chat format shares."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from formats.errors import shown

from .tool_calls import write_call

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


class ChatFormatError(ValueError):
    """The messages or the chat format cannot be used."""


@dataclass(frozen=True)
class Control:
    """A control token, named by its text; BOS and EOS below are whatever the model's file says."""

    text: str


@dataclass(frozen=True)
class Message:
    """One message. ids: the tokens that an answer was made of, if they are known; calls: whether it calls a
    function, or is what a function returned."""

    role: str
    content: str
    ids: tuple[int, ...] = ()
    calls: bool = False


@dataclass(frozen=True)
class Spoken:
    """Text that the model itself wrote as these ids, which need not be those that encoding it would give."""

    text: str
    ids: tuple[int, ...]


Piece = str | Control | Spoken
BOS = Control("BOS")
EOS = Control("EOS")


def check_messages(messages: Sequence[Mapping[str, Any] | Message]) -> list[Message]:
    """Check the shape of OpenAI messages; a content in parts must be all text. Raises ChatFormatError."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatFormatError('messages must be a list of {"role": ..., "content": ...}')
    if not messages:
        raise ChatFormatError("messages is empty: there is nothing to answer")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _check_message(message: Any, where: str) -> Message:
    if isinstance(message, Message):
        return message
    if not isinstance(message, Mapping):
        raise ChatFormatError(f'{where} must be {{"role": ..., "content": ...}}, got {shown(message)}')
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ChatFormatError(f"{where}: the role must be one of {', '.join(ROLES)}, got {shown(role)}")
    known = {"assistant": ("tool_calls",), "tool": ("tool_call_id",)}.get(role, ())
    extra = [str(key) for key, value in message.items() if value and key not in ("role", "content", "name", *known)]
    if extra:
        raise ChatFormatError(f"{where}: {', '.join(extra)} is not supported; text messages only")
    if role == "assistant" and message.get("tool_calls"):
        return _check_call(message["tool_calls"], where)
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        content = "".join(_text_of_part(part, where) for part in content)
    if not isinstance(content, str):
        raise ChatFormatError(f"{where}: the content must be text, got {type(content).__name__}")
    return Message(role, content, calls=role == "tool")


def _check_call(calls: Any, where: str) -> Message:
    if not isinstance(calls, Sequence) or isinstance(calls, (str, bytes)) or len(calls) != 1:
        raise ChatFormatError(f"{where}: tool_calls must be a list of one call; the model makes one at a time")
    try:
        return Message("assistant", write_call(calls[0]), calls=True)
    except ValueError as exc:
        raise ChatFormatError(f"{where}: {exc}") from exc


def _text_of_part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    raise ChatFormatError(f'{where}: a part of the content must be {{"type": "text", "text": ...}}')


def encode_pieces(tokenizer: Tokenizer, pieces: Iterable[Piece]) -> list[int]:
    """Encode pieces; neighbouring texts are joined first, as a template would have written them.

    Texts after the first go on from it, which keeps SentencePiece from putting spaces in front where the
    model's own tokenizer puts none.
    """
    ids: list[int] = []
    text = ""
    for piece in pieces:
        if isinstance(piece, str):
            text += piece
        elif isinstance(piece, Spoken) and not _spells(tokenizer, piece):
            text += piece.text
        else:
            ids += tokenizer.encode(text, continuation=bool(ids)) if text else []
            ids += piece.ids if isinstance(piece, Spoken) else [_control_id(tokenizer, piece)]
            text = ""
    return ids + (tokenizer.encode(text, continuation=bool(ids)) if text else [])


def _spells(tokenizer: Tokenizer, spoken: Spoken) -> bool:
    """Whether the ids are the text and nothing else: no control token, no part of a character."""
    parts = [tokenizer.token_bytes(token) for token in spoken.ids]
    return all(parts) and bool(parts) and b"".join(parts) == spoken.text.encode(errors="replace")


def _control_id(tokenizer: Tokenizer, control: Control) -> int:
    if control is BOS:
        token = tokenizer.bos_id
    elif control is EOS:
        token = tokenizer.eos_id
    else:
        token = tokenizer.special.get(control.text)
    if token is None:
        raise ChatFormatError(
            f"the model's tokenizer has no token {control.text}, which the chat format needs; name another"
        )
    return token
