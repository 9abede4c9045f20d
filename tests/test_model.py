"""The forward pass: against Hugging Face's logits, against a float64 model, and against itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from formats import TensorError, TritWriter, open_trit
from runtime.errors import CacheError
from runtime.model import Cancelled, Model
from runtime.ring.cache import KVRing
from tests import reference_model, tiny
from tests.native_library import ensure_native_library

# Largest absolute difference of a logit, activations="f32": float32 sums in another order, nothing else.
HF_TOLERANCE = 1e-4
EXACT = 2e-5
# With an f16 ring the reference rounds what the ring stores too. But sums that differ in the last bit now and
# then round to another f16, and each such number moves a few logits by up to 5e-4.
ROUNDED = 2e-3
# NumPy's sums depend on the number of tokens: an activation that rounds to another int8 moves all that come after it.
NUMPY_INT8 = 0.1
# Mean KL divergence (natural logarithm) of int8 activations from f32 ones: measured are 2.4e-4.
INT8_KL = 1e-3

FIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("tiny-llama-tied-bf16", {}),
    "bias": ("tiny-llama-bias-bf16", {}),
}
if tiny.MORE_FIXTURES:
    FIXTURES |= {
        "base": ("tiny-llama-bf16", {}),
        "base-rope32": ("tiny-llama-bf16", {"original_max_seq_len": 32}),
        "kjv": ("kjv-5m", {}),
    }
CODECS = ("f32", "f16", "bf16", "q8", "trit1", "trit2", "trit3", "trit4", "nf4")


@pytest.fixture(params=["numpy", "numba", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if name == "native":
        ensure_native_library()
    return name


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Files made once and shared by the tests of this module."""
    yield {"folder": tmp_path_factory.mktemp("models")}


def load(path: Path, backend: str, activations: str = "f32") -> Model:
    return Model.load(path, backend=backend, n_threads=2, activations=activations)


def some_ids(count: int, vocab: int = tiny.CONFIG["vocab_size"], seed: int = 3) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(vocab, size=count)]


def scores(model: Model, ids: Sequence[int], ring: KVRing, which: Literal["all", "last"]) -> np.ndarray:
    """Run ids and take their logits. out: (n, vocab_size), or (vocab_size,) for "last"."""
    logits = model.forward(ids, ring, which)
    assert logits is not None and logits.dtype == np.float32
    return logits


def all_logits(model: Model, ids: Sequence[int], steps: Sequence[int] = (), **cache: Any) -> np.ndarray:
    """Run ids through a fresh cache in calls of the given lengths, the last repeated. out: (n, vocab_size)"""
    ring = model.new_cache(cache.pop("n_ctx", len(ids)), **cache)
    out, at, steps = [], 0, list(steps) or [len(ids)]
    while at < len(ids):
        step = steps.pop(0) if len(steps) > 1 else steps[0]
        out.append(scores(model, ids[at : at + step], ring, "all"))
        at += step
    return np.concatenate(out)


def assert_close(found: np.ndarray, expected: np.ndarray, limit: float = EXACT) -> None:
    """found, expected: (n, vocab_size)"""
    assert found.shape == expected.shape and np.isfinite(found).all()
    error = np.abs(found - expected)
    far = np.flatnonzero(error.max(axis=-1) > limit)
    assert not far.size, f"positions {far.tolist()} of {len(found)} differ, by up to {error.max():.2e}"


def shared(made: dict[str, Path], key: str, **how: Any) -> Path:
    if key not in made:
        made[key] = tiny.write_trit(made["folder"] / f"{key}.trit", **how)
    return made[key]


# ---- Hugging Face -----------------------------------------------------------------------------------------


def converted(made: dict[str, Path], name: str) -> Path:
    folder, rope = FIXTURES[name]
    if name not in made:
        made[name] = tiny.convert_fixture(folder, made["folder"] / f"{name}.trit", rope)
    return made[name]


@pytest.mark.parametrize("name", FIXTURES)
def test_logits_equal_hugging_face(name: str, backend: str, made: dict[str, Path]) -> None:
    model = load(converted(made, name), backend)
    expected = tiny.expected_logits(name)
    ids = expected["input_ids"].tolist()
    logits = all_logits(model, ids)
    assert logits.dtype == np.float32 and logits.shape == (len(ids), model.config.vocab_size)
    rows = expected.get("positions", np.arange(len(ids)))
    assert np.abs(logits[rows] - expected["logits"]).max() <= HF_TOLERANCE


