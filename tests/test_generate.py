"""The loop of generation over a model that says what it is told."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest

from runtime.generate import Run, Session, common_length, generate, generate_text
from runtime.sampler import Sampler
from runtime.stops import StopStrings
from tests.byte_tokenizer import ByteTokenizer
from tests.fake_model import FakeModel, says

PROMPT = list(b"prompt")
END = 257  # </s>


def session(model: FakeModel, n_ctx: int = 64, n_batch: int = 4) -> Session:
    return Session(model, n_ctx, n_batch)  # type: ignore[arg-type]


def run(prompt: Sequence[int] = PROMPT, **options: Any) -> Run:
    return Run(prompt, Sampler(temperature=0, seed=1), **{"stop_ids": {END}, **options})


def texts(model: FakeModel, job: Run) -> list[str]:
    return [piece.text for piece in generate_text(session(model), ByteTokenizer(), job)]  # type: ignore[arg-type]


def answering(answer: bytes, then: int = END) -> FakeModel:
    return FakeModel(says(PROMPT, answer, then))


def test_it_ends_at_a_stop_id() -> None:
    model, job = answering(b"hello"), run()
    assert bytes(generate(session(model), job)) == b"hello"
    stats = job.stats
    assert (stats.finish_reason, stats.seed) == ("stop", 1)
    assert (stats.prompt_tokens, stats.reused_tokens, stats.generated_tokens) == (6, 0, 5)
    assert stats.prompt_seconds > 0 and stats.seconds > 0 and stats.prompt_rate > 0 and stats.rate > 0
    assert model.calls == [6, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(("most", "calls"), [(0, [6]), (1, [6]), (3, [6, 1, 1])])
def test_max_tokens_and_no_evaluation_that_nobody_wants(most: int, calls: list[int]) -> None:
    model, job = answering(b"hello"), run(max_tokens=most)
    assert bytes(generate(session(model), job)) == b"hello"[:most]
    assert job.stats.finish_reason == "length" and model.calls == calls


def test_generation_goes_on_past_the_context() -> None:
    job = run(max_tokens=40)
    ids = list(generate(session(answering(b"", then=65), n_ctx=8), job))
    assert ids == [65] * 40


# ==== Reuse ====


def test_the_common_beginning_is_not_read_again() -> None:
    model = answering(b"hello")
    kept = session(model)
    list(generate(kept, run()))
    longer, other = run([*PROMPT, *b"hello there"]), run([*PROMPT[:3], *b"xyz"])
    list(generate(kept, longer))
    assert longer.stats.reused_tokens == 11 and kept.ids[:17] == [*PROMPT, *b"hello there"]
    list(generate(kept, other))
    assert other.stats.reused_tokens == 3
    assert kept.cache.seen == kept.ids  # type: ignore[attr-defined]


def test_at_least_one_token_is_evaluated() -> None:
    model = answering(b"hello")
    kept = session(model)
    first = list(generate(kept, run()))
    again = run()
    assert list(generate(kept, again)) == first
    assert again.stats.reused_tokens == len(PROMPT) - 1


def test_what_slid_out_means_a_fresh_start() -> None:
    kept = session(answering(b"", then=65), n_ctx=8)
    list(generate(kept, run(max_tokens=20)))
    again = run(max_tokens=1, sinks=2)
    list(generate(kept, again))
    assert again.stats.reused_tokens == 0 and kept.ids == PROMPT
    assert kept.cache.sinks == 2


def test_other_sinks_are_taken_over_with_what_is_kept() -> None:
    kept = session(answering(b"a"))
    list(generate(kept, run(sinks=2)))
    again = run(sinks=5)
    list(generate(kept, again))
    assert kept.cache.sinks == 5 and again.stats.reused_tokens == len(PROMPT) - 1


def test_other_sinks_after_tokens_have_slid_out_mean_a_fresh_start() -> None:
    kept = session(answering(b"", then=65), n_ctx=8)
    list(generate(kept, run(max_tokens=20)))
    longer = run([*kept.ids, 66], max_tokens=1, sinks=2)
    list(generate(kept, longer))
    assert longer.stats.reused_tokens == 0 and kept.cache.sinks == 2


# ==== Cancelling ====


def test_cancelled_before_and_between_chunks_of_the_prompt() -> None:
    model, cancel = answering(b"hello"), threading.Event()
    kept = session(model)

    def progress(done: int, total: int) -> None:
        assert total == 6
        if done == 4:
            cancel.set()

    job = run(cancel=cancel, progress=progress)
    assert list(generate(kept, job)) == []
    assert job.stats.finish_reason == "cancelled" and kept.ids == PROMPT[:4]
    unstarted = run(cancel=cancel)
    assert list(generate(kept, unstarted)) == [] and kept.ids == PROMPT[:4]
    cancel.clear()
    after = run(cancel=cancel)
    assert bytes(generate(kept, after)) == b"hello" and after.stats.reused_tokens == 4


def test_cancelled_while_decoding() -> None:
    cancel = threading.Event()
    kept = session(answering(b"hello"))
    job = run(cancel=cancel)
    got = []
    for token in generate(kept, job):
        got.append(token)
        if len(got) == 2:
            cancel.set()
    assert bytes(got) == b"he" and job.stats.finish_reason == "cancelled"
    assert kept.ids == [*PROMPT, *b"h"] == kept.cache.seen  # type: ignore[attr-defined]


def test_closing_the_iterator_leaves_the_session_in_order() -> None:
    kept, job = session(answering(b"hello")), run()
    pieces = generate_text(kept, ByteTokenizer(), job)  # type: ignore[arg-type]
    assert next(pieces).text == "h"
    pieces.close()  # type: ignore[attr-defined]
    assert job.stats.finish_reason == "cancelled"
    assert bytes(generate(kept, run())) == b"hello"


def test_an_interrupt_inside_the_model_leaves_the_session_in_order() -> None:
    model = answering(b"hello")
    kept = session(model)
    list(generate(kept, run()))
    model.fail = True
    with pytest.raises(KeyboardInterrupt):
        list(generate(kept, run([*PROMPT, 1, 2])))
    assert kept.ids == kept.cache.seen == PROMPT  # type: ignore[attr-defined]
    model.fail = False
    assert bytes(generate(kept, run())) == b"hello"


# ==== Text ====


def test_characters_are_never_broken() -> None:
    family = "👨\u200d👩\u200d👧 naïve 日本"
    got = texts(answering(family.encode()), run())
    assert "".join(got) == family
    assert got == list(family)


def test_an_answer_that_ends_inside_a_character() -> None:
    assert "".join(texts(answering("é".encode()), run(max_tokens=1))) == "\ufffd"


@pytest.mark.parametrize(
    ("answer", "stops", "expected", "reason"),
    [
        (b"one END two", ["END"], "one ", "stop"),
        (b"one EN two", ["END"], "one EN two", "stop"),
        (b"one EN", ["END"], "one EN", "stop"),
        (b"ENEND", ["END"], "EN", "stop"),
        (b"aab", ["ab"], "a", "stop"),
        (b"x\n\nUser: y", ["\n\nUser:", "\nUser"], "x\n", "stop"),
        ("日本語".encode(), ["語"], "日本", "stop"),
        (b"stop", ["stop"], "", "stop"),
    ],
)
def test_stop_strings_across_tokens(answer: bytes, stops: list[str], expected: str, reason: str) -> None:
    job = run(stop=stops)
    assert "".join(texts(answering(answer), job)) == expected
    assert job.stats.finish_reason == reason


def test_text_is_held_back_only_while_it_could_be_a_stop() -> None:
    assert texts(answering(b"a EN b"), run(stop=["END"])) == ["a", " ", "EN ", "b"]


def test_a_stop_string_cut_short_by_max_tokens_is_text() -> None:
    job = run(stop=["END"], max_tokens=2)
    assert "".join(texts(answering(b"END"), job)) == "EN" and job.stats.finish_reason == "length"


def test_each_token_of_the_text_is_in_one_piece() -> None:
    job = run(stop=["END"])
    answer = "aé EN END rest".encode()
    pieces = list(generate_text(session(answering(answer)), ByteTokenizer(), job))  # type: ignore[arg-type]
    tokens = [item for piece in pieces for item in piece.tokens]
    assert bytes(token for token, _ in tokens) == "aé EN ".encode()
    assert [offset for _, offset in tokens] == [0, 1, 1, 2, 3, 4, 5]


def test_every_token_is_watched_before_it_is_shown() -> None:
    seen: list[tuple[int, int]] = []
    job = run(watch=lambda token, logits: seen.append((token, int(logits.argmax()))))
    list(generate(session(answering(b"ab")), job))
    assert seen == [(97, 97), (98, 98)]


def test_stop_strings_by_hand() -> None:
    stops = StopStrings(["END", "E!"])
    assert [stops.push(text) for text in ("the E", "NE", "!", "x")] == ["the ", "EN", "", "x"]
    assert stops.found and StopStrings([]).push("all") == "all"


def test_common_length() -> None:
    assert common_length([], [1]) == common_length([2], [1]) == 0
    assert common_length([1, 2, 3], [1, 2]) == common_length([1, 2], [1, 2, 3]) == 2
    assert common_length([1, 2, 3], [1, 9, 3]) == 1
