"""Learned KV modules from a checkpoint to logits: found, converted, run, exported; refused where that is unsure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.codecs import CODECS
from formats.codecs.base import from_bf16, to_bf16
from formats.container import dequantize, open_trit
from formats.conversion.safetensors_writer import Piece, write_folder
from formats.kv_modules import KVModule, module_tensors
from formats.sources.bnb import bnb_pieces
from formats.sources.hf_names import HF_NAMES
from formats.sources.safetensors_reader import open_folder, read_file
from formats.sources.source import open_source
from runtime.model import Model
from tests import reference_model, tiny
from tests.checkpoints import config_of, edit_json, write_gguf, write_hf
from tests.native_library import ensure_native_library
from tools import convert, export, inspect

MAPS = Path(__file__).parent / "data" / "kv-maps"
CONFIG = config_of()
LEAN = {"architectures": ["LeanLlamaForCausalLM"]}
# Largest absolute difference of a logit from the float64 model: float32 sums
EXACT = 3e-5
# From transformers in float32
LIKE_TRANSFORMERS = 1e-4
Weights = dict[str, np.ndarray]

LINEAR: dict[str, Any] = {"rank": 6}
LINEAR_BIAS: dict[str, Any] = {"rank": 9, "biases": ("encoder", "decoder")}
GELU: dict[str, Any] = {"rank": 4, "hidden": 24, "activation": "gelu"}
GELU_BIAS: dict[str, Any] = {**GELU, "biases": ("encoder", "decoder", "decoder2")}


def values(form: Mapping[str, Any], *layers: int) -> list[KVModule]:
    return [KVModule(layer, "v", **form) for layer in layers]


def keys(form: Mapping[str, Any], rope: str, *layers: int) -> list[KVModule]:
    return [KVModule(layer, "k", rope=rope, **form) for layer in layers]


# What the checkpoint holds, and what its config.json states besides
CASES: dict[str, tuple[list[KVModule], dict[str, Any]]] = {
    "linear values of one layer": (values(LINEAR, 1), {}),
    "linear values with biases": (values(LINEAR_BIAS, 0, 1), {}),
    "linear keys and values, after": (values(LINEAR, 0, 1) + keys(LINEAR, "after", 0, 1), {"kv_rope": "post_rope"}),
    "linear keys with biases, before": (values(LINEAR_BIAS, 0) + keys(LINEAR_BIAS, "before", 1), {"pre_rope": True}),
    "GELU values": (values(GELU, 0), LEAN),
    "GELU keys and values, before": (
        values(GELU_BIAS, 0, 1) + keys(GELU_BIAS, "before", 0, 1),
        {**LEAN, "kv_rope": "before"},
    ),
    "GELU keys and values, after": (
        values(GELU, 1) + keys(GELU, "after", 1),
        {"kv_act": "gelu", "kv_rope": "after"},
    ),
    "GELU by tanh": (values({**GELU_BIAS, "activation": "gelu_tanh"}, 0), {"kv_act": "gelu_pytorch_tanh"}),
}


def module_weights(modules: Sequence[KVModule]) -> Weights:
    """Values that float16 holds. out: our tensor name -> float32 array"""
    rng = np.random.default_rng(5)
    shapes = module_tensors(modules, CONFIG)
    scales = {name: 0.2 if len(shape) == 1 else shape[1] ** -0.5 for name, shape in shapes.items()}
    made = {name: scales[name] * rng.standard_normal(shape) for name, shape in shapes.items()}
    return {name: x.astype(np.float16).astype(np.float32) for name, x in made.items()}


def their_name(ours: str, modules: Sequence[KVModule]) -> str:
    """Name a module's tensor as PyTorch's nn.Sequential would: decoder.0 and decoder.2 have the GELU between them."""
    _, layer, _, side, role = ours.split(".", 4)
    matrix, kind = role.removesuffix(".bias"), "bias" if role.endswith(".bias") else "weight"
    two = any(m.hidden is not None and ours.startswith(f"{m.prefix}.") for m in modules)
    place = {"encoder": "encoder", "decoder": "decoder.0" if two else "decoder", "decoder2": "decoder.2"}[matrix]
    return f"model.layers.{layer}.self_attn.{side}_compressor.{place}.{kind}"


def write(
    folder: Path,
    modules: Sequence[KVModule],
    stated: Mapping[str, Any],
    stored: Weights | None = None,
    packed: str = "",
    rename: Sequence[tuple[str, str]] = (),
) -> Weights:
    """Write a checkpoint with modules. stored: their tensors, if not `module_weights`, as float16 or bits of bfloat16

    rename: (old, new) parts of the modules' names
    packed: what is NF4 with double quantisation: "" nothing, "base" the Llama's matrices, "all" the modules', too
    returns: the weights by our names, as the model is to use them
    """
    state = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}} if packed else {}
    plain = write_hf(folder, {**stated, **state})
    (folder / "model.safetensors").unlink()
    own = stored or {name: x.astype(np.float16) for name, x in module_weights(modules).items()}
    names = {name: HF_NAMES.theirs(name) for name in plain} | {name: their_name(name, modules) for name in own}
    for old, new in rename:
        names = {name: theirs.replace(old, new) for name, theirs in names.items()}
    pieces, used = [], {}
    for name, x in {**{n: x.astype(np.float16) for n, x in plain.items()}, **own}.items():
        if x.ndim == 2 and "layers" in name and (packed == "all" or (packed and name in plain)):
            params, parts = CODECS["nf4"].quantize(x.astype(np.float32), dtype="float16")
            pieces += bnb_pieces(names[name], x.shape, params, parts)
            used[name] = CODECS["nf4"].dequantize(parts, x.shape, params)
        else:
            kind = "BF16" if x.dtype == np.uint16 else {2: "F16", 4: "F32"}[x.itemsize]
            pieces.append(Piece(names[name], kind, x.shape, lambda x=x: iter([x])))  # type: ignore[misc]
            used[name] = from_bf16(x) if kind == "BF16" else x.astype(np.float32)
    write_folder(folder, pieces, 40_000)
    return used


def run(path: Path, backend: str, ids: Sequence[int]) -> np.ndarray:
    """Run ids through a ring that wraps. out: (n, vocab_size)"""
    model = Model.load(path, backend=backend, n_threads=2, activations="f32")
    ring = model.new_cache(16, n_batch=8)
    logits = [model.forward(ids[at : at + 8], ring, "all") for at in range(0, len(ids), 8)]
    model.close()
    return np.concatenate([part for part in logits if part is not None])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "source"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.trit"


@pytest.fixture(params=["numpy", "numba", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        ensure_native_library()
    return str(request.param)


IDS = [int(i) for i in np.random.default_rng(3).integers(CONFIG["vocab_size"], size=40)]


def assert_runs(path: Path, weights: Weights, modules: Sequence[KVModule], backend: str) -> None:
    wide = {name: x.astype(np.float64) for name, x in weights.items()}
    header = [m.to_dict() for m in modules]
    expected = reference_model.forward(wide, CONFIG, IDS, 16, 4, kv_modules=header)
    assert np.abs(run(path, backend, IDS) - expected).max() <= EXACT
    without = reference_model.forward(wide, CONFIG, IDS, 16, 4)
    assert np.abs(expected - without).max() > 1000 * EXACT


# ---- what is carried over ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_of_a_converted_checkpoint(case: str, backend: str, folder: Path, out: Path) -> None:
    modules, stated = CASES[case]
    weights = write(folder, modules, stated)
    assert convert.main([str(folder), "-o", str(out), "--quant", "f16"]) == 0
    assert_runs(out, weights, modules, backend)


@pytest.mark.parametrize("packed", ["base", "all"])
def test_logits_of_a_bitsandbytes_checkpoint(packed: str, backend: str, folder: Path, out: Path) -> None:
    """LeanLlama-8B-INT4: the Llama in NF4 with double quantisation, its modules in float16, or packed themselves."""
    modules, stated = CASES["GELU keys and values, before"]
    weights = write(folder, modules, stated, packed=packed)
    assert convert.main([str(folder), "-o", str(out), "--quant", "keep"]) == 0
    with open_trit(out) as file:
        codecs = {name: tensor.codec for name, tensor in file.tensors.items()}
        for name in module_tensors(modules, CONFIG):
            assert codecs[name] == "f16" and np.array_equal(dequantize(file.tensors[name]), weights[name])
    assert codecs["layers.0.wq"] == "nf4"
    assert_runs(out, weights, modules, backend)


@pytest.mark.parametrize(
    ("name", "base", "stated"),
    [
        ("linear", "tiny-llama-bias-nf4-dq-emb", {}),
        ("gelu", "tiny-llama-tied-bf16", {**LEAN, "kv_rope": "before"}),
    ],
)
def test_logits_are_those_of_transformers(
    name: str, base: str, stated: dict[str, Any], backend: str, folder: Path, out: Path
) -> None:
    """Two checkpoints of the makers' forms: transformers' own code, with the modules hooked in."""
    shutil.copytree(tiny.fixture_folder(base), folder)
    edit_json(folder / "config.json", **stated)
    (folder / "model.safetensors").rename(folder / "llama.safetensors")
    shutil.copyfile(tiny.FIXTURES / f"kv-{name}.safetensors", folder / "kv.safetensors")
    shards = [folder / "llama.safetensors", folder / "kv.safetensors"]
    weight_map = {tensor: shard.name for shard in shards for tensor in read_file(shard)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert convert.main([str(folder), "-o", str(out), "--quant", "keep"]) == 0
    expected = tiny.expected_logits(f"kv-{name}")
    model = Model.load(out, backend=backend, n_threads=2, activations="f32")
    ring = model.new_cache(64, n_batch=16)
    logits = model.forward(expected["input_ids"], ring, "all")
    assert logits is not None and np.abs(logits - expected["logits"]).max() <= LIKE_TRANSFORMERS
    model.close()


@pytest.mark.parametrize("quant", ["trit2", "nf4", "q8", "f32", "keep"])
def test_modules_lose_nothing_whatever_the_codec(quant: str, folder: Path, out: Path) -> None:
    modules, stated = CASES["GELU keys and values, before"]
    weights = write(folder, modules, stated)
    assert convert.main([str(folder), "-o", str(out), "--quant", quant, "--embed", "q8"]) == 0
    with open_trit(out) as file:
        assert file.header["requires"] == ["kv_modules"] and len(file.header["kv_modules"]) == 4
        for name in module_tensors(modules, CONFIG):
            assert file.tensors[name].codec == "f16" and np.array_equal(dequantize(file.tensors[name]), weights[name])


@pytest.mark.parametrize(("scale", "codec"), [(1.0, "f16"), (1e-9, "bf16"), (1 + 2**-20, "f32")])
def test_a_module_keeps_a_type_that_holds_it(scale: float, codec: str, folder: Path, out: Path) -> None:
    """Values of bfloat16 that float16 cannot hold stay bfloat16, those of float32 stay float32."""
    modules = values(LINEAR, 0)
    exact = {name: (x * np.float32(scale)).astype(np.float32) for name, x in module_weights(modules).items()}
    stored: Weights = {name: to_bf16(x) if codec == "bf16" else x for name, x in exact.items()}
    weights = write(folder, modules, {}, stored)
    assert convert.main([str(folder), "-o", str(out), "--quant", "q8"]) == 0
    with open_trit(out) as file:
        for name in module_tensors(modules, CONFIG):
            assert file.tensors[name].codec == codec and np.array_equal(dequantize(file.tensors[name]), weights[name])


def test_an_exported_folder_is_the_same_again(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules, stated = CASES["GELU keys and values, after"]
    write(folder, modules, stated)
    back, again = folder.parent / "back", out.with_name("again.trit")
    assert convert.main([str(folder), "-o", str(out), "--quant", "keep"]) == 0
    assert export.main([str(out), "-o", str(back)]) == 0
    assert "KV modules" in capsys.readouterr().err
    one, other = open_folder(folder)[0], open_folder(back)[0]
    byte = np.dtype("u1")
    for name, tensor in one.items():
        twin = other.pop(name)
        assert (twin.dtype, twin.shape) == (tensor.dtype, tensor.shape)
        assert np.array_equal(twin.raw(byte, 0, twin.nbytes), tensor.raw(byte, 0, tensor.nbytes))
    assert not other
    assert convert.main([str(back), "-o", str(again), "--quant", "keep"]) == 0
    with open_trit(out) as first, open_trit(again) as second:
        assert first.header["kv_modules"] == second.header["kv_modules"]
        assert first.header["source"]["kv_names"] == second.header["source"]["kv_names"]


def test_export_of_modules_whose_names_are_not_known(folder: Path, out: Path) -> None:
    """As in a file of another writer: the names are made up, and the map in config.json leads back."""
    modules, stated = CASES["GELU keys and values, before"]
    weights = write(folder, modules, stated)
    source = open_source(folder)
    from formats.conversion.convert import _metadata
    from formats.writer import TritWriter

    metadata = _metadata(source, None)
    del metadata["source"]["kv_names"]
    with TritWriter(out, metadata, list(source.tensors)) as writer:
        for name, tensor in source.tensors.items():
            params, parts = CODECS["f16"].quantize(tensor.read())
            writer.add(name, "f16", tensor.shape, params, parts)
    assert export.main([str(out), "-o", str(folder.parent / "back")]) == 0
    again = open_source(folder.parent / "back")
    assert again.kv_modules == source.kv_modules
    for name, values in weights.items():
        assert np.array_equal(again.tensors[name].read(), values)


def test_inspect_and_the_plan_show_them(folder: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules, stated = CASES["GELU keys and values, before"]
    write(folder, modules, stated)
    convert.main([str(folder), "--quant", "f16", "--dry-run"])
    plan, notes = capsys.readouterr()
    assert "layers.0-1.kv.v.decoder2" in plan
    assert "learned KV modules: keys of rank 4, encoded before RoPE, decoded through 24 gelu: layers 0, 1" in notes
    convert.main([str(folder), "-o", str(out), "--quant", "f16"])
    capsys.readouterr()
    inspect.main([str(out)])
    assert "values of rank 4, decoded through 24 gelu: layers 0, 1" in capsys.readouterr().out
    inspect.main([str(out), "--json"])
    assert json.loads(capsys.readouterr().out)["kv_modules"] == [m.to_dict() for m in sorted_modules(modules)]


def sorted_modules(modules: Sequence[KVModule]) -> list[KVModule]:
    return sorted(modules, key=lambda m: (m.layer, m.side))


# ---- maps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["values-linear", "keys-and-values-gelu"])
def test_the_examples_of_maps(name: str, folder: Path, out: Path) -> None:
    """Neither checkpoint says enough by itself: names without a side, no activation, no order."""
    if name == "values-linear":
        modules = values(LINEAR, 0)
        renamed = [("v_compressor.encoder", "compressor.0"), ("v_compressor.decoder", "compressor.1")]
        write(folder, modules, {}, rename=renamed)
    else:
        modules = values(GELU_BIAS, 0, 1) + keys(GELU_BIAS, "before", 0, 1)
        write(folder, modules, {})
    assert convert.main([str(folder), "-o", str(out), "--quant", "f16"]) == 2 and not out.exists()
    arguments = [str(folder), "-o", str(out), "--quant", "f16", "--kv-map", str(MAPS / f"{name}.json")]
    assert convert.main(arguments) == 0
    with open_trit(out) as file:
        assert file.header["kv_modules"] == [m.to_dict() for m in sorted_modules(modules)]


# ---- refusals ---------------------------------------------------------------------------------------------


def refusal(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Convert, which must fail in one line and leave nothing. returns: the line"""
    source = Path(arguments[0])
    before = sorted(source.parent.rglob("*"))
    assert convert.main([*arguments, "-o", str(source.parent / "out.trit"), "--quant", "keep"]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "" and stderr.count("\n") == 1 and sorted(source.parent.rglob("*")) == before
    return stderr


@pytest.mark.parametrize("width", [16, 31, 64])
def test_a_module_of_the_wrong_width(width: int, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    modules = values(LINEAR, 1)
    stored = {n: x.astype(np.float16) for n, x in module_weights(modules).items()}
    stored["layers.1.kv.v.encoder"] = np.zeros((6, width), np.float16)
    write(folder, modules, {}, stored)
    line = refusal([str(folder)], capsys)
    assert "model-0000" in line and "model.layers.1.self_attn.v_compressor.encoder.weight" in line
    assert f"shape [6, {width}]; expected [6, 32]" in line


def test_a_checkpoint_that_does_not_say_enough(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, keys(LINEAR, "before", 0), {})
    line = refusal([str(folder)], capsys)
    assert "before or after RoPE" in line and "k_compressor.encoder.weight" in line and "--kv-map" in line


def test_maps_that_cannot_be_used(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(folder, values(LINEAR, 0), {})
    example = str(MAPS / "values-linear.json")
    assert "has no tensor" in refusal([str(folder), "--kv-map", example], capsys)
    assert "nothing.json" in refusal([str(folder), "--kv-map", str(tmp_path / "nothing.json")], capsys)
    write_gguf(tmp_path / "m.gguf")
    assert "is a GGUF file" in refusal([str(tmp_path / "m.gguf"), "--kv-map", example], capsys)
    edit_json(folder / "config.json", kv_map={"modules": []})
    assert "config.json" in refusal([str(folder)], capsys)
