"""How sure a share or a mean is, and how sure a drop of a share is. Closed forms: no random numbers, no tables.

All are 95 % intervals. Apart from the prober because they are arithmetic on counts that published examples check.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import fmean, stdev
from typing import Final

Z: Final = 1.959963984540054  # the normal quantile of 97.5 %


@dataclass(frozen=True, slots=True)
class Interval:
    """Both ends belong to it."""

    low: float
    high: float


def wilson(right: int, total: int) -> Interval:
    """For a share of right answers (Wilson, 1927). Raises ValueError without answers."""
    if total < 1:
        raise ValueError("there are no answers")
    share = right / total
    middle = (share + Z * Z / (2 * total)) / (1 + Z * Z / total)
    half = Z / (1 + Z * Z / total) * sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


MEAN_NEEDS: Final = 30  # values, for a mean of them to be nearly normal whatever they are


def mean_interval(values: Sequence[float]) -> Interval | None:
    """For the mean that `values` are a sample of, by the central limit theorem; None with too few to rely on it."""
    if len(values) < MEAN_NEEDS:
        return None
    half = Z * stdev(values) / sqrt(len(values))
    return Interval(fmean(values) - half, fmean(values) + half)


@dataclass(frozen=True, slots=True)
class Paired:
    """The same items answered twice: how many were right both times, only before, only now, and never."""

    both: int
    lost: int
    gained: int
    neither: int

    @classmethod
    def of(cls, before: Mapping[str, bool], now: Mapping[str, bool]) -> Paired:
        """Raises ValueError if they are not the same items."""
        if before.keys() != now.keys():
            raise ValueError("these are not the same items")
        pairs = [(before[item], now[item]) for item in before]
        return cls(
            both=pairs.count((True, True)),
            lost=pairs.count((True, False)),
            gained=pairs.count((False, True)),
            neither=pairs.count((False, False)),
        )


def difference(pairs: Paired) -> Interval:
    """For (share right before) - (share right now).

    Method 10 of Newcombe, "Improved confidence intervals for the difference between binomial proportions based on
    paired data" (Statistics in Medicine 17, 1998): Wilson's intervals of both shares, joined with the correlation of
    the pairs. Raises ValueError without pairs.
    """
    a, b, c, d = pairs.both, pairs.lost, pairs.gained, pairs.neither
    total = a + b + c + d
    before, now = wilson(a + b, total), wilson(a + c, total)
    share_before, share_now = (a + b) / total, (a + c) / total
    phi = _phi(a, b, c, d)
    theta = share_before - share_now
    down, up = share_before - before.low, now.high - share_now
    low = theta - sqrt(max(0.0, down * down - 2 * phi * down * up + up * up))
    down, up = before.high - share_before, share_now - now.low
    high = theta + sqrt(max(0.0, down * down - 2 * phi * down * up + up * up))
    return Interval(max(-1.0, low), min(1.0, high))


def _phi(a: int, b: int, c: int, d: int) -> float:
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    covariance: float = a * d - b * c
    if covariance > 0:
        covariance = max(0.0, covariance - (a + b + c + d) / 2)  # the continuity correction
    return covariance / sqrt(margins)


def relative_drop(pairs: Paired) -> Interval:
    """The difference as a part of the share right before, which counts as a fixed number; 0 if nothing was right."""
    right_before = pairs.both + pairs.lost
    if right_before == 0:
        return Interval(0.0, 0.0)
    share = right_before / (right_before + pairs.gained + pairs.neither)
    found = difference(pairs)
    return Interval(found.low / share, found.high / share)
