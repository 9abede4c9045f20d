"""Learned projections of the KV cache: the forward pass, the header, and what a bad file is told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats import HeaderError, TensorError, open_trit
from formats.kv_modules import KVModule, module_tensors, read_kv_modules
from runtime.errors import CacheError
from runtime.model import Model
from tests import reference_model, tiny
from tests.native_library import ensure_native_library

WIDTH = tiny.CONFIG["n_kv_heads"] * tiny.CONFIG["head_dim"]
# Largest absolute difference of a logit from the float64 model: float32 sums; codes rounded to f16 on both sides.
EXACT, ROUNDED = 3e-5, 3e-3

FORMS: dict[str, dict[str, Any]] = {
    "linear": {"rank": 7},
    "linear-bias": {"rank": 6, "biases": ("encoder", "decoder")},
    "full-rank": {"rank": WIDTH},
    "wide": {"rank": WIDTH - 1, "biases": ("decoder",)},
    "gelu": {"rank": 4, "hidden": 9, "activation": "gelu"},
    "gelu-bias": {"rank": 5, "hidden": 33, "activation": "gelu", "biases": ("encoder", "decoder", "decoder2")},
    "gelu-tanh": {"rank": 17, "hidden": 16, "activation": "gelu_tanh", "biases": ("decoder2",)},
}
# Which sides have a module, and whether keys are encoded before or after their rotation.
SIDES = {"v": None, "k+v after": "after", "k+v before": "before"}


@pytest.fixture(params=["numpy", "numba", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        ensure_native_library()
    return str(request.param)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for files that several tests use."""
    return tmp_path_factory.mktemp("kv")


def modules_of(form: Mapping[str, Any], rope: str | None, layers: Sequence[int] = (0, 1)) -> list[KVModule]:
    """A module for the values of each layer, and one for the keys unless `rope` is None."""
    made = [KVModule(layer, "v", **form) for layer in layers]
    return made + [KVModule(layer, "k", rope=rope, **form) for layer in layers if rope]


