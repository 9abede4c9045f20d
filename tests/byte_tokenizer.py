"""A tokenizer small enough to read: every byte is an id, control tokens follow."""

from __future__ import annotations

from collections.abc import Iterable

CONTROLS = (
    "<s>", "</s>", "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|im_start|>", "<|im_end|>",
)  # fmt: skip


class ByteTokenizer:
    """The interface of runtime.tokenizer.Tokenizer over bytes. bos, eos: the texts of two of the CONTROLS."""

    def __init__(self, bos: str | None = "<s>", eos: Iterable[str] = ("</s>",), add_bos: bool = True) -> None:
        self.special = {text: 256 + i for i, text in enumerate(CONTROLS)}
        self.bos_id = None if bos is None else self.special[bos]
        self.eos_ids = frozenset(self.special[text] for text in eos)
        self.add_bos = add_bos
        self.vocab_size = 256 + len(CONTROLS)
        self._texts = {token: text for text, token in self.special.items()}

    def encode(self, text: str, add_bos: bool = False, special: bool = False) -> list[int]:
        assert not special
        head = [self.bos_id] if add_bos and self.bos_id is not None else []
        return head + list(text.encode())

    def token_bytes(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else b""

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        names = self._texts if special else {}
        return b"".join(names[i].encode() if i in names else self.token_bytes(i) for i in ids).decode(
            errors="replace"
        )
