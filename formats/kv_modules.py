"""Learned projections of the KV cache, as the header of a .trit file describes them.

Of a layer that has one, the cache stores `rank` numbers for each token instead of `width` = n_kv_heads * head_dim:
codes = encoder(vector); attention sees decoder(codes). The encoder is linear. The decoder is linear, or linear, GELU,
linear through `hidden` numbers. This is the form of the LeanLlama checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .codecs import CODECS
from .errors import HeaderError, TensorError, shown

if TYPE_CHECKING:
    from .container import TritFile

FEATURE = "kv_modules"
KEY_MEAN, KEY_BALANCE = KEY_FACTS = ".kv.k.mean", ".kv.k.balance"  # what follows the layer's number; SPEC.md, 6.2
BALANCES = 2.0**-10, 2.0**10  # the least and the largest number of a balance
SIDES = ("k", "v")
ACTIVATIONS = ("gelu", "gelu_tanh")
ROPE_ORDERS = ("before", "after")
CODECS_ALLOWED = ("f16", "bf16", "f32")
_KEYS = ("layer", "side", "rank", "hidden", "activation", "rope", "biases")


@dataclass(frozen=True)
class KVModule:
    """One module. Layers, sides and shapes are as in the header; see SPEC.md, section 6.1.

    hidden, activation: of a decoder of two layers, else None; activation: "gelu" (erf) or "gelu_tanh"
    rope: of keys, whether they are encoded "before" or "after" their rotation; None for values
    biases: which of "encoder", "decoder", "decoder2" have one
    """

    layer: int
    side: str
    rank: int
    hidden: int | None = None
    activation: str | None = None
    rope: str | None = None
    biases: tuple[str, ...] = ()

    @property
    def prefix(self) -> str:
        """What the names of its tensors begin with."""
        return f"layers.{self.layer}.kv.{self.side}"

    @property
    def matrices(self) -> tuple[str, ...]:
        return ("encoder", "decoder") if self.hidden is None else ("encoder", "decoder", "decoder2")

    def shapes(self, width: int) -> dict[str, tuple[int, ...]]:
        """Give name -> shape of its tensors. width: n_kv_heads * head_dim of the model."""
        middle = width if self.hidden is None else self.hidden
        sizes = {"encoder": (self.rank, width), "decoder": (middle, self.rank), "decoder2": (width, middle)}
        out: dict[str, tuple[int, ...]] = {}
        for name in self.matrices:
            out[f"{self.prefix}.{name}"] = sizes[name]
            if name in self.biases:
                out[f"{self.prefix}.{name}.bias"] = sizes[name][:1]
        return out

    def to_dict(self) -> dict[str, Any]:
        """Give the entry of the header's list."""
        return {**{key: getattr(self, key) for key in _KEYS}, "biases": list(self.biases)}


def kv_width(config: Mapping[str, Any]) -> int:
    """Numbers in the keys, or in the values, of one token and layer."""
    return int(config["n_kv_heads"] * config["head_dim"])


