"""Byte-pair merging: words to token ids, exactly as the tokenizer's merge list orders it."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import pairwise

import numpy as np

CACHED_WORDS = 1 << 15
CACHED_CHARS = 32
SHORT_WORD = 96


class BytePairEncoder:
    """Turns text into ids: pre-tokenizer, then merges within each word, with a bounded cache of words.

    ids: bytes of a token -> id; n_ids: ids are below it
    merges: (n, 3) int64 left, right, result, in order of priority
    by_result: the priority is the result's id instead
    ignore_merges: a word that is a token as a whole is that token, whatever the merges say
    unk_id: the id of a byte that has no token; None: such bytes are left out, as `tokenizers` does
    """

    def __init__(
        self,
        ids: dict[bytes, int],
        n_ids: int,
        merges: np.ndarray,
        split: Callable[[str], list[str]],
        *,
        by_result: bool = False,
        ignore_merges: bool = False,
        unk_id: int | None = None,
    ) -> None:
        self._split = split
        single = [ids.get(bytes([b]), unk_id) for b in range(256)]
        self.missing_bytes = frozenset(b for b in range(256) if bytes([b]) not in ids)
        self._byte_ids: list[int] | None = None if None in single else [i for i in single if i is not None]
        self._some_ids = {b: i for b, i in enumerate(single) if i is not None}
        self._whole = ids if ignore_merges else {}
        self._shift = shift = max(n_ids - 1, 1).bit_length()
        self._mask = (1 << shift) - 1
        left, right, result = merges.T
        order = result if by_result else np.arange(len(merges))
        # One integer holds priority and result, so that min() finds the merge to do.
        pairs, values = (left << shift) | right, (order << shift) | result
        self._merges = dict(zip(pairs.tolist(), values.tolist(), strict=True))
        self._never = (max(len(merges), n_ids) + 1) << shift
        self._cache: dict[str, list[int]] = {}

    @property
    def n_merges(self) -> int:
        return len(self._merges)

    def encode(self, text: str, at_start: bool = True) -> list[int]:
        """Encode text that holds no control tokens and no surrogates."""
        out: list[int] = []
        cached = self._cache.get
        for word in self._split(text):
            ids = cached(word)
            out += self._new_word(word) if ids is None else ids
        return out

    encode_inside = encode

    def encode_bytes(self, data: bytes) -> list[int]:
        """Encode any bytes as one word."""
        whole = self._whole.get(data)
        if whole is not None:
            return [whole]
        if self._byte_ids is None:
            some = self._some_ids
            ids = [some[b] for b in data if b in some]
        else:
            known = self._byte_ids
            ids = [known[b] for b in data]
        return self._merge(ids) if len(ids) <= SHORT_WORD else self._merge_long(ids)

    def _new_word(self, word: str) -> list[int]:
        ids = self.encode_bytes(word.encode("utf-8"))
        if len(word) <= CACHED_CHARS:
            if len(self._cache) >= CACHED_WORDS:
                self._cache = {}
            self._cache[word] = ids
        return ids

    def _merge(self, ids: list[int]) -> list[int]:
        """Merge a short word in place: of the best pairs the leftmost, until none is left."""
        get, shift, mask, never = self._merges.get, self._shift, self._mask, self._never
        ranks = [get(a << shift | b, never) for a, b in pairwise(ids)]
        while ranks:
            best = min(ranks)
            if best == never:
                break
            i = ranks.index(best)
            ids[i] = best & mask
            del ids[i + 1], ranks[i]
            if i < len(ranks):
                ranks[i] = get(ids[i] << shift | ids[i + 1], never)
            if i:
                ranks[i - 1] = get(ids[i - 1] << shift | ids[i], never)
        return ids

    def _merge_long(self, ids: list[int]) -> list[int]:
        """Do the same with a heap of (priority, place), in time n log n."""
        get, shift, mask, n = self._merges.get, self._shift, self._mask, len(ids)
        after, before = list(range(1, n + 1)), list(range(-1, n - 1))
        found = ((get(ids[i] << shift | ids[i + 1]), i) for i in range(n - 1))
        heap = [(value >> shift) << 40 | i for value, i in found if value is not None]
        heapq.heapify(heap)
        while heap:
            entry = heapq.heappop(heap)
            i = entry & 0xFF_FFFF_FFFF
            j = after[i]
            if ids[i] < 0 or j >= n:
                continue
            value = get(ids[i] << shift | ids[j])
            if value is None or value >> shift != entry >> 40:  # out of date: a neighbour was merged since
                continue
            ids[i], ids[j] = value & mask, -1
            k, h = after[j], before[i]
            after[i] = k
            if k < n:
                before[k] = i
                if (value := get(ids[i] << shift | ids[k])) is not None:
                    heapq.heappush(heap, (value >> shift) << 40 | i)
            if h >= 0 and (value := get(ids[h] << shift | ids[i])) is not None:
                heapq.heappush(heap, (value >> shift) << 40 | h)
        return [i for i in ids if i >= 0]
