"""Finding the learned KV modules of a Hugging Face checkpoint: by their tensors, or by a map (kv_map.py).

The makers' names are not published, so names only tell the side (k, v) and the role (encoder, decoder); shapes must
then chain from the width of the cache to the rank and back. Whatever is unsure is refused, never guessed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SourceError, shorten
from ..kv_modules import ROPE_ORDERS, KVModule, kv_width
from .kv_map import IN_LAYER, MATRICES, ROLES, KVMap, Roles, Shapes, named_modules

HINT = "name them with --kv-map"

_SIDE_WORDS = {"k": "k", "key": "k", "keys": "k", "v": "v", "value": "v", "values": "v"}
_ROLE_WORDS = {
    **dict.fromkeys(("enc", "encoder", "encode", "down", "compress"), "encoder"),
    **dict.fromkeys(("dec", "decoder", "decode", "up", "decompress"), "decoder"),
}
# Names of a whole module in some places, of its encoder in others: they count where nothing else does
_WEAK_ROLE_WORDS = {"compressor": "encoder", "decompressor": "decoder"}


@dataclass
class FoundModules:
    """The modules of a checkpoint. sources: our tensor name -> name in the checkpoint"""

    modules: list[KVModule] = field(default_factory=list)
    sources: dict[str, str] = field(default_factory=dict)


def find_kv_modules(
    path: str | os.PathLike[str],
    shapes: Shapes,
    config: Mapping[str, Any],
    raw: Mapping[str, Any],
    mapping: KVMap | None = None,
    files: Mapping[str, Path] | None = None,
) -> FoundModules:
    """Find the modules among the tensors that a plain Llama does not have.

    path: the checkpoint; shapes: name -> shape of those tensors; config: the header's; raw: config.json
    files: where each tensor lies, for messages

    Raises SourceError, in one line that lists the tensors and says what to do, if anything is unsure.
    """
    width, n_layers = kv_width(config), config["n_layers"]
    groups = named_modules(path, shapes, mapping) if mapping else _guessed(path, shapes, width)
    stated = {"activation": _activation(raw), "rope": _rope_order(raw)}
    found = FoundModules()
    for (layer, side), roles in sorted(groups.items()):
        names = ", ".join(name for role, name in roles.items() if role in ROLES)
        if layer >= n_layers:
            raise SourceError(path, f"has KV modules for layer {layer} of {n_layers}: {names}")
        given = {key: roles.get(key) or stated[key] for key in stated}
        module = _module(path, layer, side, roles, shapes, given, width)
        for ours, shape in module.shapes(width).items():
            theirs = roles[ours.removeprefix(f"{module.prefix}.")]
            if shapes[theirs] != shape:
                expected = f"expected {list(shape)}, for keys or values of {width} numbers"
                where = (files or {}).get(theirs, path)
                raise SourceError(where, f"KV module: shape {list(shapes[theirs])}; {expected}", theirs)
            found.sources[ours] = theirs
        found.modules.append(module)
    return found


def _module(
    path: str | os.PathLike[str],
    layer: int,
    side: str,
    roles: Mapping[str, str],
    shapes: Shapes,
    given: Mapping[str, str | None],
    width: int,
) -> KVModule:
    """Describe one module, once it is known which tensor is what. Raises SourceError."""
    names = ", ".join(name for role, name in roles.items() if role in ROLES)
    for role in ("encoder", "decoder"):
        if role not in roles:
            raise SourceError(path, f"layer {layer} has no {role} for its {side} module ({names}); {HINT}")
    for name in MATRICES:
        if f"{name}.bias" in roles and name not in roles:
            raise SourceError(path, f"layer {layer} has a bias but no matrix of its {side} {name} ({names}); {HINT}")
    for role in MATRICES:
        shape = shapes[roles[role]] if role in roles else (1, 1)
        if len(shape) != 2 or 0 in shape:
            raise SourceError(path, f"KV module: shape {list(shape)}; expected two sizes of 1 or more", roles[role])
    two = "decoder2" in roles
    activation, rope = given["activation"] if two else None, given["rope"] if side == "k" else None
    if two and activation is None:
        raise SourceError(path, f"config.json does not name the activation between {names}; {HINT}")
    if side == "k" and rope is None:
        raise SourceError(path, f"it is not known whether keys are encoded before or after RoPE by {names}; {HINT}")
    biases = tuple(name for name in MATRICES if f"{name}.bias" in roles)
    hidden = shapes[roles["decoder"]][0] if two else None
    rank = shapes[roles["encoder"]][0]
    if rank > width:
        raise SourceError(path, f"KV module: it makes {rank} numbers of {width}; expected fewer", roles["encoder"])
    return KVModule(layer, side, rank, hidden, activation, rope, biases)


# ---- by names and shapes --------------------------------------------------------------------------------


def _guessed(path: str | os.PathLike[str], shapes: Shapes, width: int) -> dict[tuple[int, str], Roles]:
    """Sort the tensors of the layers into modules: (layer, side) -> role -> name.

    Raises SourceError that lists what is not understood.
    """
    candidates: dict[tuple[int, str, str], list[str]] = {}
    unsure: list[str] = []
    for name in shapes:
        match = IN_LAYER.fullmatch(name)
        if match is None:
            if None not in _side_and_role(name):  # the modules may lie in a place of their own
                unsure.append(name)
            continue
        if match[2].startswith("mlp."):  # experts have an "up" and a "down", too
            continue
        side, role = _side_and_role(match[2])
        if side is not None and role is not None:
            candidates.setdefault((int(match[1]), side, role), []).append(name)
        elif (side, role) != (None, None):
            unsure.append(name)
    groups: dict[tuple[int, str], Roles] = {}
    for (layer, side, role), names in candidates.items():
        roles = _assign(role, sorted(names), shapes, width)
        if roles is None:
            unsure += names
        else:
            groups.setdefault((layer, side), {}).update(roles)
    if unsure:
        listed = shorten([f"{name} {list(shapes[name])}" for name in sorted(unsure)])
        raise SourceError(
            path, f"holds {len(unsure)} tensors that may be KV modules, of no form that is known: {listed}; {HINT}"
        )
    return groups


def _side_and_role(rest: str) -> tuple[str | None, str | None]:
    """Read side and role from a name such as "v_compressor.decoder.2.weight"; None where it does not tell."""
    words = [word for word in re.split(r"[._\d]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", rest).lower()) if word]
    sides = {_SIDE_WORDS[word] for word in words if word in _SIDE_WORDS}
    roles = {_ROLE_WORDS[word] for word in words if word in _ROLE_WORDS}
    roles = roles or {_WEAK_ROLE_WORDS[word] for word in words if word in _WEAK_ROLE_WORDS}
    return (sides.pop() if len(sides) == 1 else None, roles.pop() if len(roles) == 1 else None)


def _assign(role: str, names: Sequence[str], shapes: Shapes, width: int) -> dict[str, str] | None:
    """Tell which of the tensors of one encoder or decoder is which; None if that is not certain."""
    matrices = [name for name in names if len(shapes[name]) == 2]
    biases = {name for name in names if name not in matrices}
    if role == "decoder" and len(matrices) == 2:
        matrices = _in_order(matrices, shapes, width)
    elif len(matrices) != 1:
        return None
    out: dict[str, str] = {}
    for key, name in zip((role, "decoder2"), matrices, strict=False):
        out[key] = name
        bias = name.removesuffix(".weight") + ".bias" if name.endswith(".weight") else f"{name}.bias"
        if bias in biases:
            out[f"{key}.bias"] = bias
            biases.remove(bias)
    return None if biases or not out else out


def _in_order(matrices: Sequence[str], shapes: Shapes, width: int) -> list[str]:
    """Order the two matrices of a decoder by their shapes, where these agree with any numbers in the names."""
    a, b = matrices
    chains = [
        [first, second]
        for first, second in ((a, b), (b, a))
        if shapes[second][0] == width and shapes[second][1] == shapes[first][0]
    ]
    numbered = [[int(n) for n in re.findall(r"\d+", name)] for name in (a, b)]
    if numbered[0] != numbered[1]:
        chains = [chain for chain in chains if chain[0] == (a if numbered[0] < numbered[1] else b)]
    return chains[0] if len(chains) == 1 else []


# ---- what config.json may state -------------------------------------------------------------------------


def _entries(raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give every (key, value) of the config and of the objects in it, keys in lower case."""
    for key, value in raw.items():
        yield key.lower(), value
        if isinstance(value, dict):
            yield from _entries(value)


