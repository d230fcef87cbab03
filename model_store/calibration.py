"""Ranges of a model's activations and of its keys and values, measured while it reads text.

Numbers are only gathered here, and turned into the one threshold that int8 activations need; what else a range becomes
(a scale of keys, of an fp8 tensor) is the business of the node writer that needs it. The float32 reference runs the
text, so ranges are the checkpoint's own and not those of a quantized model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from model_store.checkpoint import Checkpoint
from model_store.reference import reference_logits

Floats = NDArray[np.float32]
Counts = NDArray[np.int64]
TokenIds = NDArray[np.int64]

BINS: Final = 2048
LEVELS: Final = 128  # magnitudes that int8 tells apart
VALUES_AT_ONCE: Final = 1 << 20  # counted in portions: the widest activations of a long text have a hundred million


class Histogram:
    """Counts of magnitudes in BINS equal bins from 0 to `top`, which doubles as larger values come.

    `top` is a power of two, so that two neighbouring bins become one exactly and counts never move; what is counted
    does not depend on the order in which values came.
    """

    def __init__(self) -> None:
        self.counts: Counts = np.zeros(BINS, np.int64)
        self.top = 0.0  # 0 = nothing but zeros so far
        self._num_zeros = 0

    def add(self, values: Floats) -> None:
        """Count |values|, zeros apart: they are exact at every scale and would drown the rest."""
        magnitudes = np.abs(values[values != 0]).astype(np.float64).ravel()
        self._num_zeros += values.size - magnitudes.size
        if not magnitudes.size:
            return
        self._widen(float(2.0 ** np.floor(np.log2(magnitudes.max()) + 1)))  # above the largest
        where = np.minimum((magnitudes * (BINS / self.top)).astype(np.int64), BINS - 1)
        self.counts += np.bincount(where, minlength=BINS)

    def _widen(self, top: float) -> None:
        if not self.top:
            self.top = top
        while self.top < top:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(axis=1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2


def kl_threshold(histogram: Histogram) -> float:
    """The magnitude at which clipping to int8 loses the least: entropy calibration.

    For every number of bins i from 128 up: P is the distribution with everything beyond bin i put into it, Q the same
    bins merged into 128 levels and spread again over what was not empty; the i with the least divergence KL(P || Q)
    wins, its upper edge is the threshold. 0 for an activation that was always zero. Migacz, "8-bit Inference with
    TensorRT", GTC 2017, slides 35 to 38.
    """
    used = int(np.flatnonzero(histogram.counts).max(initial=-1)) + 1
    if not used:
        return 0.0
    best, best_divergence = used, np.inf
    for bins in range(min(LEVELS, used), used + 1):
        divergence = _divergence(histogram.counts, bins)
        if divergence <= best_divergence:  # of equals the wider: it clips less
            best, best_divergence = bins, divergence
    return best * histogram.top / BINS


def _divergence(counts: Counts, bins: int) -> float:
    """KL(P || Q) of the first `bins` bins, clipped and quantized to LEVELS."""
    inside = counts[:bins].astype(np.float64)
    p = inside.copy()
    p[-1] += counts[bins:].sum()
    edges = np.linspace(0, bins, LEVELS + 1).astype(np.int64) if bins > LEVELS else np.arange(bins + 1)
    starts = edges[:-1]
    is_there = inside > 0
    sums = np.add.reduceat(inside, starts)
    filled = np.add.reduceat(is_there.astype(np.float64), starts)
    level = np.repeat(np.arange(len(starts)), np.diff(edges))
    q = np.where(is_there, (sums / np.maximum(filled, 1))[level], 0.0)
    if not q.sum():
        return np.inf
    p, q = p / p.sum(), q / q.sum()
    # A bin that only clipped values fill has P and no Q: as bad as it is likely, and not infinitely bad.
    q = np.where((p > 0) & (q == 0), 1e-10, q)
    here = p > 0
    return float((p[here] * np.log(p[here] / q[here])).sum())


class Calibration:
    """What was seen of each named activation; names as in reference.py's Observer."""

    def __init__(self) -> None:
        self._channel_peaks: dict[str, Floats] = {}
        self._histograms: dict[str, Histogram] = {}

    def observe(self, name: str, values: Floats) -> None:
        """Take in values [T, C] of activation `name`."""
        peaks = np.abs(values).max(axis=0, initial=0.0)
        known = self._channel_peaks.get(name)
        self._channel_peaks[name] = peaks if known is None else np.maximum(known, peaks)
        histogram, flat = self._histograms.setdefault(name, Histogram()), values.reshape(-1)
        for start in range(0, flat.size, VALUES_AT_ONCE):
            histogram.add(flat[start : start + VALUES_AT_ONCE])

    def channel_peaks(self, name: str) -> Floats:
        """The largest magnitude seen in each channel: [C]. Raises KeyError for what was never seen."""
        return self._channel_peaks[name]

    def peak(self, name: str) -> float:
        """The largest magnitude seen."""
        return float(self._channel_peaks[name].max(initial=0.0))

    def threshold(self, name: str) -> float:
        """Where int8 should clip: see kl_threshold."""
        return kl_threshold(self._histograms[name])


def calibrate(checkpoint: Checkpoint, sequences: Sequence[TokenIds]) -> Calibration:
    """Run `sequences` of token ids through the checkpoint and watch."""
    calibration = Calibration()
    reference_logits(checkpoint, sequences, observe=calibration.observe)
    return calibration