@pytest.mark.parametrize("name", [n for n in FIXTURES if n != "kjv"])
@pytest.mark.parametrize("activations", ["f32", "int8"])
def test_greedy_ids_equal_hugging_face(name: str, activations: str, backend: str, made: dict[str, Path]) -> None:
    model = load(converted(made, name), backend, activations)
    expected = tiny.expected_logits(name)
    ids, wanted = expected["input_ids"].tolist(), expected["greedy"].tolist()
    cache = model.new_cache(len(ids) + len(wanted))
    found: list[int] = []
    for _ in wanted:
        found.append(int(scores(model, found[-1:] or ids, cache, "last").argmax()))
    assert found == wanted


@pytest.mark.parametrize("name", ["tied-nf4", "bias-nf4-dq-emb"])
def test_nf4_of_bitsandbytes_runs_as_it_is(name: str, backend: str, made: dict[str, Path]) -> None:
    """The packed bytes of a bitsandbytes checkpoint, carried over, give what its own dequantisation gives."""
    if name not in made:
        made[name] = tiny.carry_nf4(f"tiny-llama-{name}", made["folder"] / f"{name}.trit")
    expected = tiny.expected_logits(name)
    logits = all_logits(load(made[name], backend), expected["input_ids"].tolist())
    assert np.abs(logits - expected["logits"]).max() <= HF_TOLERANCE


# ---- the float64 model ------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tied_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "one-head-kv": {"n_kv_heads": 1, "n_heads": 3},
    "no-gqa": {"n_kv_heads": 6},
    "wide-heads": {"head_dim": 34, "n_heads": 2, "n_kv_heads": 1},
    "linear-rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3-rope": {
        "rope_scaling": {
            "type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_seq_len": 16,
        }
    },
    "one-layer": {"n_layers": 1, "vocab_size": 3, "dim": 2, "hidden_dim": 1},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model_equals_the_reference(variant: str, backend: str, made: dict[str, Path]) -> None:
    path = shared(made, variant, config=VARIANTS[variant])
    config, weights = tiny.dequantized(path)
    ids = some_ids(37, config["vocab_size"])
    assert_close(all_logits(load(path, backend), ids), reference_model.forward(weights, config, ids))


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_equals_the_reference(codec: str, backend: str, made: dict[str, Path]) -> None:
    """Layers, embeddings and output all in the codec; the prompt in one go and token by token."""
    path = shared(made, f"codec-{codec}", codec=codec, embed=codec)
    config, weights = tiny.dequantized(path)
    ids = some_ids(19)
    expected = reference_model.forward(weights, config, ids)
    model = load(path, backend)
    assert_close(all_logits(model, ids), expected)
    assert_close(all_logits(model, ids, [1]), expected)


@pytest.mark.parametrize("codec", CODECS)
def test_int8_activations_stay_close(codec: str, backend: str, made: dict[str, Path]) -> None:
    path = shared(made, f"codec-{codec}", codec=codec, embed=codec)
    ids = some_ids(64)
    exact = log_softmax(all_logits(load(path, backend), ids))
    rough = log_softmax(all_logits(load(path, backend, "int8"), ids))
    kl = (np.exp(exact) * (exact - rough)).sum(axis=-1)
    assert kl.mean() <= INT8_KL


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64) - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# ---- chunks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["f32", "int8"])
@pytest.mark.parametrize("steps", [[1], [3], [7], [1, 31], [40]])
def test_chunked_prefill_equals_token_by_token(
    steps: list[int], activations: str, backend: str, made: dict[str, Path]
) -> None:
    model = load(shared(made, "codec-trit3", codec="trit3", embed="trit3"), backend, activations)
    ids = some_ids(41)
    one_by_one = all_logits(model, ids, [1])
    limit = NUMPY_INT8 if activations == "int8" and backend == "numpy" else EXACT
    assert_close(all_logits(model, ids, steps), one_by_one, limit)
    assert_close(all_logits(model, ids, n_batch=7), one_by_one, limit)


