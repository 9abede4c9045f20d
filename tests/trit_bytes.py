"""Files for the container's tests: whole ones made by the writer, and ones put together byte by byte."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from formats import CODECS, FormatError, TritWriter, open_trit

AUTO = "auto"


def write_all_codecs(path: Path, overwrite: bool = False) -> dict[str, np.ndarray]:
    """Write one small tensor of every codec; give the values that went in by name."""
    rng = np.random.default_rng(5)
    values = {f"a.{codec}": rng.standard_normal((3, 20), dtype=np.float32) for codec in CODECS}
    values["a.u8"] = np.frombuffer("tokenizer Ā".encode(), np.uint8)
    metadata = {"config": {"dim": 20}, "extra": [1, 2.5, None, "é"]}
    with TritWriter(path, metadata, list(values), overwrite) as writer:
        for name, w in values.items():
            params, parts = CODECS[name[2:]].quantize(w)
            writer.add(name, name[2:], w.shape, params, parts)
    return values


def two_tensors() -> dict[str, Any]:
    """A header with two tensors, as `assemble` wants it; offsets are filled in when they are AUTO."""
    tensors = [
        {"name": "a", "codec": "f32", "shape": [3], "params": {}, "offset": AUTO, "nbytes": 12},
        {"name": "b", "codec": "q8", "shape": [1, 2], "params": {}, "offset": AUTO, "nbytes": 66},
    ]
    return {"config": {}, "tensors": [{**line, "crc32": 0} for line in tensors]}


def changed(**fields: Any) -> bytes:
    """A file whose second tensor has other fields; ... takes one away."""
    header = two_tensors()
    header["tensors"][1].update(fields)
    header["tensors"][1] = {k: v for k, v in header["tensors"][1].items() if v is not ...}
    return assemble(header)


def assemble(header: dict[str, Any] | bytes, size: int | None = None, version: int = 1) -> bytes:
    """Put a file together around a header that may break any rule: checksum right, payloads zero.

    size: length of the whole file; None: what the tensor table asks for
    """
    end = 0
    if isinstance(header, bytes):
        text = header
    else:
        text, end = _place(header)
    head = struct.pack("<4sIQ", b"TRIT", version, len(text)) + text
    head += zlib.crc32(head).to_bytes(4, "little")
    head += bytes(-len(head) % 64)
    return head.ljust(end if size is None else size, b"\0")


def _place(header: dict[str, Any]) -> tuple[bytes, int]:
    """Give offsets to the tensors that have none, and the length of the file."""
    room = -(-(16 + len(json.dumps(header)) + 60) // 512) * 512
    end = room
    for line in header["tensors"] if isinstance(header.get("tensors"), list) else []:
        if isinstance(line, dict) and "offset" in line:
            if line["offset"] == AUTO:
                line["offset"] = end
            if type(line.get("nbytes")) is int and 0 < line["nbytes"] < 1 << 20:
                end += -(-line["nbytes"] // 64) * 64
    text = json.dumps(header).encode()
    return text + b" " * (room - 20 - len(text)), end


def refuses(folder: Path, data: bytes, kind: type[FormatError], message: str, tensor: str | None = None) -> None:
    """Check how a file made of these bytes is refused: in one short line that names the file."""
    path = folder / "bad.trit"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=message) as caught:
        open_trit(path)
    assert type(caught.value) is kind
    assert caught.value.path == str(path) and str(caught.value).startswith(f"{path}: ")
    assert caught.value.tensor == tensor
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500 + len(str(path))
