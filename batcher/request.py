"""One request on its way through the engine: its tokens, how many of them are computed, and where their KV lies.

There are no phases. `num_computed_tokens` says what is in the KV cache; what is known beyond it is pending. One
pending token is a decode, many are a prompt, or a preempted or resumed sequence that is computed again: the scheduler
need not know which.

    WAITING  --first chunk committed-->  RUNNING          FINISHED  stop, length, cancelled: a Finished event went out
    RUNNING  --preempted------------->   WAITING          FAILED    a Failed event went out
    WAITING or RUNNING  ------------->   an end state     DROPPED   another worker owns it now: no event
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Final

from batcher.kv_blocks import BlockTable, block_hash, root_hash
from batcher.policy import order_key
from wire.messages import Generate, Timings, Usage


class RequestStatus(Enum):
    """Where a request is in its life; TRANSITIONS says where it may go."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"
    FAILED = "failed"
    DROPPED = "dropped"


_ENDS: Final = frozenset({RequestStatus.FINISHED, RequestStatus.FAILED, RequestStatus.DROPPED})

TRANSITIONS: Final[Mapping[RequestStatus, frozenset[RequestStatus]]] = {
    RequestStatus.WAITING: _ENDS | {RequestStatus.RUNNING},
    RequestStatus.RUNNING: _ENDS | {RequestStatus.WAITING},
    RequestStatus.FINISHED: frozenset(),
    RequestStatus.FAILED: frozenset(),
    RequestStatus.DROPPED: frozenset(),
}


class Request:
    """The one mutable object of a request's life in this engine. Times are seconds on the engine's clock."""

    __slots__ = (
        "_hashes",
        "added_s",
        "block_table",
        "cached_tokens",
        "epoch",
        "first_scheduled_s",
        "first_token_s",
        "forced_ids",
        "generate",
        "last_token_s",
        "logprob",
        "max_tokens",
        "num_computed_tokens",
        "num_prompt_tokens",
        "order",
        "preemptions",
        "request_id",
        "sampling",
        "status",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self, generate: Generate, token_ids_so_far: Sequence[int], epoch: int, now: float, arrival: int = 0
    ) -> None:
        """`token_ids_so_far` are in the queue's log already: the next token takes index len(token_ids_so_far)."""
        self.generate = generate
        self.request_id = generate.request_id
        self.epoch = epoch
        self.order = order_key(generate.priority, arrival)
        self.sampling = generate.sampling
        self.max_tokens = generate.max_tokens
        self.stop_token_ids = frozenset(generate.stop_token_ids)
        self.token_ids = array("q", generate.prompt_ids)  # prompt, then completion
        self.token_ids.extend(token_ids_so_far)
        self.num_prompt_tokens = len(generate.prompt_ids)
        self.forced_ids = generate.forced_ids
        self.logprob = 0.0  # of the forced ids so far
        self.num_computed_tokens = 0
        self.block_table = BlockTable()
        self.status = RequestStatus.WAITING
        self.added_s = now
        self.first_scheduled_s: float | None = None
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None
        self.preemptions = 0
        self.cached_tokens = 0
        self._hashes = [root_hash(generate.tenant)]  # [0] the tenant's root, [1 + i] block i; grows with the tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_forced(self) -> bool:
        """Whether its completion is given: then none of it is sampled or sent."""
        return bool(self.forced_ids)

    @property
    def next_forced_id(self) -> int:
        return self.forced_ids[self.num_output_tokens]

    @property
    def num_pending_tokens(self) -> int:
        """Known, not computed: at least one as long as the request lives."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def has_ended(self) -> bool:
        return self.status in _ENDS

    def move_to(self, status: RequestStatus) -> None:
        """Change status along TRANSITIONS."""
        if status not in TRANSITIONS[self.status]:
            raise ValueError(f"request {self.request_id}: {self.status.value} -> {status.value}: this is a bug")
        self.status = status

    def block_hashes(self, num_blocks: int, block_size: int) -> list[bytes]:
        """The hash chain of the first `num_blocks` blocks; each is computed once and kept (they never change)."""
        for i in range(len(self._hashes) - 1, num_blocks):
            self._hashes.append(block_hash(self._hashes[i], self.token_ids[i * block_size : (i + 1) * block_size]))
        return self._hashes[1 : num_blocks + 1]

    def note_token(self, now: float) -> None:
        """A token became part of it."""
        if self.first_token_s is None:
            self.first_token_s = now
        self.last_token_s = now

    def ends_with(self, token_id: int) -> bool:
        """Whether this next token ends the completion as a stop token."""
        return token_id in self.stop_token_ids and self.num_output_tokens >= self.generate.min_tokens

    def usage(self) -> Usage:
        return Usage(self.num_prompt_tokens, 0 if self.is_forced else self.num_output_tokens, self.cached_tokens)

    def timings(self) -> Timings:
        """Where the time went here; a span that never began is 0."""
        return Timings(
            queue_ms=_span_ms(self.added_s, self.first_scheduled_s),
            prefill_ms=_span_ms(self.first_scheduled_s, self.first_token_s),
            decode_ms=_span_ms(self.first_token_s, self.last_token_s),
            preemptions=self.preemptions,
        )


def _span_ms(start_s: float | None, end_s: float | None) -> float:
    return 0.0 if start_s is None or end_s is None else 1000.0 * (end_s - start_s)
