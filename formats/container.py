"""Reading a .trit file: everything is checked before anything is mapped; nothing in the file is executed."""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np

from .codecs import CODECS, align, beyond_range, part_spans
from .errors import ChecksumError, FormatError, TensorError, TruncatedFileError
from .header import Entry, checked_span, read_header
from .writer import TritWriter as TritWriter

_CHUNK = 4 << 20
Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor in a mapped file; `parts` are read-only views, valid as long as they are referenced."""

    name: str
    codec: str
    shape: tuple[int, ...]
    params: Mapping[str, Any]
    parts: Mapping[str, np.ndarray] = field(repr=False)
    offset: int
    nbytes: int
    crc32: int
    path: str

    def check_range(self) -> None:
        """Refuse values with which sums would overflow. Reads scales and vectors only, not the weights themselves.

        Raises TensorError.
        """
        for problem in beyond_range(self.codec, self.shape, self.params, self.parts):
            raise TensorError(self.path, f"{problem}; convert the model again", self.name)


def dequantize(tensor: Tensor) -> np.ndarray:
    """Give the values of a tensor: float32 of its shape."""
    return CODECS[tensor.codec].dequantize(tensor.parts, tensor.shape, tensor.params)


def dequantize_rows(tensor: Tensor, ids: np.ndarray) -> np.ndarray:
    """Give some rows of a matrix without expanding the rest.

    ids: (n,) integer
    returns: (n, in) float32
    Raises IndexError if there is no such row.
    """
    return CODECS[tensor.codec].dequantize_rows(tensor.parts, tensor.shape, tensor.params, ids)


class TritFile:
    """An open .trit file. Made by `open_trit`; also a context manager."""

    def __init__(self, path: str, header: dict[str, Any], raw: bytes, entries: list[Entry], data: mmap.mmap):
        self.path = path
        self.header = header
        self.size = len(data)
        self.fingerprint = hashlib.sha256(raw).hexdigest()
        self._map: mmap.mmap | None = data
        self._tensors = {entry.name: _map_tensor(data, entry, path) for entry in entries}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The tensors by name, in file order."""
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        return MappingProxyType(self._tensors)

    @property
    def config(self) -> dict[str, Any]:
        return self.header.get("config", {})

    @property
    def tokenizer(self) -> dict[str, Any]:
        return self.header.get("tokenizer", {})

    def blob(self, name: str) -> bytes:
        """Give the bytes of a u8 tensor.

        Raises TensorError if there is no such tensor or it is no blob.
        """
        if name not in self.tensors:
            raise TensorError(self.path, "is missing from the file", name)
        tensor = self.tensors[name]
        if tensor.codec != "u8":
            raise TensorError(self.path, f"has codec {tensor.codec}; expected u8", name)
        return tensor.parts["values"].tobytes()

    def release(self, name: str) -> None:
        """Let go of the memory that reading a tensor has filled; it is read from the file again when it is needed."""
        tensor = self.tensors[name]
        assert self._map is not None
        if hasattr(self._map, "madvise"):
            start = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            length = (tensor.offset + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
            if length > 0:
                self._map.madvise(mmap.MADV_DONTNEED, start, length)

    def problems(self, progress: Progress | None = None) -> Iterator[FormatError]:
        """Read every byte and yield what is wrong: checksums, padding, values that no writer makes.

        progress: called with (bytes done, bytes in all)
        """
        done = 0
        end = 0
        for tensor in self.tensors.values():
            crc = 0
            for start in range(tensor.offset, tensor.offset + tensor.nbytes, _CHUNK):
                chunk = self._bytes(start, min(start + _CHUNK, tensor.offset + tensor.nbytes))
                crc = zlib.crc32(chunk, crc)
                done += len(chunk)
                if progress:
                    progress(done, self.size)
            end = align(tensor.offset + tensor.nbytes)
            if crc != tensor.crc32:
                message = f"crc32 is {crc:08x}, the table says {tensor.crc32:08x}; convert the model again"
                yield ChecksumError(self.path, message, tensor.name)
            for message in self._value_problems(tensor):
                yield ChecksumError(self.path, f"{message}; convert the model again", tensor.name)
            if any(self._bytes(tensor.offset + tensor.nbytes, end)):
                yield ChecksumError(self.path, "the padding after it is not zero", tensor.name)
        if progress:
            progress(self.size, self.size)

    def verify(self, progress: Progress | None = None) -> None:
        """Raise the first of `problems`, a ChecksumError that names the tensor."""
        for problem in self.problems(progress):
            raise problem

    def close(self) -> None:
        """Give the file back. Views that are still referenced stay valid and keep the map until they go."""
        if self._map is None:
            return
        self._tensors = {}
        with suppress(BufferError):
            self._map.close()
        self._map = None

    def __enter__(self) -> TritFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _bytes(self, start: int, stop: int) -> bytes:
        assert self._map is not None
        return self._map[start:stop]

    def _value_problems(self, tensor: Tensor) -> Iterator[str]:
        codec = CODECS[tensor.codec]
        yield from codec.problems(tensor.parts, tensor.shape, tensor.params)
        yield from beyond_range(tensor.codec, tensor.shape, tensor.params, tensor.parts)
        end = 0
        for key, (offset, nbytes) in part_spans(tensor.codec, tensor.shape, tensor.params).items():
            if any(self._bytes(tensor.offset + end, tensor.offset + offset)):
                yield f"the padding before {key} is not zero"
            end = offset + nbytes


def open_trit(path: str | os.PathLike[str]) -> TritFile:
    """Open a .trit file for reading: check it, then map it.

    >>> with open_trit("model.trit") as f:
    ...     f.tensors["layers.0.wq"].shape

    Raises FileNotFoundError, IsADirectoryError, PermissionError, or a FormatError that says what is wrong.
    The file must not be shortened while it is open: the operating system kills a process that reads past the
    end of a map. Replacing it by a rename, as TritWriter does, is safe.
    """
    name = os.fspath(path)
    descriptor = open_regular(name)
    size = os.fstat(descriptor).st_size
    with open(descriptor, "rb") as file:
        header, raw, entries = read_header(file, size, name)
        try:
            data = mmap.mmap(descriptor, size, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as e:
            raise TruncatedFileError(name, f"{size} bytes cannot be mapped: {e}") from e
    return TritFile(name, header, raw, entries, data)


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading; returns its descriptor, which the caller closes.

    Raises FileNotFoundError, IsADirectoryError, PermissionError, or FormatError: also for a pipe or a device.
    """
    name = os.fspath(path)
    try:
        # O_NONBLOCK: opening a FIFO without a writer would wait for ever.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(name, flags | getattr(os, "O_CLOEXEC", 0))
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except (OSError, ValueError) as e:
        raise FormatError(name, f"cannot be opened: {getattr(e, 'strerror', None) or e}") from e
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        os.close(descriptor)
        if stat.S_ISDIR(info.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
        raise FormatError(name, "is a pipe or device; expected a regular file")
    return descriptor


def _map_tensor(data: mmap.mmap, entry: Entry, path: str) -> Tensor:
    checked_span(path, entry.offset, entry.nbytes, len(data), f"tensor {entry.name}")
    layout = CODECS[entry.codec].parts(entry.shape, entry.params)
    parts = {}
    for key, (offset, nbytes) in part_spans(entry.codec, entry.shape, entry.params).items():
        dtype, shape = layout[key]
        count = nbytes // dtype.itemsize
        parts[key] = np.frombuffer(data, dtype, count, entry.offset + offset).reshape(shape)
    return Tensor(
        entry.name,
        entry.codec,
        entry.shape,
        MappingProxyType(entry.params),
        MappingProxyType(parts),
        entry.offset,
        entry.nbytes,
        entry.crc32,
        path,
    )
