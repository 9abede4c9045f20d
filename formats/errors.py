"""What can be wrong with a file: one class per cause, each naming the file and, where there is one, the tensor."""

from __future__ import annotations

import os


class FormatError(ValueError):
    """A file cannot be used as it is.

    path: the file; tensor: the tensor concerned, or None; message: what was found, what was expected, what to do.
    """

    def __init__(self, path: str | os.PathLike[str], message: str, tensor: str | None = None) -> None:
        self.path = os.fspath(path)
        self.tensor = tensor
        self.message = message
        where = f"tensor {tensor:.256}: " if tensor else ""  # a checkpoint's names may have any length
        super().__init__(f"{self.path}: {where}{message}")

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
