"""Learned projections: closed forms against direct computation, and the command on a model that they fit exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.container import open_trit
from formats.conversion.convert import convert
from formats.kv_modules import BALANCES, KVModule, read_key_facts, read_kv_modules
from formats.sources.source import open_source
from formats.writer import TritWriter
from runtime import Llama
from runtime.evaluate import log_softmax
from runtime.model import Model
from runtime.progress import Bar
from runtime.tokenizer import load_tokenizer
from tests import tiny
from tools import kv_fit
from tools.kv_statistics import SINKS, collect
from tools.kv_trial import SOME, Judge, Learned, install
from tools.learn_kv import main

WIDTH, RANK = 32, 12


def random_psd(rng: np.random.Generator, width: int) -> Any:
    a = rng.standard_normal((width, width)) * np.geomspace(3, 0.1, width)
    return a.T @ a


# ==== The closed form ====


def test_what_is_lost_is_what_was_foretold_and_no_projection_loses_less() -> None:
    rng = np.random.default_rng(0)
    covariance, metric, mean = random_psd(rng, 12), random_psd(rng, 12), rng.standard_normal(12)
    fitted = kv_fit.fit(covariance, metric, mean)

    def lost(encoder: Any, decoder: Any) -> float:
        rest = np.eye(12) - decoder @ encoder
        return float(np.trace(metric @ rest @ covariance @ rest.T) / np.trace(metric @ covariance))

    for rank in (1, 5, 11, 12):
        parts = fitted.parts(rank)
        mine = lost(parts["encoder"], parts["decoder"])
        assert mine == pytest.approx(fitted.lost[rank], abs=5e-3)
        principal = np.linalg.eigh(covariance)[1][:, -rank:]
        assert mine <= lost(principal.T, principal) + 1e-5
        other = rng.standard_normal((rank, 12))
        best_decoder = covariance @ other.T @ np.linalg.inv(other @ covariance @ other.T)
        assert mine <= lost(other, best_decoder) + 1e-5
        assert np.allclose(parts["decoder"] @ (parts["encoder"] @ mean) + parts["decoder.bias"], mean, atol=1e-4)


def test_a_plan_saves_what_is_asked_where_it_hurts_least() -> None:
    rng = np.random.default_rng(1)
    fits = [kv_fit.fit(random_psd(rng, 8), np.eye(8), np.zeros(8)) for _ in range(4)]
    damage = {i: (fits[i], 4, (0.1, 0.001, 0.1, 10.0)[i]) for i in range(4)}
    ranks = kv_fit.plan(damage, 8, 2, 8)
    assert sum(8 - rank for rank in ranks.values()) == 8
    assert 3 not in ranks and ranks[1] == min(ranks.values())
    assert kv_fit.plan(damage, 8, 2, 0) == {} and set(kv_fit.plan(damage, 8, 2, 99)) == {0, 1, 2, 3}
    assert kv_fit.cheapest({5: 0.3, 2: 0.1, 9: 0.2}, 2) == [2, 9]


def test_layers_by_number_or_by_name() -> None:
    assert kv_fit.parse_layers("3", 4) == 3 and kv_fit.parse_layers("0,2-3", 4) == [0, 2, 3]
    assert kv_fit.parse_layers("=3", 4) == [3]
    for wrong in ("0", "5", "=4", "=-1", "=", "x", "1-", "3-2", "1,4"):
        with pytest.raises(ValueError):
            kv_fit.parse_layers(wrong, 4)


# ==== The command ====


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a tokenizer whose values lie in RANK of WIDTH dimensions, whatever it reads."""
    folder = tmp_path_factory.mktemp("learn")
    convert(open_source(tiny.folder_with_tokenizer(folder / "source")), folder / "whole.trit", "f32", "f32")
    with open_trit(folder / "whole.trit") as file:
        header = {key: value for key, value in file.header.items() if key != "tensors"}
        with TritWriter(folder / "model.trit", header, list(file.tensors)) as writer:
            for t in file.tensors.values():
                parts = dict(t.parts)
                if t.name.endswith("wv"):
                    u, s, vt = np.linalg.svd(parts["values"])
                    parts["values"] = np.ascontiguousarray((u[:, :RANK] * s[:RANK]) @ vt[:RANK], np.float32)
                writer.add(t.name, t.codec, t.shape, t.params, parts)
    return folder / "model.trit"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(2)
    words = ["the", "ring", "is", "full", "of", "tokens", "and", "slides", "on", "no", "one", "reads", "this"]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(words[i] for i in rng.integers(len(words), size=400)), encoding="utf-8")
    return path


