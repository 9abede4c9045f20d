"""Hostile input made from good input: one seed, one case, always the same."""

from __future__ import annotations

import json
import math
import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

from formats.codecs import CODECS, align, payload_nbytes

BAD_TEXTS = ("", "x", "-1", "0", "<0x-1>", "llama3", "linear", "none", "bpe", "\0", "\x1b[2J", "a\nb", "é\u202e",
             "\ud800", "../x", "{{ x }}", "{% for a in b %}", "<|eot_id|>", "y" * 5000)  # fmt: skip
BAD_NUMBERS = (-1, 0, 1, 2, 3, 16, 63, 65, 255, 513, 4097, 1 << 20, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 48,
               (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 64, 10**400, 0.5, -1.5, 5e-324, 1e-30, 1e30, 1.7e308, math.nan,
               math.inf)  # fmt: skip
BAD_VALUES = (None, True, False, [], {}, [[]], [-1], [1, "2", None], {"a": 1}, {"<s>": 0}, *BAD_TEXTS, *BAD_NUMBERS)
BAD_BYTES = (b"\xff" * 4, bytes(4), b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\x80\x7f", b"\0\x7c", b"\xff\xff\xff\x7f")
DTYPES = ("float32", "float16", "bfloat16")


class Mutator:
    """Draws from one seed; `log` tells what was done."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.log: list[str] = []

    def note(self, *what: object) -> None:
        self.log.append(" ".join(f"{part!r:.60}" for part in what))

    # ==== JSON ====

    def tree(self, value: Any) -> Any:
        """Change, remove, move or add something in a JSON value, in place where it can."""
        places = list(_places(value))
        if not places:
            return self.random.choice(BAD_VALUES)
        # As likely near the root as in the longest list
        depth = self.random.choice(sorted({place[2] for place in places}))
        parent, key, _ = self.random.choice([place for place in places if place[2] == depth])
        kind = self.random.choice(("near", "near", "junk", "junk", "remove", "rename", "exchange"))
        self.note(kind, key, parent[key])
        if kind == "near":
            parent[key] = self.near(parent[key])
        elif kind == "junk":
            parent[key] = self.random.choice(BAD_VALUES)
        elif kind == "remove":
            del parent[key]
        elif kind == "rename" and isinstance(parent, dict):
            parent[self.random.choice(BAD_TEXTS)] = parent.pop(key)
        else:
            other, place, _ = self.random.choice([place for place in places if place[2] == depth])
            parent[key], other[place] = other[place], parent[key]
        return value

    def near(self, value: Any) -> Any:
        """Give a value that is nearly right."""
        if isinstance(value, bool) or value is None:
            return not value
        if isinstance(value, int):
            return self.random.choice((value + 1, value - 1, -value, 2 * value, value // 2, float(value), str(value)))
        if isinstance(value, float):
            return self.random.choice((-value, 0.0, value * 1e10, value / 1e10, int(value), str(value)))
        if isinstance(value, str):
            return self.random.choice((value + "x", value[:-1], value.upper(), value * 3, [value]))
        if isinstance(value, list):
            return self.random.choice((value[:-1], value + value[:1], value[::-1], value * 2))
        keys = list(value)
        return {key: value[key] for key in self.random.sample(keys, self.random.randrange(len(keys) + 1))}

    def text(self, data: bytes) -> bytes:
        """Change JSON as text: what a tree cannot say, such as a key twice, or depth without end."""
        kind = self.random.choice(("twice", "deep", "constant", "digits", "control", "bytes"))
        self.note("text", kind)
        where = self.random.choice([i for i, c in enumerate(data) if c in b",:{["] or [0]) + 1
        piece = {
            "twice": b'"config":{},"model":{},"config":{},"a":1,"a":1,',
            "deep": self.random.choice((b"[", b'{"a":', b"[[],")) * self.random.choice((33, 2000, 100_000)),
            "constant": self.random.choice((b"NaN,", b"-Infinity,", b"1e999,", b'"\\ud800",', b"null,")),
            "digits": b"9" * self.random.choice((19, 21, 5000, 1_000_000)),
            "control": self.random.choice((b"\0", b"\x1b", b"\xff\xfe", b"\xef\xbb\xbf", b'"\\u0000":0,')),
        }.get(kind)
        return self.raw(data) if piece is None else data[:where] + piece + data[where:]

    # ==== Bytes ====

    def raw(self, data: bytes) -> bytes:
        """Change some bytes; the length stays."""
        if not data:
            return data
        kind = self.random.choice(("few", "few", "few", "piece", "rest", "all"))
        self.note("bytes", kind)
        out = bytearray(data)
        start = self.random.randrange(len(out))
        if kind == "few":
            for _ in range(self.random.choice((1, 1, 4, 64))):
                out[self.random.randrange(len(out))] = self.random.choice((0, 1, 0x7F, 0x80, 0xFF, 243))
        elif kind == "piece":
            piece = self.random.choice(BAD_BYTES)
            out[start : start + len(piece)] = piece
        elif kind == "rest":
            out[start:] = bytes(len(out) - start)
        else:
            fills = (bytes(len(out)), b"\xff" * len(out), self.random.randbytes(len(out)))
            out[:] = self.random.choice(fills)
        return bytes(out[: len(data)])

    def cut(self, data: bytes) -> bytes:
        """Change the length, or any byte at all."""
        kind = self.random.choice(("short", "short", "long", "few"))
        self.note("file", kind)
        if kind == "short":
            return data[: self.random.choice((self.random.randrange(len(data)), len(data) - 1, len(data) & ~4095))]
        if kind == "long":
            return data + self.random.choice((b"\0", bytes(64), b"PK\x03\x04" + bytes(60)))
        return self.raw(data)


def _places(value: Any, depth: int = 0) -> Iterator[tuple[Any, Any, int]]:
    """Every place of a JSON value: its parent, its key, its depth."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key, depth
        yield from _places(value[key], depth + 1)


# ======== .trit


class TritParts:
    """The header and the payloads of a .trit file, to be changed and put together again."""

    def __init__(self, data: bytes) -> None:
        length = int.from_bytes(data[8:16], "little")
        self.header: dict[str, Any] = json.loads(data[16 : 16 + length])
        self.table: list[dict[str, Any]] = self.header.pop("tensors")
        self.payloads = [data[line["offset"] : line["offset"] + line["nbytes"]] for line in self.table]

    def mutated(self, m: Mutator) -> bytes:
        """Give a file with one to three things changed; checksums are right unless they are what was changed."""
        late = None
        for _ in range(m.random.choice((1, 1, 2, 3))):
            kind = m.random.choice(("section", "section", "section", "table", "payload", "line", "text", "file"))
            if kind == "section":
                m.tree(self.header[m.random.choice([key for key, v in self.header.items() if v])])
            elif kind == "table":
                self._change_table(m)
            elif kind == "payload":
                self._change_payload(m)
            else:
                late = kind
        return self._join(m, late)

    def _change_payload(self, m: Mutator) -> None:
        special = [i for i, line in enumerate(self.table) if line["codec"] == "u8"]
        chosen = special if special and m.random.random() < 0.3 else range(len(self.table))
        i = m.random.choice(chosen)
        m.note("payload", self.table[i]["name"])
        self.payloads[i] = m.raw(self.payloads[i])

    def _change_table(self, m: Mutator) -> None:
        i, j = m.random.randrange(len(self.table)), m.random.randrange(len(self.table))
        line = self.table[i]
        kind = m.random.choice(("remove", "exchange", "codec", "shape", "turn", "add"))
        m.note("table", kind, line["name"])
        if kind == "remove" and len(self.table) > 1:
            del self.table[i], self.payloads[i]
        elif kind == "exchange":
            line["name"], self.table[j]["name"] = self.table[j]["name"], line["name"]
        elif kind == "codec":
            line["codec"] = codec = m.random.choice(list(CODECS))
            block = {"block": m.random.choice((32, 64, 4096)), "nested_block": m.random.choice((0, 256))}
            dtype = {"dtype": m.random.choice(DTYPES)}
            line["params"] = {**block, **dtype} if codec == "nf4" else dtype if codec.startswith("trit") else {}
            self._fit(i, m)
        elif kind == "shape":
            k = m.random.randrange(len(line["shape"]))
            line["shape"][k] = max(1, m.random.choice((1, line["shape"][k] + 1, line["shape"][k] - 1)))
            self._fit(i, m)
        elif kind == "turn":
            line["shape"].reverse()
            self._fit(i, m)
        else:
            name = m.random.choice(("layers.0.wq.bias", "layers.9.wq", "output", "layers.0.kv.v.encoder", "x", "../y"))
            self.table.append({"name": name, "codec": "f32", "shape": [64], "params": {}})
            self.payloads.append(m.random.randbytes(256))

    def _fit(self, i: int, m: Mutator) -> None:
        """Give a payload the length that its line asks for."""
        line = self.table[i]
        try:
            size = min(payload_nbytes(line["codec"], tuple(line["shape"]), line["params"]), 1 << 20)
        except (ValueError, KeyError):
            return
        self.payloads[i] = (self.payloads[i] + m.random.randbytes(size))[:size]

    def _join(self, m: Mutator, late: str | None) -> bytes:
        table = []
        room = align(len(json.dumps([self.header, self.table])) + 100 * len(self.table) + 64)
        offset = room
        for line, payload in zip(self.table, self.payloads, strict=True):
            place = {"offset": offset, "nbytes": len(payload), "crc32": zlib.crc32(payload)}
            table.append({**line, **place})
            offset = align(offset + len(payload))
        if late == "line":
            m.tree(table)
        text = json.dumps({**self.header, "tensors": table}).encode().ljust(room - 20)
        if late == "text":
            text = m.text(text.rstrip()).ljust(room - 20)
        head = struct.pack("<4sIQ", b"TRIT", 1, len(text)) + text
        head += zlib.crc32(head).to_bytes(4, "little")
        data = head.ljust(align(len(head)), b"\0") + b"".join(p.ljust(align(len(p)), b"\0") for p in self.payloads)
        return m.cut(data) if late == "file" else data


# ======== safetensors and GGUF


def mutated_safetensors(data: bytes, m: Mutator) -> bytes:
    """Change the header of a safetensors file, its length, or its bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    kind = m.random.choice(("tree", "tree", "text", "raw", "file", "length"))
    text = data[8:end]
    if kind == "tree":
        text = json.dumps(m.tree(json.loads(text))).encode()
    elif kind == "text":
        text = m.text(text)
    elif kind == "raw":
        return data[:end] + m.raw(data[end:])
    elif kind == "file":
        return m.cut(data)
    length = m.random.choice((0, 1, len(text) + 1, 1 << 40, (1 << 64) - 1)) if kind == "length" else len(text)
    return struct.pack("<Q", length) + text + data[end:]


GGUF_NUMBERS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}


def gguf_fields(data: bytes) -> list[tuple[int, int]]:
    """Find every number before a GGUF file's tensors: counts, lengths, types, values. out: (offset, bytes)"""
    found: list[tuple[int, int]] = []
    at = 4

    def number(size: int) -> int:
        nonlocal at
        found.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def string() -> None:
        nonlocal at
        length = number(8)
        at += length

    def value(kind: int) -> None:
        if kind == 8:
            string()
        elif kind == 9:
            inner = number(4)
            for _ in range(number(8)):
                value(inner)
        else:
            number(struct.calcsize(GGUF_NUMBERS[kind]))

    number(4)
    tensors, keys = number(8), number(8)
    for _ in range(keys):
        string()
        value(number(4))
    for _ in range(tensors):
        string()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return found


def mutated_gguf(data: bytes, fields: list[tuple[int, int]], m: Mutator) -> bytes:
    """Change numbers of a GGUF file's header, letters near them, or its bytes."""
    kind = m.random.choice(("number", "number", "number", "letter", "raw", "file"))
    if kind == "file":
        return m.cut(data)
    if kind == "raw":
        return data[: fields[-1][0] + 8] + m.raw(data[fields[-1][0] + 8 :])
    out = bytearray(data)
    for _ in range(m.random.choice((1, 1, 2))):
        # Half of them where the tensors are listed or the counts are: lists of tokens are long
        few = fields[:40] + fields[-200:]
        at, size = m.random.choice(few if m.random.random() < 0.5 else fields)
        old = int.from_bytes(out[at : at + size], "little")
        near = (old + 1, old - 1, 2 * old, old // 2, old + 64)
        new = m.random.choice((*near, 0, 1, 255, 1 << 31, 1 << 32, 1 << 48, (1 << 63) - 1, (1 << 64) - 1))
        new &= (1 << 8 * size) - 1
        m.note("gguf", kind, at, old, new)
        if kind == "number":
            out[at : at + size] = new.to_bytes(size, "little")
        else:
            out[min(at + size, len(out) - 1)] = new & 255
    return bytes(out)
