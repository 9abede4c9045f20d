"""A whole model quantised layer by layer with a calibration text; it can be stopped, and goes on where it was.

All that is needed to go on lies in one folder: what has come out of every finished layer, and the residual streams
after the last of them. A layer is finished when its file appears under its name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from formats.codecs.base import Parts
from formats.codecs.trit import GROUP, pack
from formats.conversion.plan import OPTIONS
from formats.sources.source import Carried, Source
from formats.version import __version__

from ..config import ModelConfig
from ..kernels import Kernels
from ..kernels.numba_best import BestSearch
from ..kernels.numba_feedback import RoundColumns
from .effects import embedded
from .feedback import Factors, quantize
from .layer import PASSES, LayerRun, Streams
from .nf4 import quantize_nf4
from .state import StateFolder
from .streams import Forward, Stream

Progress = Callable[[int, int, str], None]


class Calibration:
    """Quantises the matrices of all layers.

    windows: (windows, ctx) integer, the text; codecs: of each matrix by name, trit1 to trit4 or nf4
    folder: of what is needed to go on, made if it is not there; the result reads from it
    kernels: exact ones; progress: called with (done, total, what)
    Raises CalibrationError as StateFolder does.
    """

    def __init__(
        self,
        source: Source,
        windows: np.ndarray,
        codecs: Mapping[str, str],
        folder: Path,
        kernels: Kernels,
        pool: ThreadPoolExecutor,
        progress: Progress | None = None,
    ) -> None:
        self._source, self._windows, self._codecs, self._folder = source, windows, codecs, folder
        self._config = ModelConfig.from_dict(source.config, str(source.path))
        self._forward = Forward(self._config, kernels, windows.shape[1])
        self._round_columns, self._search = RoundColumns(pool.map), BestSearch(pool.map)
        self._progress = progress
        batches = sum(1 for _ in self._forward.batches(windows.size))
        self._done, self._steps = 0, PASSES * batches
        self.state = StateFolder(folder, self._about())

    def run(self) -> Source:
        """Quantise every layer that is not finished.

        returns: the source with its matrices carried in their codecs
        """
        try:
            streams = None
            for i in range(self._config.n_layers):
                if self.state.layer(i).exists():
                    self._done += self._steps
                    continue
                streams = streams or (self._streams(i) if i else self._embed())
                streams = self._layer(i, streams)
        except BaseException:
            self.state.release()
            raise
        return self._carrying()

    # ---- layers

    def _embed(self) -> Streams:
        """Begin both streams with the embeddings of the text."""
        streams = self._streams(0)
        x = embedded(self._source, self._windows)
        for stream in streams:
            stream.write(0, x)
        return streams

    def _layer(self, i: int, before: Streams) -> Streams:
        """Quantise one layer; its file is what makes it count. returns: the streams after it"""

        def tensor(name: str) -> np.ndarray | None:
            found = self._source.tensors.get(f"layers.{i}.{name}")
            return None if found is None else np.ascontiguousarray(found.read(), np.float32)

        def to_codec(name: str, w: np.ndarray, factors: Factors) -> tuple[Parts, np.ndarray]:
            codec = self._codecs[f"layers.{i}.{name}"]
            if codec == "nf4":
                return quantize_nf4(w, factors)
            depth = int(codec.removeprefix("trit"))
            levels, codes, units = quantize(w, factors, depth, self._round_columns, self._search)
            values = levels * np.repeat(units[codes], GROUP, axis=1)[:, : levels.shape[1]]
            return {"units": units, "blocks": pack(levels, codes, depth)}, values

        def step() -> None:
            self._done += 1
            if self._progress:
                total = self._steps * self._config.n_layers
                self._progress(self._done, total, f"layer {i + 1} of {self._config.n_layers}")

        run = LayerRun(self._forward, tensor, to_codec, self._folder, self._windows.size, step)
        after = self._streams(i + 1)
        for worked, kept in zip(run.run(*before), after, strict=True):
            os.replace(worked.path, kept.path)
        values = {f"{name}.{part}": array for name, parts in run.found.items() for part, array in parts.items()}
        partial = self._folder / "work-layer.npz"
        np.savez(partial, **values)  # type: ignore[arg-type]
        os.replace(partial, self.state.layer(i))
        for stream in before:
            stream.path.unlink(missing_ok=True)
        return after

    # ---- what is kept

    def _streams(self, i: int) -> Streams:
        """The residual streams before layer i, the source's and the quantised model's."""
        dim = self._config.dim
        return Stream(self._folder / f"source-{i:04}", dim), Stream(self._folder / f"quantized-{i:04}", dim)

    def _about(self) -> dict[str, Any]:
        files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in self._source.files]
        return {
            "source": files,
            "text": hashlib.sha256(np.ascontiguousarray(self._windows, np.int64).tobytes()).hexdigest(),
            "windows": list(self._windows.shape),
            "codecs": dict(self._codecs),
            "version": __version__,
        }

    def _carrying(self) -> Source:
        tensors = dict(self._source.tensors)
        for name, codec in self._codecs.items():
            layer, matrix = name.removeprefix("layers.").split(".")
            carried = Carried(codec, OPTIONS[codec], _parts_reader(self.state.layer(int(layer)), matrix))
            tensors[name] = replace(tensors[name], carried=carried)
        return replace(self._source, tensors=tensors)


def _parts_reader(file: Path, matrix: str) -> Callable[[], dict[str, np.ndarray]]:
    def read() -> dict[str, np.ndarray]:
        with np.load(file) as values:
            return {key.partition(".")[2]: values[key] for key in values.files if key.startswith(f"{matrix}.")}

    return read
