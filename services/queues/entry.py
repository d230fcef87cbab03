"""One request as the queue keeps it, from submit until it is forgotten.

Apart from the state machine because readers follow an entry's log on their own: it stays whole for a slow reader even
when the queue has forgotten the request. The log is int32 token ids and then one terminal, so what a reader has missed
is a slice, and it costs four bytes a token however it was published.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

from services.queues.waiting_line import Place
from wire.messages import Event, Facts, Finished, Timings, Tokens, Usage, decode_event, encode
from wire.queue import RefusalReason, Standing, Status


@dataclass(slots=True)
class Entry:
    """Mutable, one per request; only the core changes it. Times in ms of the queue's clock."""

    request_id: str
    model: str
    place: Place
    facts: Facts
    deadline_ms: int | None
    fingerprint: bytes
    body: bytes  # the encoded Generate; empty once ended
    status: Status = Status.WAITING
    epoch: int | None = None  # of the last lease; None = nobody may append
    lease_until_ms: int = 0
    deliveries: int = 0  # since one of them logged a token, that one included
    losses: int = 0  # leases that lapsed, in all
    is_cancelled: bool = False  # while running: its worker has yet to hear of it
    tokens: array[int] = field(default_factory=lambda: array("i"))  # int32 holds every wire.messages.TokenId
    terminal: bytes = b""  # the encoded Finished or Failed
    ended_as: RefusalReason = RefusalReason.FENCED  # what a late append is told
    forget_ms: int = 0
    alarm_ms: int | None = None  # the entry's live alarm in the core's heap

    def read(self, index: int) -> Event | None:
        """What the log holds from token `index` on: all tokens in one event, else the terminal, else None (not yet)."""
        if index < len(self.tokens):
            return Tokens(self.request_id, index, self.tokens[index:].tolist())
        return decode_event(self.terminal) if self.terminal else None

    def has_logged(self, event: Event) -> bool:
        """Whether an ended log holds this event already: the reply to it was lost and it comes again."""
        if isinstance(event, Tokens):
            return event.first_index + len(event.token_ids) <= len(self.tokens)
        return self.is_cancelled or encode(event) == self.terminal

    def standing(self) -> Standing:
        """What a gateway is told that takes over the stream."""
        terminal = decode_event(self.terminal) if self.terminal else None
        assert not isinstance(terminal, Tokens)
        return Standing(self.facts, self.status, len(self.tokens), terminal)

    def cancelled(self, cached_tokens: int = 0, timings: Timings | None = None) -> Finished:
        """The end of a cancelled request: it bills what the log holds, whatever its worker had computed beyond."""
        usage = Usage(self.facts.prompt_tokens, len(self.tokens), cached_tokens)
        return Finished(self.request_id, "cancelled", usage, timings or Timings())

    def due_ms(self) -> int | None:
        """When time alone will change this entry."""
        if self.status is Status.ENDED:
            return self.forget_ms
        if self.status is Status.WAITING:
            return self.deadline_ms
        return self.lease_until_ms if self.deadline_ms is None else min(self.lease_until_ms, self.deadline_ms)
