"""The vocabulary blob "tokenizer.vocab": byte-level BPE tokens and merges in a form that loads fast.

Used by the tokenizer types "bpe" and "tiktoken". All integers are little-endian, nothing is padded:

| bytes | content |
|---|---|
| 8 | b"TRITVOC1" |
| 4 | u32 n_tokens, at least 1 |
| 4 | u32 n_merges, may be 0 |
| 4 * (n_tokens + 1) | u32 ends: token i is data[ends[i] : ends[i + 1]]; ends[0] = 0, never falling |
| 12 * n_merges | u32 (left, right, result) token ids of each merge |
| ends[n_tokens] | data: the raw bytes of all tokens, in id order |

A token of zero bytes is one that merging never makes: a control token (always) or added token, whose text is in
the header, or an unused id. All other tokens differ, and none is longer than MAX_TOKEN_BYTES. A merge joins two tokens
of one byte or more into the token that is their concatenation (so a merge can never lead back to its own
parts), and no pair is listed twice. Type "bpe": the order of the list is the priority, first merge first.
Type "tiktoken": the list holds every split of every token into two tokens, and the priority is the id of
the result (its rank), lowest first.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from formats.errors import TensorError, shown

MAGIC = b"TRITVOC1"
MAX_TOKENS = 1 << 24
MAX_TOKEN_BYTES = 4096
VOCAB_BLOB = "tokenizer.vocab"

_HEAD = struct.Struct("<8sII")
_MASKS = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # the first n of eight bytes


@dataclass(frozen=True)
class Vocab:
    """A byte-level vocabulary.

    tokens: bytes of each id, b"" for control tokens and unused ids; ids: the id of each token that has bytes
    merges: (n, 3) int64, columns left, right, result
    """

    tokens: list[bytes]
    ids: dict[bytes, int]
    merges: np.ndarray


def pack_vocab(tokens: Sequence[bytes], merges: np.ndarray) -> bytes:
    """Lay a checked vocabulary out as one blob.

    merges: (n, 3) any integer type

    Raises ValueError if a token is too long or the numbers do not fit.
    """
    if not 0 < len(tokens) <= MAX_TOKENS:
        raise ValueError(f"{len(tokens)} tokens; 1 to {MAX_TOKENS} can be stored")
    longest = max(map(len, tokens))
    if longest > MAX_TOKEN_BYTES:
        raise ValueError(f"a token of {longest} bytes; the longest allowed has {MAX_TOKEN_BYTES}")
    ends = np.zeros(len(tokens) + 1, dtype="<u4")
    np.cumsum([len(t) for t in tokens], out=ends[1:])
    table = np.ascontiguousarray(merges, dtype="<u4").reshape(-1, 3)
    head = _HEAD.pack(MAGIC, len(tokens), len(table))
    return b"".join((head, ends.tobytes(), table.tobytes(), *tokens))


def unpack_vocab(blob: bytes, path: str | os.PathLike[str], tensor: str = VOCAB_BLOB) -> Vocab:
    """Read and check a blob made by pack_vocab.

    Raises TensorError, naming the file, if any rule of the layout is broken.
    """

    def bad(message: str) -> TensorError:
        return TensorError(path, f"{message}; convert the model again", tensor)

    if len(blob) < _HEAD.size:
        raise bad(f"the vocabulary has {len(blob)} bytes, its header alone needs {_HEAD.size}")
    magic, n_tokens, n_merges = _HEAD.unpack_from(blob)
    if magic != MAGIC:
        raise bad(f"the vocabulary starts with {shown(magic)}, expected {MAGIC!r}")
    if not 0 < n_tokens <= MAX_TOKENS:
        raise bad(f"the vocabulary claims {n_tokens} tokens, expected 1 to {MAX_TOKENS}")
    start = _HEAD.size + 4 * (n_tokens + 1) + 12 * n_merges
    if len(blob) < start:
        raise bad(f"the vocabulary has {len(blob)} bytes, its tables need {start}")
    ends = np.frombuffer(blob, "<u4", n_tokens + 1, _HEAD.size).astype(np.int64)
    merges = np.frombuffer(blob, "<u4", 3 * n_merges, _HEAD.size + 4 * ends.size).astype(np.int64)
    merges = merges.reshape(-1, 3)
    lengths = np.diff(ends)
    if ends[0] != 0 or lengths.min() < 0 or ends[-1] != len(blob) - start:
        raise bad("the token offsets of the vocabulary do not fit its data")
    if lengths.max() > MAX_TOKEN_BYTES:
        raise bad(f"a token of {lengths.max()} bytes, at most {MAX_TOKEN_BYTES} are allowed")
    bounds = (ends + start).tolist()
    tokens = [blob[a:b] for a, b in pairwise(bounds)]
    problem = check_merges(blob[start:], ends, merges)
    if problem:
        raise bad(problem)
    ids = dict(zip(tokens, range(n_tokens), strict=True))
    ids.pop(b"", None)
    if len(ids) != np.count_nonzero(lengths):
        raise bad("two tokens of the vocabulary have the same bytes")
    return Vocab(tokens, ids, merges)


def check_merges(data: bytes, ends: np.ndarray, merges: np.ndarray) -> str | None:
    """Say what is wrong with a merge list, or None.

    data: the bytes of all tokens; ends: (n_tokens + 1,) int64, token i is data[ends[i] : ends[i + 1]]
    merges: (n, 3) int64
    """
    if not merges.size:
        return None
    if merges.min() < 0 or merges.max() >= ends.size - 1:
        return f"a merge names token {merges.max()}, there are {ends.size - 1}"
    (left, right, result), lengths = merges.T, np.diff(ends)
    at = lengths[left]
    if at.min() < 1 or lengths[right].min() < 1 or (at + lengths[right] != lengths[result]).any():
        return "a merge whose result is not as long as its two parts"
    # Eight bytes at any place, as one number
    words: np.ndarray = np.ndarray(len(data) + 1, "<u8", data + bytes(8), strides=(1,))
    same = _equal(words, ends[left], ends[result], at) and _equal(words, ends[right], ends[result] + at, lengths[right])
    return None if same else "a merge whose result is not its two parts"


def _equal(words: np.ndarray, a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> bool:
    """Tell whether the bytes from a[i] equal those from b[i], counts[i] of them, for all i."""
    while a.size:
        if ((words[a] ^ words[b]) & _MASKS[np.minimum(counts, 8)]).any():
            return False
        more = counts > 8
        a, b, counts = a[more] + 8, b[more] + 8, counts[more] - 8
    return True
