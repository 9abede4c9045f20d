"""Checks of what callers may ask for: everything wrong is found before a model is loaded or a token read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np

from formats.errors import HeaderError, shown

from .errors import CacheError
from .openai_shapes import LogProbs
from .ring.codecs import CODECS, side_codecs
from .sampler import OptionError, SamplingOptions, check_seed
from .window import overflow_error

DEFAULT_N_BATCH = 256
MAX_LOGPROBS = 20
# What generation_config.json calls our options
FILE_OPTIONS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def check_arguments(
    *, n_ctx: Any = None, n_batch: Any = None, n_threads: Any = None, n_threads_batch: Any = None,
    keep: Any = None, kv: Any = "auto", seed: Any = None,
) -> None:  # fmt: skip
    """Check the arguments of Llama that need no model. Raises OptionError naming the first wrong one."""
    for name, value, least in (
        ("n_ctx", n_ctx, 2), ("n_batch", n_batch, 1), ("n_threads", n_threads, 1),
        ("n_threads_batch", n_threads_batch, 1), ("keep", keep, 0),
    ):  # fmt: skip
        if value is not None:
            _check_whole(name, value, least)
    ring_codec(kv)
    check_seed(seed)


def ring_codec(kv: Any) -> str:
    """Return the codec of the ring that "auto", a codec, or "k=CODEC,v=CODEC" asks for. Raises OptionError."""
    if kv == "auto":
        return "auto"
    try:
        keys, values = side_codecs(kv)
    except (CacheError, TypeError) as exc:
        raise OptionError(f"kv must be auto, {', '.join(CODECS)} or k=CODEC,v=CODEC, got {shown(kv)}") from exc
    return keys if keys == values else f"k={keys},v={values}"


def check_max_tokens(max_tokens: Any) -> None:
    _check_whole("max_tokens", max_tokens, -1)


def check_stop(stop: Any) -> list[str]:
    """Return the stop strings as a list. Raises OptionError for anything but texts, or an empty one."""
    stops = [stop] if isinstance(stop, str) or not isinstance(stop, (Sequence, type(None))) else list(stop or ())
    for text in stops:
        if not isinstance(text, str) or not text:
            raise OptionError(f"stop must be one or more non-empty texts, got {shown(text)}")
    return stops


def check_ids(ids: Any, wanted: str) -> np.ndarray:
    """Return ids as (n,) integers. Raises OptionError with the text `wanted` for something else."""
    try:
        array = np.asarray(ids)
    except ValueError:  # lists of different lengths
        raise OptionError(wanted) from None
    if array.size and (array.ndim != 1 or array.dtype.kind not in "iu"):
        raise OptionError(wanted)
    return array


def check_known(ids: np.ndarray, vocab_size: int) -> None:
    """Raise OptionError naming the first of some ids that no token has."""
    unknown = ids[(ids < 0) | (ids >= vocab_size)]
    if unknown.size:
        raise OptionError(f"there is no token {unknown[0]}; ids go from 0 to {vocab_size - 1}")


def check_prompt(ids: Any, vocab_size: int, n_ctx: int | None = None) -> list[int]:
    """Return the ids of a prompt as a list; n_ctx: the most there may be, None for any number.

    Raises OptionError for something else than ids of the vocabulary, ContextOverflowError for too many.
    """
    array = check_ids(ids, "a prompt must be a text or a list of token ids")
    if array.size == 0:
        raise OptionError("the prompt is empty; give it at least one token")
    check_known(array, vocab_size)
    if n_ctx is not None and len(array) > n_ctx:
        raise overflow_error(len(array), n_ctx)
    return [int(i) for i in array]


def check_bias(bias: Mapping[int, float], vocab_size: int) -> None:
    """Raise OptionError if a logit bias names a token that does not exist."""
    wrong = [token for token in bias if token >= vocab_size]
    if wrong:
        raise OptionError(f"logit_bias: there is no token {wrong[0]}; ids go from 0 to {vocab_size - 1}")


def check_signals(cancel: Any, progress: Any) -> None:
    """Raise OptionError unless these are what a run can look at and call, or None."""
    if cancel is not None and not callable(getattr(cancel, "is_set", None)):
        raise OptionError(f"cancel must be a threading.Event, got {shown(cancel)}")
    if progress is not None and not callable(progress):
        raise OptionError(f"progress must be a function of (done, total), got {shown(progress)}")


def callables(value: Any, name: str) -> list[Callable[..., Any]]:
    """Return one function or several as a list. Raises OptionError for anything else."""
    found = [] if value is None else [value] if callable(value) and not isinstance(value, list) else value
    if not isinstance(found, (list, tuple)) or not all(map(callable, found)):
        raise OptionError(f"{name} must be a function or a list of functions, got {shown(value)}")
    return list(found)


def log_probs(top: Any, name: str) -> LogProbs | None:
    """Return a collector of log probabilities, or None if none are wanted."""
    if top is None:
        return None
    _check_whole(name, top, 0)
    if top > MAX_LOGPROBS:
        raise OptionError(f"{name} must be from 0 to {MAX_LOGPROBS}, got {top}")
    return LogProbs(int(top))


def defaults_of_file(generation: Any, path: str) -> dict[str, Any]:
    """Return the sampling options that a model file sets. Raises HeaderError if a value is impossible."""
    if generation is None:
        return {}
    if not isinstance(generation, Mapping):
        raise HeaderError(path, f"generation must be an object, found {shown(generation)}; convert it again")
    found = {
        ours: generation[theirs]
        for theirs, ours in FILE_OPTIONS.items()
        if generation.get(theirs) is not None
    }
    try:
        SamplingOptions(**found)
    except OptionError as exc:
        raise HeaderError(path, f"generation: {exc}; convert it again") from exc
    return found


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < least:
        raise OptionError(f"{name} must be a whole number, {least} or more, got {shown(value)}")
