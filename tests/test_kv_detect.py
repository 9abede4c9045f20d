"""Finding learned KV modules in a checkpoint: what is recognised, what is refused, and what a map can say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from formats import SourceError
from formats.kv_modules import KVModule, describe_modules
from formats.sources.kv_detect import find_kv_modules
from formats.sources.kv_map import map_of, read_kv_map

MAPS = Path(__file__).parent / "data" / "kv-maps"
CONFIG = {"n_layers": 8, "n_kv_heads": 4, "head_dim": 16}
WIDTH, RANK, HIDDEN = 64, 6, 24
LEAN = {"architectures": ["LeanLlamaForCausalLM"]}

Shapes = dict[str, tuple[int, ...]]


def linear(encoder: str, decoder: str, layer: int = 3, biases: bool = False) -> Shapes:
    """Tensors of a module with a linear decoder, by the names within self_attn; "{}" stands for "weight" or "bias"."""
    start = f"model.layers.{layer}.self_attn."
    shapes: Shapes = {start + encoder.format("weight"): (RANK, WIDTH), start + decoder.format("weight"): (WIDTH, RANK)}
    if biases:
        shapes |= {start + encoder.format("bias"): (RANK,), start + decoder.format("bias"): (WIDTH,)}
    return shapes


def gelu(side: str, layer: int = 3, biases: bool = True) -> Shapes:
    start = f"model.layers.{layer}.self_attn.{side}_compressor."
    matrices = {"encoder": (RANK, WIDTH), "decoder.0": (HIDDEN, RANK), "decoder.2": (WIDTH, HIDDEN)}
    shapes: Shapes = {f"{start}{name}.weight": shape for name, shape in matrices.items()}
    return shapes | ({f"{start}{name}.bias": shape[:1] for name, shape in matrices.items()} if biases else {})


def find(shapes: Shapes, raw: dict[str, Any] | None = None, **how: Any) -> Any:
    return find_kv_modules("folder", shapes, CONFIG, raw or {}, **how)


@pytest.mark.parametrize(
    ("encoder", "decoder", "side"),
    [
        ("v_compressor.encoder.{}", "v_compressor.decoder.{}", "v"),
        ("v_encoder.{}", "v_decoder.{}", "v"),
        ("value_down.{}", "value_up.{}", "v"),
        ("v_compress.{}", "v_decompress.{}", "v"),
        ("v_compressor.{}", "v_decompressor.{}", "v"),
        ("vAutoencoder.enc.{}", "valueUp.{}", "v"),
        ("kv.values.down_proj.{}", "kv.values.up_proj.{}", "v"),
    ],
)
@pytest.mark.parametrize("biases", [False, True])
def test_linear_modules_are_found(encoder: str, decoder: str, side: str, biases: bool) -> None:
    shapes = linear(encoder, decoder, 3, biases) | linear(encoder, decoder, 5, biases)
    found = find(shapes)
    has = ("encoder", "decoder") if biases else ()
    assert found.modules == [KVModule(layer, side, RANK, biases=has) for layer in (3, 5)]
    assert set(found.sources.values()) == set(shapes)
    assert found.sources["layers.5.kv.v.decoder"] == "model.layers.5.self_attn." + decoder.format("weight")
    assert describe_modules(found.modules) == ["values of rank 6, decoded linearly: layers 3, 5"]


def test_directly_under_the_layer() -> None:
    names = {
        f"model.layers.0.v_{name}.weight": shape for name, shape in (("enc", (RANK, WIDTH)), ("dec", (WIDTH, RANK)))
    }
    assert find(names).modules == [KVModule(0, "v", RANK)]


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(
    ("stated", "rope", "activation"),
    [
        ({**LEAN, "kv_compress_before_rope": True}, "before", "gelu"),
        ({**LEAN, "kv": {"before_rope": False}}, "after", "gelu"),
        ({"kv": {"rope_order": "post", "activation": "gelu_new"}}, "after", "gelu_tanh"),
        ({"kv_rope": "pre-rope", "decoder_act": "GELU", "hidden_act": "silu"}, "before", "gelu"),
    ],
)
def test_gelu_modules_are_found(stated: dict[str, Any], rope: str, activation: str, biases: bool) -> None:
    found = find(gelu("k", 3, biases) | gelu("v", 3, biases), stated)
    has = ("encoder", "decoder", "decoder2") if biases else ()
    assert found.modules == [
        KVModule(3, "k", RANK, HIDDEN, activation, rope, has),
        KVModule(3, "v", RANK, HIDDEN, activation, None, has),
    ]


def test_no_modules_are_no_error() -> None:
    for others in ({}, {"model.extra.weight": (3, 3)}, {"model.layers.0.mlp.experts.1.up_proj.weight": (3, 3)}):
        assert find(others).modules == []


# ---- refusals ---------------------------------------------------------------------------------------------

V = linear("v_encoder.{}", "v_decoder.{}")


@pytest.mark.parametrize(
    ("shapes", "raw", "message"),
    [
        (gelu("v"), {}, "does not name the activation"),
        (gelu("v"), {"kv_activation": "relu"}, "does not name the activation"),
        (gelu("v"), {"kv_activation": "gelu", "v_act": "gelu_new"}, "does not name the activation"),
        (linear("k_encoder.{}", "k_decoder.{}"), {}, "before or after RoPE"),
        (linear("k_encoder.{}", "k_decoder.{}"), {"pre_rope": True, "k_rope": "after"}, "before or after RoPE"),
        (linear("encoder.{}", "decoder.{}"), {}, "of no form that is known"),
        ({"model.v_modules.3.encoder.weight": (RANK, WIDTH)}, {}, "of no form that is known"),
        (linear("kv.k_v_encoder.{}", "v_decoder.{}"), {}, "of no form that is known"),
        (linear("v_encoder.{}", "v_other.{}"), {}, "of no form that is known"),
        (linear("v_encoder.{}", "v_encoder.decoder.{}"), {}, "of no form that is known"),
        (V | linear("v_enc.{}", "v_dec.{}"), {}, "of no form that is known"),
        (V | {"model.layers.3.self_attn.v_scale": (WIDTH,)}, {}, "v_scale [64]"),
        ({k: s for k, s in V.items() if "decoder" not in k}, {}, "no decoder"),
        ({k: s for k, s in V.items() if "encoder" not in k}, {}, "no encoder"),
        (V | {"model.layers.3.self_attn.v_decoder.weight": (WIDTH, RANK + 1)}, {}, "shape [64, 7]; expected [64, 6]"),
        (V | {"model.layers.3.self_attn.v_encoder.weight": (RANK, 16)}, {}, "shape [6, 16]; expected [6, 64]"),
        (V | {"model.layers.3.self_attn.v_encoder.bias": (RANK + 1,)}, {}, "shape [7]; expected [6]"),
        (linear("v_encoder.{}", "v_decoder.{}", 8), {}, "layer 8 of 8"),
        (gelu("v") | {"model.layers.3.self_attn.v_compressor.decoder.4.weight": (WIDTH, WIDTH)}, LEAN, "no form"),
    ],
)  # fmt: skip
def test_what_is_unsure_is_refused(shapes: Shapes, raw: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=re.escape(message)) as error:
        find(shapes, raw)
    assert "\n" not in str(error.value) and str(error.value).startswith("folder: ")
    assert "--kv-map" in str(error.value) or "shape" in str(error.value) or "layer 8" in str(error.value)


def test_decoders_whose_order_cannot_be_told_are_refused() -> None:
    square = gelu("v", biases=False) | {
        f"model.layers.3.self_attn.v_compressor.{name}.weight": (WIDTH, WIDTH)
        for name in ("encoder", "decoder.0", "decoder.2")
    }
    assert find(square, LEAN).sources["layers.3.kv.v.decoder2"].endswith("decoder.2.weight")
    renamed = {
        name.replace("decoder.0", "decoder.a").replace("decoder.2", "decoder.b"): s for name, s in square.items()
    }
    with pytest.raises(SourceError, match="--kv-map"):
        find(renamed, LEAN)


# ---- maps -------------------------------------------------------------------------------------------------


def test_the_map_of_linear_values() -> None:
    shapes = linear("compressor.0.{}", "compressor.1.{}", 3) | linear("compressor.0.{}", "compressor.1.{}", 6)
    found = find(shapes, mapping=read_kv_map(MAPS / "values-linear.json"))
    assert found.modules == [KVModule(3, "v", RANK), KVModule(6, "v", RANK)]


def test_the_map_of_keys_and_values_with_gelu() -> None:
    found = find(gelu("k") | gelu("v"), mapping=read_kv_map(MAPS / "keys-and-values-gelu.json"))
    has = ("encoder", "decoder", "decoder2")
    assert found.modules == [
        KVModule(3, "k", RANK, HIDDEN, "gelu", "before", has),
        KVModule(3, "v", RANK, HIDDEN, "gelu", None, has),
    ]


def test_a_map_that_does_not_fit_the_checkpoint_is_refused() -> None:
    linear_map = read_kv_map(MAPS / "values-linear.json")
    first = linear("compressor.0.{}", "compressor.1.{}")
    for shapes, message in (
        ({}, "has no tensor model.layers.{}.self_attn.compressor.0.weight"),
        ({k: s for k, s in first.items() if ".0." in k}, "has no tensor model.layers.3.self_attn.compressor.1.weight"),
        (linear("compressor.0.{}", "compressor.1.{}", biases=True), "leaves 2 tensors without a role"),
    ):
        with pytest.raises(SourceError, match=re.escape(message)):
            find(shapes, mapping=linear_map)


def test_a_map_that_names_the_models_own_tensors_is_told_so(tmp_path: Path) -> None:
    own = {"side": "v", "encoder": "model.layers.{}.self_attn.v_proj.weight", "decoder": "a.{}.d"}
    for module in (own, {**own, "encoder": "a.{}.e", "decoder": own["encoder"]}):
        path = tmp_path / "map.json"
        path.write_text(json.dumps({"modules": [module]}))
        with pytest.raises(SourceError, match=r"v_proj\.weight belongs to the model itself"):
            find({"a.1.e": (RANK, WIDTH), "a.1.d": (WIDTH, RANK)}, mapping=read_kv_map(path))


def test_a_module_that_makes_more_of_its_input_is_refused() -> None:
    found = linear("v_encoder.{}", "v_decoder.{}")
    shapes = {k: tuple(WIDTH + 1 if n == RANK else n for n in s) for k, s in found.items()}
    with pytest.raises(SourceError, match=f"makes {WIDTH + 1} numbers of {WIDTH}"):
        find(shapes)


ENTRY = {"side": "v", "encoder": "a.{}.e", "decoder": "a.{}.d"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object"),
        ({"module": []}, "is {'module': []}; expected"),
        ({"modules": []}, "expected"),
        ({"modules": [3]}, "entry 0 of modules: expected an object"),
        ({"modules": [{**ENTRY, "rank": 4}]}, "expected an object whose values are all strings"),
        ({"modules": [{**ENTRY, "decoder3": "x.{}"}]}, "key 'decoder3' is not known"),
        ({"modules": [{"side": "v", "encoder": "a.{}"}]}, "'decoder' is missing"),
        ({"modules": [{**ENTRY, "side": "q"}]}, "side is 'q'; expected k or v"),
        ({"modules": [{**ENTRY, "rope": "during"}]}, "rope is 'during'; expected before or after"),
        ({"modules": [{**ENTRY, "activation": "relu"}]}, "activation is 'relu'"),
        ({"modules": [{**ENTRY, "decoder": "a.d"}]}, "expected one {} for the layer"),
        ({"modules": [{**ENTRY, "layer": "3"}]}, "layer is '3'; expected its number"),
    ],
)
def test_a_bad_map_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SourceError, match=re.escape(message)) as error:
        read_kv_map(path)
    assert error.value.path == str(path)


def test_two_entries_for_one_module_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"modules": [ENTRY, ENTRY]}))
    with pytest.raises(SourceError, match="two modules for side v of layer 1"):
        find({"a.1.e": (RANK, WIDTH), "a.1.d": (WIDTH, RANK)}, mapping=read_kv_map(path))


def test_one_tensor_in_two_roles_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"modules": [{**ENTRY, "decoder": "a.{}.e"}]}))
    with pytest.raises(SourceError, match=r"gives two roles to a\.1\.e"):
        find({"a.1.e": (WIDTH, WIDTH)}, mapping=read_kv_map(path))


def test_the_map_of_found_modules_finds_them_again(tmp_path: Path) -> None:
    """Of one layer each: forms, biases and names may differ from layer to layer."""
    shapes = gelu("k") | linear("v_encoder.{}", "v_decoder.{}", 3) | linear("v_encoder.{}", "v_decoder.{}", 5, True)
    found = find(shapes, {**LEAN, "rope_order": "before"})
    path = tmp_path / "map.json"
    path.write_text(json.dumps(map_of(found.modules, found.sources)))
    again = find(shapes, mapping=read_kv_map(path))
    assert (again.modules, again.sources) == (found.modules, found.sources) and len(again.modules) == 3
