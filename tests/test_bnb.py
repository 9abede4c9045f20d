"""4-bit checkpoints of bitsandbytes: carried over without a bit changed, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats.codecs import CODECS
from formats.container import dequantize, open_trit
from formats.conversion.convert import Summary, convert
from formats.conversion.safetensors_writer import Piece, write_folder, write_safetensors
from formats.errors import FormatError, SourceError, UnsupportedError
from formats.sources.bnb import bnb_pieces, split_packed
from formats.sources.hf_names import HF_NAMES
from formats.sources.safetensors_reader import open_folder, read_file
from formats.sources.source import open_source
from tests import tiny
from tests.checkpoints import HF_CONFIG, edit_json, weights_for, write_hf

WQ = "model.layers.0.self_attn.q_proj.weight"
STATE = ".quant_state.bitsandbytes__nf4"
NF4 = ("tiny-llama-tied-nf4", "tiny-llama-bias-nf4-dq-emb")
MORE = ("tiny-llama-nf4-dq", "tiny-llama-bias-nf4-dq") if tiny.MORE_FIXTURES else ()
Pieces = dict[str, Piece]


def pieces_of(options: dict[str, Any], embed: bool = True, **changes: Any) -> Pieces:
    """Describe a checkpoint as bitsandbytes writes it. embed: pack the embeddings and the output, too."""
    pieces: Pieces = {}
    for name, values in weights_for({**HF_CONFIG, **changes}).items():
        theirs = HF_NAMES.theirs(name)
        if values.ndim == 2 and (embed or "layers" in name):
            params, parts = CODECS["nf4"].quantize(values, **options)
            found = bnb_pieces(theirs, values.shape, params, parts)
        else:
            found = [Piece.of(theirs, values.astype(np.float16))]
        pieces |= {piece.name: piece for piece in found}
    return pieces


def write(folder: Path, pieces: Pieces, shard_bytes: int = 1 << 30, **changes: Any) -> Path:
    write_hf(folder, {**changes, "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    (folder / "model.safetensors").unlink()
    write_folder(folder, list(pieces.values()), shard_bytes)
    return folder


def keep(folder: Path, quant: str = "keep", **options: Any) -> Summary:
    return convert(open_source(folder), folder.parent / "out.trit", quant, **options)


def by_hand(stored: dict[str, Any], name: str) -> np.ndarray:
    """Dequantise straight from the file, each step written out. returns: float32 of the weight's shape"""

    def array(suffix: str, dtype: str) -> np.ndarray:
        tensor = stored[name + suffix]
        values: np.ndarray = tensor.raw(np.dtype(dtype), 0, tensor.nbytes // np.dtype(dtype).itemsize)
        return values

    about = json.loads(array(STATE, "u1").tobytes())
    n = int(np.prod(about["shape"]))
    nibbles = np.stack([array("", "u1") >> 4, array("", "u1") & 15], axis=1).reshape(-1)[:n]
    if "nested_blocksize" in about:
        codes = array(".absmax", "u1")
        nested = array(".nested_absmax", "<f4")[np.arange(len(codes)) // about["nested_blocksize"]]
        absmax = array(".nested_quant_map", "<f4")[codes] * nested
        absmax = absmax + np.float32(about["nested_offset"])
    else:
        absmax = array(".absmax", "<f4")
    w = array(".quant_map", "<f4")[nibbles] * absmax[np.arange(n) // about["blocksize"]]
    if about["dtype"] == "float16":
        w = w.astype(np.float16).astype(np.float32)
    elif about["dtype"] == "bfloat16":
        bits = w.view(np.uint32)
        w = ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return w.reshape(about["shape"])


# ---- carried over ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NF4 + MORE)
def test_every_tensor_of_the_fixtures_is_bit_exact(name: str, tmp_path: Path) -> None:
    folder = tiny.fixture_folder(name)
    stored, _ = open_folder(folder)
    summary = convert(open_source(folder), tmp_path / "out.trit", "keep")
    with open_trit(tmp_path / "out.trit") as file:
        file.verify()
        packed = 0
        for ours, tensor in file.tensors.items():
            theirs = HF_NAMES.theirs(ours)
            values = dequantize(tensor)
            if theirs + STATE in stored:
                packed += 1
                assert tensor.codec == "nf4"
                assert values.tobytes() == by_hand(stored, theirs).tobytes(), ours
            else:
                assert tensor.codec != "nf4"
                assert values.tobytes() == stored[theirs].read_rows(0, tensor.shape[0]).tobytes(), ours
        assert packed >= 14 and ("output" in file.tensors) == ("bias" in name or name == "tiny-llama-nf4-dq")
        assert summary.by_codec()["nf4"]["tensors"] == packed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("nested", [0, 256])
@pytest.mark.parametrize("block", [32, 64, 128, 4096])
def test_every_form_that_the_library_writes(block: int, nested: int, dtype: str, tmp_path: Path) -> None:
    """Rows of 96 are no multiple of 64: blocks cross them."""
    pieces = pieces_of({"block": block, "nested_block": nested, "dtype": dtype})
    folder = write(tmp_path / "source", pieces, shard_bytes=30_000)
    stored, files = open_folder(folder)
    assert len(files) >= 3
    source = open_source(folder)
    keep(folder)
    with open_trit(tmp_path / "out.trit") as file:
        for ours, tensor in file.tensors.items():
            if tensor.codec != "nf4":
                continue
            theirs = HF_NAMES.theirs(ours)
            expected = by_hand(stored, theirs)
            assert tensor.params == {"block": block, "nested_block": nested, "dtype": dtype}
            codes = stored[theirs].raw(np.dtype("u1"), 0, stored[theirs].nbytes)
            assert tensor.parts["codes"].tobytes() == codes.tobytes()
            assert dequantize(tensor).tobytes() == expected.tobytes()
            assert source.tensors[ours].read().tobytes() == expected.tobytes()
            assert source.tensors[ours].read_rows(3, 7).tobytes() == expected[3:7].tobytes()
        assert {file.tensors[n].codec for n in ("tok_embeddings", "output", "layers.1.w2")} == {"nf4"}


@pytest.mark.parametrize("storage", ["BF16", "F16", "F32"])
def test_codes_may_be_stored_as_any_type(storage: str, tmp_path: Path) -> None:
    pieces = pieces_of({})
    plain = write(tmp_path / "plain" / "source", pieces)
    for name in [n for n in pieces if n + STATE in pieces]:
        codes = next(iter(pieces[name].blocks()))
        wide = codes.reshape(-1).view({"BF16": "<u2", "F16": "<f2", "F32": "<f4"}[storage]).reshape(-1, 1)
        pieces[name] = Piece.of(name, wide, storage)
    folder = write(tmp_path / "wide" / "source", pieces)
    first, second = open_source(plain).tensors, open_source(folder).tensors
    for name, tensor in first.items():
        assert tensor.read().tobytes() == second[name].read().tobytes()


def test_what_is_not_packed_stays_as_it_is(tmp_path: Path) -> None:
    folder = write(tmp_path / "source", pieces_of({"dtype": "float16"}, embed=False))
    summary = keep(folder)
    assert set(summary.by_codec()) == {"nf4", "f16"} and summary.by_codec()["nf4"]["tensors"] == 14
    with open_trit(tmp_path / "out.trit") as file:
        values = weights_for(HF_CONFIG)["tok_embeddings"]
        assert file.tensors["tok_embeddings"].codec == "f16"
        np.testing.assert_array_equal(dequantize(file.tensors["tok_embeddings"]), values)
    keep(folder, embed="q8", overwrite=True)
    with open_trit(tmp_path / "out.trit") as file:
        assert file.tensors["output"].codec == "q8" and file.tensors["layers.0.wq"].codec == "nf4"


def test_a_head_tied_to_a_packed_embedding(tmp_path: Path) -> None:
    pieces = pieces_of({})
    folder = write(tmp_path / "same" / "source", pieces, tie_word_embeddings=True)
    assert "output" in open_source(folder).tensors  # the two differ, so both are kept
    embedding = "model.embed_tokens.weight"
    for name in [n for n in pieces if n.startswith(embedding)]:
        twin = name.replace(embedding, "lm_head.weight")
        pieces[twin] = Piece(twin, pieces[name].dtype, pieces[name].shape, pieces[name].blocks)
    folder = write(tmp_path / "tied" / "source", pieces, tie_word_embeddings=True)
    source = open_source(folder)
    assert "output" not in source.tensors and source.tensors["tok_embeddings"].dtype == "NF4"


def test_packed_weights_may_be_quantised_anew(tmp_path: Path) -> None:
    folder = write(tmp_path / "source", pieces_of({"dtype": "bfloat16"}))
    values = open_source(folder).tensors["layers.0.w1"].read()
    summary = keep(folder, "trit3")
    assert any("NF4" in note and "keep" in note for note in summary.notes)
    with open_trit(tmp_path / "out.trit") as file:
        params, parts = CODECS["trit3"].quantize(values)
        expected = CODECS["trit3"].dequantize(parts, values.shape, params)
        np.testing.assert_array_equal(dequantize(file.tensors["layers.0.w1"]), expected)
    assert not keep(folder, "nf4", embed="nf4", overwrite=True).notes
    with open_trit(tmp_path / "out.trit") as file:
        assert file.tensors["layers.0.w1"].params["dtype"] == "bfloat16"
        np.testing.assert_array_equal(dequantize(file.tensors["layers.0.w1"]), values)


def test_config_does_not_decide(tmp_path: Path) -> None:
    """Without quant_state keys a checkpoint is an ordinary one, with them it is packed, whatever config.json says."""
    weights = write_hf(tmp_path / "plain", {"quantization_config": {"quant_method": "bitsandbytes"}})
    np.testing.assert_array_equal(open_source(tmp_path / "plain").tensors["norm"].read(), weights["norm"])
    folder = write(tmp_path / "packed", pieces_of({}))
    for config in (None, {"load_in_4bit": True}):
        edit_json(folder / "config.json", quantization_config=config)
        assert open_source(folder).tensors["layers.0.wq"].dtype == "NF4"


# ---- refused --------------------------------------------------------------------------------------------


def state_with(**changes: Any) -> Callable[[Pieces], None]:
    """Change keys of one quant_state; None takes a key away."""

    def change(pieces: Pieces) -> None:
        about = json.loads(next(iter(pieces[WQ + STATE].blocks())).tobytes())
        about = {key: value for key, value in {**about, **changes}.items() if value is not None}
        set_state(pieces, json.dumps(about).encode())

    return change


def set_state(pieces: Pieces, data: bytes) -> None:
    pieces[WQ + STATE] = Piece.of(WQ + STATE, np.frombuffer(data, np.uint8))


def cut(suffix: str, by: int = 1) -> Callable[[Pieces], None]:
    def change(pieces: Pieces) -> None:
        values = next(iter(pieces[WQ + suffix].blocks()))
        pieces[WQ + suffix] = Piece.of(WQ + suffix, values[:-by])

    return change


def drop(suffix: str) -> Callable[[Pieces], None]:
    def change(pieces: Pieces) -> None:
        del pieces[WQ + suffix]

    return change


def retype(suffix: str, values: np.ndarray) -> Callable[[Pieces], None]:
    return lambda pieces: pieces.update({WQ + suffix: Piece.of(WQ + suffix, values)})


def fp4(pieces: Pieces) -> None:
    state = pieces.pop(WQ + STATE)
    other = WQ + ".quant_state.bitsandbytes__fp4"
    pieces[other] = Piece(other, state.dtype, state.shape, state.blocks)


def int8(pieces: Pieces) -> None:
    for name in [n for n in pieces if n.startswith(WQ)]:
        del pieces[name]
    pieces[WQ] = Piece.of(WQ, np.zeros((64, 64), np.int8))
    scales = WQ.removesuffix("weight") + "SCB"
    pieces[scales] = Piece.of(scales, np.zeros(64, np.float32))


BAD: dict[str, tuple[Callable[[Pieces], None], type[FormatError], str, str]] = {
    "fp4": (fp4, UnsupportedError, ".quant_state.bitsandbytes__fp4", "packed as 'FP4'"),
    "int8": (int8, UnsupportedError, "q_proj.SCB", "LLM.int8"),
    "other type": (state_with(quant_type="nf3"), UnsupportedError, STATE, "quant_type 'nf3'"),
    "no type": (state_with(quant_type=None), UnsupportedError, STATE, "quant_type None"),
    "nested dtype": (state_with(nested_dtype="float16"), UnsupportedError, STATE, "nested_dtype 'float16'"),
    "nested block": (state_with(nested_blocksize=128), UnsupportedError, STATE, "nested_blocksize 128"),
    "block": (state_with(blocksize=48), UnsupportedError, STATE, "blocksize 48"),
    "dtype": (state_with(dtype="float64"), UnsupportedError, STATE, "dtype 'float64'"),
    "not JSON": (lambda p: set_state(p, b"{"), SourceError, STATE, "is not valid JSON"),
    "not UTF-8": (lambda p: set_state(p, b"\xff{}"), SourceError, STATE, "is not valid JSON"),
    "a list": (lambda p: set_state(p, b"[]"), SourceError, STATE, "expected an object"),
    "no shape": (state_with(shape=None), SourceError, STATE, "shape None"),
    "odd shape": (state_with(shape=[64, -1]), SourceError, STATE, "shape [64, -1]"),
    "other shape": (state_with(shape=[32, 128]), SourceError, "", "expected [64, 64]"),
    "huge shape": (state_with(shape=[1 << 20, 1 << 20]), SourceError, "", "calls for 549755813888"),
    "offset": (state_with(nested_offset="1"), SourceError, STATE, "nested_offset '1'"),
    "no offset": (state_with(nested_offset=None), SourceError, STATE, "nested_offset None"),
    "infinite offset": (state_with(nested_offset=float("inf")), SourceError, STATE, "nested_offset inf"),
    "no nested": (state_with(nested_blocksize=None), UnsupportedError, ".absmax", "supported is F32"),
    "no absmax": (drop(".absmax"), SourceError, STATE, ".absmax, which is missing"),
    "no levels": (drop(".quant_map"), SourceError, STATE, ".quant_map, which is missing"),
    "no weight": (drop(""), SourceError, STATE, "which is missing"),
    "codes": (cut(""), SourceError, "", "calls for 2048"),
    "absmax": (cut(".absmax"), SourceError, ".absmax", "has 63 bytes"),
    "nested absmax": (
        retype(".nested_absmax", np.zeros(2, np.float32)), SourceError, ".nested_absmax", "has 8 bytes"
    ),
    "levels": (cut(".quant_map"), SourceError, ".quant_map", "has 60 bytes"),
    "nested levels": (cut(".nested_quant_map", 256), SourceError, ".nested_quant_map", "has 0 bytes"),
    "absmax dtype": (retype(".absmax", np.zeros(64, np.int8)), UnsupportedError, ".absmax", "supported is U8"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line_with_file_and_tensor(case: str, tmp_path: Path) -> None:
    change, kind, tensor, text = BAD[case]
    pieces = pieces_of({})
    change(pieces)
    with pytest.raises(kind) as caught:
        open_source(write(tmp_path / "source", pieces))
    message = str(caught.value)
    assert text in message and "\n" not in message
    assert (caught.value.tensor or message).endswith(tensor) or WQ + tensor in message
    if case != "other shape":
        assert "model.safetensors" in caught.value.path


def test_scales_whose_products_do_not_fit(tmp_path: Path) -> None:
    pieces = pieces_of({})
    retype(".nested_absmax", np.full(1, 1e38, np.float32))(pieces)
    state_with(dtype="float16")(pieces)
    source = open_source(write(tmp_path / "source", pieces))
    with pytest.raises(SourceError, match=r"does not fit codec nf4 with dtype float16.*the checkpoint is broken"):
        convert(source, tmp_path / "m.trit", "keep")


@pytest.mark.parametrize("suffix", [".nested_absmax", ".quant_map", ".nested_quant_map"])
def test_scales_that_are_not_numbers(suffix: str, tmp_path: Path) -> None:
    pieces = pieces_of({})
    values = next(iter(pieces[WQ + suffix].blocks())).copy()
    values[0] = np.nan
    pieces[WQ + suffix] = Piece.of(WQ + suffix, values)
    folder = write(tmp_path / "source", pieces)
    with pytest.raises(SourceError, match="checkpoint is broken") as caught:
        keep(folder)
    assert caught.value.tensor == WQ + suffix and sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_side_tensors_without_a_weight_are_not_dropped(tmp_path: Path) -> None:
    pieces = pieces_of({})
    extra = "model.layers.0.extra.absmax"
    pieces[extra] = Piece.of(extra, np.zeros(4, np.float32))
    with pytest.raises(SourceError, match=r"extra\.absmax"):
        open_source(write(tmp_path / "source", pieces))


# ---- the writer of such files ---------------------------------------------------------------------------


def test_pieces_and_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for shape in ((3, 5), (70, 40)):
        params, parts = CODECS["nf4"].quantize(rng.standard_normal(shape).astype(np.float32), dtype="float16")
        write_safetensors(tmp_path / "x.safetensors", bnb_pieces("x", shape, params, parts))
        packed, plain = split_packed(read_file(tmp_path / "x.safetensors"))
        assert not plain and packed["x"].params == params and packed["x"].shape == shape
        found = packed["x"].parts()
        assert {k: v.tobytes() for k, v in found.items()} == {k: np.asarray(v).tobytes() for k, v in parts.items()}


# ---- logits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("name", MORE)
def test_logits_are_those_of_its_own_dequantisation(name: str, backend: str, tmp_path: Path) -> None:
    """The larger fixtures; tests/test_model.py has the others."""
    from runtime.model import Model

    path = convert(open_source(tiny.fixture_folder(name)), tmp_path / "m.trit", "keep").path
    expected = tiny.expected_logits(name.removeprefix("tiny-llama-"))
    model = Model.load(path, backend=backend, n_threads=1, activations="f32")
    ids = expected["input_ids"].tolist()
    logits = model.forward(ids, model.new_cache(len(ids)), "all")
    assert logits is not None
    assert np.abs(logits - expected["logits_state_dtype"]).max() <= 1e-4
    model.close()
