"""The needle test: where facts are hidden, that they are asked for, and that what is told of the answers is true."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.conversion.convert import convert
from formats.sources.source import open_source
from runtime.model import Model
from runtime.tokenizer import Tokenizer, load_tokenizer
from tests import tiny
from tools import needle


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("needle")
    convert(open_source(tiny.folder_with_tokenizer(folder / "source")), folder / "tiny.trit", "f16")
    return folder / "tiny.trit"


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return Model.load(path, "numpy", activations="f32")


@pytest.fixture(scope="module")
def tokenizer(model: Model) -> Tokenizer:
    return load_tokenizer(model.file)


def test_facts_stand_where_they_are_asked_to(tokenizer: Tokenizer) -> None:
    depths = [0.0, 0.25, 0.5, 1.0]
    hays = needle.hide(tokenizer, needle.made_up(), 1000, depths, 3)
    assert [hay.depth for hay in hays] == [d for d in reversed(depths) for _ in range(3)]
    for hay in hays:
        text = tokenizer.decode(hay.prompt)
        number = tokenizer.decode(hay.answer).strip()
        assert 900 < len(hay.prompt) + len(hay.answer) <= 1000
        assert len(number) == 5 and number.isdigit() and text.count(number) == 1
        filler, question = text.split("\n\n")
        assert question.endswith(" is") and number not in question
        place = question.rsplit(" of ", 1)[1].removesuffix(" is")
        fact = needle.NEEDLE.format(place=place, number=number)
        before, after = filler.split(fact)
        assert len(before) / len(before + after) == pytest.approx(hay.depth, abs=0.05)
    assert len({tuple(hay.answer) for hay in hays}) == 3


def test_a_text_of_ones_own(tokenizer: Tokenizer) -> None:
    sentences = needle.sentences_of("One is here. And two!  " + "word " * 100)
    first = list(itertools.islice(sentences, 6))
    assert first[:2] == ["One is here.", "And two!"] and first[5] == "One is here."
    assert all(len(s.split()) <= needle.LONGEST for s in first)
    hay = needle.hide(tokenizer, sentences, 900, [0.5], 1)[0]
    assert "And two! word" in tokenizer.decode(hay.prompt)
    with pytest.raises(needle.UserError, match="empty"):
        needle.sentences_of(" \n")
    with pytest.raises(needle.UserError, match="no room"):
        needle.hide(tokenizer, needle.made_up(), 160, [0.5], 1)


class Rememberer:
    """Says the first number that it has read and not forgotten; it forgets all but the newest `memory` ids."""

    def __init__(self, tokenizer: Tokenizer, memory: int) -> None:
        self.tokenizer, self.memory, self.seen = tokenizer, memory, np.zeros(0, int)
        self.read = 0

    def trim(self, n: int) -> None:
        assert n <= len(self.seen)
        self.seen = self.seen[:n]

    def forward(self, ids: Any, ring: Any, logits: str | None) -> Any:
        rows = []
        for token in ids:
            self.seen, self.read = np.append(self.seen, token), self.read + 1
            text = self.tokenizer.decode(list(self.seen[-self.memory :]))
            _, told, rest = text.partition("is ")
            said = text.rpartition(" is")[2]
            wanted = (" " + rest[:5])[len(said) :] if told else ""
            row = np.zeros(512, np.float32)
            if wanted and (" " + rest[:5]).startswith(said):
                row[self.tokenizer.encode(wanted, continuation=True)[0]] = 50
            rows.append(row)
        return np.array(rows) if logits else None


@pytest.mark.parametrize(("memory", "found"), [(10000, [True, True]), (450, [False, True])])
def test_retrieved_is_what_the_model_would_say(tokenizer: Tokenizer, memory: int, found: list[bool]) -> None:
    hays = needle.hide(tokenizer, needle.made_up(), 700, [0.1, 0.9], 1)[::-1]
    model: Any = Rememberer(tokenizer, memory)
    read: list[int] = []
    told = [needle.ask(model, model, read, hay) for hay in hays]
    assert [one[0] for one in told] == found
    assert told[1][1] == pytest.approx(0, abs=1e-3)
    if not found[0]:
        assert told[0][1] < -20


def test_prompts_that_begin_alike_are_read_once(path: Path, tokenizer: Tokenizer) -> None:
    model = Model.load(path, "numba", activations="f32")  # whose results do not depend on what is read in one go
    hays = needle.hide(tokenizer, needle.made_up(), 400, [0.2, 0.8], 2)
    ring, passed = model.new_cache(400, kv="q8"), 0
    read: list[int] = []
    for hay in hays:
        passed += len(hay.prompt) + len(hay.answer) - 1 - needle.shared(read, hay.prompt)
        alone = needle.ask(model, model.new_cache(400, kv="q8"), [], hay)
        assert needle.ask(model, ring, read, hay) == alone
        assert read == hay.prompt + hay.answer[:-1] and ring.length == len(read)
    assert passed < 0.8 * sum(len(hay.prompt) for hay in hays)
    model.close()


def test_command(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["-c", "300,400", "--kv", "f16,k=q8,v=q4", "--depth", "0.1,0.9", "--repeats", "2", "--backend", "numpy"]
    assert needle.main([str(path), *options, "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [(c["ctx"], c["kv"], c["depth"]) for c in cells] == list(
        itertools.product([300, 400], ["f16", "k=q8,v=q4"], [0.1, 0.9])
    )
    assert all(c["tries"] == 2 and 0 <= c["retrieved"] <= 2 and c["logprob"] < 0 for c in cells)
    assert all(c["tokens"] <= c["ctx"] for c in cells)
    assert cells[0]["bytes_per_token"] == 2 * 2 * 32 * 2 and cells[2]["bytes_per_token"] < cells[0]["bytes_per_token"]
    assert needle.main([str(path), *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| k=q8,v=q4 |") for line in lines) == 2 and "at 90%" in lines[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--kv", "f16,q9"], "q9"), (["--depth", "0.5,2"], "from 0 to 1"), (["-c", "100000"], "at most"),
     (["-c", "96"], "no room"), (["-f", "nowhere.txt"], "No such file")],
    ids=str,
)  # fmt: skip
def test_bad_arguments(path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert needle.main([str(path), "--backend", "numpy", *options]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
