"""Every kernel of every backend against `dequantize(w) @ x` in float64, odd sizes included."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from formats import CODECS, Tensor, TritWriter, dequantize, open_trit
from native.build import machine
from runtime.kernels import Kernels, get_kernels
from runtime.kernels.base import takes_int8
from runtime.kernels.numpy_backend import int8_weights, quantize_activations
from runtime.kernels.vectors import cpu_features
from tests.native_library import LESSER_ISAS, ensure_native_library

ROOT = Path(__file__).resolve().parent.parent
SHAPES = [(1, 1), (3, 5), (17, 83), (16, 80), (64, 160), (130, 192), (33, 1000)]
BATCHES = [1, 3, 5, 64]
MATRIX_CODECS = [name for name in CODECS if name != "u8"]
OPTIONS = {
    "nf4": [{}, {"nested_block": 0}, {"block": 32, "dtype": "float16"}, {"dtype": "bfloat16"}],
    "trit2": [{}, {"dtype": "bfloat16"}],
    "trit4": [{}, {"dtype": "float16"}],
}
# Of the largest |output|: what float32 sums may differ from float64 ones.
SUM_ERROR = 3e-6


@pytest.fixture(scope="module", params=["numpy", "numba", "native", *(f"native:{isa}" for isa in LESSER_ISAS)])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend's name; the native one also with each lesser instruction set that this CPU has."""
    name, _, isa = str(request.param).partition(":")
    if name == "native":
        ensure_native_library(isa)
    with pytest.MonkeyPatch.context() as patch:
        if isa:
            patch.setenv("TRIT_NATIVE_ISA", isa)
        yield name


@pytest.fixture(scope="module", params=[True, False], ids=["int8", "f32"])
def kernels(request: pytest.FixtureRequest, backend: str) -> Kernels:
    made = get_kernels(backend, n_threads=2, int8=request.param)
    request.addfinalizer(made.close)
    return made


@pytest.fixture(scope="module")
def matrices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One file with every codec, option and shape."""
    path = tmp_path_factory.mktemp("kernels") / "matrices.trit"
    rng = np.random.default_rng(7)
    tensors = []
    for codec in MATRIX_CODECS:
        for k, options in enumerate(OPTIONS.get(codec, [{}])):
            for shape in SHAPES:
                w = (rng.standard_normal(shape) * rng.lognormal(size=(shape[0], 1))).astype(np.float32)
                name = f"{codec}.{k}.{shape[0]}x{shape[1]}"
                tensors.append((name, codec, shape, *CODECS[codec].quantize(w, **options)))
    with TritWriter(path, {}, [t[0] for t in tensors]) as writer:
        for tensor in tensors:
            writer.add(*tensor)
    return path


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("codec", MATRIX_CODECS)
def test_product(matrices: Path, kernels: Kernels, codec: str, batch: int) -> None:
    with open_trit(matrices) as file:
        for tensor in [t for t in file.tensors.values() if t.codec == codec]:
            out, width = tensor.shape
            rng = np.random.default_rng(out * width + batch)
            x = rng.standard_normal((batch, width)).astype(np.float32)
            bias = rng.standard_normal(out).astype(np.float32)
            y = rng.standard_normal((batch, out)).astype(np.float32)
            int8 = kernels.int8 and takes_int8(tensor)
            rounded, weights = (quantize_activations(x), int8_weights(tensor)) if int8 else (x, dequantize(tensor))
            product = rounded.astype(np.float64) @ weights.astype(np.float64).T + bias
            plain = np.full_like(y, np.nan)
            kernels.linear([tensor], [bias])(x, [plain])
            size = np.abs(rounded).astype(np.float64) @ np.abs(weights).T + np.abs(bias)
            limit = (SUM_ERROR + int8 * _unrounded(tensor)) * size
            assert (np.abs(plain - product) <= limit).all(), tensor.name
            added = y.copy()
            kernels.linear([tensor], [None])(x, [added], add=True)
            assert (np.abs(added - (product - bias + y)) <= limit + SUM_ERROR * np.abs(y)).all(), tensor.name


def _unrounded(tensor: Tensor) -> float:
    """Int8 sums do not round weights to the half type that the file states; the relative error is that type's."""
    return {"float32": 0.0, "float16": 2**-11, "bfloat16": 2**-8}[tensor.params.get("dtype", "float32")]


def test_several_matrices_of_several_codecs_in_one_call(matrices: Path, kernels: Kernels) -> None:
    with open_trit(matrices) as file:
        tensors = [file.tensors[f"{codec}.0.130x192"] for codec in ("trit4", "f16", "trit2", "nf4", "trit4", "q8")]
        x = np.random.default_rng(1).standard_normal((3, 192)).astype(np.float32)
        together = [np.zeros((3, 130), np.float32) for _ in tensors]
        kernels.linear(tensors, [None] * len(tensors))(x, together)
        for tensor, result in zip(tensors, together, strict=True):
            alone = np.zeros((3, 130), np.float32)
            kernels.linear([tensor], [None])(x, [alone])
            assert np.array_equal(result, alone), tensor.name


