"""One tensor of a checkpoint, packed in each of the codecs that are wanted, every kind of part made once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import prod

import numpy as np

from ..codecs import CODECS, beyond_range
from ..codecs.base import Rows, Streamed
from ..codecs.trit_codec import Encode
from ..errors import SourceError
from .plan import KEPT, TRITS, Planned, rows_of
from .recovered import recover_packed

Packed = tuple[Planned, dict[str, np.ndarray | Streamed]]

# Codecs of one part whose rows do not depend on each other: made while they are written, never whole in memory
STREAMED = frozenset({"f32", "f16", "bf16"})
BLOCK_ELEMENTS = 1 << 22


def pack(items: Sequence[Planned], encode: Encode) -> list[Packed]:
    """Make one tensor's parts for each file, each kind of them once."""
    tensor = items[0].source
    if tensor is None:
        return [(item, {"values": np.frombuffer(item.data, np.uint8)}) for item in items]
    rows = rows_of(tensor)
    depths = {int(item.codec[4:]): item for item in items if item.codec in TRITS and not item.recover}
    packed: dict[str, Packed] = {}
    for item in items:
        if item.codec in packed:
            continue
        with _blaming(item):
            if item.recover:
                packed[item.codec] = _recovered(item, rows)
            elif tensor.carried and tensor.carried.codec == item.codec:
                packed[item.codec] = item, {**tensor.carried.read()}
            elif item.codec in STREAMED:
                packed[item.codec] = item, {"values": _streamed(item, rows)}
            elif item.codec in TRITS:
                for depth, (_, parts) in encode(rows, list(depths), **item.params).items():
                    packed[f"trit{depth}"] = depths[depth], {**parts}
            else:
                packed[item.codec] = item, {**CODECS[item.codec].quantize(rows, **item.params)[1]}
    for item, made in packed.values():
        arrays = {key: part for key, part in made.items() if isinstance(part, np.ndarray)}
        for problem in beyond_range(item.codec, item.shape, item.params, arrays) if len(arrays) == len(made) else ():
            raise SourceError(tensor.file, problem, tensor.theirs)
    return [packed[item.codec] for item in items]


def _recovered(item: Planned, rows: Rows) -> Packed:
    """Pack the trits that a matrix was made of; if there are none after all, keep it as it is and say so."""
    found = recover_packed(rows, item.params["dtype"])
    if isinstance(found, str):
        assert item.source is not None
        codec = KEPT[item.source.dtype]
        kept = replace(item, codec=codec, params={}, recover=False, remark=f"is kept as {codec}: {found}")
        return kept, {"values": _streamed(kept, rows)}
    (codec, params, parts), facts = found
    count, remark = facts["exceptions"], ""
    if count:
        remark = f"has {count} groups of 16 that are no trits: they are carried as they are"
    return replace(item, codec=codec, params=params, remark=remark, facts=facts), {**parts}


def _streamed(item: Planned, rows: Rows) -> Streamed:
    codec, step = CODECS[item.codec], max(1, BLOCK_ELEMENTS // prod(rows.shape[1:]))

    def blocks() -> Iterator[np.ndarray]:
        for start in range(0, rows.shape[0], step):
            with _blaming(item):
                values = codec.quantize(rows[start : start + step])[1]["values"]
            yield values

    return Streamed(codec.parts(rows.shape, {})["values"][0], rows.shape, blocks)


@contextmanager
def _blaming(item: Planned) -> Iterator[None]:
    """Name file and tensor where a value does not fit a codec."""
    try:
        yield
    except SourceError:
        raise
    except ValueError as exc:
        assert item.source is not None
        hint = " or bf16 (--quant, --embed)" if item.codec in ("f16", "q8") else ""
        raise SourceError(item.source.file, f"{exc}{hint}", item.source.theirs) from exc