@pytest.mark.parametrize("compiled", ["numba", "native"])
@pytest.mark.parametrize("activations", ["f32", "int8"])
@pytest.mark.parametrize("codec", CODECS)
def test_chunks_and_threads_change_no_bit(codec: str, activations: str, compiled: str, made: dict[str, Path]) -> None:
    """Token by token or in chunks of any length, on any number of threads, before and after the ring is full."""
    if compiled == "native":
        ensure_native_library()
    path = shared(made, f"codec-{codec}", codec=codec, embed=codec)
    ids, found = some_ids(90), []
    for threads, steps, n_batch in ((1, [1], 1), (2, [90], 80), (3, [33, 1, 2, 17, 5], 64), (2, [64, 1], 16)):
        model = Model.load(path, backend=compiled, n_threads=threads, activations=activations)
        found.append(all_logits(model, ids, steps, n_ctx=80, n_batch=n_batch))
        model.close()
    assert all(np.array_equal(found[0], other) for other in found[1:])


def test_which_logits_are_returned(backend: str, made: dict[str, Path]) -> None:
    model = load(shared(made, "plain"), backend)
    ids = some_ids(9)
    every = all_logits(model, ids)
    last = scores(model, ids, model.new_cache(16), "last")
    assert last.shape == (257,)
    assert_close(last[None], every[-1:])
    cache = model.new_cache(16)
    assert model.forward(ids, cache, None) is None
    assert cache.length == len(ids)


def test_results_do_not_change_from_run_to_run(backend: str, made: dict[str, Path]) -> None:
    for activations in ("f32", "int8"):
        model = load(shared(made, "codec-trit3", codec="trit3", embed="trit3"), backend, activations)
        assert np.array_equal(all_logits(model, some_ids(33)), all_logits(model, some_ids(33)))


def test_the_number_of_threads_does_not_change_the_logits(backend: str, made: dict[str, Path]) -> None:
    path = shared(made, "codec-trit3", codec="trit3", embed="trit3")
    one = Model.load(path, backend=backend, n_threads=1, activations="int8")
    two = Model.load(path, backend=backend, n_threads=2, activations="int8")
    assert np.array_equal(all_logits(one, some_ids(33)), all_logits(two, some_ids(33)))


# ---- the ring ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("capacity", "sinks"), [(16, 4), (13, 0), (17, 1), (9, 8)])
@pytest.mark.parametrize("steps", [[1], [5], [11, 1, 1, 1, 1, 30], [70]])
def test_a_ring_sees_the_sinks_and_the_newest_tokens(
    capacity: int, sinks: int, steps: list[int], backend: str, made: dict[str, Path]
) -> None:
    """Before, at and after the wrap, whatever the chunks: the float64 model with the same window."""
    path = shared(made, "plain")
    config, weights = tiny.dequantized(path)
    ids = some_ids(70)
    model = load(path, backend)
    for kv, stored, limit in (("f32", reference_model.exact, EXACT), ("f16", reference_model.half, ROUNDED)):
        expected = reference_model.forward(weights, config, ids, capacity, sinks, stored)
        found = all_logits(model, ids, steps, n_ctx=capacity, sinks=sinks, n_batch=8, kv=kv)
        assert_close(found, expected, limit)


def test_the_ring_is_f16_unless_all_is_exact(backend: str, made: dict[str, Path]) -> None:
    path = shared(made, "plain")
    wide = load(path, backend, "f32").new_cache(32)
    narrow = load(path, backend, "int8").new_cache(32)
    assert (wide.codec, narrow.codec) == ("f32", "f16") and wide.nbytes == 2 * narrow.nbytes
    with pytest.raises(CacheError, match="codec"):
        load(path, backend).new_cache(32, kv="q1")


def test_a_ring_that_never_fills_is_a_plain_cache(backend: str, made: dict[str, Path]) -> None:
    model = load(shared(made, "plain"), backend)
    ids = some_ids(30)
    assert np.array_equal(all_logits(model, ids, n_ctx=30), all_logits(model, ids, n_ctx=300))


def test_several_turns_with_trim_equal_one_go(backend: str, made: dict[str, Path]) -> None:
    """A conversation whose second answer is taken back and said again in other words."""
    model = load(shared(made, "plain"), backend)
    first, regretted, second = some_ids(12), some_ids(9, seed=8), some_ids(10, seed=9)
    cache = model.new_cache(64)
    model.forward(first, cache, None)
    model.forward(regretted, cache, None)
    cache.trim(len(first))
    assert cache.length == len(first)
    again = scores(model, second, cache, "all")
    assert_close(again, all_logits(model, first + second)[len(first) :])


