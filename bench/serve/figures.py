"""The arithmetic of load runs: slopes, percentiles, rates, recovery. Pure; times in s unless a name says ms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

MOST_POINTS = 1_000  # a slope looks at each pair of points


@dataclass(frozen=True, slots=True)
class Probe:
    """A request sent to see how long its first token takes: None if it was refused or failed."""

    sent_at: float
    ttft_s: float | None


def theil_sen(times: Sequence[float], values: Sequence[float]) -> float:
    """The median slope of all pairs of points (Sen 1968): a fifth of wild values does not move it much.

    Thinned evenly to MOST_POINTS. NaN with fewer than two different times.
    """
    step = -(-len(times) // MOST_POINTS) or 1
    x, y = np.asarray(times[::step], dtype=np.float64), np.asarray(values[::step], dtype=np.float64)
    first, second = np.triu_indices(len(x), 1)
    runs = x[second] - x[first]
    rises = (y[second] - y[first])[runs != 0]
    return float(np.median(rises / runs[runs != 0])) if rises.size else math.nan


def percentile(values: Sequence[float], share: float) -> float:
    """The `share` percentile, NaN of nothing."""
    return float(np.percentile(np.asarray(values), share)) if len(values) else math.nan


def spread(values: Sequence[float]) -> list[float]:
    """[median, smallest, largest]."""
    return [median(values), min(values), max(values)]


def rate_within(ends: Sequence[float], start: float, stop: float) -> float:
    """Ends a second between `start` and `stop`."""
    return sum(start <= end < stop for end in ends) / (stop - start)


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process with `rate` a second, from 0 to `seconds`."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=int(rate * seconds * 1.5) + 100)
    return [float(at) for at in np.cumsum(gaps) if at < seconds]


def recovered_at(probes: Sequence[Probe], ttft_s: float, in_a_row: int) -> float | None:
    """When the first of `in_a_row` probes was sent that were all answered, it and the median within `ttft_s`.

    Not each of them, as one slow spell of the machine is no relapse. None if there were never so many.
    """
    for first in range(len(probes) - in_a_row + 1):
        run = [probe.ttft_s for probe in probes[first : first + in_a_row] if probe.ttft_s is not None]
        if len(run) == in_a_row and max(run[0], median(run)) <= ttft_s:
            return probes[first].sent_at
    return None


def milliseconds(seconds: float) -> float | None:
    """Rounded for a report; None for NaN, which JSON has not."""
    return None if math.isnan(seconds) else round(1000 * seconds, 2)
