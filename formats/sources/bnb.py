"""4-bit weights of bitsandbytes in a checkpoint: found, checked, offered as codec nf4 without a bit changed.

What is packed shows in the keys `NAME.quant_state.*` alone: neither a module's name nor config.json says so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..codecs.base import DTYPES, Params, Parts
from ..codecs.nf4 import BLOCKS, NESTED_BLOCKS, NF4Codec
from ..conversion.safetensors_writer import Piece
from ..errors import SourceError, UnsupportedError, shown
from .safetensors_reader import StoredTensor
from .source import Carried, parse_json

STATE = ".quant_state."
NF4_STATE = "bitsandbytes__nf4"
INT8_SCALES = ".SCB"
MAX_STATE_BYTES = 1 << 16
STATE_BYTES = 256
F4, U1 = np.dtype("<f4"), np.dtype("u1")


@dataclass(frozen=True)
class PackedTensor:
    """One packed weight. sides: its side tensors by suffix; offset: added to scales that are quantised themselves."""

    weight: StoredTensor
    sides: Mapping[str, StoredTensor]
    shape: tuple[int, ...]
    params: dict[str, Any]
    offset: float

    @property
    def carried(self) -> Carried:
        return Carried("nf4", self.params, self._checked)

    def parts(self) -> dict[str, np.ndarray]:
        """Map the arrays of codec nf4 where they lie.

        Raises SourceError if a scale or level is NaN or infinite.
        """
        parts = {"codes": self.weight.raw(U1, 0, self.weight.nbytes), "levels": self._side("quant_map")}
        if not self.params["nested_block"]:
            return {**parts, "absmax": self._side("absmax")}
        return {
            **parts,
            "absmax": self.sides["absmax"].raw(U1, 0, self.sides["absmax"].nbytes),
            "nested_absmax": self._side("nested_absmax"),
            "nested_levels": self._side("nested_quant_map"),
            "offset": np.array([self.offset], F4),
        }

    def _checked(self) -> dict[str, np.ndarray]:
        parts = self.parts()
        for problem in NF4Codec().problems(parts, self.shape, self.params):
            raise SourceError(self.weight.path, f"{problem}: the checkpoint is broken", self.weight.name)
        return parts

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows start..stop as bitsandbytes itself dequantises them: (stop - start, ...) float32."""
        return NF4Codec().dequantize_range(self.parts(), self.shape, self.params, start, stop)

    def _side(self, suffix: str) -> np.ndarray:
        stored = self.sides[suffix]
        values = stored.raw(F4, 0, stored.nbytes // 4)
        if not np.isfinite(values).all():
            raise SourceError(stored.path, "holds NaN or infinity: the checkpoint is broken", stored.name)
        return values


def split_packed(stored: Mapping[str, StoredTensor]) -> tuple[dict[str, PackedTensor], dict[str, StoredTensor]]:
    """Sort the tensors of a checkpoint into packed weights, each with its side tensors, and all others.

    returns: both by the source's names

    Raises UnsupportedError (FP4, LLM.int8, another variant), SourceError (damaged or incomplete).
    """
    plain = dict(stored)
    for name, tensor in stored.items():
        if name.endswith(INT8_SCALES):
            message = "is a scale of bitsandbytes LLM.int8 (8 bits), which is not read; supported is NF4"
            raise UnsupportedError(tensor.path, message, name)
    packed = {}
    for key in [name for name in stored if STATE in name]:
        name, _, kind = key.partition(STATE)
        state = plain.pop(key)
        if kind != NF4_STATE:
            what = kind.removeprefix("bitsandbytes__").upper()
            message = f"says that the weight is packed as {shown(what)}, which is not read; supported is NF4"
            raise UnsupportedError(state.path, message, key)
        packed[name] = _packed(name, state, plain)
    return packed, plain


def _packed(name: str, state: StoredTensor, plain: dict[str, StoredTensor]) -> PackedTensor:
    """Check one weight against its quant_state, and take it and its side tensors out of `plain`."""
    about = _read_state(state)
    shape, params = _shape(state, about), _params(state, about)
    layout = NF4Codec().parts(shape, params)
    wanted = {"": ("codes", None), ".absmax": ("absmax", None), ".quant_map": ("levels", "F32")}
    if params["nested_block"]:
        wanted |= {".nested_absmax": ("nested_absmax", "F32"), ".nested_quant_map": ("nested_levels", "F32")}
    found = {}
    for suffix, (part, kind) in wanted.items():
        tensor = plain.pop(f"{name}{suffix}", None)
        if tensor is None:
            raise SourceError(state.path, f"belongs to {name}{suffix}, which is missing", state.name)
        dtype, part_shape = layout[part]
        kind = kind or ("U8" if dtype == U1 else "F32")
        # The codes may be stored as any type: the bytes count.
        if suffix and tensor.dtype != kind:
            raise UnsupportedError(tensor.path, f"has dtype {tensor.dtype}; supported is {kind}", tensor.name)
        nbytes = math.prod(part_shape) * dtype.itemsize
        if tensor.nbytes != nbytes:
            raise SourceError(
                tensor.path,
                f"has {tensor.nbytes} bytes; a weight of {list(shape)} in blocks of {params['block']} "
                f"calls for {nbytes}: the checkpoint is damaged",
                tensor.name,
            )
        found[suffix] = tensor
    sides = {suffix[1:]: tensor for suffix, tensor in found.items() if suffix}
    return PackedTensor(found[""], sides, shape, params, _offset(state, about) if params["nested_block"] else 0.0)


def _read_state(state: StoredTensor) -> dict[str, Any]:
    if state.dtype != "U8" or state.nbytes > MAX_STATE_BYTES:
        message = f"is {state.dtype} of {state.nbytes} bytes; expected JSON as U8, {MAX_STATE_BYTES} bytes at most"
        raise SourceError(state.path, message, state.name)
    about = parse_json(state.path, state.raw(U1, 0, state.nbytes).tobytes(), state.name)
    if not isinstance(about, dict):
        raise SourceError(state.path, f"holds a JSON {type(about).__name__}, expected an object", state.name)
    return about


def _shape(state: StoredTensor, about: Mapping[str, Any]) -> tuple[int, ...]:
    shape = about.get("shape")
    good = isinstance(shape, list) and 1 <= len(shape) <= 2 and all(type(n) is int and 0 < n < 1 << 24 for n in shape)
    if not good:
        raise SourceError(state.path, f"has shape {shown(shape)}, expected one or two sizes", state.name)
    assert isinstance(shape, list)
    return tuple(shape)


def _params(state: StoredTensor, about: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a quant_state to the parameters of codec nf4. Raises UnsupportedError naming what we lack."""
    nested = "nested_blocksize" in about
    allowed: dict[str, tuple[Any, ...]] = {"quant_type": ("nf4",), "blocksize": BLOCKS, "dtype": DTYPES}
    if nested:
        allowed |= {"nested_blocksize": NESTED_BLOCKS[:1], "nested_dtype": ("float32",)}
    for key, values in allowed.items():
        value = about.get(key)
        if type(value) is not type(values[0]) or value not in values:
            supported = ", ".join(map(str, values))
            raise UnsupportedError(state.path, f"has {key} {shown(value)}; supported: {supported}", state.name)
    nested_block = about["nested_blocksize"] if nested else 0
    return {"block": about["blocksize"], "nested_block": nested_block, "dtype": about["dtype"]}


def _offset(state: StoredTensor, about: Mapping[str, Any]) -> float:
    offset = about.get("nested_offset")
    good = isinstance(offset, float | int) and abs(offset) <= float(np.finfo(F4).max)
    if not good or isinstance(offset, bool):
        raise SourceError(state.path, f"has nested_offset {shown(offset)}, expected a finite number", state.name)
    return float(offset or 0)


def bnb_pieces(name: str, shape: tuple[int, ...], params: Params, parts: Parts) -> list[Piece]:
    """Describe parts of codec nf4 as the tensors that bitsandbytes saves: the way back."""
    about: dict[str, Any] = {"quant_type": "nf4", "blocksize": params["block"], "dtype": params["dtype"]}
    about["shape"] = list(shape)
    sides = {"absmax": parts["absmax"], "quant_map": parts["levels"]}
    if params["nested_block"]:
        sides |= {"nested_absmax": parts["nested_absmax"], "nested_quant_map": parts["nested_levels"]}
        about |= {"nested_blocksize": params["nested_block"], "nested_dtype": "float32"}
        about["nested_offset"] = float(parts["offset"][0])
    # Spaces make the length known before the offset is
    state = np.frombuffer(json.dumps(about).encode().ljust(STATE_BYTES), np.uint8)
    return [
        Piece.of(name, parts["codes"].reshape(-1, 1)),
        *(Piece.of(f"{name}.{suffix}", values) for suffix, values in sides.items()),
        Piece.of(f"{name}{STATE}{NF4_STATE}", state),
    ]
