"""The table of codecs, and where the parts of a payload lie."""

from __future__ import annotations

from collections.abc import Iterator

from .base import LARGEST, Codec, Params, Parts, Shape
from .dense import ByteCodec, FloatCodec, Q8Codec
from .nf4 import NF4Codec
from .trit_codec import TritCodec

ALIGNMENT = 64

CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        FloatCodec("f32", "<f4"),
        FloatCodec("f16", "<f2"),
        FloatCodec("bf16", "<u2"),
        ByteCodec(),
        Q8Codec(),
        *(TritCodec(depth) for depth in (1, 2, 3, 4)),
        NF4Codec(),
    )
}


def align(offset: int) -> int:
    """Round up to the next multiple of 64."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def part_spans(codec: str, shape: Shape, params: Params) -> dict[str, tuple[int, int]]:
    """Give the (offset, nbytes) of every part within the payload, in order.

    Raises ValueError if the shape or the parameters are not the codec's, KeyError if there is no such codec.
    """
    spans = {}
    end = 0
    for key, (dtype, part_shape) in CODECS[codec].parts(shape, params).items():
        nbytes = dtype.itemsize
        for n in part_shape:
            nbytes *= n
        spans[key] = (align(end), nbytes)
        end = align(end) + nbytes
    return spans


def payload_nbytes(codec: str, shape: Shape, params: Params) -> int:
    """Give the size of a payload: the parts and the padding between them, none after the last."""
    offset, nbytes = list(part_spans(codec, shape, params).values())[-1]
    return offset + nbytes


def beyond_range(codec: str, shape: Shape, params: Params, parts: Parts) -> Iterator[str]:
    """Say, if it is so, that values may be larger than any is allowed to be; only what they share is looked at."""
    largest = CODECS[codec].largest(parts, shape, params)
    if not largest <= LARGEST:
        yield f"has values up to {largest:g}; none may exceed {LARGEST:g}"
