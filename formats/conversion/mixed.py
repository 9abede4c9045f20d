"""Mixed depth: which matrix gets how many trits, at a given average of bits per weight.

The harm of a matrix at a depth is taken to be

    sensitivity of its role * number of weights * relative squared error of its weights at that depth

and every matrix starts at the deepest uniform depth that the budget allows. Then, again and again, the matrix that
loses most harm for each bit added gets one trit more, as long as the average stays within the budget. No matrix goes
below the uniform depth, and none gets a third trit while others have one: taking trits from seemingly dull matrices was
measured to be worse, because the harm of depth 1 grows faster than its squared error says. For the same reason a budget
below two trits each buys little.

The sensitivities are shares of predicted damage per weight, measured once on SmolLM2-135M (squared gradients of the
loss, 4096 tokens, times the squared error of depth 2): 36 % of it came from wv, which has 3 % of the weights. They
rank roles, not layers; `runtime.calibration` measures both on the model itself.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..codecs import CODECS, payload_nbytes
from ..codecs.base import Rows
from ..codecs.trit_codec import Encode
from ..errors import OptionError

DEPTHS = (1, 2, 3, 4)
SENSITIVITY = {"wv": 11.5, "wk": 1.9, "w2": 0.84, "w3": 0.72, "w1": 0.44, "wo": 0.43, "wq": 0.32}
SAMPLE = 1 << 20  # weights of a matrix that are measured


@dataclass(frozen=True)
class Measured:
    """One matrix. errors, nbytes: relative squared error and size at depth 1, 2, 3, 4

    effect: (depth, harm) as it was measured on the model's output, instead of what its role lets expect
    """

    name: str
    weights: int
    errors: Sequence[float]
    nbytes: Sequence[int]
    effect: tuple[int, float] | None = None

    def harm(self, depth: int) -> float:
        if self.effect:
            known, harm = self.effect
            return harm * self.errors[depth - 1] / (self.errors[known - 1] or 1.0)
        return SENSITIVITY[self.name.rsplit(".", 1)[-1]] * self.weights * self.errors[depth - 1]


def measure(name: str, rows: Rows, encode: Encode) -> Measured:
    """Quantise evenly spaced rows of a matrix at every depth and compare.

    Raises ValueError if a value is NaN or infinite.
    """
    out, width = rows.shape
    few = min(out, max(SAMPLE // width, 1))
    w = rows[:] if few == out else np.concatenate([rows[i : i + 1] for i in np.linspace(0, out - 1, few).astype(int)])
    power = float(np.square(w, dtype=np.float64).sum())
    errors = []
    for depth, (params, parts) in encode(w, DEPTHS).items():
        rest = w - CODECS[f"trit{depth}"].dequantize(parts, w.shape, params)
        errors.append(float(np.square(rest, dtype=np.float64).sum()) / power if power else 0.0)
    nbytes = [payload_nbytes(f"trit{depth}", rows.shape, {"dtype": "float32"}) for depth in DEPTHS]
    return Measured(name, out * width, errors, nbytes)


def base_depth(matrices: Sequence[Measured], bpw: float) -> int:
    """Give the trits that every matrix can have. Raises OptionError if even one trit each takes more than `bpw`."""
    weights = sum(m.weights for m in matrices)
    uniform = {depth: 8 * sum(m.nbytes[depth - 1] for m in matrices) / weights for depth in DEPTHS}
    if uniform[1] > bpw:
        raise OptionError(f"{bpw:g} bits per weight are too few: one trit each takes {uniform[1]:.2f}")
    return max(depth for depth in DEPTHS if uniform[depth] <= bpw)


def allocate(matrices: Sequence[Measured], bpw: float) -> Mapping[str, int]:
    """Choose the depth of each matrix so that all together take at most `bpw` bits per weight.

    Raises OptionError if even one trit each takes more.
    """
    budget, base = bpw * sum(m.weights for m in matrices) / 8, base_depth(matrices, bpw)
    top = DEPTHS[-1] if base > 1 else 2  # of 3.7 bits, SmolLM2-135M makes 25 % less divergence with this rule
    depths = dict.fromkeys((m.name for m in matrices), base)
    left = budget - sum(m.nbytes[base - 1] for m in matrices)
    queue = [_step(m, base, i) for i, m in enumerate(matrices) if base < top]
    heapq.heapify(queue)
    while queue:
        _, i, depth = heapq.heappop(queue)
        matrix = matrices[i]
        more = matrix.nbytes[depth - 1] - matrix.nbytes[depth - 2]
        if more > left:
            continue
        left -= more
        depths[matrix.name] = depth
        if depth < top:
            heapq.heappush(queue, _step(matrix, depth, i))
    return depths


def _step(matrix: Measured, depth: int, i: int) -> tuple[float, int, int]:
    """Rate one trit more than `depth`: the best step sorts first, equal ones in the order of the model."""
    more = matrix.nbytes[depth] - matrix.nbytes[depth - 1]
    return (matrix.harm(depth + 1) - matrix.harm(depth)) / more, i, depth + 1
