"""A conversation in turns: messages in the model's chat format, or one plain text that goes on and on."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import CacheError
from ..generate import Run
from .chat_pieces import ROLES, Message

if TYPE_CHECKING:
    from ..engine import Engine
    from ..llama import Llama
    from ..sampler import Sampler


@dataclass
class Conversation:
    """chat: speak in the model's chat format; otherwise what is asked continues one plain text.

    system: the system message, None for the format's own
    messages: of a chat, user and assistant in turn; texts: of a plain text, ids asked and ids answered in turn
    """

    chat: bool
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)

    @property
    def turns(self) -> list[Any]:
        """The list of `messages` or `texts`, whichever is in use."""
        return self.messages if self.chat else self.texts

    @property
    def size(self) -> str:
        """How long it is, for people."""
        count = len(self.turns) // 2
        return f"{count} exchange" + "s" * (count != 1)

    def ask(self, llm: Engine, text: str) -> None:
        """Add a question, or a piece of the plain text."""
        if self.chat:
            self.messages.append(Message("user", text))
        else:
            tokenizer, begins = llm.tokenizer, not self.texts
            self.texts.append(tokenizer.encode(text, add_bos=begins and tokenizer.add_bos, continuation=not begins))

    def answered(self, text: str, ids: list[int]) -> None:
        """Add the answer to the last question."""
        if self.chat:
            self.messages.append(Message("assistant", text, tuple(ids)))
        else:
            self.texts.append(ids)

    def prepare(self, llm: Engine, sampler: Sampler, **options: Any) -> Run:
        """Prepare the run that answers the last question; options and errors are those of Engine.prepare."""
        if self.chat:
            system = [] if self.system is None else [Message("system", self.system)]
            return llm.prepare_chat([*system, *self.messages], sampler, **options)
        return llm.prepare([token for part in self.texts for token in part], sampler, **options)

    def save(self, llm: Llama, path: str) -> None:
        """Write the conversation, and what the model has read, to a file. Raises OSError."""
        llm.save_session(path, self.to_json())

    @classmethod
    def load(cls, llm: Llama, path: str, chat: bool) -> Conversation:
        """Take over what `save` wrote. Raises CacheError or OSError; the context is as it was then."""

        def read(value: Any) -> Conversation:
            found = cls.from_json(value, llm.config.vocab_size)
            if found.chat != chat:
                kinds = ("a plain text (--raw)", "a conversation")
                raise CacheError(f"it holds {kinds[found.chat]}, this is {kinds[chat]}")
            return found

        return llm.load_session(path, read)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object for a session file. A question without an answer is left out."""
        whole = len(self.turns) // 2 * 2
        messages = [[m.role, m.content, list(m.ids)] for m in self.messages[:whole]]
        return {"chat": self.chat, "system": self.system, "messages": messages, "texts": self.texts[:whole]}

    @classmethod
    def from_json(cls, value: Any, vocab_size: int) -> Conversation:
        """Read what to_json gave. Raises CacheError for anything else."""

        def ids(found: Any) -> list[int]:
            _check(isinstance(found, list) and all(type(i) is int and 0 <= i < vocab_size for i in found))
            return list(found)

        _check(isinstance(value, dict) and set(value) == {"chat", "system", "messages", "texts"})
        chat, system = value["chat"], value["system"]
        _check(isinstance(chat, bool) and isinstance(system, (str, type(None))))
        _check(isinstance(value["messages"], list) and isinstance(value["texts"], list))
        messages = []
        for entry in value["messages"]:
            _check(isinstance(entry, list) and len(entry) == 3)
            role, content, spoken = entry
            _check(isinstance(role, str) and role in ROLES and isinstance(content, str))
            messages.append(Message(role, content, tuple(ids(spoken))))
        return cls(chat, system, messages, [ids(part) for part in value["texts"]])


def _check(good: bool) -> None:
    if not good:
        raise CacheError("the saved state holds no conversation that could go on (was it saved by save_state?)")
