"""Windows of a calibration text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tokenizer import Tokenizer

CTX = 512


class CalibrationError(ValueError):
    """The text, the folder or the options do not fit the conversion; the text is the one line to show."""


def cut_windows(tokenizer: Tokenizer, texts: Sequence[str], tokens: int, ctx: int = CTX) -> np.ndarray:
    """Take windows that are spread evenly over each of the texts, as many from one as from the others, if it has them.

    tokens: at most, in all, but for a window of each text
    returns: (windows, ctx) int64; each begins with BOS if the tokenizer adds one
    Raises CalibrationError if the texts have less than a window.
    """
    cut = []
    for text in texts:
        ids = np.array(tokenizer.encode(text, add_bos=False), np.int64)
        cut.append(ids[: len(ids) // ctx * ctx].reshape(-1, ctx))
    counts, left = [0] * len(cut), tokens // ctx
    shortest_first = sorted(range(len(cut)), key=lambda i: len(cut[i]))
    for done, i in enumerate(shortest_first):  # what a short text lacks, the others give
        counts[i] = min(len(cut[i]), max(left // (len(cut) - done), 1))
        left -= counts[i]
    windows = np.concatenate(
        [whole[np.linspace(0, len(whole) - 1, count).astype(int)] for whole, count in zip(cut, counts, strict=True)]
    )
    if not len(windows):
        raise CalibrationError(f"the calibration text has less than one window of {ctx} tokens; give a longer one")
    if tokenizer.add_bos:
        windows[:, 0] = tokenizer.bos_id
    return windows
