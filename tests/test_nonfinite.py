"""NaN and infinity: what is not a number stays none on every backend, and does not spread to other tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from formats.codecs import CODECS
from formats.container import Tensor
from runtime.errors import ConfigError
from runtime.kernels import Kernels, get_kernels
from runtime.model import Model
from runtime.ring.cache import KVRing
from runtime.ring.codecs import CODECS as RING_CODECS
from tests import tiny
from tests.native_library import ensure_native_library
from tests.test_attention import config_of

BAD = (np.nan, np.inf, -np.inf)
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow|divide)")


@pytest.fixture(scope="module", params=["numpy", "numba", "native"])
def kernels(request: pytest.FixtureRequest) -> Iterator[Kernels]:
    if request.param == "native":
        ensure_native_library()
    made = get_kernels(request.param, n_threads=2)
    yield made
    made.close()


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("place", [0, 3, 79, 80, 98])
@pytest.mark.parametrize("codec", ["f16", "q8", "trit3", "nf4"])
def test_a_product_with_a_broken_activation(codec: str, place: int, bad: float, kernels: Kernels) -> None:
    weights = np.random.default_rng(1).standard_normal((35, 99)).astype(np.float32)
    params, parts = CODECS[codec].quantize(weights)
    linear = kernels.linear([Tensor("x", codec, (35, 99), params, parts, 0, 0, 0, "test")], [None])
    x = np.random.default_rng(2).standard_normal((3, 99)).astype(np.float32)
    x[1, place] = bad
    out = np.zeros((3, 35), np.float32)
    linear(x, [out])
    used = weights[:, place] != 0 if codec == "trit3" else np.abs(weights[:, place]) > 1e-2
    assert np.isfinite(out[[0, 2]]).all() and not np.isfinite(out[1][used]).any()


@pytest.mark.parametrize("bad", BAD)
def test_a_broken_number_in_the_small_steps(bad: float, kernels: Kernels) -> None:
    for place in (0, 5, 31, 33):
        x = np.ones((3, 35), np.float32)
        x[1, place] = bad
        out, gate, up = np.zeros_like(x), np.ones_like(x), x.copy()
        kernels.rmsnorm(x, np.ones(35, np.float32), 1e-5, out)
        assert np.isfinite(out[[0, 2]]).all() and np.isnan(out[1, place])
        kernels.swiglu(gate, up)
        assert np.array_equal(np.isfinite(gate), np.isfinite(x))


@pytest.mark.parametrize("codec", RING_CODECS)
@pytest.mark.parametrize("side", ["q", "k", "v"])
@pytest.mark.parametrize("place", [0, 7, 40, 63])
def test_attention_to_what_is_not_a_number(place: int, side: str, codec: str, kernels: Kernels) -> None:
    """In one of some tokens: it and the later ones see it. A value is also seen, at weight 0, by those beside it."""
    ring = KVRing(config_of((2, 1, 64)), 100, 40, codec=codec)
    rng = np.random.default_rng(3)
    widths = {"q": 128, "k": 64, "v": 64}
    x = {name: rng.standard_normal((40, width)).astype(np.float32) for name, width in widths.items()}
    x[side][35, place] = np.nan
    kernels.append(x["k"], x["v"], ring, 0)
    out = np.zeros_like(x["q"])
    kernels.attention(x["q"], x["q"], ring, 0, out)
    broken = ~np.isfinite(out).all(axis=1)
    assert broken[35] and (broken[36:] == (side != "q")).all()
    assert side == "v" or not broken[:35].any()


def test_angles_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    path = tiny.write_trit(tmp_path / "far.trit", {"rope_scaling": {"type": "linear", "factor": 5e-324}})
    with pytest.raises(ConfigError, match=r"far\.trit: config rope_scaling factor is 5e-324; expected a number"):
        Model.load(path, "numpy")
