"""How long the steps of a run take, so that one that would be cut off is not begun.

Apart from the steps because it is arithmetic: lines through the times of one run on an H200 (16 processor cores, files
in /dev/shm) with weights of 2.5 and 16 GB, and a margin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

MARGIN: Final = 1.2


@dataclass(frozen=True, slots=True)
class Cost:
    fixed_s: float
    per_gb_s: float  # of the weights, 1e9 bytes


COSTS: Final[Mapping[str, Cost]] = {
    "make": Cost(1.5, 0.9),
    "import": Cost(2.5, 3.0),
    "engine": Cost(3.5, 1.4),  # five concurrencies, three rounds of 128 + 128 tokens
    "peer": Cost(20.0, 2.0),  # guessed from one configuration of the smaller model
}


def needed_s(steps: Iterable[str], weight_bytes: int) -> float:
    """Seconds that `steps` (keys of COSTS) take together for a model with so many bytes of weights."""
    costs = [COSTS[step] for step in steps]
    return MARGIN * sum(cost.fixed_s + cost.per_gb_s * weight_bytes / 1e9 for cost in costs)


def fits(pass_s: float, passes: int, left_s: float) -> bool:
    """Whether `passes` more passes, each like one that took `pass_s`, end within `left_s`."""
    return MARGIN * pass_s * passes <= left_s