@pytest.mark.parametrize("name", ["numba", "native"])
def test_an_output_depends_on_neither_batch_nor_threads(matrices: Path, name: str) -> None:
    """Bit for bit: a token's result is the same alone, in any batch, with any number of threads."""
    if name == "native":
        ensure_native_library()
    rng = np.random.default_rng(2)
    x = rng.standard_normal((300, 1000)).astype(np.float32)
    with open_trit(matrices) as file:
        for codec in MATRIX_CODECS:
            tensor = file.tensors[f"{codec}.0.33x1000"]
            results = []
            for threads in (1, 2, 5):
                kernels = get_kernels(name, n_threads=threads)
                linear = kernels.linear([tensor], [None])
                whole = np.zeros((300, 33), np.float32)
                linear(x, [whole])
                single = np.zeros((300, 33), np.float32)
                for i in (0, 1, 255, 256, 299):
                    linear(x[i : i + 1], [single[i : i + 1]])
                    assert np.array_equal(single[i], whole[i]), (codec, threads, i)
                results.append(whole)
                kernels.close()
            assert all(np.array_equal(results[0], r) for r in results[1:]), codec


def test_rmsnorm_and_swiglu(kernels: Kernels) -> None:
    rng = np.random.default_rng(3)
    for width in (1, 5, 16, 47, 576):
        x = rng.standard_normal((3, width)).astype(np.float32)
        gain, up = rng.standard_normal(width).astype(np.float32), rng.standard_normal((3, width)).astype(np.float32)
        out = np.zeros_like(x)
        kernels.rmsnorm(x, gain, 1e-5, out)
        exact = x.astype(np.float64)
        expected = exact / np.sqrt((exact**2).mean(axis=1, keepdims=True) + 1e-5) * gain
        np.testing.assert_allclose(out, expected, rtol=3e-6, atol=1e-6)
        gate = (x * 30).astype(np.float32)
        expected = gate.astype(np.float64) / (1 + np.exp(-gate.astype(np.float64))) * up
        kernels.swiglu(gate, up)
        np.testing.assert_allclose(gate, expected, rtol=1e-5, atol=1e-6)


def test_no_pattern_of_bytes_is_read_out_of_bounds(kernels: Kernels, tmp_path: Path) -> None:
    """Weight data of arbitrary bytes gives numbers or NaN, never a fault."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 100)).astype(np.float32)
    for fill in (0, 255, 243, None):
        tensors = []
        for codec in MATRIX_CODECS:
            params, parts = CODECS[codec].quantize(rng.standard_normal((20, 100)).astype(np.float32))
            parts = {name: _filled(part, fill, rng) for name, part in parts.items()}
            tensors.append((codec, codec, (20, 100), params, parts))
        path = tmp_path / f"{fill}.trit"
        with TritWriter(path, {}, MATRIX_CODECS) as writer:
            for tensor in tensors:
                writer.add(*tensor)
        with open_trit(path) as file, np.errstate(all="ignore"):
            for tensor in file.tensors.values():
                kernels.linear([tensor], [None])(x, [np.zeros((2, 20), np.float32)])


def test_every_pattern_of_codes_means_the_same(kernels: Kernels, tmp_path: Path) -> None:
    """Bytes that no writer makes, such as trits of 243 and more, or a q8 value of -128, too."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((2, 256)).astype(np.float32)
    names = ("trit1", "trit2", "trit3", "trit4", "nf4", "q8")
    with TritWriter(tmp_path / "codes.trit", {}, names) as writer:
        for codec in names:
            params, parts = CODECS[codec].quantize(rng.standard_normal((40, 256)).astype(np.float32))
            first = next(name for name in ("blocks", "codes", "values") if name in parts)
            parts[first] = _filled(parts[first], None, rng)
            writer.add(codec, codec, (40, 256), params, parts)
    with open_trit(tmp_path / "codes.trit") as file:
        for tensor in file.tensors.values():
            out = np.zeros((2, 40), np.float32)
            kernels.linear([tensor], [None])(x, [out])
            rounded = quantize_activations(x) if kernels.int8 else x
            weights = int8_weights(tensor) if kernels.int8 else dequantize(tensor)
            limit = SUM_ERROR * (np.abs(rounded) @ np.abs(weights).T)
            assert (np.abs(out - rounded.astype(np.float64) @ weights.T) <= limit).all(), tensor.name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cpu", "features"),
    [("x86-64", ""), ("haswell", "+ssse3,+avx2,+fma,+f16c"), ("alderlake", "+ssse3,+avx2,+fma,+f16c,+avxvnni")],
)
def test_numba_compiled_for_lesser_cpus(cpu: str, features: str, tmp_path: Path) -> None:
    """The self-test of every product, compiled for what the CPU need not have all of."""
    if machine() != "x86_64" or not set(features.replace("+", "").split(",")) - {""} <= cpu_features():
        pytest.skip(f"this CPU cannot run code for {cpu}")
    code = """
from runtime.kernels.compiling import kernel
from runtime.kernels.selftest import agrees
from runtime.kernels.words import KERNELS
modules = ("numba_jobs", "numba_trits", "numba_dense", "numba_int8")
wrong = [f for m in modules for f in KERNELS[m] if not agrees(kernel, m, f)]
assert not wrong, wrong
"""
    forced = {"NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "TRITLLAMA_CACHE": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **forced}, check=True)


def _filled(part: np.ndarray, fill: int | None, rng: np.random.Generator) -> np.ndarray:
    raw = rng.integers(0, 256, part.nbytes) if fill is None else np.full(part.nbytes, fill)
    return raw.astype(np.uint8).view(part.dtype).reshape(part.shape)
