"""The order in which waiting requests are handed out, and which of them fit a worker's budget.

A pure data structure, apart from the state machine so that fairness can be read and tested without leases or clocks.
Higher priority first, then oldest first; a request that comes back (its worker died) takes its old place again.

A request that does not fit now may be overtaken by younger ones that do, but not for ever: at most `max_overtakes`
times. Then it blocks the line for every worker it does not fit, whose room grows until one can take it. One pick looks
at most `max_overtakes` places past the first request that does not fit, so a long line costs no more than a short one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import merge
from typing import NamedTuple

from wire.queue import LeaseBudget


class Place(NamedTuple):
    """Where a request stands. Places sort as the line does: by rank, then by arrival, which is unique."""

    rank: int  # minus the priority
    arrival: int
    tokens: int  # max_total_tokens
    request_id: str


class WaitingLine:
    """Waiting requests of all models."""

    def __init__(self, max_overtakes: int) -> None:
        self._max_overtakes = max_overtakes
        self._lines: dict[str, list[Place]] = {}
        self._overtaken: dict[str, int] = {}

    def add(self, model: str, place: Place) -> None:
        insort(self._lines.setdefault(model, []), place)

    def remove(self, model: str, place: Place) -> None:
        line = self._lines[model]
        del line[bisect_left(line, place)]
        if not line:
            del self._lines[model]
        self._overtaken.pop(place.request_id, None)

    def pick(self, budget: LeaseBudget) -> list[str]:
        """Request ids to hand out, in order. They stay in the line until removed; only overtaking is counted here."""
        picked: list[str] = []
        room = budget.max_tokens
        head = ""  # the first that does not fit
        looked = 0  # places seen behind it
        lines = [self._lines[model] for model in dict.fromkeys(budget.models) if model in self._lines]
        for place in merge(*lines):
            if len(picked) >= budget.max_requests:
                break
            if head:
                looked += 1
                if looked > self._max_overtakes or self._overtaken.get(head, 0) >= self._max_overtakes:
                    break
            # What can never fit takes no room: its worker refuses it in words.
            needed = place.tokens if place.tokens <= budget.capacity_tokens else 0
            if needed <= room:
                room -= needed
                picked.append(place.request_id)
                if head:
                    self._overtaken[head] = self._overtaken.get(head, 0) + 1
            elif not head:
                head = place.request_id
        return picked
