"""Bytes after the header that are not what was written, or that no writer writes."""

from __future__ import annotations

import numpy as np
import pytest

from formats import ChecksumError, FormatError, TritWriter, dequantize, open_trit
from tests.trit_bytes import write_all_codecs


def test_every_flipped_bit_is_found(tmp_path):
    path = tmp_path / "m.trit"
    with TritWriter(path, {"config": {"dim": 2}}, ["a", "b"]) as writer:
        writer.add("a", "f32", (2,), {}, {"values": np.array([1, -2], np.float32)})
        parts = {"values": np.full((1, 32), 3, np.int8), "scales": np.ones((1, 1), np.float16)}
        writer.add("b", "q8", (1, 5), {}, parts)
    good = path.read_bytes()
    with open_trit(path) as file:
        file.verify()
    with open(path, "r+b", buffering=0) as writable:
        for i, byte in enumerate(good):
            writable.seek(i)
            writable.write(bytes([byte ^ 1 << (i % 8)]))
            with pytest.raises(FormatError), open_trit(path) as file:
                file.verify()
            writable.seek(i)
            writable.write(bytes([byte]))
    assert path.read_bytes() == good


def test_verify_names_what_no_writer_makes(tmp_path):
    """Payloads with a right checksum and impossible contents."""
    path = tmp_path / "m.trit"
    write_all_codecs(path)
    with open_trit(path) as file:
        original = {n: (t.codec, t.shape, t.params, dict(t.parts)) for n, t in file.tensors.items()}
    spoiled = {
        "a.f32": ("values", np.nan, "NaN"),
        "a.f16": ("values", np.inf, "NaN or infinity"),
        "a.bf16": ("values", 0x7F80, "NaN or infinity"),
        "a.q8": ("scales", np.nan, "scales holds NaN"),
        "a.trit1": ("blocks", 243, "1 bytes above 242"),
        "a.trit4": ("units", -1, "units holds"),
        "a.nf4": ("nested_absmax", np.inf, "none may exceed 65536"),
    }
    for name, (key, value, _) in spoiled.items():
        codec, shape, params, parts = original[name]
        part = parts[key].copy()
        part.flat[-1 if key != "units" else 0] = value
        original[name] = (codec, shape, params, {**parts, key: part})
    with TritWriter(tmp_path / "bad.trit", {}, list(original)) as writer:
        for name, tensor in original.items():
            writer.add(name, *tensor)
    with open_trit(tmp_path / "bad.trit") as file:
        problems = {p.tensor: str(p) for p in file.problems()}
        assert list(problems) == [n for n in original if n in spoiled]
        for name in spoiled:
            assert spoiled[name][2] in problems[name]
        with pytest.raises(ChecksumError, match=r"tensor a\.f32"):
            file.verify()
        for tensor in file.tensors.values():
            with np.errstate(all="ignore"):
                dequantize(tensor)


def test_padding_between_parts_and_tensors(tmp_path):
    path = tmp_path / "m.trit"
    write_all_codecs(path)
    data = bytearray(path.read_bytes())
    with open_trit(path) as file:
        after = file.tensors["a.u8"].offset + file.tensors["a.u8"].nbytes
        inside = file.tensors["a.nf4"].offset + 63
    data[after] = data[inside] = 1
    path.write_bytes(data)
    with open_trit(path) as file:
        messages = [str(p) for p in file.problems()]
    assert any("tensor a.u8: the padding after it is not zero" in m for m in messages)
    assert any("tensor a.nf4: crc32" in m for m in messages)
    assert any("tensor a.nf4: the padding before levels is not zero" in m for m in messages)


@pytest.mark.parametrize("byte", [0x00, 0xFF])
def test_payload_of_one_byte_only(tmp_path, byte):
    """Whatever the payload, opening and dequantising stay in bounds."""
    path = tmp_path / "m.trit"
    write_all_codecs(path)
    data = bytearray(path.read_bytes())
    with open_trit(path) as file:
        start = min(t.offset for t in file.tensors.values())
    data[start:] = bytes([byte]) * (len(data) - start)
    path.write_bytes(data)
    with open_trit(path) as file, np.errstate(all="ignore"):
        for tensor in file.tensors.values():
            assert dequantize(tensor).shape == tensor.shape
        with pytest.raises(ChecksumError):
            file.verify()
