"""From logits to the next token.

The steps, in order: the caller's processors, repeat penalty, presence and frequency penalty, logit bias, top-k,
top-p, min-p, temperature. The last four stand as in llama.cpp's default chain: the temperature does not change
what is cut.
"""

from __future__ import annotations

import math
import numbers
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from formats.errors import shown

from .errors import LogitsError

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

# From the ids so far, the prompt's included, and (vocab_size,) logits to other logits; -inf forbids a token.
Processor = Callable[[Sequence[int], Floats], Floats]

LARGEST_BIAS = 1e6
BLOCK = 256  # weights that are added up before the draw looks at single ones
REACHES = (8.0, 12.0, 16.0, math.inf)  # how far below the best logit top-p looks for candidates, as far as needed


class OptionError(ValueError):
    """An option of generation has a value that it cannot have."""


@dataclass(frozen=True)
class SamplingOptions:
    """What shapes the choice of a token; the defaults are llama.cpp's.

    temperature: 0 takes the likeliest token; top_k: 0 is off; top_p: 1 is off; min_p: 0 is off, otherwise the
    least probability relative to the likeliest token; repeat_penalty: 1 is off; repeat_last_n: how many
    tokens (prompt included) the penalties look back, -1 is all; logit_bias: {id: added to its logit}.

    Raises OptionError naming the option and its range.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0)
        _check_whole("top_k", self.top_k, 0)
        _check_number("top_p", self.top_p, 0, 1)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repeat_penalty", self.repeat_penalty, 0, 100)
        if self.repeat_penalty < 0.01:
            raise OptionError(f"repeat_penalty must be 0.01 or more, got {self.repeat_penalty}; 1 switches it off")
        _check_whole("repeat_last_n", self.repeat_last_n, -1)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @property
    def penalises(self) -> bool:
        return self.repeat_last_n != 0 and (
            self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        )


class Sampler:
    """Choose tokens by SamplingOptions with a random generator of its own.

    >>> Sampler(temperature=0)(np.array([0.5, 2.0, 2.0], np.float32))
    1

    seed: None or -1 takes a random one; the one in use can be read from `.seed`.
    Raises OptionError for a bad value, TypeError for an unknown option.
    """

    def __init__(self, *, seed: int | None = None, **options: Any) -> None:
        self.options = SamplingOptions(**options)
        check_seed(seed)
        self.seed = random.SystemRandom().getrandbits(32) if seed is None or seed == -1 else int(seed)
        self._rng = np.random.Generator(np.random.PCG64(self.seed))

    def __call__(self, logits: Floats, recent: Sequence[int] = ()) -> int:
        """Choose the next id.

        logits: (vocab_size,) float32, left as they are; recent: all ids so far, the prompt's included
        Raises OptionError if a biased id is not in the vocabulary or nothing is left to choose from,
        LogitsError for logits that are no numbers.
        """
        if self.options.temperature == 0:
            return int(np.argmax(self._adjust(logits, recent)))
        ids, weights = self._weighted(logits, recent)
        return int(ids[_draw(weights, self._rng.random())])

    def distribution(self, logits: Floats, recent: Sequence[int] = ()) -> tuple[Ids, Doubles]:
        """Return the candidates that are left and their probabilities at a temperature above 0.

        logits: (vocab_size,) float32; returns ids (n,) int64, probabilities (n,) float64 that add up to 1
        """
        ids, weights = self._weighted(logits, recent)
        return ids, weights / weights.sum(dtype=np.float64)

    def _weighted(self, logits: Floats, recent: Sequence[int]) -> tuple[Ids, Floats | Doubles]:
        """Return the candidates that are left, and numbers in proportion to their probabilities."""
        options = self.options
        ids, values, log_total = self._candidates(self._adjust(logits, recent))
        if options.top_p < 1:
            cumulative = np.cumsum(np.exp(values - log_total))
            keep = int(np.searchsorted(cumulative, options.top_p)) + 1
            ids, values = ids[:keep], values[:keep]
        if values.min() == -math.inf:
            possible = values > -math.inf
            ids, values = ids[possible], values[possible]
        if options.min_p > 0:
            near = values >= values.max() + math.log(options.min_p)
            ids, values = ids[near], values[near]
        with np.errstate(over="ignore"):  # next to temperature 0 the quotient is -inf, and its weight 0
            return ids, np.exp((values - values.max()) / values.dtype.type(max(options.temperature, 1e-30)))

    def _adjust(self, logits: Floats, recent: Sequence[int]) -> Floats:
        """Apply penalties and biases; the caller's array is copied only if there are any."""
        options = self.options
        if not math.isfinite(best := float(logits.max())) and best != -math.inf:
            raise LogitsError(f"a logit is {best}: the model's file is damaged, or a logits processor gave it")
        if options.penalises and len(recent) > 0:
            logits = _penalise(logits.copy(), recent, options)
        if options.logit_bias:
            logits = logits.copy()
            for token, bias in options.logit_bias.items():
                if token >= len(logits):
                    raise OptionError(f"logit_bias: there is no token {token}, only 0 to {len(logits) - 1}")
                logits[token] += np.float32(bias)
        best = float(logits.max())
        if best == -math.inf:
            raise OptionError("every token is forbidden, by logit_bias or a logits processor")
        return logits

    def _candidates(self, logits: Floats) -> tuple[Ids, Floats | Doubles, float]:
        """Return ids by falling logit (by id where no cut needs the order), their logits, and log(sum(exp))
        over those that probabilities are measured against: the top-k survivors, or the whole vocabulary."""
        options = self.options
        if 0 < options.top_k < len(logits):
            ids = _largest(logits, options.top_k)
            values = logits[ids].astype(np.float64)
            return ids, values, _log_sum_exp(values)
        if options.top_p == 1 and options.min_p == 0:  # nothing is cut, so everything is passed over only once
            return np.arange(len(logits)), logits, 0.0
        log_total, best = _log_sum_exp(logits), float(logits.max())
        # What min-p is certain to cut need not be looked at; its exact cut follows.
        lowest = best + math.log(options.min_p) - 1e-3 if options.min_p > 0 else -math.inf
        if options.top_p == 1:
            ids = np.flatnonzero(logits >= lowest)
            return ids, logits[ids].astype(np.float64), log_total
        for reach in REACHES:
            ids = np.flatnonzero(logits >= max(lowest, best - reach))
            if best - reach <= lowest or np.exp(logits[ids] - log_total).sum() > options.top_p:
                break
        values = logits[ids].astype(np.float64)
        order = np.argsort(-values, kind="stable")
        return ids[order], values[order], log_total