def module_weights(modules: Sequence[KVModule], seed: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in module_tensors(modules, tiny.CONFIG).items():
        scale = 0.2 if len(shape) == 1 else 1 / np.sqrt(shape[1])
        weights[name] = (scale * rng.standard_normal(shape)).astype(np.float32)
    return weights


def write(path: Path, modules: Sequence[KVModule], weights: Mapping[str, np.ndarray], **header: Any) -> Path:
    """Write the tiny model with modules; header: sections to replace or add, None to leave one out."""
    sections = {"kv_modules": [m.to_dict() for m in modules], "requires": ["kv_modules"], **header}
    metadata = {key: value for key, value in sections.items() if value is not None}
    path.unlink(missing_ok=True)
    return tiny.write_trit(path, weights={**tiny.random_weights(tiny.CONFIG), **weights}, metadata=metadata)


def some_ids(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(3).integers(tiny.CONFIG["vocab_size"], size=count)]


def run(model: Model, ids: Sequence[int], steps: Sequence[int], **cache: Any) -> np.ndarray:
    """Run ids through a fresh ring in calls of the given lengths, the last repeated. out: (n, vocab_size)"""
    ring, at, out, left = model.new_cache(**cache), 0, [], list(steps)
    while at < len(ids):
        step = left.pop(0) if len(left) > 1 else left[0]
        out.append(model.forward(ids[at : at + step], ring, "all"))
        at += step
    return np.concatenate(out)


# ---- the forward pass -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("form", FORMS)
def test_logits_equal_the_reference(form: str, sides: str, backend: str, shared: Path) -> None:
    """Before the wrap and long after it, in one go and in steps, with an exact ring and with f16."""
    modules = modules_of(FORMS[form], SIDES[sides])
    path = shared / f"{form}-{sides}.trit"
    if not path.exists():
        write(path, modules, module_weights(modules))
    config, weights = tiny.dequantized(path)
    ids, header = some_ids(70), [m.to_dict() for m in modules]
    model = Model.load(path, backend=backend, n_threads=2, activations="f32")
    for capacity, sinks, steps in ((70, 4, [70]), (16, 4, [11, 1, 1, 1, 30]), (17, 0, [9])):
        expected = reference_model.forward(weights, config, ids, capacity, sinks, kv_modules=header)
        found = run(model, ids, steps, n_ctx=capacity, sinks=sinks, n_batch=8 if capacity < 70 else 70)
        assert np.abs(found - expected).max() <= EXACT
    expected = reference_model.forward(weights, config, ids, 16, 4, reference_model.half, header)
    assert np.abs(run(model, ids, [5], n_ctx=16, n_batch=5, kv="f16") - expected).max() <= ROUNDED


def test_rank_of_full_width_changes_nothing(backend: str, tmp_path: Path) -> None:
    """Orthogonal encoders, and decoders that undo them: the model is the one without modules."""
    plain = tiny.write_trit(tmp_path / "plain.trit", embed="f32")
    turn = np.linalg.qr(np.random.default_rng(2).standard_normal((WIDTH, WIDTH)))[0].astype(np.float32)
    for rope in ("before", "after"):
        modules = modules_of({"rank": WIDTH}, rope)
        weights = {f"{m.prefix}.{name}": x for m in modules for name, x in (("encoder", turn), ("decoder", turn.T))}
        path = tiny.write_trit(
            tmp_path / f"turned-{rope}.trit",
            weights={**tiny.random_weights(tiny.CONFIG), **weights},
            embed="f32",
            metadata={"kv_modules": [m.to_dict() for m in modules], "requires": ["kv_modules"]},
        )
        ids = some_ids(50)
        logits = [
            run(Model.load(p, backend=backend, n_threads=2, activations="f32"), ids, [7], n_ctx=20, n_batch=7)
            for p in (path, plain)
        ]
        assert np.abs(logits[0] - logits[1]).max() <= EXACT


@pytest.mark.parametrize("compiled", ["numba", "native"])
def test_threads_and_chunks_do_not_change_a_bit(compiled: str, tmp_path: Path) -> None:
    if compiled == "native":
        ensure_native_library()
    for form, rope in (("gelu-bias", "before"), ("wide", "after")):
        modules = modules_of(FORMS[form], rope)
        path = write(tmp_path / f"bits-{form}.trit", modules, module_weights(modules))
        ids, results = some_ids(90), []
        for threads, steps, n_batch in ((1, [1], 1), (2, [90], 40), (2, [7, 1, 1, 30, 3], 16)):
            model = Model.load(path, backend=compiled, n_threads=threads)
            results.append(run(model, ids, steps, n_ctx=40, n_batch=n_batch))
        assert all(np.array_equal(each, results[0]) for each in results)


def test_the_ring_holds_only_codes(backend: str, tmp_path: Path) -> None:
    modules = [KVModule(1, "v", 5)]
    model = Model.load(write(tmp_path / "one.trit", modules, module_weights(modules)), backend=backend)
    ring, full = model.new_cache(32), tiny.write_trit(tmp_path / "none.trit")
    assert [(p.heads, p.width) for p in (ring.layers[1].keys, ring.layers[1].values)] == [(2, 10), (1, 5)]
    assert ring.nbytes < Model.load(full, backend=backend).new_cache(32).nbytes
    with pytest.raises(CacheError, match="another model"):
        Model.load(full, backend=backend).forward([1], ring)


def test_save_and_load_go_on_as_if_nothing_had_been(backend: str, tmp_path: Path) -> None:
    modules = modules_of(FORMS["gelu"], "before")
    model = Model.load(write(tmp_path / "saved.trit", modules, module_weights(modules)), backend=backend, n_threads=2)
    ids, ring = some_ids(60), model.new_cache(20, n_batch=8)
    model.forward(ids[:41], ring, None)
    again = model.new_cache(20, n_batch=8)
    again.load(ring.save())
    assert np.array_equal(model.forward(ids[41:], again, "last"), model.forward(ids[41:], ring, "last"))  # type: ignore[arg-type]


# ---- what is refused --------------------------------------------------------------------------------------

ONE = KVModule(1, "k", 4, 9, "gelu", "before", ("decoder",))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": 2}, "layer is 2; expected an integer from 0 to 1"),
        ({"layer": True}, "layer is True"),
        ({"side": "q"}, "side is 'q'; expected 'k' or 'v'"),
        ({"rank": 0}, "rank is 0; expected a positive integer"),
        ({"rank": WIDTH + 1}, f"rank {WIDTH + 1} in layer 1 for the {WIDTH} numbers of a token"),
        ({"rank": "4"}, "rank is '4'"),
        ({"hidden": 0}, "hidden is 0; expected a positive integer or null"),
        ({"activation": "relu"}, "activation is 'relu'; expected 'gelu' or 'gelu_tanh'"),
        ({"activation": None}, "activation is None"),
        ({"hidden": None}, "activation is 'gelu'; expected None"),
        ({"rope": None}, "rope is None; expected 'before' or 'after'"),
        ({"side": "v"}, "rope is 'before'; expected None"),
        ({"biases": "decoder"}, "biases is 'decoder'; expected a list of names"),
        ({"biases": ["decoder", "encoder"]}, "expected some of encoder, decoder, decoder2, in this order"),
        ({"biases": ["output"]}, "biases is"),
        ({"scale": 1}, "key 'scale' is not known"),
    ],
)
def test_a_bad_header_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "bad.trit", [ONE], module_weights([ONE]), kv_modules=[{**ONE.to_dict(), **change}])
    with pytest.raises(HeaderError, match=re.escape(message)) as error, open_trit(path) as file:
        read_kv_modules(file)
    assert error.value.path == str(path) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"kv_modules": [ONE.to_dict(), ONE.to_dict()]}, "two modules for side 'k' of layer 1"),
        ({"kv_modules": ["v"]}, "entry 0 of 'kv_modules' is 'v'; expected an object"),
        ({"kv_modules": [{}]}, "key 'activation' is missing"),
        ({"kv_modules": []}, "expected a list that is not empty"),
        ({"kv_modules": {}}, "expected a list that is not empty"),
        ({"kv_modules": None}, "is required, but missing"),
        ({"requires": None}, "is there, but 'requires' does not name it"),
    ],
)
def test_a_bad_section_is_refused(sections: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The writer refuses it if it can tell, the reader always."""
    with pytest.raises(HeaderError, match=re.escape(message)):
        path = write(tmp_path / "bad.trit", [ONE], module_weights([ONE]), **sections)
        with open_trit(path) as file:
            read_kv_modules(file)


@pytest.mark.parametrize(
    ("change", "tensor", "message"),
    [
        ({"encoder": None}, "encoder", "is missing"),
        ({"decoder.bias": None}, "decoder.bias", "is missing"),
        ({"decoder2": np.zeros((WIDTH, 8))}, "decoder2", f"has shape [{WIDTH}, 8]; the module calls for [{WIDTH}, 9]"),
        ({"encoder": np.zeros((4, WIDTH + 1))}, "encoder", "has shape"),
        ({"decoder2.bias": np.zeros(WIDTH)}, "decoder2.bias", "belongs to no module"),
        ({"decoder.bias": np.zeros(8)}, "decoder.bias", "has shape [8]"),
    ],
)
def test_bad_tensors_are_refused(
    change: dict[str, np.ndarray | None], tensor: str, message: str, tmp_path: Path
) -> None:
    prefix = "layers.1.kv.k."
    changed = {**module_weights([ONE]), **{prefix + name: x for name, x in change.items()}}
    weights = {name: np.asarray(x, np.float32) for name, x in changed.items() if x is not None}
    path = write(tmp_path / "bad.trit", [ONE], weights)
    with pytest.raises(TensorError, match=re.escape(message)) as error:
        Model.load(path)
    assert (error.value.path, error.value.tensor) == (str(path), prefix + tensor)


@pytest.mark.parametrize("bad", [0x7C00, 0xFE00])
def test_values_that_are_not_finite_are_refused(bad: int, tmp_path: Path) -> None:
    """A bit that flipped on the disk: infinity and NaN in float16."""
    path = write(tmp_path / "bad.trit", [ONE], module_weights([ONE]))
    with open_trit(path) as file:
        offset = file.tensors["layers.1.kv.k.decoder"].offset
    data = bytearray(path.read_bytes())
    data[offset : offset + 2] = bad.to_bytes(2, "little")
    path.write_bytes(data)
    with pytest.raises(TensorError, match="NaN or infinity") as error:
        Model.load(path)
    assert error.value.tensor == "layers.1.kv.k.decoder"


def test_tensors_of_modules_that_the_header_does_not_list_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.trit", [ONE], module_weights([ONE]), kv_modules=None, requires=None)
    with pytest.raises(TensorError, match="belongs to no module"):
        Model.load(path)


def test_packed_modules_are_refused(tmp_path: Path) -> None:
    module = KVModule(0, "v", WIDTH)
    path = tmp_path / "bad.trit"
    metadata = {"kv_modules": [module.to_dict()], "requires": ["kv_modules"]}
    weights = {**tiny.random_weights(tiny.CONFIG), **module_weights([module])}
    tiny.write_trit(path, weights=weights, embed="q8", metadata=metadata)
    with pytest.raises(TensorError, match="has codec q8; allowed in a module are f16, bf16, f32"):
        Model.load(path)
