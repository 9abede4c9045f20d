"""The fields of requests: what each may be. One that is unknown or out of range is an error, never ignored."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from .errors import ApiError

MOST_VALUES = 1 << 19

Check = Callable[[str, Any], Any]  # a field's name and value to the value that is used; raises ApiError


def parse(raw: bytes) -> dict[str, Any]:
    """Read a request's body as a JSON object. Raises ApiError."""
    # Each value becomes an object, so their number is what a body costs; commas and brackets bound it beforehand.
    if sum(raw.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise ApiError(400, f"the body holds more than {MOST_VALUES} values, or commas and brackets")
    try:
        body = json.loads(raw, parse_constant=_no_number, parse_float=_finite)
        if b"\\u" in raw:
            json.dumps(body, ensure_ascii=False).encode()
    except UnicodeEncodeError as exc:
        raise ApiError(400, "a text in the body holds half of a surrogate pair") from exc
    except (ValueError, RecursionError) as exc:
        raise ApiError(400, f"the body is not JSON: {exc}") from exc
    if not isinstance(body, dict):
        raise ApiError(400, "the body must be a JSON object")
    return body


def read(body: Mapping[str, Any], fields: Mapping[str, Check], required: tuple[str, ...] = ()) -> dict[str, Any]:
    """Check each field; null is the same as leaving it out. Raises ApiError naming the first wrong one."""
    for name in body:
        if name not in fields:
            raise ApiError(400, f"unknown field {name!r:.80}", name[:80], "unknown_parameter")
    found = {name: fields[name](name, value) for name, value in body.items() if value is not None}
    for name in required:
        if name not in found:
            raise ApiError(400, f"the field {name!r} is missing", name, "missing_required_parameter")
    return found


# ==== Checks ====


def anything(name: str, value: Any) -> Any:
    """What is checked further on."""
    return value


def number(low: float, high: float) -> Check:
    def check(name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise wrong(name, value, f"a number from {low} to {high}")
        return float(value)

    return check


def whole(low: int, high: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise wrong(name, value, f"a whole number from {low} to {high}")
        return value

    return check


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def text(most: int) -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or len(value) > most:
            raise wrong(name, value, f"a text of at most {most} characters")
        return value

    return check


def only(*allowed: Any) -> Check:
    """These values and no other: a field that clients send, of which we do no more than the usual."""

    def check(name: str, value: Any) -> Any:
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise wrong(name, value, " or ".join(json.dumps(one) for one in allowed))
        return value

    return check


def texts(most: int, longest: int) -> Check:
    """One text or a list of them, none empty."""

    def check(name: str, value: Any) -> list[str]:
        values = [value] if isinstance(value, str) else value
        fine = isinstance(values, list) and len(values) <= most
        if not fine or not all(isinstance(one, str) and 0 < len(one) <= longest for one in values):
            raise wrong(name, value, f"at most {most} non-empty texts of at most {longest} characters")
        return list(values)

    return check


def ids(most: int) -> Check:
    def check(name: str, value: Any) -> list[int]:
        fine = isinstance(value, list) and len(value) <= most
        if not fine or not all(type(one) is int and 0 <= one < 2**31 for one in value):
            raise wrong(name, value, f"a list of at most {most} token ids")
        return list(value)

    return check


def biases(name: str, value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > 1024:
        raise wrong(name, value, "an object of at most 1024 token ids and numbers")
    checked = number(-100, 100)
    for token in value:
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise wrong(name, token, "an object whose keys are token ids")
    return {int(token): checked(f"{name}.{token}", bias) for token, bias in value.items()}


def inner(fields: Mapping[str, Check]) -> Check:
    """An object with fields of its own."""

    def check(name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(name, value, "an object")
        return read(value, fields)

    return check


def wrong(name: str, value: Any, wanted: str) -> ApiError:
    shown = f"{value!r:.60}" if isinstance(value, (str, int, float)) else type(value).__name__
    return ApiError(400, f"{name} must be {wanted}, got {shown}", name, "invalid_value")


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits:.40} is too large a number")
    return value
