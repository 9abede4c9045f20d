"""The trit codecs: every byte, bytes written by hand, a slow twin of packer and quantiser."""

from __future__ import annotations

import math

import numpy as np
import pytest

from formats import CODECS
from formats.codecs import trit
from formats.codecs.base import round_to
from tests.matrices import DEPTHS, SHAPES, gaussian, same_bits

each_depth = pytest.mark.parametrize("depth", DEPTHS)


# ======== bytes


def slow_pack(levels, codes, depth):
    """SPEC.md word for word, one weight at a time."""
    top = (3**depth - 1) // 2
    out, width = levels.shape
    blocks = np.zeros((math.ceil(out / 16), math.ceil(width / 80), 256 * depth + 48), int)
    for s, b in np.ndindex(blocks.shape[:2]):

        def level(g, j, row, k, s=s, b=b):
            r, c = s * 16 + row, b * 80 + g * 16 + j * 4 + k
            return int(levels[r, c]) + top if r < out and c < width else top

        for j, row, k in np.ndindex(4, 16, 4):
            q = [level(g, j, row, k) for g in range(5)]
            for v, byte in enumerate(slow_bytes(q, depth)):
                blocks[s, b, (j * depth + v) * 64 + row * 4 + k] = byte
        for row in range(16):
            r = s * 16 + row
            c = [int(codes[r, b * 5 + g]) if r < out and b * 5 + g < codes.shape[1] else 0 for g in range(5)]
            h = [c[3] % 9, c[4] % 9, c[3] // 9 + 3 * (c[4] // 9)]
            for k in range(3):
                blocks[s, b, 256 * depth + 16 * k + row] = c[k] + 27 * h[k]
    return blocks.astype(np.uint8)


def slow_bytes(q, depth):
    if depth == 4:
        t = [q[4] // 27, q[4] // 9 % 3, q[4] // 3 % 3, q[4] % 3]
        return [q[i] + 81 * t[i] for i in range(4)]
    if depth == 3:
        return [q[0] + 27 * (q[3] % 9), q[1] + 27 * (q[4] % 9), q[2] + 27 * (3 * (q[3] // 9) + q[4] // 9)]
    if depth == 2:
        return [q[0] + 9 * q[1] + 81 * (q[4] // 3), q[2] + 9 * q[3] + 81 * (q[4] % 3)]
    return [81 * q[0] + 27 * q[1] + 9 * q[2] + 3 * q[3] + q[4]]


def random_levels(shape, depth, seed=0):
    rng = np.random.default_rng(seed)
    top = trit.max_level(depth)
    codes = rng.integers(0, 27, (shape[0], math.ceil(shape[1] / 16)), np.uint8)
    return rng.integers(-top, top + 1, shape, np.int8), codes


@pytest.mark.parametrize("shape", SHAPES)
@each_depth
def test_packer_agrees_with_the_specification(depth, shape):
    levels, codes = random_levels(shape, depth)
    blocks = trit.pack(levels, codes, depth)
    assert same_bits(blocks, slow_pack(levels, codes, depth))
    again = trit.unpack(blocks, shape, depth)
    assert same_bits(again[0], levels) and same_bits(again[1], codes)


@each_depth
def test_every_valid_trit_byte(depth):
    """Whatever valid bytes a superblock holds, unpacking and packing gives them back."""
    bytes_ = np.arange(243, dtype=np.uint8)
    rng = np.random.default_rng(depth)
    columns = [rng.permutation(bytes_) for _ in range(trit.block_bytes(depth))]
    blocks = np.stack(columns, axis=1).reshape(243, 1, -1)
    shape = (243 * 16, 80)
    levels, codes = trit.unpack(blocks, shape, depth)
    top = trit.max_level(depth)
    assert set(np.unique(levels)) == set(range(-top, top + 1))
    assert set(np.unique(codes)) == set(range(27))
    assert same_bits(trit.pack(levels, codes, depth), blocks)


@each_depth
def test_invalid_trit_bytes_stay_in_bounds_and_are_reported(depth):
    codec = CODECS[f"trit{depth}"]
    shape, params = (16, 80), {"dtype": "float32"}
    units = np.zeros(32, np.float32)
    units[:27] = 1
    for byte in range(243, 256):
        blocks = np.full((1, 1, trit.block_bytes(depth)), byte, np.uint8)
        parts = {"units": units, "blocks": blocks}
        assert np.isfinite(codec.dequantize(parts, shape, params)).all()
        assert trit.unpack(blocks, shape, depth)[1].max() < 32
        assert list(codec.problems(parts, shape, params)) == [
            f"blocks holds {blocks.size} bytes above 242, which stand for no trits"
        ]


@pytest.mark.parametrize(
    ("depth", "zeros", "expected"),
    [
        # Group 0 at its highest, group 4 at its lowest level; all others zero (q = L).
        (1, [121], [2 * 81 + 27 + 9 + 3 + 0]),
        (2, [4 + 36 + 81, 4 + 36 + 81], [8 + 36 + 0, 4 + 36 + 0]),
        (3, [13 + 27 * 4, 13 + 27 * 4, 13 + 27 * 4], [26 + 27 * 4, 13 + 27 * 0, 13 + 27 * 3]),
        (4, [40 + 81] * 4, [80 + 0, 40, 40, 40]),
    ],
)
def test_trit_bytes_by_hand(depth, zeros, expected):
    levels = np.zeros((16, 80), np.int8)
    row, j, k = 3, 2, 1
    levels[row, 0 * 16 + j * 4 + k] = trit.max_level(depth)
    levels[row, 4 * 16 + j * 4 + k] = -trit.max_level(depth)
    codes = np.zeros((16, 5), np.uint8)
    codes[5] = [1, 2, 3, 13, 26]
    block = trit.pack(levels, codes, depth)[0, 0]
    for v in range(depth):
        vector = block[(j * depth + v) * 64 :][:64].copy()
        assert vector[row * 4 + k] == expected[v]
        vector[row * 4 + k] = zeros[v]
        assert (vector == zeros[v]).all()
    scales = block[256 * depth :].reshape(3, 16)
    assert scales[:, 5].tolist() == [1 + 27 * 4, 2 + 27 * 8, 3 + 27 * (1 + 3 * 2)]
    assert not np.delete(scales, 5, axis=1).any()


@each_depth
def test_packer_refuses_what_does_not_fit(depth):
    levels, codes = random_levels((4, 20), depth)
    with pytest.raises(ValueError, match="level lies outside"):
        trit.pack(np.where(levels == levels[0, 0], trit.max_level(depth) + 1, levels), codes, depth)
    with pytest.raises(ValueError, match="scale code lies outside"):
        trit.pack(levels, codes + 27, depth)
    with pytest.raises(ValueError, match="do not belong"):
        trit.pack(levels, codes[:, :1], depth)


# ======== levels, scale codes and units


def slow_quantize(w, depth):
    """The quantiser of tritllm v2, one group at a time, in NumPy scalars."""
    top = np.float32(trit.max_level(depth))
    padded = np.pad(w, ((0, 0), (0, -w.shape[1] % 16)))
    groups = padded.reshape(-1, 16)

    def levels(group, unit):
        return np.clip(np.rint(group / unit), -top, top) if unit > 0 else np.zeros(16, np.float32)

    scales = []
    for group in groups:
        ordered = np.sort(np.abs(group))
        errors = {}
        for i in (10, 12, 14, 15):
            if ordered[i] > 0:
                rest = group - levels(group, ordered[i] / top) * (ordered[i] / top)
                errors.setdefault(sum(float(r) ** 2 for r in rest), ordered[i])
        scales.append(errors[min(errors)] if errors else np.float32(0))
    positive = [math.log(s) for s in scales if s > 0]
    grid = np.linspace(min(positive), max(positive), 27)
    units = np.exp(grid).astype(np.float32) / top
    codes = [int(np.abs(grid - math.log(s)).argmin()) if s > 0 else 0 for s in scales]
    q = np.array([levels(g, units[c]) for g, c in zip(groups, codes, strict=True)])
    return q.reshape(padded.shape)[:, : w.shape[1]], np.array(codes).reshape(len(w), -1), units


@pytest.mark.parametrize("shape", [(5, 16), (6, 50), (2, 3)])
@each_depth
def test_quantiser_agrees_with_its_slow_twin(depth, shape):
    w = gaussian(shape, seed=depth) * np.float32(0.02)
    w[1] = 0
    levels, codes, units = trit.quantize_levels(w, depth)
    expected = slow_quantize(w, depth)
    assert (levels == expected[0]).all()
    assert (codes == expected[1]).all()
    assert np.allclose(units[:27], expected[2], rtol=1e-6) and not units[27:].any()


def test_quantiser_golden():
    """A literal result, so that a change of one rounding step anywhere is seen."""
    w = np.array([[((i * 37) % 101 - 50) / 64 * (1 + i // 16) for i in range(40)]], np.float32)
    levels, codes, units = trit.quantize_levels(w, 2)
    assert levels[0, :20].tolist() == [-4, -1, 2, -3, 0, 3, -3, 1, 4, -2, 1, -4, -1, 2, -3, 0, 3, -2, 1, 4]
    assert levels[0, 20:].tolist() == [-1, 2, -4, -1, 3, -3, 0, 3, -2, 1, 4, -1, 2, -4, 0, 3, -3, 1, 4, -2]
    assert codes.tolist() == [[0, 18, 26]]
    some = [float(u).hex().replace("0000000p", "p") for u in units[[0, 1, 13, 26]]]
    assert some == ["0x1.780000p-3", "0x1.86e376p-3", "0x1.377608p-2", "0x1.020000p-1"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@each_depth
def test_trit_values_are_level_times_unit(depth, dtype):
    levels, codes = random_levels((17, 83), depth)
    units = np.zeros(32, np.float32)
    units[:27] = np.exp(np.linspace(-6, -3, 27))
    parts = {"units": units, "blocks": trit.pack(levels, codes, depth)}
    expected = round_to(levels * units[np.repeat(codes, 16, axis=1)[:, :83]], dtype)
    back = CODECS[f"trit{depth}"].dequantize(parts, (17, 83), {"dtype": dtype})
    assert same_bits(back, expected.astype(np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_bad_units_are_reported(value):
    params, parts = CODECS["trit1"].quantize(gaussian((3, 20)))
    units = parts["units"].copy()
    units[4] = value
    problems = list(CODECS["trit1"].problems({**parts, "units": units}, (3, 20), params))
    assert problems == ["units holds NaN, infinity or a negative number"]
    units[4], units[31] = 1, 1
    problems = list(CODECS["trit1"].problems({**parts, "units": units}, (3, 20), params))
    assert problems == ["units has more than 27 entries"]
