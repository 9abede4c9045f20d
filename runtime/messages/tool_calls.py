"""Functions that a model may call, in the form that Llama 3.1 was taught: one JSON object as the whole answer."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from formats.errors import shown

from ..sampler import OptionError

NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
PREAMBLE = (
    "Given the following functions, please respond with a JSON for a function call with its proper arguments that "
    'best answers the given prompt.\n\nRespond in the format {"name": function name, "parameters": dictionary of '
    "argument name and its value}.Do not use variables.\n\n"
)


@dataclass(frozen=True)
class Tools:
    """The functions of one request. schema: what the answer must be, None where the model may also just talk."""

    names: tuple[str, ...]
    text: str
    schema: Mapping[str, Any] | None


def read_tools(tools: Any, choice: Any) -> Tools | None:
    """Check OpenAI's `tools` and `tool_choice`; None if there is nothing to call. Raises OptionError."""
    if tools is not None and (isinstance(tools, (str, bytes, Mapping)) or not isinstance(tools, Sequence)):
        raise OptionError(f"tools must be a list of functions, got {tools!r:.60}")
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools or ())]
    names = tuple(function["name"] for function in functions)
    if len(set(names)) < len(names):
        raise OptionError("tools has two functions of the same name")
    if choice not in (None, "none", "auto", "required") and not isinstance(choice, Mapping):
        raise OptionError(f"tool_choice must be none, auto, required or a function, got {choice!r:.60}")
    if not functions and choice not in (None, "none", "auto"):
        raise OptionError("tool_choice needs tools")
    if not functions or choice == "none":
        return None
    text = PREAMBLE + "".join(json.dumps(tool, ensure_ascii=False, indent=4) + "\n\n" for tool in tools or ())
    if isinstance(choice, Mapping):
        functions = [function for function in functions if function["name"] == _named(choice)]
        if not functions:
            raise OptionError(f"tool_choice names {shown(_named(choice))}, which is not among the tools")
    schema = None if choice in (None, "auto") else {"anyOf": [_call_schema(function) for function in functions]}
    return Tools(names, text, schema)


def read_calls(text: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Read an answer as a call of one of these functions, in OpenAI's form; empty if it is something else."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(call, dict) or call.get("name") not in names:
        return []
    arguments = call.get("parameters", call.get("arguments", {}))
    if not isinstance(arguments, dict):
        return []
    function = {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    return [{"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}]


def write_call(call: Any) -> str:
    """Write a call of an earlier answer as the model wrote it. Raises ValueError that says what is wrong."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError('a tool call must be {"type": "function", "function": {"name": ..., "arguments": ...}}')
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError) as exc:
            raise ValueError("the arguments of a tool call are not JSON") from exc
    return json.dumps({"name": function["name"], "parameters": arguments}, ensure_ascii=False)


def _function(tool: Any, where: str) -> Mapping[str, Any]:
    function = tool.get("function") if isinstance(tool, Mapping) and tool.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise OptionError(f'{where} must be {{"type": "function", "function": {{...}}}}')
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise OptionError(f"{where}: a function's name is 1 to 64 letters, digits, _ and -, got {name!r:.80}")
    if extra := set(function) - {"name", "description", "parameters", "strict"}:
        raise OptionError(f"{where}: unknown field {sorted(map(str, extra))[0]!r:.60}")
    if not isinstance(function.get("parameters", {}), Mapping):
        raise OptionError(f"{where}: parameters must be a JSON schema")
    try:
        json.dumps(tool, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise OptionError(f"{where} is not JSON: {exc}") from exc
    return function


def _named(choice: Mapping[str, Any]) -> str:
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise OptionError('tool_choice must be {"type": "function", "function": {"name": ...}}')
    return name


def _call_schema(function: Mapping[str, Any]) -> dict[str, Any]:
    parameters = function.get("parameters") or {"type": "object", "properties": {}, "additionalProperties": False}
    properties = {"name": {"const": function["name"]}, "parameters": parameters}
    return {
        "type": "object", "properties": properties, "required": ["name", "parameters"], "additionalProperties": False
    }  # fmt: skip