def process(logits: Floats, ids: Sequence[int], processors: Sequence[Processor]) -> Floats:
    """Pass logits through the caller's processors; the array given is left as it is.

    Raises OptionError if what comes back are no logits of the same number.
    """
    if not processors:
        return logits
    found = logits.copy()
    for processor in processors:
        found = np.asarray(processor(ids, found))
        if found.shape != logits.shape or found.dtype.kind != "f":
            raise OptionError(
                f"a logits processor must return {len(logits)} floating-point logits, "
                f"it returned {found.dtype} of shape {found.shape}"
            )
    return found.astype(np.float32, copy=False)


def check_seed(seed: int | None) -> None:
    """Raise OptionError unless the seed is None, -1 or a whole number of 32 bits."""
    if seed is not None:
        _check_whole("seed", seed, -1, 2**32 - 1)


def log_probabilities(logits: Floats, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Return log p of `token` and of the `top` likeliest ids, under the model itself, before any sampling.

    logits: (vocab_size,) float32
    """
    log_total = _log_sum_exp(logits.astype(np.float64))
    best = _largest(logits, min(top, len(logits))) if top > 0 else ()
    return float(logits[token]) - log_total, [(int(i), float(logits[i]) - log_total) for i in best]


def _penalise(logits: Floats, recent: Sequence[int], options: SamplingOptions) -> Floats:
    """llama.cpp's penalties over the last repeat_last_n ids, in place."""
    window = recent if options.repeat_last_n < 0 else recent[-options.repeat_last_n :]
    seen, counts = np.unique(np.asarray(window, dtype=np.int64), return_counts=True)
    values = logits[seen]
    penalty = np.float32(options.repeat_penalty)
    # A negative logit is multiplied: dividing it would make the token likelier.
    values = np.where(values <= 0, values * penalty, values / penalty)
    values -= counts.astype(np.float32) * np.float32(options.frequency_penalty)
    values -= np.float32(options.presence_penalty)
    logits[seen] = values
    return logits


def _largest(logits: Floats, count: int) -> Ids:
    """Return the ids of the largest logits in falling order; among equals the lowest ids come first."""
    if count < len(logits):
        limit = np.partition(logits, len(logits) - count)[len(logits) - count]
        above = np.flatnonzero(logits > limit)
        ids = np.concatenate([above, np.flatnonzero(logits == limit)[: count - len(above)]])
    else:
        ids = np.arange(len(logits))
    return ids[np.lexsort((ids, -logits[ids]))]


def _draw(weights: Floats | Doubles, chance: float) -> int:
    """Choose a place in proportion to the weights. weights: (n,), some above 0; chance: from 0 to 1, without 1"""
    ends = np.cumsum(np.add.reduceat(weights, np.arange(0, len(weights), BLOCK), dtype=np.float64))
    wanted = min(chance * ends[-1], np.nextafter(ends[-1], 0))  # rounding must not push it past the last of all
    block = int(np.searchsorted(ends, wanted, side="right"))
    part = weights[block * BLOCK : (block + 1) * BLOCK]
    inside = np.cumsum(part, dtype=np.float64) + (ends[block - 1] if block else 0.0)
    return block * BLOCK + int(min(np.searchsorted(inside, wanted, side="right"), np.flatnonzero(part)[-1]))


def _log_sum_exp(values: Floats | Doubles) -> float:
    best = values.max()
    return float(best) + math.log(float(np.exp(values - best).sum(dtype=np.float64)))


def _check_number(name: str, value: Any, low: float, high: float = math.inf) -> None:
    wanted = f"{low} or more" if high == math.inf else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionError(f"{name} must be a number {wanted}, got {shown(value)}")
    if not math.isfinite(value) or not low <= float(value) <= high:
        raise OptionError(f"{name} must be {wanted}, got {value}")


def _check_whole(name: str, value: Any, low: int, high: int | None = None) -> None:
    wanted = f"{low} or more" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise OptionError(f"{name} must be a whole number, {wanted}, got {shown(value)}")
    if int(value) < low or (high is not None and int(value) > high):
        raise OptionError(f"{name} must be {wanted}, got {value}")


def _checked_bias(bias: Any) -> dict[int, float]:
    """Check {id: bias}; ids may be texts of digits, as they are in JSON. -inf forbids a token."""
    if not isinstance(bias, Mapping):
        raise OptionError(f"logit_bias must map token ids to numbers, got {shown(bias)}")
    checked: dict[int, float] = {}
    for token, value in bias.items():
        if isinstance(token, str) and token.isascii() and token.isdigit():
            token = int(token)
        _check_whole("logit_bias: a token id", token, 0)
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise OptionError(f"logit_bias[{token}] must be a number, got {shown(value)}")
        if math.isnan(value) or value == math.inf:
            raise OptionError(f"logit_bias[{token}] must be finite or -inf, got {value}")
        if value != -math.inf and not -LARGEST_BIAS <= float(value) <= LARGEST_BIAS:
            raise OptionError(f"logit_bias[{token}] must be from -1e6 to 1e6 or -inf, got {value}")
        checked[int(token)] = float(value)
    return checked
