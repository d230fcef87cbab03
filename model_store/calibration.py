"""Ranges of a model's activations and of its keys and values, measured while it reads text.

Numbers are only gathered here; what a range becomes (a scale, a threshold) is the business of the node writer that
needs it. The float32 reference runs the text, so ranges are the checkpoint's own and not those of a quantized model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from model_store.checkpoint import Checkpoint
from model_store.reference import reference_logits

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]


class Calibration:
    """What was seen of each named activation; names as in reference.py's `observe`."""

    def __init__(self) -> None:
        self._channel_peaks: dict[str, Floats] = {}

    def observe(self, name: str, values: Floats) -> None:
        """Take in values [T, C] of activation `name`."""
        peaks = np.abs(values).max(axis=0, initial=0.0)
        known = self._channel_peaks.get(name)
        self._channel_peaks[name] = peaks if known is None else np.maximum(known, peaks)

    def channel_peaks(self, name: str) -> Floats:
        """The largest magnitude seen in each channel: [C]. Raises KeyError for what was never seen."""
        return self._channel_peaks[name]


def calibrate(checkpoint: Checkpoint, sequences: Sequence[TokenIds]) -> Calibration:
    """Run `sequences` of token ids through the checkpoint and watch."""
    calibration = Calibration()
    reference_logits(checkpoint, sequences, observe=calibration.observe)
    return calibration
