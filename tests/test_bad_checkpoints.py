"""Every kind of bad checkpoint, through the command: one line with file and tensor, code 2, and nothing left behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from formats.conversion.safetensors_writer import Piece
from tests.test_bnb import BAD, STATE, WQ, Pieces, pieces_of, retype, set_state, state_with, write
from tools import convert

SHARD_BYTES = 40_000
W2 = "model.layers.1.mlp.down_proj.weight"
V_ENCODER = "model.layers.1.self_attn.v_encoder.weight"
V_DECODER = "model.layers.1.self_attn.v_decoder.weight"


def index_of(folder: Path) -> Path:
    return folder / "model.safetensors.index.json"


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads(index_of(folder).read_text())["weight_map"][name]


def missing_shard(folder: Path) -> str:
    shard_of(folder, WQ).unlink()
    return shard_of(folder, WQ).name


def shard_cut_short(folder: Path) -> str:
    shard = shard_of(folder, W2)
    shard.write_bytes(shard.read_bytes()[:-3000])
    return shard.name


def index_names_a_missing_tensor(folder: Path) -> str:
    index = json.loads(index_of(folder).read_text())
    index["weight_map"]["model.layers.9.mlp.down_proj.weight"] = index["weight_map"][W2]
    index_of(folder).write_text(json.dumps(index))
    return shard_of(folder, W2).name


FILES: dict[str, tuple[Callable[[Path], str], str, str]] = {
    "missing shard": (missing_shard, "model.", "is missing (a shard that model.safetensors.index.json names)"),
    "shard cut short": (shard_cut_short, "model.", "it was cut short, download it again"),
    "index names a missing tensor": (
        index_names_a_missing_tensor,
        "model.layers.9.mlp.down_proj.weight",
        "is not in this file, but model.safetensors.index.json says so",
    ),
}


def narrow_module(pieces: Pieces) -> None:
    for name, shape in ((V_ENCODER, (6, 24)), (V_DECODER, (32, 6))):
        pieces[name] = Piece.of(name, np.zeros(shape, np.float16))


TENSORS: dict[str, tuple[Callable[[Pieces], None], str, str]] = {
    "nested absmax": (
        retype(".nested_absmax", np.zeros(2, np.float32)),
        f"{WQ}.nested_absmax",
        "has 8 bytes; a weight of [64, 64] in blocks of 64 calls for 4",
    ),
    "quant type": (state_with(quant_type="nf3"), WQ + STATE, "has quant_type 'nf3'; supported: nf4"),
    "fp4": (BAD["fp4"][0], f"{WQ}.quant_state.bitsandbytes__fp4", "packed as 'FP4', which is not read"),
    "fp4 in the state": (state_with(quant_type="fp4"), WQ + STATE, "has quant_type 'fp4'; supported: nf4"),
    "int8": (BAD["int8"][0], "q_proj.SCB", "bitsandbytes LLM.int8 (8 bits), which is not read; supported is NF4"),
    "quant_state": (lambda pieces: set_state(pieces, b'{"shape": '), WQ + STATE, "is not valid JSON"),
    "width of a module": (narrow_module, V_ENCODER, "shape [6, 24]; expected [6, 32]"),
}  # fmt: skip


def refusal(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Convert to a file and to a folder of several: both fail alike. returns: the line"""
    before = sorted(folder.parent.rglob("*"))
    lines = []
    for out, quant in (("m.trit", "keep"), ("new", "trit2,nf4")):
        assert convert.main([str(folder), "-o", str(folder.parent / out), "--quant", quant]) == 2
        stdout, stderr = capsys.readouterr()
        assert stdout == "" and stderr.startswith("error: ") and stderr.count("\n") == 1
        lines.append(stderr)
    assert sorted(folder.parent.rglob("*")) == before and lines[0] == lines[1]
    return lines[0]


@pytest.mark.parametrize("case", FILES)
def test_damaged_files(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "source", pieces_of({}), SHARD_BYTES)
    damage, tensor, text = FILES[case]
    file = damage(folder)
    line = refusal(folder, capsys)
    assert f"{folder / file}: tensor {tensor}" in line and text in line


@pytest.mark.parametrize("case", TENSORS)
def test_damaged_tensors(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, tensor, text = TENSORS[case]
    pieces = pieces_of({})
    change(pieces)
    line = refusal(write(tmp_path / "source", pieces, SHARD_BYTES), capsys)
    assert "source/model-0000" in line and f"{tensor}: " in line and text in line
