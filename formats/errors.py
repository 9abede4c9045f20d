"""What can be wrong with a file: one class per cause, each naming the file and, where there is one, the tensor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from reprlib import Repr

MAX_MESSAGE = 900

_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 2, 60, 60, 40


def shown(value: object) -> str:
    """Write a value that came from outside for a message: as `repr` does, with the middle left out where it is long.

    >>> shown("a" * 1000)
    "'aaaaaaaaaaaaaaaaaaaaaaaaaaaa...aaaaaaaaaaaaaaaaaaaaaaaaaaaa'"
    """
    return cut(_SHORT.repr(value), 100)


def cut(text: str, most: int) -> str:
    """Leave out what is too much of a text, in its middle: both ends tell something."""
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[-half:]}"


def shorten(names: Sequence[str], most: int = 10) -> str:
    """List names for a message, only so many of them."""
    listed = ", ".join(cut(name, 160) for name in names[:most])
    return listed + (f" and {len(names) - most} more" if len(names) > most else "")


class FormatError(ValueError):
    """A file cannot be used as it is.

    path: the file; tensor: the tensor concerned, or None; message: what was found, what was expected, what to do;
    all but the path are kept to a length that a person reads.
    """

    def __init__(self, path: str | os.PathLike[str], message: str, tensor: str | None = None) -> None:
        self.path = os.fspath(path)
        self.tensor = tensor
        self.message = cut(message, MAX_MESSAGE)
        where = f"tensor {cut(tensor, 256)}: " if tensor else ""  # a checkpoint's names may have any length
        super().__init__(f"{self.path}: {where}{self.message}")

    def __reduce__(self) -> tuple[type[FormatError], tuple[str, str, str | None]]:
        return type(self), (self.path, self.message, self.tensor)


class BadMagicError(FormatError):
    """The file is not of the format at all."""


class UnsupportedVersionError(FormatError):
    """The file was written for another version of the format."""


class TruncatedFileError(FormatError):
    """The file is shorter than its header says."""


class HeaderError(FormatError):
    """The header cannot be read, or a field in it has a wrong type or value."""


class TensorError(FormatError):
    """An entry of the tensor table is wrong, or a tensor is missing."""


class ChecksumError(FormatError):
    """The bytes differ from those that were written."""


class UnsupportedError(FormatError):
    """An architecture, quantisation or feature that this version does not run."""


class SourceError(FormatError):
    """A checkpoint, tokenizer or configuration file to be converted is damaged or incomplete."""


class OptionError(ValueError):
    """An option of a conversion has a value that cannot be had; the text says what can."""
