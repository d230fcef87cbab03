"""Cores with one rule broken each: what the simulation must find, or it proves nothing.

Each is a mistake that somebody could make; the docstring says which promise it breaks.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final

from services.queues.entry import Entry
from services.queues.fair_share import FairShare
from services.queues.protocol_core import QueueCore, QueueLimits
from services.queues.waiting_line import Place
from wire.messages import Event, Finished, Generate, Tokens, encode
from wire.queue import Lease, LeaseBudget, Refusal, RefusalReason, Status


class ZombiesWrite(QueueCore):
    """An append is taken whatever its epoch."""

    def _append(self, epoch: int, event: Event, now: int) -> RefusalReason | None:
        entry = self._entries.get(event.request_id)
        is_fenced = entry is not None and entry.epoch is not None and entry.status is Status.RUNNING
        return super()._append(entry.epoch if entry and is_fenced and entry.epoch else epoch, event, now)


class ZombiesRenew(QueueCore):
    """A lease is kept by whoever says so."""

    def renew(self, leases: Sequence[tuple[str, int]], now: int) -> list[Refusal]:
        found = {request_id: self._entries[request_id].epoch for request_id, _ in leases if request_id in self._entries}
        return super().renew([(request_id, found.get(request_id) or epoch) for request_id, epoch in leases], now)


class LapseLosesTokens(QueueCore):
    """A request starts anew when its worker is lost."""

    def _lapse(self, entry: Entry, now: int) -> None:
        entry.tokens = array("i")
        super()._lapse(entry, now)


class LapseForgetsCancel(QueueCore):
    """A cancelled request whose worker is lost goes back to the line."""

    def _lapse(self, entry: Entry, now: int) -> None:
        entry.is_cancelled = False
        super()._lapse(entry, now)


class LapseForgives(QueueCore):
    """A request that loses its worker may lose one more than allowed."""

    def _lapse(self, entry: Entry, now: int) -> None:
        if entry.deliveries == self._limits.max_deliveries and not entry.is_cancelled:
            self._put_back(entry, now)
        else:
            super()._lapse(entry, now)


class EndsTwice(QueueCore):
    """A second terminal replaces the first."""

    def _append(self, epoch: int, event: Event, now: int) -> RefusalReason | None:
        entry = self._entries.get(event.request_id)
        if entry is not None and entry.epoch == epoch and entry.terminal and not isinstance(event, Tokens):
            entry.status = Status.RUNNING
            self._accounts._count(entry, 1, now)
        return super()._append(epoch, event, now)


class WritesTwice(QueueCore):
    """Tokens that were logged before are logged again."""

    def _append(self, epoch: int, event: Event, now: int) -> RefusalReason | None:
        entry = self._entries.get(event.request_id)
        if entry is not None and isinstance(event, Tokens):
            event = Tokens(event.request_id, len(entry.tokens), event.token_ids)
        return super()._append(epoch, event, now)


class BillsTheWorkersWord(QueueCore):
    """A cancelled request is billed what its worker had computed."""

    def _append(self, epoch: int, event: Event, now: int) -> RefusalReason | None:
        entry = self._entries.get(event.request_id)
        refused = super()._append(epoch, event, now)
        if entry is not None and entry.epoch == epoch and entry.is_cancelled and isinstance(event, Finished):
            entry.terminal = encode(Finished(event.request_id, "cancelled", event.usage))
        return refused


class ReleaseKeepsEpoch(QueueCore):
    """Who has handed a request back may go on writing."""

    def release(self, leases: Sequence[tuple[str, int]], now: int) -> None:
        super().release(leases, now)
        for request_id, epoch in leases:
            entry = self._entries.get(request_id)
            if entry is not None and entry.epoch is None and entry.status is Status.WAITING:
                entry.epoch = epoch


class ReleaseCounts(QueueCore):
    """A drain uses up a delivery."""

    def release(self, leases: Sequence[tuple[str, int]], now: int) -> None:
        for request_id, epoch in leases:
            entry = self._entries.get(request_id)
            if entry is not None and entry.epoch == epoch and entry.status is Status.RUNNING:
                entry.deliveries += 1
        super().release(leases, now)


class NoDeadlineWhileWaiting(QueueCore):
    """A deadline is looked at only when a worker has the request."""

    def _on_alarm(self, entry: Entry, now: int) -> None:
        if entry.status is not Status.WAITING:
            super()._on_alarm(entry, now)


class ForgetsTooSoon(QueueCore):
    """Background requests are kept no longer than others."""

    def _end(self, entry: Entry, terminal: Event, now: int) -> None:
        super()._end(entry, terminal, now)
        entry.forget_ms = now + self._limits.log_ttl_ms
        self._set_alarm(entry)


class AcceptsTwice(QueueCore):
    """A submit that is sent again is another request."""

    def submit(self, request: Generate, now: int) -> bool:
        self.expire(now)
        entry = self._entries.get(request.request_id)
        if entry is not None and entry.status is Status.ENDED:
            del self._entries[request.request_id]
        return super().submit(request, now)


class TakesAnyBody(QueueCore):
    """An id is attached to whatever its body."""

    def submit(self, request: Generate, now: int) -> bool:
        self.expire(now)
        return request.request_id not in self._entries and super().submit(request, now)


class RefusesNobody(QueueCore):
    """A queue without a cap for tenants."""

    def __init__(self, limits: QueueLimits) -> None:
        super().__init__(limits)
        self._accounts._tenant_cap = limits.max_queued_tokens


class SuspectsTogether(QueueCore):
    """A worker gets as many suspects as there are."""

    def lease(self, budget: LeaseBudget, now: int) -> list[Lease]:
        self.expire(now)
        self._line._suspects.clear()
        return super().lease(budget, now)


class FirstComeFirstServed(QueueCore):
    """Tenants have no shares."""

    def __init__(self, limits: QueueLimits) -> None:
        super().__init__(limits)
        self._line.share = NoShares()


class NoShares(FairShare):
    def stamp(self, tenant: str, weight: int, tokens: int) -> int:
        return 0


class WeightsUpsideDown(QueueCore):
    """Who pays for more gets less."""

    def __init__(self, limits: QueueLimits) -> None:
        super().__init__(limits)
        self._line.share = UpsideDown()


class UpsideDown(FairShare):
    def stamp(self, tenant: str, weight: int, tokens: int) -> int:
        return super().stamp(tenant, 1, tokens * weight)


class PriorityIsIgnored(QueueCore):
    """All wait in one line."""

    def _offer(self, entry: Entry) -> None:
        entry.place = Place(0, *entry.place[1:])
        super()._offer(entry)


class EndsInSilence(QueueCore):
    """Readers are not woken by an end that no worker sent."""

    def _on_alarm(self, entry: Entry, now: int) -> None:
        super()._on_alarm(entry, now)
        self.grown.discard(entry.request_id)


class ComesBackInSilence(QueueCore):
    """Idle workers do not hear of a request that comes back."""

    def _put_back(self, entry: Entry, now: int) -> None:
        offered = set(self.offered)
        super()._put_back(entry, now)
        self.offered = offered


class LosesRoom(QueueCore):
    """What a lapsed lease held is never given back."""

    def _put_back(self, entry: Entry, now: int) -> None:
        self._accounts.enter(entry, now)
        super()._put_back(entry, now)


BROKEN: Final[tuple[type[QueueCore], ...]] = (
    AcceptsTwice,
    BillsTheWorkersWord,
    ComesBackInSilence,
    EndsInSilence,
    EndsTwice,
    FirstComeFirstServed,
    ForgetsTooSoon,
    LapseForgetsCancel,
    LapseForgives,
    LapseLosesTokens,
    LosesRoom,
    NoDeadlineWhileWaiting,
    PriorityIsIgnored,
    RefusesNobody,
    ReleaseCounts,
    ReleaseKeepsEpoch,
    SuspectsTogether,
    TakesAnyBody,
    WeightsUpsideDown,
    WritesTwice,
    ZombiesRenew,
    ZombiesWrite,
)
