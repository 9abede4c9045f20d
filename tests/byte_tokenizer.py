"""A tokenizer small enough to read: every byte is an id, control tokens follow."""

from __future__ import annotations

from collections.abc import Iterable

CONTROLS = (
    "<s>", "</s>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|im_start|>", "<|im_end|>",
)  # fmt: skip


class ByteTokenizer:
    """The interface of runtime.tokenizer.Tokenizer over bytes. bos, eos: texts of some of the CONTROLS."""

    strips_first_space = False
    longest_token = 1

    add_bos = False

    def __init__(self, bos: str | None = "<s>", eos: Iterable[str] = ("</s>",)) -> None:
        self.special = {text: 256 + i for i, text in enumerate(CONTROLS)}
        self.bos_id = None if bos is None else self.special[bos]
        ends = [self.special[text] for text in eos]
        self.eos_id, self.eos_ids = ends[0], frozenset(ends)
        self.vocab_size = 256 + len(CONTROLS)
        self._shown = {token: text.encode() for text, token in self.special.items()}

    def encode(
        self, text: str, add_bos: bool = False, special: bool = False, continuation: bool = False
    ) -> list[int]:
        assert not special
        head = [self.bos_id] if add_bos and self.bos_id is not None else []
        return head + list(text.encode())

    def token_bytes(self, token: int, special: bool = False) -> bytes:
        if token < 256:
            return bytes([token])
        return self._shown[token] if special else b""

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        return b"".join(self.token_bytes(i, special) for i in ids).decode(errors="replace")
