"""Windows of a calibration text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..tokenizer import Tokenizer

CTX = 512


class CalibrationError(ValueError):
    """The text, the folder or the options do not fit the conversion; the text is the one line to show."""


def cut_windows(tokenizer: Tokenizer, texts: Sequence[str], tokens: int, ctx: int = CTX) -> np.ndarray:
    """Take windows that are spread evenly over each of the texts, as many from one as from the others.

    tokens: at most, in all
    returns: (windows, ctx) int64; each begins with BOS if the tokenizer adds one
    Raises CalibrationError if the texts have less than a window.
    """
    found = []
    for text in texts:
        ids = np.array(tokenizer.encode(text, add_bos=False), np.int64)
        whole = len(ids) // ctx
        chosen = np.linspace(0, whole - 1, min(whole, max(tokens // ctx // len(texts), 1))).astype(int)
        found.append(ids[: whole * ctx].reshape(whole, ctx)[chosen])
    windows = np.concatenate(found)
    if not len(windows):
        raise CalibrationError(f"the calibration text has less than one window of {ctx} tokens; give a longer one")
    if tokenizer.add_bos:
        windows[:, 0] = tokenizer.bos_id
    return windows
