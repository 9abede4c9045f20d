"""Writing a .trit file, one tensor at a time, so that it appears whole under its name or not at all."""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from .codecs import CODECS, align, part_spans
from .codecs.base import Streamed
from .errors import HeaderError, TensorError, shorten
from .header import MAGIC, MAX_HEADER, PREFIX, VERSION, check_layout, check_name, check_sections
from .strict_json import parse_json
from .unfinished import Unfinished, check_target

_CHUNK = 16 << 20
# The most that one line of the table takes besides its name.
_LINE_ROOM = 288


class TritWriter:
    """Writes a new .trit file; use it as a context manager, so that an error leaves nothing behind.

    metadata: the sections of the header (config, tokenizer, ...), JSON values
    names: every tensor that will be added; they determine the room for the header
    Raises FileExistsError if the file exists and `overwrite` is not given.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        metadata: Mapping[str, Any],
        names: Sequence[str],
        overwrite: bool = False,
    ) -> None:
        self.path = os.fspath(path)
        self.overwrite = overwrite
        self._target = os.path.realpath(self.path)
        self._metadata = dict(metadata)
        self._left = dict.fromkeys(names)
        self._table: list[dict[str, Any]] = []
        self._file: BinaryIO | None = None
        self._check_metadata(names)
        self._check_target()
        # A round header length makes the payloads begin right after the checksum.
        room = len(self._encode([])) + sum(_LINE_ROOM + len(_json(name)) for name in names)
        self._header_length = align(PREFIX.size + room + 4) - PREFIX.size - 4
        if self._header_length > MAX_HEADER:
            raise HeaderError(self.path, f"the metadata takes {room} bytes; the limit is {MAX_HEADER}")
        self._temporary = Unfinished(self._target)
        try:
            self._file = open(self._temporary.path, "wb")  # noqa: SIM115 - closed by close() or abort()
            self._file.write(bytes(PREFIX.size + self._header_length + 4))
        except BaseException:
            self._discard()
            raise

    def add(
        self,
        name: str,
        codec: str,
        shape: Sequence[int],
        params: Mapping[str, Any],
        parts: Mapping[str, np.ndarray | Streamed],
    ) -> None:
        """Append a tensor.

        parts: exactly as `CODECS[codec].parts(shape, params)` describes them, in memory or made as they are written
        Raises TensorError if they are not, or if the name was not announced or was written already.
        """
        if self._file is None:
            raise ValueError(f"{self.path}: the writer is closed")
        if name not in self._left:
            raise TensorError(self.path, "was not announced, or was written already", name)
        nbytes = check_layout(codec, list(shape), dict(params), self.path, name)
        self._check_parts(name, CODECS[codec].parts(tuple(shape), params), parts)
        offset = self._file.tell()
        crc = 0
        end = 0
        for key, (start, size) in part_spans(codec, tuple(shape), params).items():
            crc = self._write(bytes(start - end), crc)
            written = self._file.tell()
            for block in _blocks(parts[key]):
                data = np.ascontiguousarray(block).reshape(-1).view(np.uint8).data
                for a in range(0, len(data), _CHUNK):
                    crc = self._write(data[a : a + _CHUNK], crc)
            if self._file.tell() - written != size:
                message = f"part {key} gave {self._file.tell() - written} bytes; expected {size}"
                raise TensorError(self.path, message, name)
            end = start + size
        self._write(bytes(align(offset + nbytes) - offset - nbytes), 0)
        del self._left[name]
        line = {"name": name, "codec": codec, "shape": list(shape), "params": dict(params)}
        self._table.append({**line, "offset": offset, "nbytes": nbytes, "crc32": crc})

    def close(self) -> None:
        """Finish the file and put it under its name.

        Raises TensorError if an announced tensor was not added; then nothing is left behind.
        """
        close_all([self])

    def abort(self) -> None:
        """Remove the unfinished file."""
        if self._file is not None:
            self._discard()

    def withdraw(self) -> None:
        """Remove the file after it was finished, because another that belongs to it was not."""
        with suppress(FileNotFoundError):
            os.unlink(self._target)

    def __enter__(self) -> TritWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self._discard()

    def _discard(self) -> None:
        file, self._file = self._file, None
        try:
            if file is not None:
                file.close()
        finally:
            self._temporary.discard()

    def _finish(self) -> None:
        """Write the header; all that is left is to give the file its name."""
        assert self._file is not None
        if self._left:
            raise TensorError(self.path, f"tensors announced but not written: {shorten(list(self._left))}")
        text = self._encode(self._table)
        if len(text) > self._header_length:
            raise HeaderError(self.path, "the header outgrew the room kept for it")
        head = PREFIX.pack(MAGIC, VERSION, self._header_length) + text.ljust(self._header_length)
        self._file.seek(0)
        self._file.write(head + zlib.crc32(head).to_bytes(4, "little"))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._check_target()

    def _publish(self) -> None:
        assert self._file is not None
        self._file.close()
        self._temporary.publish()
        self._file = None

    def _write(self, data: bytes | memoryview, crc: int) -> int:
        assert self._file is not None
        self._file.write(data)
        return zlib.crc32(data, crc)

    def _encode(self, table: list[dict[str, Any]]) -> bytes:
        return _json({**self._metadata, "tensors": table})

    def _check_metadata(self, names: Sequence[str]) -> None:
        """Hold the metadata and the names to the reader's rules, before any work is done."""
        if "tensors" in self._metadata:
            raise HeaderError(self.path, "'tensors' is written by the writer and cannot be metadata")
        try:
            text = self._encode([])
        except (TypeError, ValueError, RecursionError) as e:
            raise HeaderError(self.path, f"the metadata cannot be written as JSON: {e}") from e
        check_sections(parse_json(text, self.path), self.path)
        for name in names:
            check_name(name, self.path, "a tensor")
        if len(self._left) != len(names):
            raise TensorError(self.path, "a tensor name stands twice in the list")

    def _check_target(self) -> None:
        check_target(self.path)
        if os.path.exists(self._target) and not self.overwrite:
            message = "exists already; choose another name, or overwrite it with --overwrite (overwrite=True)"
            raise FileExistsError(errno.EEXIST, message, self.path)

    def _check_parts(self, name: str, layout: dict[str, Any], parts: Mapping[str, np.ndarray | Streamed]) -> None:
        if set(parts) != set(layout):
            raise TensorError(self.path, f"has parts {sorted(parts)}; expected {sorted(layout)}", name)
        for key, (dtype, shape) in layout.items():
            part = parts[key]
            if part.dtype != dtype or part.shape != shape:
                found, wanted = f"{part.dtype} {part.shape}", f"{dtype} {shape}"
                raise TensorError(self.path, f"part {key} is {found}; expected {wanted}", name)


def close_all(writers: Sequence[TritWriter]) -> None:
    """Finish several files that belong together: all of them appear under their names, or none.

    Raises as `TritWriter.close`; writers that are closed already are left as they are.
    """
    writers = [writer for writer in writers if writer._file is not None]
    published: list[TritWriter] = []
    try:
        for writer in writers:
            writer._finish()
        for writer in writers:
            writer._publish()
            published.append(writer)
    except BaseException:
        for writer in writers:
            writer.withdraw() if writer in published else writer.abort()
        raise


def _blocks(part: np.ndarray | Streamed) -> Iterable[np.ndarray]:
    return part.blocks() if isinstance(part, Streamed) else [part]


def _json(value: Any) -> bytes:
    """The one way JSON is written: sorted keys, no spaces, UTF-8, finite numbers."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")