def learn(capsys: pytest.CaptureFixture[str], model: Path, text: Path, out: Path, *options: object) -> dict[str, Any]:
    args = [model, "-f", text, "-o", out, "-c", 32, "--backend", "numpy", "--activations", "f32", "--json", *options]
    assert main([str(arg) for arg in args]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_values_that_lie_in_few_dimensions_are_kept_whole(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.trit"
    found = learn(capsys, model, text, out, "--rank", RANK, "--layers", "2")
    assert abs(found["ppl_increase"]) < 1e-3 and all(row["kept"] > 0.9999 for row in found["layers"])
    assert found["bytes_per_token"][1] < found["bytes_per_token"][0]
    with open_trit(model) as before, open_trit(out) as after:
        for name, tensor in before.tensors.items():
            assert after.tensors[name].crc32 == tensor.crc32 and after.tensors[name].params == tensor.params
        assert {k: v for k, v in after.header.items() if k not in ("tensors", "kv_modules", "requires")} == {
            k: v for k, v in before.header.items() if k != "tensors"
        }
        assert [(m.layer, m.side, m.rank) for m in read_kv_modules(after)] == [(0, "v", RANK), (1, "v", RANK)]
    exact: dict[str, Any] = {"backend": "numpy", "activations": "f32"}
    with Llama(model, **exact) as whole, Llama(out, **exact) as learned:
        ids = whole.tokenize("the ring is full")
        assert np.abs(whole.logits(ids) - learned.logits(ids)).max() < 0.02
        assert learned.cache_nbytes < whole.cache_nbytes


def test_budgets(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {ratio: learn(capsys, model, text, tmp_path / f"{ratio}.trit", "--ratio", ratio) for ratio in (0.8, 0.3)}
    saved = {ratio: sum(WIDTH - row["rank"] for row in found["layers"]) for ratio, found in kept.items()}
    assert all(1 - ratio <= saved[ratio] / (2 * WIDTH) < 1 - ratio + 0.13 for ratio in kept)
    assert abs(kept[0.8]["ppl_increase"]) < 1e-3
    within = learn(capsys, model, text, tmp_path / "within.trit", "--max-ppl-increase", 0.001)
    assert within["ppl_increase"] <= 0.001 and sum(row["rank"] for row in within["layers"]) <= WIDTH
    one = learn(capsys, model, text, tmp_path / "one.trit", "--layers", "=1", "--rank", 3)
    assert [(row["layer"], row["rank"]) for row in one["layers"]] == [(1, 3)]


def test_keys(model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = [learn(capsys, model, text, tmp_path / f"{rank}.trit", "--side", "k", "--layers", "2", "--rank", rank)
             for rank in (4, 28)]  # fmt: skip
    alone = [[row["kl_alone"] for row in one["layers"]] for one in found]
    assert all(few > 4 * many for few, many in zip(*alone, strict=True))
    with open_trit(tmp_path / "4.trit") as file:
        assert {(m.side, m.rope, m.rank) for m in read_kv_modules(file)} == {("k", "after", 4)}


def test_facts_of_keys_are_written_beside_projections_or_alone(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = learn(capsys, model, text, tmp_path / "alone.trit", "--side", "none")
    assert found["layers"] == [] and found["bytes_per_token"][0] == found["bytes_per_token"][1]
    learn(capsys, model, text, tmp_path / "beside.trit", "--rank", RANK, "--layers", "1")
    with open_trit(tmp_path / "alone.trit") as alone, open_trit(tmp_path / "beside.trit") as beside:
        assert "requires" not in alone.header and read_kv_modules(alone) == []
        facts = read_key_facts(alone)
        assert sorted(facts) == [0, 1] and all(np.abs(mean).max() > 0 for mean, _ in facts.values())
        for _, balance in facts.values():
            pairs = balance.reshape(len(balance), 2, -1)
            assert (pairs[:, 0] == pairs[:, 1]).all()
            assert np.abs(np.log(balance).mean(axis=1)).max() <= 2.0**-11  # each number is rounded to float16
            assert BALANCES[0] < balance.min() < 0.99 and 1.01 < balance.max() < BALANCES[1]
        assert all((of_layer == read_key_facts(beside)[layer]).all() for layer, of_layer in facts.items())
    again = learn(capsys, tmp_path / "alone.trit", text, tmp_path / "again.trit", "--side", "none")
    assert again["output"] == str(tmp_path / "again.trit")


def test_moments_are_those_of_the_model(model: Path) -> None:
    """Values as attention averages them, seen through the output projection, are what it gives."""
    loaded = Model.load(model, "numpy", activations="f32")
    config = loaded.config
    ids = np.arange(20) % 50 + 5
    moments = collect(loaded, [ids])[0]
    assert moments.keys.count == 20 - SINKS and moments.values.count == config.n_heads * (20 - SINKS)
    assert sum(q.count for q in moments.queries) == config.n_heads * (20 - SINKS)
    ring = loaded.new_cache(20, kv="f32")
    loaded.forward(ids, ring, None)
    keys = ring.layers[0].keys.read(np.arange(SINKS, 20)).transpose(1, 0, 2).reshape(20 - SINKS, -1)
    assert np.allclose(moments.keys.mean, keys.mean(axis=0), atol=1e-5)
    assert np.allclose(moments.keys.covariance, np.cov(keys.T, bias=True), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [(("--rank", WIDTH), f"has {WIDTH} numbers"), (("--layers", "9"), "there are 2 layers"),
     (("--rank", 8), "no layer can be compressed so little"),
     (("--ratio", "1.5"), "between 0 and 1"),
     (("--ratio", "0.5", "--max-ppl-increase", "0.1"), "two budgets"), (("-c", 500), "it takes"),
     (("-c", 2049), "has at most 2048 tokens"),
     (("-f", "nowhere.txt"), "No such file")],
    ids=str,
)  # fmt: skip
def test_bad_arguments(
    model: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[Any, ...], message: str
) -> None:
    args = [model, "-f", text, "-o", tmp_path / "x.trit", "--backend", "numpy", "-c", 32, *options]
    assert main([str(arg) for arg in args]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())


def test_damage_is_the_divergence_of_whole_runs(model: Path, text: Path) -> None:
    """What single layers cost, measured from the layer on, is what runs of the whole model give."""
    loaded = Model.load(model, "numpy", activations="f32", kv="f32")
    ids = np.array(load_tokenizer(loaded.file).encode(text.read_text())[:64]).reshape(2, 32)
    rng = np.random.default_rng(3)
    trials = {}
    for layer in (0, 1):
        parts = kv_fit.fit(random_psd(rng, WIDTH), np.eye(WIDTH), np.zeros(WIDTH)).parts(RANK)
        trials[layer] = Learned(KVModule(layer, "v", RANK, biases=("decoder",)), parts)
    damage = Judge(loaded, list(ids), 2, "f32").damage(trials)
    base = [log_softmax(loaded.forward(window[:-1], loaded.new_cache(32), "all")[SOME]) for window in ids]
    for layer, trial in trials.items():
        install(loaded, [trial])
        kl = []
        for window, p in zip(ids, base, strict=True):
            q = log_softmax(loaded.forward(window[:-1], loaded.new_cache(32), "all")[SOME])
            kl.append((np.exp(p) * (p - q)).sum(axis=1).mean())
        install(loaded, [])
        assert damage[layer] == pytest.approx(np.mean(kl), rel=1e-3) and damage[layer] > 1e-4


def test_far_work_is_told_without_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 1.0, 16.0, 17.0, 40.0])
    monkeypatch.setattr("runtime.progress.time.monotonic", lambda: next(clock))
    bar = Bar("reading", unit="window", enabled=False, lines=True)
    for done in range(1, 5):
        bar(done, 4)
    assert capsys.readouterr().err == "reading: 2 of 4 windows, 16 s\nreading: 4 of 4 windows, 40 s\n"