def _activation(raw: Mapping[str, Any]) -> str | None:
    """Find the activation of two-layer decoders; LeanLlama's cards say GELU, which in PyTorch is the exact one."""
    names = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}
    stated = {
        value.lower()
        for key, value in _entries(raw)
        if isinstance(value, str) and key != "hidden_act" and {"act", "activation"} & set(key.split("_"))
    }
    if stated:
        return names.get(stated.pop()) if len(stated) == 1 else None
    architectures = raw.get("architectures")
    lean = isinstance(architectures, list) and any(str(name).startswith("Lean") for name in architectures)
    return "gelu" if lean else None


def _rope_order(raw: Mapping[str, Any]) -> str | None:
    """Find whether keys are encoded before or after their rotation, where a key or its value says so."""
    words = {"before": "before", "pre": "before", "after": "after", "post": "after"}
    stated: set[str] = set()
    for key, value in _entries(raw):
        parts = set(key.split("_"))
        if "rope" not in parts:
            continue
        if isinstance(value, str):
            stated |= {words[word] for word in re.split(r"[_\- ]", value.lower()) if word in words}
        orders = {words[word] for word in parts if word in words}
        if isinstance(value, bool) and len(orders) == 1:
            order = orders.pop()
            stated.add(order if value else ROPE_ORDERS[order == "before"])
    return stated.pop() if len(stated) == 1 else None
