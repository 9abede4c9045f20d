"""Which chat format a model speaks: the one that is asked for, or that its template turns out to be."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from formats.errors import shown

from .chat_format import FORMATS, ChatFormat, ChatMLFormat, Llama2Format, Llama3Format
from .chat_pieces import ChatFormatError

DATE_3_1 = "26 Jul 2024"  # what the templates from Llama 3.1 on fall back to; today's would not repeat
LONGEST_TEMPLATE = 1 << 16
STRINGS = {quote: re.compile(rf"{quote}(?:[^{quote}\\]|\\.)*{quote}", re.DOTALL) for quote in ("'", '"')}


def select_format(chat: Mapping[str, Any], name: str | None = None, jinja: bool = False) -> ChatFormat | None:
    """Choose the format for a model file; None if it is a base model, without template and without a name.

    chat: the file's `chat` header; name: a format asked for, which need not be the file's own; jinja: render
    the file's template. Raises ChatFormatError if the name is unknown or the template must be asked for.
    """
    template = _text_in(chat, "template")
    if jinja:
        from .jinja_format import JinjaFormat

        if name is not None:
            raise ChatFormatError("jinja renders the model's own template: name no chat format with it")
        if not template:
            raise ChatFormatError("the model has no chat template to render with jinja")
        return JinjaFormat(template)
    own = _from_template(template) if template else None
    wanted = name or _text_in(chat, "format")
    if own is not None and wanted in (None, own.name):
        return own
    if wanted is not None:
        if wanted not in FORMATS:
            raise ChatFormatError(f"unknown chat format {shown(wanted)}; known are {', '.join(FORMATS)}")
        return FORMATS[wanted](system=None if name else _text_in(chat, "system"))
    if template:
        raise ChatFormatError(
            f"the model's chat template is none of {', '.join(FORMATS)}: name one of these (--chat-format), "
            "let the template itself run in a sandbox (--jinja), or complete plain text (--raw)"
        )
    return None


def _text_in(chat: Mapping[str, Any], key: str) -> str | None:
    value = chat.get(key)
    if value is not None and not isinstance(value, str):
        raise ChatFormatError(f"the file's chat.{key} is {shown(value)}, expected a text; convert it again")
    return value


def recognise(template: str | None) -> dict[str, str | None]:
    """Tell the built-in format of a chat template: {"format", "system"}, both None if it is none of them."""
    found = _from_template(template) if template else None
    if found is None:
        return {"format": None, "system": None}
    return {"format": found.name, "system": found.system}


def _from_template(template: str) -> ChatFormat | None:
    """Recognise a template by the marks it writes, and read its variations out of its string literals."""
    if len(template) > LONGEST_TEMPLATE:
        return None
    text = "".join(_split(template, "{#", "#}")[0])
    if re.search("think|reasoning", text):  # such templates rewrite earlier answers
        return None
    tags = [*_split(text, "{{", "}}")[1], *_split(text, "{%", "%}")[1]]
    literals = [literal for tag in tags for literal in _literals(tag)]
    trims = re.search(r"content['\"]?\]?(\s?\|\s?trim|\.strip\(\))", text) is not None
    if "<|im_start|>" in text and "<|im_end|>" in text:
        system = _chatml_system(literals) or _assigned(tags, "system_message")
        return ChatMLFormat(system=system, bos="bos_token" in text, trim=trims)
    if all(mark in text for mark in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")):
        system = _assigned(tags, "system_message")
        return Llama3Format(system=system, dates=_dates(tags, literals), trim=trims)
    if re.search(r"(bos_token\s?\+\s?['\"]|<s>)\[INST\]", text) and "<<SYS>>" in text and trims:
        return Llama2Format(system=_assigned(tags, "system_message"))
    return None


def _split(text: str, start: str, end: str) -> tuple[list[str], list[str]]:
    """Return what is outside and what is inside of the brackets start ... end."""
    outside, inside = [], []
    first, *rest = text.split(start)
    outside.append(first)
    for part in rest:
        within, closed, after = part.partition(end)
        inside.append(within)
        outside.append(after if closed else "")
    return outside, inside


def _literals(tag: str) -> list[str]:
    """Return the string literals in the code of one tag, in one pass: a template may be hostile."""
    found, position = [], 0
    while opening := re.compile("['\"]").search(tag, position):
        literal = STRINGS[opening[0]].match(tag, opening.start())
        if literal is None:
            break
        found.append(_unescape(literal[0][1:-1]))
        position = literal.end()
    return found


def _unescape(literal: str) -> str:
    """Read the escapes of a jinja literal, which are Python's."""
    try:
        return literal.encode("ascii", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError:
        return literal


def _assigned(tags: Iterable[str], name: str) -> str | None:
    """Find the text in `{% set name = "text" %}`; an empty one is none."""
    for tag in tags:
        match = re.match(rf"-?\s*set\s+{name}\s*=\s*(?=['\"])", tag)
        if match and (literals := _literals(tag[match.end() :])):
            return literals[0] or None
    return None


def _chatml_system(literals: Iterable[str]) -> str | None:
    """Find the default system message where it is written out with its control tokens."""
    begin, end = "<|im_start|>system\n", "<|im_end|>"
    for literal in literals:
        if literal.startswith(begin) and literal.rstrip("\n").endswith(end):
            return literal.rstrip("\n")[len(begin) : -len(end)] or None
    return None


def _dates(tags: Sequence[str], literals: Iterable[str]) -> str | None:
    """Return the preamble with the two dates that the template writes before the system text."""
    cutting = [literal for literal in literals if literal.startswith("Cutting Knowledge Date:")]
    today = _assigned(tags, "date_string") or DATE_3_1
    return f"{cutting[0]}Today Date: {today}\n\n" if cutting else None
