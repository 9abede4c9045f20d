"""Maps that name the tensors of learned KV modules, where a checkpoint itself does not make that sure.

A file given with --kv-map; `{}` stands for the number of the layer:

    {"modules": [{"side": "v",
                  "encoder": "model.layers.{}.self_attn.v_compressor.encoder.weight",
                  "decoder": "model.layers.{}.self_attn.v_compressor.decoder.weight"},
                 {"side": "k", "rope": "before", "activation": "gelu",
                  "encoder": "model.layers.{}.self_attn.k_ae.down.weight",
                  "encoder.bias": "model.layers.{}.self_attn.k_ae.down.bias",
                  "decoder": "model.layers.{}.self_attn.k_ae.up.0.weight",
                  "decoder2": "model.layers.{}.self_attn.k_ae.up.2.weight"}]}

"rope" says whether keys are encoded before or after their rotation; "activation", of decoders with two matrices, is
"gelu" (the exact one) or "gelu_tanh". A module belongs to every layer that has its encoder; an entry with "layer": 3
is that layer's alone, and its names are whole, without `{}`. Export writes such a map into config.json, as "kv_map".
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError, shorten, shown
from ..kv_modules import ACTIVATIONS, ROPE_ORDERS, SIDES, KVModule
from .hf_names import HF_NAMES
from .source import read_json

Shapes = Mapping[str, tuple[int, ...]]
Roles = dict[str, str]

MATRICES = ("encoder", "decoder", "decoder2")
ROLES = tuple(role for name in MATRICES for role in (name, f"{name}.bias"))
MAP_KEYS = {*ROLES, "layer", "side", "rope", "activation"}
CONFIG_KEY = "kv_map"
IN_LAYER = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(?:self_attn\.)?(.+)")


@dataclass(frozen=True)
class KVMap:
    """A checked map. path: where it was found, for messages"""

    path: str
    modules: tuple[Mapping[str, Any], ...]


def read_kv_map(path: str | os.PathLike[str]) -> KVMap:
    """Read and check a --kv-map file.

    Raises SourceError, FileNotFoundError.
    """
    return check_kv_map(read_json(Path(path)), Path(path))


def check_kv_map(raw: Any, path: Path) -> KVMap:
    """Check a map. path: the file that it was found in

    Raises SourceError.
    """
    entries = raw.get("modules") if isinstance(raw, dict) and set(raw) == {"modules"} else None
    if not isinstance(entries, list) or not entries:
        raise SourceError(path, f'is {shown(raw)}; expected {{"modules": [...]}} with one entry or more')
    for i, entry in enumerate(entries):
        _check_entry(entry, path, f"entry {i} of modules")
    return KVMap(str(path), tuple(entries))


def _check_entry(entry: Any, path: Path, where: str) -> None:
    good = isinstance(entry, dict) and all(isinstance(value, str) for key, value in entry.items() if key != "layer")
    if not good:
        raise SourceError(path, f"{where}: expected an object whose values are all strings, but for a layer")
    if unknown := sorted(set(entry) - MAP_KEYS):
        known = ", ".join(sorted(MAP_KEYS))
        raise SourceError(path, f"{where}: key {shown(unknown[0])} is not known; known are {known}")
    if missing := [key for key in ("side", "encoder", "decoder") if key not in entry]:
        raise SourceError(path, f"{where}: {shown(missing[0])} is missing")
    for key, allowed in (("side", SIDES), ("rope", ROPE_ORDERS), ("activation", ACTIVATIONS)):
        if key in entry and entry[key] not in allowed:
            raise SourceError(path, f"{where}: {key} is {shown(entry[key])}; expected {' or '.join(allowed)}")
    if "layer" in entry and (type(entry["layer"]) is not int or entry["layer"] < 0):
        raise SourceError(path, f"{where}: layer is {shown(entry['layer'])}; expected its number")
    for role in ROLES:
        if role in entry and "layer" not in entry and entry[role].count("{}") != 1:
            raise SourceError(path, f"{where}: {role} is {shown(entry[role])}; expected one {{}} for the layer")


def named_modules(path: str | os.PathLike[str], shapes: Shapes, mapping: KVMap) -> dict[tuple[int, str], Roles]:
    """Sort the tensors as a map says: (layer, side) -> role -> name, and what else the entry states.

    Raises SourceError if an entry finds nothing, tensors are missing, or two entries claim the same layer.
    """
    groups: dict[tuple[int, str], Roles] = {}
    for i, entry in enumerate(mapping.modules):
        layers = _layers_of(entry, shapes)
        if not layers:
            raise SourceError(mapping.path, f"entry {i} of modules: {_absent(path, [entry['encoder']])}")
        for layer in layers:
            whole = "layer" in entry
            stated = {key: value for key, value in entry.items() if key not in ("layer", "side")}
            roles = stated if whole else {key: value.replace("{}", str(layer)) for key, value in stated.items()}
            if missing := [name for role, name in roles.items() if role in ROLES and name not in shapes]:
                raise SourceError(mapping.path, f"entry {i} of modules: {_absent(path, missing)}")
            if (layer, entry["side"]) in groups:
                raise SourceError(mapping.path, f"names two modules for side {entry['side']} of layer {layer}")
            groups[layer, entry["side"]] = roles
    used = [name for roles in groups.values() for role, name in roles.items() if role in ROLES]
    if twice := sorted({name for name in used if used.count(name) > 1}):
        raise SourceError(mapping.path, f"gives two roles to {shorten(twice)}")
    if left := [name for name in shapes if IN_LAYER.fullmatch(name) and name not in used]:
        raise SourceError(mapping.path, f"leaves {len(left)} tensors without a role: {shorten(left)}")
    return groups


def _absent(path: str | os.PathLike[str], names: list[str]) -> str:
    """Say why these names are not to be had for a module."""
    own = [name for name in names if HF_NAMES.ours(name.replace("{}", "0"))]
    return f"{shorten(own)} belongs to the model itself" if own else f"{os.fspath(path)} has no tensor {shorten(names)}"


def _layers_of(entry: Mapping[str, Any], shapes: Shapes) -> list[int]:
    if "layer" in entry:
        return [entry["layer"]]
    before, after = entry["encoder"].split("{}")
    pattern = re.compile(f"{re.escape(before)}(0|[1-9][0-9]{{0,5}}){re.escape(after)}")
    return [int(match[1]) for name in shapes if (match := pattern.fullmatch(name))]


def names_for(ours: Iterable[str]) -> dict[str, str]:
    """Make up names in a checkpoint that `find_kv_modules` understands. ours: our names of modules' tensors

    >>> names_for(["layers.3.kv.v.encoder", "layers.3.kv.v.encoder.bias"])["layers.3.kv.v.encoder.bias"]
    'model.layers.3.self_attn.v_encoder.bias'
    """
    made = {}
    for name in ours:
        _, layer, _, side, role = name.split(".", 4)
        kind = "" if role.endswith(".bias") else ".weight"
        made[name] = f"model.layers.{layer}.self_attn.{side}_{role}{kind}"
    return made


def map_of(modules: Iterable[KVModule], names: Mapping[str, str]) -> dict[str, Any]:
    """Make the map that says what these modules are. names: our tensor name -> name in the checkpoint"""
    entries = []
    for m in modules:
        stated = {"layer": m.layer, "side": m.side, "rope": m.rope, "activation": m.activation}
        roles = {role: names[f"{m.prefix}.{role}"] for role in ROLES if f"{m.prefix}.{role}" in names}
        entries.append({key: value for key, value in {**stated, **roles}.items() if value is not None})
    return {"modules": entries}
