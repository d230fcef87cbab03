"""The order in which waiting requests are handed out, and which of them fit a worker's budget.

A pure data structure, apart from the state machine so that fairness can be read and tested without leases or clocks.
Higher priority first, then by fair share (fair_share.py), then oldest first; a request that comes back (its worker
died) takes its old place again.

A request that does not fit now may be overtaken by younger ones that do, but not for ever: at most `max_overtakes`
times. Then it blocks the line for every worker it does not fit, whose room grows until one can take it. A suspect is
passed over by a worker that holds one. One pick looks at most `max_overtakes` places past what it may hand out, so a
long line costs no more than a short one.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import merge
from itertools import islice
from typing import NamedTuple

from services.queues.fair_share import FairShare
from wire.queue import LeaseBudget


class Place(NamedTuple):
    """Where a request stands. Places sort as the line does; the arrival is unique."""

    rank: int  # minus the priority
    tag: int  # of fair_share.py
    arrival: int
    tokens: int  # max_total_tokens
    request_id: str


class WaitingLine:
    """Waiting requests of all models."""

    def __init__(self, max_overtakes: int) -> None:
        self._max_overtakes = max_overtakes
        self._lines: dict[str, list[Place]] = {}
        self._overtaken: dict[str, int] = {}
        self._suspects: set[str] = set()
        self.share = FairShare()

    def add(self, model: str, place: Place, *, is_suspect: bool = False) -> None:
        insort(self._lines.setdefault(model, []), place)
        if is_suspect:
            self._suspects.add(place.request_id)

    def acquit(self, request_id: str) -> None:
        """Who waits is no suspect any more."""
        self._suspects.discard(request_id)

    def remove(self, model: str, place: Place) -> None:
        line = self._lines[model]
        del line[bisect_left(line, place)]
        self._overtaken.pop(place.request_id, None)
        self._suspects.discard(place.request_id)
        if not line:
            del self._lines[model]
        if not self._lines:
            self.share.emptied()

    def pick(self, budget: LeaseBudget) -> list[str]:
        """Request ids to hand out, in order. They stay in the line until removed; only overtaking is counted here."""
        picked: list[str] = []
        room = budget.max_tokens
        takes_suspect = budget.takes_suspect
        head = ""  # the first that does not fit
        looked = 0  # places seen behind it
        far = budget.max_requests + self._max_overtakes + 2
        lines = [islice(self._lines[model], far) for model in dict.fromkeys(budget.models) if model in self._lines]
        for place in merge(*lines):
            if len(picked) >= budget.max_requests:
                break
            if head:
                looked += 1
                if looked > self._max_overtakes or self._overtaken.get(head, 0) >= self._max_overtakes:
                    break
            is_suspect = place.request_id in self._suspects
            if is_suspect and not takes_suspect:
                continue
            # What can never fit takes no room: its worker refuses it in words.
            needed = place.tokens if place.tokens <= budget.capacity_tokens else 0
            if needed <= room:
                room -= needed
                takes_suspect = takes_suspect and not is_suspect
                picked.append(place.request_id)
                if head:
                    self._overtaken[head] = self._overtaken.get(head, 0) + 1
            elif not head:
                head = place.request_id
        return picked
