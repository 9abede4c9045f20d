"""Find out under which licence a checkpoint comes: whether 'Built with Llama' must be shown hangs on it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .source import read_text

MAX_LICENCE_BYTES = 1 << 20
LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "LICENCE.txt", "LICENCE.md")
LLAMA_TEXT = re.compile(r"\bllama\b.{0,40}?\bcommunity\s+licen[cs]e", re.IGNORECASE | re.DOTALL)


def licence_record(name: str | None, text: str | None = None) -> dict[str, Any]:
    """Make the header entry: {"name", "llama"} and "text" when there is one."""
    llama = bool(name and name.lower().startswith("llama")) or bool(text and LLAMA_TEXT.search(text))
    record: dict[str, Any] = {"name": name, "llama": llama}
    if text:
        record["text"] = text
    return record


def licence_of_folder(folder: Path, config_name: object) -> tuple[dict[str, Any], list[Path]]:
    """Look into README.md's front matter, the licence file, and config.json's own `license`.

    returns: the header entry, and the files that were read
    """
    read: list[Path] = []
    front: dict[str, str] = {}
    readme = folder / "README.md"
    if readme.is_file():
        front = front_matter(read_text(readme, MAX_LICENCE_BYTES))
        read.append(readme)
    text = None
    for candidate in (folder / name for name in LICENCE_FILES):
        if candidate.is_file():
            text = read_text(candidate, MAX_LICENCE_BYTES)
            read.append(candidate)
            break
    name = front.get("license")
    if name in (None, "other"):
        name = front.get("license_name", name)
    if name is None and isinstance(config_name, str):
        name = config_name
    return licence_record(name, text), read


def front_matter(text: str) -> dict[str, str]:
    """Read the plain `key: value` lines between the two `---` at the top of a model card.

    >>> front_matter("---\\nlicense: llama3.1\\n---\\n# Model")
    {'license': 'llama3.1'}
    """
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    found: dict[str, str] = {}
    for line in lines[1:]:
        if line.strip() == "---":
            return found
        match = re.fullmatch(r"([A-Za-z_]+):\s+(\S.*?)\s*", line)
        if match:
            found[match.group(1)] = match.group(2).strip("'\"")
    return {}