def module_tensors(modules: Iterable[KVModule], config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """List the tensors that these modules have, in the order in which they are written."""
    width = kv_width(config)
    return {name: shape for module in modules for name, shape in module.shapes(width).items()}


def describe_form(m: KVModule) -> str:
    """Say what a module keeps of its vectors, and how they are decoded."""
    of = "keys" if m.side == "k" else "values"
    of += f" of rank {m.rank}, " + (f"encoded {m.rope} RoPE, " if m.rope else "")
    return of + ("decoded linearly" if m.hidden is None else f"decoded through {m.hidden} {m.activation}")


def describe_modules(modules: Iterable[KVModule]) -> list[str]:
    """Say in a line for each form which layers have it."""
    forms: dict[str, list[str]] = {}
    for m in sorted(modules, key=lambda m: (m.side, m.layer)):
        forms.setdefault(describe_form(m), []).append(str(m.layer))
    return [f"{form}: layers {', '.join(layers)}" for form, layers in forms.items()]


# ---- the header -----------------------------------------------------------------------------------------


def read_kv_modules(file: TritFile) -> list[KVModule]:
    """Read the section of a file, and check it, its tensors and all their values.

    returns: the modules by layer, keys before values; [] for a file without them
    Raises HeaderError, TensorError: each names the file, and the tensor where there is one.
    """
    section, config = file.header.get(FEATURE, []), file.config
    facts = [name for name in file.tensors if name.endswith(KEY_FACTS)]
    for key in ("n_layers", "n_kv_heads", "head_dim"):
        if (section or facts) and not _is_size(config.get(key)):
            raise HeaderError(file.path, f"config {key} is {shown(config.get(key))}; expected a positive integer")
    modules = [_parse(line, i, config["n_layers"], file.path) for i, line in enumerate(section)]
    modules.sort(key=lambda m: (m.layer, m.side))
    for m in modules:
        if m.rank > kv_width(config):
            numbers = f"the {kv_width(config)} numbers of a token"
            raise HeaderError(file.path, f"'{FEATURE}' has rank {m.rank} in layer {m.layer} for {numbers}")
    for one, other in pairwise(modules):
        if (one.layer, one.side) == (other.layer, other.side):
            raise HeaderError(file.path, f"'{FEATURE}' has two modules for side {shown(one.side)} of layer {one.layer}")
    expected = module_tensors(modules, config) if modules else {}
    if facts:
        every = {f"layers.{i}{fact}": (kv_width(config),) for i in range(config["n_layers"]) for fact in KEY_FACTS}
        expected |= {name: every[name] for name in facts if name in every}
    _check_tensors(file, expected)
    for name in facts:
        values = _values(file, name)
        if name.endswith(KEY_BALANCE) and not (BALANCES[0] <= values.min() and values.max() <= BALANCES[1]):
            problem = f"has numbers from {values.min():.6g} to {values.max():.6g}; allowed are 2^-10 to 2^10"
            raise TensorError(file.path, problem, name)
    return modules


def read_key_facts(file: TritFile) -> dict[int, npt.NDArray[np.float32]]:
    """What a file tells of keys, once `read_kv_modules` has checked it: their means (else 0) and balance (else 1).

    returns: layer -> (2, n_kv_heads, head_dim) float32, of layers of which it tells something
    """
    found = {}
    for layer in range(file.config["n_layers"]):
        names = [f"layers.{layer}{fact}" for fact in KEY_FACTS]
        if any(name in file.tensors for name in names):
            facts = np.repeat(np.array([[0], [1]], np.float32), kv_width(file.config), axis=1)
            for row, name in zip(facts, names, strict=True):
                if name in file.tensors:
                    row[:] = _values(file, name)
            found[layer] = facts.reshape(2, file.config["n_kv_heads"], -1)
    return found


def _values(file: TritFile, name: str) -> npt.NDArray[np.float32]:
    tensor = file.tensors[name]
    return np.asarray(CODECS[tensor.codec].dequantize(tensor.parts, tensor.shape, tensor.params), np.float32)


def _is_size(value: Any) -> bool:
    return type(value) is int and 1 <= value < 1 << 24


def _parse(line: Any, index: int, n_layers: int, path: str) -> KVModule:
    """Check one entry of the list. Raises HeaderError."""
    where = f"entry {index} of '{FEATURE}'"
    if not isinstance(line, dict):
        raise HeaderError(path, f"{where} is {shown(line)}; expected an object")
    if wrong := sorted(set(line) ^ set(_KEYS)):
        problem = "is not known" if wrong[0] in line else "is missing"
        raise HeaderError(path, f"{where}: key {shown(wrong[0])} {problem}; expected exactly {', '.join(_KEYS)}")

    def check(key: str, good: bool, expected: str) -> None:
        if not good:
            raise HeaderError(path, f"{where}: {key} is {shown(line[key])}; expected {expected}")

    layer, hidden, biases = line["layer"], line["hidden"], line["biases"]
    check("layer", type(layer) is int and 0 <= layer < n_layers, f"an integer from 0 to {n_layers - 1}")
    check("side", line["side"] in SIDES, "'k' or 'v'")
    check("rank", _is_size(line["rank"]), "a positive integer")
    check("hidden", hidden is None or _is_size(hidden), "a positive integer or null")
    activations = (None,) if hidden is None else ACTIVATIONS
    check("activation", line["activation"] in activations, " or ".join(repr(a) for a in activations))
    orders = ROPE_ORDERS if line["side"] == "k" else (None,)
    check("rope", line["rope"] in orders, " or ".join(repr(order) for order in orders))
    check("biases", isinstance(biases, list) and all(isinstance(b, str) for b in biases), "a list of names")
    module = KVModule(**{**line, "biases": tuple(biases)})
    known = [name for name in module.matrices if name in biases]
    check("biases", biases == known, f"some of {', '.join(module.matrices)}, in this order")
    return module


def _check_tensors(file: TritFile, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check names, shapes, codecs and values of the modules' tensors. Raises TensorError."""
    present = [name for name in file.tensors if ".kv." in name]
    if extra := [name for name in present if name not in expected]:
        raise TensorError(file.path, f"belongs to no module that '{FEATURE}' lists; convert the model again", extra[0])
    for name, shape in expected.items():
        if name not in file.tensors:
            raise TensorError(file.path, "is missing from the file; convert the model again", name)
        tensor = file.tensors[name]
        if tensor.shape != shape:
            raise TensorError(file.path, f"has shape {list(tensor.shape)}; the module calls for {list(shape)}", name)
        if tensor.codec not in CODECS_ALLOWED:
            allowed = ", ".join(CODECS_ALLOWED)
            raise TensorError(file.path, f"has codec {tensor.codec}; allowed in a module are {allowed}", name)
        for problem in CODECS[tensor.codec].problems(tensor.parts, tensor.shape, tensor.params):
            raise TensorError(file.path, f"{problem}; convert the model again", name)
