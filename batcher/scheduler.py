"""Who waits, who runs and who has ended: applies what the plans decide, and speaks for every request that ends.

Both lists are sorted by Request.order (priority, then arrival). Promises:

- The first in order computes a token in every step: among the running it may take the blocks of everybody after it, and
  alone it fits (policy.refusal). So everybody finishes, and nobody preempts itself.
- A waiting request starts only when all its known tokens fit beside all that run, with one spare block for each of
  those, so a start is not undone in the next step. Nobody overtakes the first waiting request, however small it is.
- A preempted request keeps its tokens and its place in the order, loses its blocks and is computed again.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable, Sequence
from operator import attrgetter

from batcher.backend import BackendLimits
from batcher.kv_blocks import KVBlockPool
from batcher.policy import refusal, split_budget
from batcher.request import Request, RequestStatus
from batcher.step_plan import (
    Candidate,
    ScheduledSequence,
    StepPlan,
    assemble,
    find_starters,
    fit_blocks,
    missing_blocks,
)
from wire.errors import Internal, MillraceError
from wire.messages import Failed, Finished, FinishReason, Generate, Tokens, Usage
from wire.queue import Append

_order = attrgetter("order")


class Scheduler:
    """Owns all live requests of an engine, and the events they have produced and no step has returned yet."""

    def __init__(self, limits: BackendLimits, pool: KVBlockPool) -> None:
        self.limits = limits
        self.pool = pool
        self.requests: dict[str, Request] = {}
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.reserved_tokens = 0  # sum of max_total_tokens of the live requests
        self.prefix_queried_tokens = 0
        self.prefix_hit_tokens = 0
        self.preemptions = 0
        self._arrivals = 0
        self._events: list[Append] = []
        self._stops: deque[tuple[Request, bool]] = deque()  # (request, tell): applied between steps and at commit
        self._is_closed = False  # the backend ran out of memory: nobody starts beside others until somebody ends
        self._token_cap = limits.max_batch_tokens

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._events or self._stops)

    def take_events(self) -> list[Append]:
        events, self._events = self._events, []
        return events

    # ---- what comes from outside ----

    def add(self, generate: Generate, token_ids_so_far: Sequence[int], epoch: int, now: float) -> None:
        """Take a leased request; one that can never run ends at once as Failed. A newer epoch replaces an older one."""
        known = self.requests.get(generate.request_id)
        if known is not None:
            if epoch <= known.epoch:
                raise ValueError(f"request {known.request_id} is already here under epoch {known.epoch}: this is a bug")
            self._stops.append((known, False))
            del self.requests[known.request_id]
        error = refusal(generate, len(token_ids_so_far), self.limits)
        if error is not None:
            self._emit_failure(generate.request_id, epoch, error)
        elif len(token_ids_so_far) == generate.max_tokens:  # its last worker died between the last token and the end
            usage = Usage(len(generate.prompt_ids), generate.max_tokens)
            self._events.append(Append(epoch, Finished(generate.request_id, "length", usage)))
        else:
            self._arrivals += 1
            request = Request(generate, token_ids_so_far, epoch, now, self._arrivals)
            self.requests[request.request_id] = request
            self.reserved_tokens += generate.max_total_tokens
            insort(self.waiting, request, key=_order)

    def stop(self, request_id: str, epoch: int | None, *, tell: bool) -> None:
        """End a request before the next plan, or at the commit of the step in progress. Unknown ids have ended.

        `epoch`: only that one (None = whichever is here), so that an old lease's end does not end a new one.
        `tell`: answer Finished("cancelled"). Only notes the wish, so it may come from any thread and in the middle of
        a step.
        """
        request = self.requests.get(request_id)
        if request is not None and epoch in (None, request.epoch):
            self._stops.append((request, tell))

    def apply_stops(self) -> None:
        while self._stops:
            request, tell = self._stops.popleft()
            if request.has_ended:
                continue
            if tell:
                self._finish(request, "cancelled")
            else:
                self._end(request, RequestStatus.DROPPED)

    # ---- deciding ----

    def plan(self, prefill_budget: int) -> StepPlan:
        """The next step; `prefill_budget` bounds its prefill tokens if somebody decodes. Touches nothing."""
        budget = min(self.limits.max_batch_tokens, self._token_cap)
        if all(r.num_pending_tokens > 1 for r in self.running):
            prefill_budget = budget
        candidates = [Candidate(r, r.num_computed_tokens, ()) for r in self.running]
        spare_blocks = self.pool.num_available - missing_blocks(self.running, self.pool.block_size)
        if self.waiting and spare_blocks > 0:
            starters = self._starters(spare_blocks, min(budget, prefill_budget))
            if starters:
                candidates = sorted(candidates + starters, key=lambda candidate: candidate.request.order)
        counts = split_budget([len(c.request.token_ids) - c.start for c in candidates], budget, prefill_budget)
        victims = fit_blocks(self.running, counts, self.pool) if spare_blocks < 0 else []
        return assemble(candidates, counts, victims, self.pool.block_size)

    def _starters(self, spare_blocks: int, budget: int) -> list[Candidate]:
        seats = (1 if self._is_closed else self.limits.max_batch_seqs) - len(self.running)
        # Prompts that are ahead of everybody who waits use up the budget first.
        first = self.waiting[0].order
        budget -= sum(r.num_pending_tokens for r in self.running if r.num_pending_tokens > 1 and r.order < first)
        return find_starters(
            self.waiting,
            self.pool,
            num_running=len(self.running),
            seats=seats,
            spare_blocks=spare_blocks,
            budget=budget,
        )

    # ---- applying ----

    def preempt(self, request: Request) -> None:
        """Send a running request back to wait. Its full blocks may stay findable: then little is computed twice."""
        self._remove(self.running, request)
        self.pool.release(request.block_table)
        request.num_computed_tokens = 0
        request.preemptions += 1
        request.move_to(RequestStatus.WAITING)
        insort(self.waiting, request, key=_order)
        self.preemptions += 1

    def commit(
        self,
        plan: StepPlan,
        token_ids: Sequence[int],
        started_s: float,
        now: float,
        forced_logprobs: Sequence[float] = (),
    ) -> None:
        """The plan was computed and its blocks are committed; `token_ids` are the sampled tokens, in order, and
        `forced_logprobs` are those of the given ones.
        """
        self.apply_stops()
        sampled, likelihoods = iter(token_ids), iter(forced_logprobs)
        for s in plan.sequences:
            request = s.request
            token_id = next(sampled) if s.samples else None
            logprob = next(likelihoods) if s.samples and request.is_forced else None
            if request.status is RequestStatus.WAITING:
                self._start(request, s.start, started_s)
            elif request.status is not RequestStatus.RUNNING:  # stopped in mid-step: its token was never born
                continue
            request.num_computed_tokens = s.end
            if token_id is not None and not 0 <= token_id < self.limits.vocab_size:
                # No finite logits: the KV written here may be as broken as they are, and nobody else shall find it.
                error = Internal("the model produced no usable logits for this request")
                self._end(request, RequestStatus.FAILED, error, forget=True)
                continue
            self._remember(request, s)
            if logprob is not None:
                self._force(request, logprob, now)
            elif token_id is not None:
                self._append(request, token_id, now)

    def fail(self, requests: Iterable[Request], error: MillraceError) -> None:
        for request in requests:
            self._end(request, RequestStatus.FAILED, error)

    def shrink(self, plan: StepPlan) -> bool:
        """The backend ran out of memory on `plan`: make the next plan smaller, until somebody ends.

        Nobody else starts; failing that the last one is preempted; failing that the one left gets half the tokens.
        Returns False if nothing can be smaller than this plan.
        """
        self._is_closed = True
        if len(plan.sequences) == 1 and plan.num_tokens == 1:
            return False
        if len(plan.sequences) == 1:
            self._token_cap = plan.num_tokens // 2
        elif all(s.request.status is RequestStatus.RUNNING for s in plan.sequences):
            self.preempt(plan.sequences[-1].request)
        return True

    def drop_all(self) -> list[tuple[str, int]]:
        """Forget every live request without a word; returns (request id, epoch) of each."""
        self.apply_stops()
        live = list(self.requests.values())
        for request in live:
            self._end(request, RequestStatus.DROPPED)
        return [(request.request_id, request.epoch) for request in live]

    def check(self) -> None:
        """Prove the pool and the lists; raises ValueError, naming what is wrong."""
        self.pool.check(request.block_table for request in self.running)
        live = self.waiting + self.running
        faults = {
            "a waiting request holds blocks": any(len(r.block_table) for r in self.waiting),
            "the waiting list is out of order": self.waiting != sorted(self.waiting, key=_order),
            "the running list is out of order": self.running != sorted(self.running, key=_order),
            "a waiting request has another status": any(r.status is not RequestStatus.WAITING for r in self.waiting),
            "a running request has another status": any(r.status is not RequestStatus.RUNNING for r in self.running),
            "a live request has nothing to compute": any(r.num_pending_tokens < 1 for r in live),
            "too many requests run": len(self.running) > self.limits.max_batch_seqs,
            "reserved tokens do not add up": self.reserved_tokens != sum(r.generate.max_total_tokens for r in live),
        }
        for fault, is_there in faults.items():
            if is_there:
                raise ValueError(f"{fault}: this is a bug")

    def _start(self, request: Request, num_hit_tokens: int, now: float) -> None:
        self._remove(self.waiting, request)
        request.move_to(RequestStatus.RUNNING)
        insort(self.running, request, key=_order)
        if request.first_scheduled_s is None:  # what a preempted request finds of its own is no hit
            request.first_scheduled_s = now
            request.cached_tokens = min(num_hit_tokens, request.num_prompt_tokens)
            self.prefix_queried_tokens += len(request.token_ids)
            self.prefix_hit_tokens += num_hit_tokens

    def _remember(self, request: Request, s: ScheduledSequence) -> None:
        """Make the blocks that this step filled findable."""
        size = self.pool.block_size
        first, last = s.start // size, s.end // size
        if first < last and self.pool.prefix_cache:
            hashes = request.block_hashes(last, size)
            for i in range(first, last):
                self.pool.remember(request.block_table[i], hashes[i])

    def _force(self, request: Request, logprob: float, now: float) -> None:
        """The next token is the given one; only the last one is worth an event."""
        request.note_token(now)
        request.logprob += logprob
        request.token_ids.append(request.next_forced_id)
        if request.num_output_tokens == request.max_tokens:
            self._finish(request, "length", request.logprob)

    def _append(self, request: Request, token_id: int, now: float) -> None:
        request.note_token(now)
        if request.ends_with(token_id):
            self._finish(request, "stop")
            return
        index = request.num_output_tokens
        request.token_ids.append(token_id)
        self._events.append(Append(request.epoch, Tokens(request.request_id, index, [token_id])))
        if index + 1 == request.max_tokens:
            self._finish(request, "length")

    def _finish(self, request: Request, reason: FinishReason, logprob: float | None = None) -> None:
        event = Finished(request.request_id, reason, request.usage(), request.timings(), logprob)
        self._end(request, RequestStatus.FINISHED, event)

    def _end(
        self,
        request: Request,
        status: RequestStatus,
        last: Finished | MillraceError | None = None,
        *,
        forget: bool = False,
    ) -> None:
        """Out of the lists, blocks back, last word out."""
        self._remove(self.waiting if request.status is RequestStatus.WAITING else self.running, request)
        self.pool.release(request.block_table, forget=forget)
        request.move_to(status)
        self.reserved_tokens -= request.generate.max_total_tokens
        if self.requests.get(request.request_id) is request:  # a newer epoch may have taken the id
            del self.requests[request.request_id]
        if isinstance(last, MillraceError):
            self._emit_failure(request.request_id, request.epoch, last)
        elif last is not None:
            self._events.append(Append(request.epoch, last))
        self._is_closed = False
        self._token_cap = self.limits.max_batch_tokens

    def _emit_failure(self, request_id: str, epoch: int, error: MillraceError) -> None:
        self._events.append(Append(epoch, Failed(request_id, error.code, error.message, error.retryable)))

    @staticmethod
    def _remove(requests: list[Request], request: Request) -> None:
        del requests[bisect_left(requests, request.order, key=_order)]
