"""Run packed Llama models on a CPU.

>>> from runtime import Llama
>>> llm = Llama("model.trit", n_ctx=8192)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from formats.version import __version__ as __version__

if TYPE_CHECKING:
    from .errors import CacheError as CacheError
    from .errors import LogitsError as LogitsError
    from .llama import Llama as Llama
    from .messages.chat_pieces import ChatFormatError as ChatFormatError
    from .model import Cancelled as Cancelled
    from .sampler import OptionError as OptionError
    from .sharing import BusyError as BusyError
    from .window import ContextOverflowError as ContextOverflowError

_PLACES = {
    "Llama": "llama", "BusyError": "sharing", "CacheError": "errors", "Cancelled": "model",
    "ChatFormatError": "chat_pieces", "ContextOverflowError": "window", "LogitsError": "errors",
    "OptionError": "sampler",
}  # fmt: skip

__all__ = [
    "BusyError", "CacheError", "Cancelled", "ChatFormatError", "ContextOverflowError", "Llama", "LogitsError",
    "OptionError", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use: a command that shows its help must not wait for the kernels."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_PLACES[name]}", __name__), name)
