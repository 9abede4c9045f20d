"""The sampler on distributions small enough to work out by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from runtime.errors import LogitsError
from runtime.sampler import OptionError, Sampler, SamplingOptions, _draw, log_probabilities

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
FOUR = np.log(np.array([0.1, 0.4, 0.3, 0.2], np.float32))


def chances(logits: np.ndarray = FOUR, recent: tuple[int, ...] = (), **options: Any) -> list[float]:
    """Probability of each id, 0 for those that were cut."""
    ids, probabilities = Sampler(seed=0, **{**PLAIN, **options}).distribution(logits, recent)
    full = np.zeros(len(logits))
    full[ids] = probabilities
    return [round(p, 6) for p in full]


def softmax(logits: list[float]) -> list[float]:
    weights = np.exp(np.array(logits) - max(logits))
    return [round(p, 6) for p in weights / weights.sum()]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.3, 0.2]),
        ({"top_k": 1}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_k": 9}, [0.1, 0.4, 0.3, 0.2]),
        ({"top_p": 0.0}, [0, 1, 0, 0]),
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 0.65}, [0, 4 / 7, 3 / 7, 0]),
        ({"top_p": 0.75}, [0, 4 / 9, 3 / 9, 2 / 9]),
        ({"min_p": 0.6}, [0, 4 / 7, 3 / 7, 0]),
        ({"min_p": 1.0}, [0, 1, 0, 0]),
        ({"top_k": 2, "top_p": 0.5}, [0, 1, 0, 0]),  # 4/7 >= 0.5: measured against the top-k survivors
        ({"top_k": 3, "min_p": 0.7}, [0, 4 / 7, 3 / 7, 0]),
        ({"temperature": 0.5}, [1 / 30, 16 / 30, 9 / 30, 4 / 30]),
        ({"temperature": 0.5, "top_p": 0.65}, [0, 16 / 25, 9 / 25, 0]),  # cut before the temperature
        ({"temperature": 1e-300}, [0, 1, 0, 0]),
        ({"logit_bias": {0: math.log(4), 1: -math.inf}}, [0.4 / 0.9, 0, 0.3 / 0.9, 0.2 / 0.9]),
        ({"logit_bias": {"1": -math.inf}}, [1 / 6, 0, 3 / 6, 2 / 6]),
    ],
)
def test_probabilities(options: dict[str, Any], expected: list[float]) -> None:
    assert chances(**options) == pytest.approx(expected, abs=2e-6)


def test_repeat_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.0], np.float32)
    got = chances(logits, (0, 1, 0), repeat_penalty=2.0)
    assert got == softmax([1.0, -4.0, 1.0, 0.0])


def test_presence_counts_once_frequency_each_time() -> None:
    logits = np.array([2.0, -2.0, 1.0, 0.0], np.float32)
    got = chances(logits, (0, 1, 0), presence_penalty=0.5, frequency_penalty=0.25)
    assert got == softmax([1.0, -2.75, 1.0, 0.0])


@pytest.mark.parametrize(
    ("window", "expected"), [(0, [2.0, 2.0]), (1, [2.0, 1.0]), (2, [1.0, 1.0]), (-1, [1.0, 1.0])]
)
def test_penalties_look_back_repeat_last_n(window: int, expected: list[float]) -> None:
    logits = np.array([2.0, 2.0], np.float32)
    assert chances(logits, (0, 1), repeat_penalty=2.0, repeat_last_n=window) == softmax(expected)


def test_the_callers_logits_are_left_alone() -> None:
    logits = FOUR.copy()
    logits.flags.writeable = False
    Sampler(seed=1, repeat_penalty=1.3, logit_bias={2: 1.0})(logits, [1, 2])
    assert np.array_equal(logits, FOUR)


def test_temperature_zero_is_argmax_and_the_lowest_id_wins() -> None:
    logits = np.array([1.0, 3.0, 3.0, 3.0], np.float32)
    assert Sampler(temperature=0)(logits) == 1
    assert Sampler(temperature=0, logit_bias={1: -1.0})(logits) == 2
    assert Sampler(temperature=0, repeat_penalty=2.0)(logits, [1, 2]) == 3


def test_among_equals_top_k_keeps_the_lowest_ids() -> None:
    assert chances(np.zeros(6, np.float32), top_k=2) == [0.5, 0.5, 0, 0, 0, 0]


def test_frequencies_follow_the_probabilities() -> None:
    sampler = Sampler(seed=7, **PLAIN)
    counts = np.bincount([sampler(FOUR) for _ in range(20000)], minlength=4) / 20000
    assert counts == pytest.approx([0.1, 0.4, 0.3, 0.2], abs=0.01)


@pytest.mark.parametrize("places", [[0], [255, 256], [999], [3, 300, 998]])
def test_a_whole_vocabulary_is_drawn_from_in_its_proportions(places: list[int]) -> None:
    logits = np.full(1000, -math.inf, np.float32)
    logits[places] = np.log(np.arange(1, len(places) + 1))
    sampler = Sampler(seed=7, **PLAIN)
    counts = np.bincount([sampler(logits) for _ in range(4000)], minlength=1000) / 4000
    assert counts[places] == pytest.approx(np.arange(1, len(places) + 1) / sum(range(1, len(places) + 1)), abs=0.03)
    assert counts[places].sum() == 1


def test_every_chance_finds_a_place_that_has_weight() -> None:
    rng = np.random.default_rng(3)
    for size in (1, 255, 256, 257, 5000):
        weights = np.where(rng.random(size) < 0.1, rng.random(size), 0).astype(np.float32)
        weights[rng.integers(size)] = 1e-30
        ends = np.cumsum(weights, dtype=np.float64)
        for chance in (0.0, *rng.random(50), np.nextafter(1, 0)):
            place = _draw(weights, chance)
            assert weights[place] > 0
            assert ends[place] - weights[place] <= chance * ends[-1] * (1 + 1e-9) + 1e-12
            assert ends[place] >= chance * ends[-1] * (1 - 1e-9)


def test_a_seed_repeats_its_draws_and_another_differs() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(seed=seed, **PLAIN)
        return [sampler(FOUR) for _ in range(50)]

    assert draw(3) == draw(3) != draw(4)


def test_a_missing_seed_is_drawn_and_told() -> None:
    seeds = {Sampler().seed, Sampler(seed=None).seed, Sampler(seed=-1).seed}
    assert len(seeds) == 3 and all(0 <= seed < 2**32 for seed in seeds)
    assert Sampler(seed=5).seed == 5


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_top_p_without_top_k_over_a_large_vocabulary(top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=128256).astype(np.float32)
    ids, probabilities = Sampler(seed=0, **{**PLAIN, "top_p": top_p}).distribution(logits)
    exact = np.exp(logits.astype(np.float64))
    order = np.argsort(-exact, kind="stable")
    cumulative = np.cumsum(exact[order]) / exact.sum()
    wanted = order[: int(np.searchsorted(cumulative, top_p)) + 1]
    assert ids.tolist() == wanted.tolist()
    assert probabilities == pytest.approx(exact[wanted] / exact[wanted].sum(), rel=1e-9)


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("temperature", -0.1, "temperature must be 0 or more, got -0.1"),
        ("temperature", math.nan, "temperature"),
        ("temperature", True, "temperature must be a number"),
        ("top_k", -1, "top_k must be 0 or more"),
        ("top_k", 1.5, "top_k must be a whole number"),
        ("top_p", 1.01, "top_p must be from 0 to 1, got 1.01"),
        ("min_p", "a", "min_p must be a number"),
        ("repeat_penalty", 0, "repeat_penalty must be 0.01 or more"),
        ("repeat_last_n", -2, "repeat_last_n must be -1 or more"),
        ("presence_penalty", 2.5, "presence_penalty must be from -2 to 2"),
        ("frequency_penalty", -3, "frequency_penalty"),
        ("logit_bias", [1], "logit_bias must map"),
        ("logit_bias", {"x": 1}, "a token id must be a whole number"),
        ("logit_bias", {-1: 1}, "a token id must be 0 or more"),
        ("logit_bias", {1: math.inf}, "finite or -inf"),
    ],
)
def test_bad_values_name_the_option_and_the_range(option: str, value: Any, text: str) -> None:
    with pytest.raises(OptionError) as caught:
        SamplingOptions(**{option: value})
    assert text in str(caught.value)


@pytest.mark.parametrize("seed", [-2, 2**32, 1.0, "1"])
def test_bad_seeds(seed: Any) -> None:
    with pytest.raises(OptionError, match="seed"):
        Sampler(seed=seed)


def test_unknown_options_and_impossible_biases() -> None:
    with pytest.raises(TypeError, match="tfs_z"):
        Sampler(tfs_z=1.0)
    with pytest.raises(OptionError, match="there is no token 4, only 0 to 3"):
        Sampler(logit_bias={4: 1.0})(FOUR)
    with pytest.raises(OptionError, match="every token is forbidden"):
        Sampler(logit_bias=dict.fromkeys(range(4), -math.inf))(FOUR)
    with pytest.raises(LogitsError, match="a logit is nan"):
        Sampler()(np.array([0.0, math.nan], np.float32))


def test_log_probabilities() -> None:
    chosen, best = log_probabilities(FOUR, 0, 2)
    assert chosen == pytest.approx(math.log(0.1), abs=1e-6)
    assert [token for token, _ in best] == [1, 2]
    assert [p for _, p in best] == pytest.approx([math.log(0.4), math.log(0.3)], abs=1e-6)
    assert log_probabilities(FOUR, 3, 0)[1] == []
