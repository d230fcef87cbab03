"""Ranges of a model's activations and of its keys and values, measured while it reads text.

Numbers are only gathered here; what a range becomes (a scale, a clipped grid) is the business of the node writer that
needs it. The float32 reference runs the text, so ranges are the checkpoint's own and not those of a quantized model.
Memory is bounded whatever is read: a histogram and the channels' peaks for each activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_store.checkpoint import Checkpoint
from model_store.reference import reference_logits

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]
TokenIds = NDArray[np.int64]

NUM_BINS: Final = 2048
NUM_LEVELS: Final = 128  # magnitudes that int8 tells apart
VALUES_AT_ONCE: Final = 1 << 20
# A level that holds only what was clipped into it has no probability of its own; a divergence needs some.
LEAST_PROBABILITY: Final = 1e-9


@dataclass(slots=True)
class Histogram:
    """Counts of magnitudes in NUM_BINS bins of equal width from 0 to 2^exponent.

    The range is the least power of two that holds everything seen. When it grows, bins are merged whole, so the counts
    are exact and depend neither on the order nor on the portions in which values came.
    """

    counts: Counts = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))
    exponent: int | None = None  # None: nothing but zeros was seen
    num_zeros: int = 0  # seen before the first other value
    peak: float = 0.0

    @property
    def bin_width(self) -> float:
        return 0.0 if self.exponent is None else float(np.ldexp(1.0 / NUM_BINS, self.exponent))

    def add(self, magnitudes: Floats) -> None:
        """Count `magnitudes` [n], finite and not negative."""
        peak = float(magnitudes.max(initial=0.0))
        self.peak = max(self.peak, peak)
        if peak > 0:
            self._reach(int(np.frexp(peak)[1]))
        if self.exponent is None:
            self.num_zeros += magnitudes.size
            return
        bins = (magnitudes * np.float64(1 / self.bin_width)).astype(np.int64)
        self.counts += np.bincount(bins, minlength=NUM_BINS)

    def _reach(self, exponent: int) -> None:
        """Widen the range to 2^exponent."""
        if self.exponent is None:
            self.exponent = exponent
            self.counts[0] += self.num_zeros
        elif exponent > self.exponent:
            merged = 1 << min(exponent - self.exponent, NUM_BINS.bit_length() - 1)
            kept = self.counts.reshape(-1, merged).sum(axis=1)
            self.counts = np.concatenate([kept, np.zeros(NUM_BINS - len(kept), np.int64)])
            self.exponent = exponent


def entropy_threshold(histogram: Histogram) -> float:
    """Where to clip before quantizing to NUM_LEVELS levels: the threshold that loses the least information.

    Of all ranges of at least NUM_LEVELS bins, the one with the least Kullback-Leibler divergence between the
    distribution clipped to it (what lies beyond counts as its last bin) and the same after quantization. This is
    entropy calibration as published: Szymon Migacz, "8-bit Inference with TensorRT", GTC 2017, slides 34 to 38.
    0 where nothing but zeros was seen.
    """
    if histogram.exponent is None:
        return 0.0
    used = int(np.flatnonzero(histogram.counts)[-1]) + 1
    counts = histogram.counts[:used].astype(np.float64)
    beyond = counts.sum() - np.cumsum(counts)  # of each bin: what lies above it
    best, best_divergence = used, np.inf
    for size in range(NUM_LEVELS, used + 1):
        divergence = _divergence(counts[:size], float(beyond[size - 1]))
        if divergence <= best_divergence:  # of equal ones the widest
            best, best_divergence = size, divergence
    return min(best * histogram.bin_width, histogram.peak)


def _divergence(inside: NDArray[np.float64], beyond: float) -> float:
    """KL(P || Q): P is `inside` with `beyond` added to its last bin, Q is `inside` in NUM_LEVELS levels.

    A level's count is spread evenly over those of its bins that are not empty.
    """
    size = len(inside)
    clipped = inside.copy()
    clipped[-1] += beyond
    level = np.arange(size) * NUM_LEVELS // size
    is_used = clipped > 0
    sums = np.bincount(level, weights=inside, minlength=NUM_LEVELS)
    widths = np.bincount(level, weights=is_used, minlength=NUM_LEVELS)
    spread = (sums / np.maximum(widths, 1))[level[is_used]]
    if not (total := spread.sum()):
        return float("inf")  # everything lies beyond
    p = clipped[is_used] / clipped.sum()
    q = np.maximum(spread / total, LEAST_PROBABILITY)
    return float((p * np.log(p / q)).sum())


class Calibration:
    """What was seen of each named activation; names as in reference.py's `Observer`."""

    def __init__(self) -> None:
        self._channel_peaks: dict[str, Floats] = {}
        self._histograms: dict[str, Histogram] = {}
        self._thresholds: dict[str, float] = {}

    def observe(self, name: str, values: Floats) -> None:
        """Take in values [T, C] of activation `name`. Raises ValueError if they are not all finite."""
        peaks = np.abs(values).max(axis=0, initial=0.0)
        if not np.isfinite(peaks).all():
            raise ValueError(f"{name} has values that are not finite")
        known = self._channel_peaks.get(name)
        self._channel_peaks[name] = peaks if known is None else np.maximum(known, peaks)
        histogram = self._histograms.setdefault(name, Histogram())
        flat = values.reshape(-1)
        for start in range(0, flat.size, VALUES_AT_ONCE):
            histogram.add(np.abs(flat[start : start + VALUES_AT_ONCE]))
        self._thresholds.pop(name, None)

    def channel_peaks(self, name: str) -> Floats:
        """The largest magnitude seen in each channel: [C]. Raises KeyError for what was never seen."""
        return self._channel_peaks[name]

    def peak(self, name: str) -> float:
        """The largest magnitude seen. Raises KeyError for what was never seen."""
        return float(self._channel_peaks[name].max(initial=0.0))

    def threshold(self, name: str) -> float:
        """Where to clip the whole tensor for int8 (entropy_threshold). Raises KeyError for what was never seen."""
        if name not in self._thresholds:
            self._thresholds[name] = entropy_threshold(self._histograms[name])
        return self._thresholds[name]


def calibrate(checkpoint: Checkpoint, sequences: Sequence[TokenIds]) -> Calibration:
    """Run `sequences` of token ids through the checkpoint and watch."""
    calibration = Calibration()
    reference_logits(checkpoint, sequences, observe=calibration.observe)
    return calibration