def test_reset_forgets_everything(backend: str, made: dict[str, Path]) -> None:
    model = load(shared(made, "plain"), backend)
    cache = model.new_cache(16)
    model.forward(some_ids(40), cache, None)
    cache.reset()
    assert cache.length == 0
    again = scores(model, some_ids(11, seed=5), cache, "all")
    assert np.array_equal(again, all_logits(model, some_ids(11, seed=5), n_ctx=16))


def test_two_caches_of_one_model_do_not_mix(backend: str, made: dict[str, Path]) -> None:
    model = load(shared(made, "plain"), backend)
    a, b = some_ids(20), some_ids(20, seed=4)
    caches = model.new_cache(32), model.new_cache(32)
    for i in range(20):
        found = [scores(model, [ids[i]], cache, "last") for ids, cache in zip((a, b), caches, strict=True)]
    for ids, logits in zip((a, b), found, strict=True):
        assert_close(logits[None], all_logits(model, ids)[-1:])


@pytest.mark.parametrize("seed", range(6))
def test_taking_back_tokens_is_right_or_refused(seed: int, backend: str, made: dict[str, Path]) -> None:
    """Turns appended and taken back at random, long after the wrap: what is not refused is as in one go."""
    path = shared(made, "plain")
    config, weights = tiny.dequantized(path)
    model = load(path, backend)
    rng = np.random.default_rng(seed)
    capacity, sinks, chunk = 12, 3, 8
    cache = model.new_cache(capacity, sinks=sinks, n_batch=chunk)
    ids: list[int] = []
    refused = 0
    for turn in range(30):
        new = some_ids(int(rng.integers(1, 14)), seed=100 * seed + turn)
        ids += new
        expected = reference_model.forward(weights, config, ids, capacity, sinks)
        assert_close(scores(model, new, cache, "all"), expected[-len(new) :])
        keep = len(ids) - int(rng.integers(0, 8))
        try:
            cache.trim(keep)
        except CacheError:
            refused += 1
            continue
        ids = ids[:keep]
    assert refused < 30


class After:
    """A signal that is set once it has been looked at some times."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def is_set(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("before", [5, 12, 16, 400])
def test_a_chunk_that_was_cancelled_between_layers(before: int, backend: str, made: dict[str, Path]) -> None:
    """What comes next is as if it had never begun, but for what it has written over: that cannot be gone back to."""
    path = shared(made, "plain")
    config, weights = tiny.dequantized(path)
    model = load(path, backend)
    ids, more = some_ids(before), some_ids(9, seed=7)
    cache = model.new_cache(16, sinks=3, n_batch=8)
    model.forward(ids, cache, None)
    with pytest.raises(Cancelled):
        model.forward(some_ids(8, seed=6), cache, cancel=After(2))
    assert cache.length == before
    if before == 400:  # of which those from 280 on are there
        with pytest.raises(CacheError, match="slid out"):
            cache.trim(286)
    expected = reference_model.forward(weights, config, ids + more, 16, 3)
    assert_close(scores(model, more, cache, "all"), expected[-9:])


def test_bad_arguments_are_refused(backend: str, made: dict[str, Path]) -> None:
    model = load(shared(made, "plain"), backend)
    cache = model.new_cache(8)
    for ids in ([], [257], [-1]):
        with pytest.raises(ValueError, match="token id"):
            model.forward(ids, cache)
    assert cache.length == 0
    other = load(shared(made, "one-layer", config=VARIANTS["one-layer"]), backend)
    with pytest.raises(CacheError):
        other.forward([1], cache)
    with pytest.raises(ValueError, match="activations"):
        load(shared(made, "plain"), backend, "int7")


def test_a_tensor_that_the_model_does_not_have_is_refused(tmp_path: Path, made: dict[str, Path]) -> None:
    """Above all a bias that the configuration does not announce: its length would go unchecked."""
    with open_trit(shared(made, "plain")) as file:
        header = {key: value for key, value in file.header.items() if key != "tensors"}
        with TritWriter(tmp_path / "more.trit", header, [*file.tensors, "layers.0.wq.bias"]) as writer:
            for t in file.tensors.values():
                writer.add(t.name, t.codec, t.shape, t.params, t.parts)
            writer.add("layers.0.wq.bias", "f32", (1,), {}, {"values": np.zeros(1, np.float32)})
    with pytest.raises(TensorError, match=r"layers\.0\.wq\.bias"):
        Model.load(tmp_path / "more.trit", "numpy")
