"""Byte-level BPE as checkpoints write it (bytes spelt as printable characters) to the vocabulary blob."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

from ..errors import SourceError, shown
from .vocab import MAX_TOKEN_BYTES

# Without these no text can be written; other bytes may lack a token (SmolLM2 has none for 21 of them).
NEEDED_BYTES = frozenset(range(0x20, 0x7F)) | {0x09, 0x0A, 0x0D}


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """Map each of the 256 characters that spell bytes to its byte.

    Printable Latin-1 stands for itself; the other bytes, in order, are the characters from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [b for b in range(256) if b not in set(plain)]
    return {**{chr(b): b for b in plain}, **{chr(0x100 + i): b for i, b in enumerate(rest)}}


def spelt_bytes(path: Path, text: str, token: int) -> bytes:
    """Give the bytes of a token spelt in the alphabet. Raises SourceError."""
    alphabet = byte_alphabet()
    try:
        data = bytes([alphabet[c] for c in text])
    except KeyError as exc:
        message = f"token {token} ({shown(text)}) holds {exc}, which does not spell a byte"
        raise SourceError(path, message) from exc
    if not 0 < len(data) <= MAX_TOKEN_BYTES:
        raise SourceError(path, f"token {token} has {len(data)} bytes, expected 1 to {MAX_TOKEN_BYTES}")
    return data


def missing_bytes(path: Path, tokens: Iterable[bytes]) -> list[int]:
    """List the bytes that have no token.

    Raises SourceError if one of NEEDED_BYTES is among them: then the vocabulary is incomplete.
    """
    present = {t[0] for t in tokens if len(t) == 1}
    missing = [b for b in range(256) if b not in present]
    needed = [b for b in missing if b in NEEDED_BYTES]
    if needed:
        byte = f"0x{needed[0]:02X} ({shown(chr(needed[0]))})"
        raise SourceError(path, f"has no token for byte {byte}: it is incomplete")
    return missing


def merge_table(path: Path, ids: Mapping[str, int], merges: Iterable[tuple[str, str]]) -> np.ndarray:
    """Turn pairs of spelt tokens into ids: (n, 3) int64 left, right, result, in the order given.

    Raises SourceError if a merge names an unknown token or is listed twice.
    """
    rows: dict[tuple[int, int], int] = {}
    for rank, (left, right) in enumerate(merges):
        try:
            pair, result = (ids[left], ids[right]), ids[left + right]
        except KeyError as exc:
            message = f"merge {rank} ({shown(left)} + {shown(right)}) names {exc!s:.60}, which is not a token"
            raise SourceError(path, message) from exc
        if pair in rows:
            raise SourceError(path, f"merge {rank} ({shown(left)} + {shown(right)}) is listed twice")
        rows[pair] = result
    return np.array([(a, b, c) for (a, b), c in rows.items()], dtype=np.int64).reshape(-1, 3)


def split_merges(path: Path, merges: object) -> list[tuple[str, str]]:
    """Read a merge list: strings "left right", or pairs. Raises SourceError."""
    if not isinstance(merges, list):
        raise SourceError(path, f"the merges are a {type(merges).__name__}, expected a list")
    out = []
    for rank, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or len(parts) != 2 or not all(isinstance(p, str) and p for p in parts):
            raise SourceError(path, f"merge {rank} is {shown(merge)}, expected two tokens")
        out.append((parts[0], parts[1]))
    return out


# ---- tiktoken rank files --------------------------------------------------------------------------------


def is_rank_file(data: bytes) -> bool:
    """Say whether a file looks like tiktoken ranks: lines of base64, a space, a number."""
    first = data[:512].split(b"\n", 1)[0].split()
    return len(first) == 2 and first[1].isdigit() and len(first[0]) % 4 == 0


def read_ranks(path: Path, data: bytes) -> list[bytes]:
    """Read a tiktoken rank file: the token of each rank.

    Raises SourceError: a bad line, ranks that are not 0, 1, 2, ..., a token twice, a byte without a token.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error):
            rank = b""
        if not rank.isdigit() or len(rank) > 8:
            raise SourceError(path, f"line {number} is {shown(line)}, expected a token in base64 and its rank")
        if token in ranks or not 0 < len(token) <= MAX_TOKEN_BYTES:
            raise SourceError(path, f"line {number}: token {shown(token)} is empty, too long, or there twice")
        ranks[token] = int(rank)
    tokens = sorted(ranks, key=lambda token: ranks[token])
    wrong = next((i for i, token in enumerate(tokens) if ranks[token] != i), None)
    if wrong is not None:
        message = f"has {len(tokens)} ranks, but rank {wrong} is missing or there twice: it is incomplete"
        raise SourceError(path, message)
    lacking = [b for b in range(256) if bytes([b]) not in ranks]
    if lacking:
        raise SourceError(path, f"has no token for byte 0x{lacking[0]:02X}: it is incomplete")
    return tokens


def all_splits(tokens: list[bytes]) -> np.ndarray:
    """List every way to make a token of two others: (n, 3) int64 left, right, result, by result."""
    ids = {token: i for i, token in enumerate(tokens)}
    rows = []
    for result, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left = ids.get(token[:cut])
            if left is not None and (right := ids.get(token[cut:])) is not None:
                rows.append((left, right, result))
    return np.array(rows, dtype=np.int64).reshape(-1, 3)
