"""What the small JSON files beside a Hugging Face tokenizer say: control tokens, and where a text ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import SourceError, UnsupportedError, shown
from ..sources.source import read_json
from .special_tokens import AddedToken, added_token, unique_tokens

CONFIG = "tokenizer_config.json"
ROLES = ("unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Settings:
    """The settings of a folder; None where no file says anything.

    bos, eos: texts; bos_id: from config.json; eos_ids: from config.json and generation_config.json
    named: texts of all tokens that have a role; listed: from added_tokens_decoder or added_tokens.json, by id
    """

    path: Path
    bos: str | None = None
    eos: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool | None = None
    legacy: bool = True
    add_prefix_space: bool = True
    vocab_size: int | None = None
    named: frozenset[str] = frozenset()
    listed: dict[int, AddedToken] = field(default_factory=dict)

    def check_size(self, path: Path, size: int) -> None:
        """Raise SourceError if the tokenizer has ids that the model has no embedding for."""
        if self.vocab_size is not None and size > self.vocab_size:
            message = f"has ids up to {size - 1}, but config.json has a vocab_size of {self.vocab_size}"
            raise SourceError(path, message)


def read_settings(folder: Path) -> Settings:
    """Read the JSON files of a folder that say something about its tokenizer; any of them may be missing.

    Raises SourceError, UnsupportedError (add_eos_token).
    """
    path = folder / CONFIG
    raw = _optional(path)
    special = _optional(folder / "special_tokens_map.json")
    special.update({key: value for key, value in raw.items() if value is not None})
    config, generation = _optional(folder / "config.json"), _optional(folder / "generation_config.json")
    if _flag(path, raw, "add_eos_token"):
        raise UnsupportedError(path, "add_eos_token is set; prompts that end with EOS are not supported")
    bos, eos = (_text(path, special, key) for key in ("bos_token", "eos_token"))
    named = {_text(path, special, key) for key in ROLES}
    listed = _listed(path, raw.get("added_tokens_decoder"), folder / "added_tokens.json")
    eos_ids = [*_ids(folder / "config.json", config, "eos_token_id")]
    eos_ids += _ids(folder / "generation_config.json", generation, "eos_token_id")
    bos_ids = _ids(folder / "config.json", config, "bos_token_id")
    size = config.get("vocab_size")
    legacy, prefix = _flag(path, raw, "legacy"), _flag(path, raw, "add_prefix_space")
    return Settings(
        path=path,
        bos=bos,
        eos=eos,
        bos_id=bos_ids[0] if bos_ids else None,
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        add_bos=_flag(path, raw, "add_bos_token"),
        legacy=legacy is not False,
        add_prefix_space=prefix is not False,
        vocab_size=size if type(size) is int else None,
        named=frozenset({t for t in {*named, bos, eos} if t} | _extra(special)),
        listed=listed,
    )


def with_roles(added: Mapping[int, AddedToken], settings: Settings) -> dict[int, AddedToken]:
    """Make every added token that has a role (BOS, padding, ...) a control token, as transformers does."""
    return {
        i: AddedToken(t.id, t.text, True, t.lstrip, t.rstrip, t.normalized) if t.text in settings.named else t
        for i, t in added.items()
    }


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _flag(path: Path, raw: Mapping[str, Any], key: str) -> bool | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise SourceError(path, f'"{key}" is {shown(value)}, expected true, false or null')
    return value


def _text(path: Path, raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    text = value.get("content") if isinstance(value, dict) else value
    if text is not None and not isinstance(text, str):
        raise SourceError(path, f'"{key}" is {shown(value)}, expected the text of a token')
    return text or None


def _extra(raw: Mapping[str, Any]) -> frozenset[str]:
    values = [raw.get("additional_special_tokens"), raw.get("extra_special_tokens")]
    lists = [list(v.values()) if isinstance(v, dict) else v for v in values if isinstance(v, (list, dict))]
    texts = [t.get("content") if isinstance(t, dict) else t for items in lists for t in items]
    return frozenset(t for t in texts if isinstance(t, str) and t)


def _ids(path: Path, raw: Mapping[str, Any], key: str) -> list[int]:
    value = raw.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(i) is int and i >= 0 for i in ids):
        raise SourceError(path, f'"{key}" is {shown(value)}, expected a token id or a list of them')
    return ids


def _listed(path: Path, decoder: Any, older: Path) -> dict[int, AddedToken]:
    """Read added_tokens_decoder {"id": {...}}, or else added_tokens.json {text: id}."""
    if decoder is None:
        entries = [(i, {"content": text, "special": True}) for text, i in _optional(older).items()]
        return unique_tokens(older, [added_token(older, i, entry) for i, entry in entries])
    if not isinstance(decoder, dict):
        raise SourceError(path, f'"added_tokens_decoder" is {shown(decoder)}, expected {{id: token}}')
    wrong = next((key for key in decoder if not (key.isascii() and key.isdigit() and len(key) < 9)), None)
    if wrong is not None:
        raise SourceError(path, f'"added_tokens_decoder" has the id {shown(wrong)}, expected a number')
    return unique_tokens(path, [added_token(path, int(key), entry) for key, entry in decoder.items()])
