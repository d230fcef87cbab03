"""The engine: leased requests in, events out, one transaction a step.

    plan      decides, touches nothing                    scheduler, step_plan, policy
    reserve   holds blocks, given back unless committed   kv_blocks
    forward   the only slow part                          backend
    commit    tokens become part of their requests        scheduler

A forward that fails leaves tokens, tables and counters as they were. Two things stand: preempted requests stay
preempted and evicted prefixes stay forgotten, because the failed forward may have written into their blocks; both
cost time, no token.

One thread owns an engine. Only `cancel` and `drop` may come from another thread, or in the middle of a step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from batcher.backend import Backend, BackendError, BackendErrorKind, StepOutput
from batcher.kv_blocks import KVBlockPool
from batcher.likelihood import forced_logprobs, forces
from batcher.model_input import pack
from batcher.policy import adapt_prefill_budget
from batcher.scheduler import Scheduler
from batcher.step_plan import StepPlan
from wire.errors import Internal
from wire.messages import Generate
from wire.queue import Append

logger = logging.getLogger(__name__)

_GAVE_UP: Final = "the backend failed {} times on the step this request was in"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one committed step did and where its time went, in seconds."""

    num_sequences: int
    num_decode_tokens: int
    num_prefill_tokens: int
    plan_s: float
    pack_s: float
    forward_s: float
    commit_s: float

    @property
    def step_s(self) -> float:
        return self.plan_s + self.pack_s + self.forward_s + self.commit_s


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """How full the engine is, and what it has done since it started: for metrics and for the next lease."""

    running: int
    waiting: int
    free_seats: int  # requests that could be leased without waiting for a seat
    free_blocks: int  # free or holding only an unused prefix
    total_blocks: int
    free_tokens: int  # KV tokens not spoken for by prompt + max_tokens of the requests here; never below 0
    capacity_tokens: int
    kv_usage: float  # share of blocks in use, 0 to 1
    prefill_budget: int  # tokens of prompts that may share a step with decodes
    prefix_queried_tokens: int
    prefix_hit_tokens: int
    preemptions: int
    failed_forwards: int
    steps: int
    decode_tokens: int
    prefill_tokens: int
    plan_s: float
    pack_s: float
    forward_s: float
    commit_s: float


class Engine:
    """Runs requests on a backend, all of them a little further in every step."""

    def __init__(
        self,
        backend: Backend,
        now: Callable[[], float] = time.monotonic,
        *,
        prefix_cache: bool = True,
        target_itl_s: float = 0.0,
        min_prefill_tokens: int = 32,
        max_attempts: int = 3,
    ) -> None:
        """`target_itl_s`: the inter-token time that prompts may not push decodes beyond (0 = prompts take what is
        free); their share of a step never falls below `min_prefill_tokens`. `max_attempts`: forwards of one step
        before its requests fail.
        """
        limits = backend.limits
        self._backend = backend
        self._now = now
        self._pool = KVBlockPool(limits.num_blocks, limits.block_size, prefix_cache=prefix_cache)
        self._scheduler = Scheduler(limits, self._pool)
        self._target_itl_s = target_itl_s
        self._min_prefill_tokens = min(min_prefill_tokens, limits.max_batch_tokens)
        self._prefill_budget = self._min_prefill_tokens if target_itl_s else limits.max_batch_tokens
        self._max_attempts = max_attempts
        self._failed_forwards = 0
        self._steps = 0
        self._total = StepReport(0, 0, 0, 0.0, 0.0, 0.0, 0.0)
        self.last_step: StepReport | None = None

    def add(self, generate: Generate, token_ids_so_far: Sequence[int] = (), epoch: int = 1) -> None:
        """Take a leased request; `token_ids_so_far` are in the log, the next token takes the index after them.

        One that can never run here ends as Failed with the next step's events. An id that is here already is replaced
        if `epoch` is newer (its old lease was lost); otherwise raises ValueError.
        """
        self._scheduler.add(generate, token_ids_so_far, epoch, self._now())

    def cancel(self, request_id: str, epoch: int | None = None) -> None:
        """End the request with Finished("cancelled"): in this step's events if one is running, else in the next's.

        `epoch`: only if it is here under that one (None = whichever).
        """
        self._scheduler.stop(request_id, epoch, tell=True)

    def drop(self, request_id: str, epoch: int | None = None) -> None:
        """Forget the request without an event: its lease is lost, or the queue has ended it. `epoch` as for cancel."""
        self._scheduler.stop(request_id, epoch, tell=False)

    def abort_all(self) -> list[tuple[str, int]]:
        """Forget every request without an event; returns their (request id, epoch), to be released to other workers.

        Events of requests that had ended before are still owed: one more step() returns them and computes nothing.
        """
        return self._scheduler.drop_all()

    @property
    def has_work(self) -> bool:
        """Whether step() has something to do or to say."""
        return self._scheduler.has_work

    def step(self) -> list[Append]:
        """Compute the next tokens of everybody who fits and return what happened, in order.

        Raises BackendError(FATAL) after rolling back: no event is lost, no request has moved, and the caller may
        abort_all().
        """
        attempts = 0
        while True:
            started_s = self._now()
            self._scheduler.apply_stops()
            plan = self._scheduler.plan(self._prefill_budget)
            if not plan.sequences:
                break
            try:
                self._run(plan, started_s)
                break
            except BackendError as error:
                self._note_failure(plan, error)
                if error.kind is BackendErrorKind.FATAL:
                    raise
                if error.kind is BackendErrorKind.CAPACITY and self._scheduler.shrink(plan):
                    continue
                attempts += 1
                if attempts >= self._max_attempts:
                    self._scheduler.fail((s.request for s in plan.sequences), Internal(_GAVE_UP.format(attempts)))
                    break
        return self._scheduler.take_events()

    def check(self) -> None:
        """Prove that blocks, tables and lists agree; raises ValueError if not. For tests, and for an idle worker."""
        self._scheduler.check()

    @property
    def load(self) -> EngineLoad:
        scheduler, pool, total = self._scheduler, self._pool, self._total
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        capacity_tokens = pool.num_blocks * pool.block_size
        return EngineLoad(
            running=running,
            waiting=waiting,
            free_seats=max(0, scheduler.limits.max_batch_seqs - running - waiting),
            free_blocks=pool.num_available,
            total_blocks=pool.num_blocks,
            free_tokens=max(0, capacity_tokens - scheduler.reserved_tokens),
            capacity_tokens=capacity_tokens,
            kv_usage=1.0 - pool.num_available / pool.num_blocks,
            prefill_budget=self._prefill_budget,
            prefix_queried_tokens=scheduler.prefix_queried_tokens,
            prefix_hit_tokens=scheduler.prefix_hit_tokens,
            preemptions=scheduler.preemptions,
            failed_forwards=self._failed_forwards,
            steps=self._steps,
            decode_tokens=total.num_decode_tokens,
            prefill_tokens=total.num_prefill_tokens,
            plan_s=total.plan_s,
            pack_s=total.pack_s,
            forward_s=total.forward_s,
            commit_s=total.commit_s,
        )

    def _run(self, plan: StepPlan, started_s: float) -> None:
        """One plan, all of it or nothing."""
        planned_s = self._now()
        for request in plan.preempted:
            self._scheduler.preempt(request)
        with self._pool.reserve(plan.needs) as hold:
            batch, sampling = pack(plan, hold, self._pool.block_size)
            packed_s = self._now()
            is_forced = forces(plan)
            output = self._backend.forward(batch, sampling, keeps_logits=is_forced)
            logprobs = forced_logprobs(plan, output) if is_forced else []
            computed_s = self._now()
            token_ids = _token_ids(output, len(batch.logits_rows))
            hold.commit()
        self._scheduler.commit(plan, token_ids, started_s, computed_s, logprobs)
        self._record(
            StepReport(
                num_sequences=len(plan.sequences),
                num_decode_tokens=plan.num_decode_tokens,
                num_prefill_tokens=plan.num_prefill_tokens,
                plan_s=planned_s - started_s,
                pack_s=packed_s - planned_s,
                forward_s=computed_s - packed_s,
                commit_s=self._now() - computed_s,
            )
        )

    def _note_failure(self, plan: StepPlan, error: BackendError) -> None:
        self._failed_forwards += 1
        logger.warning(
            "forward failed",
            extra={"kind": error.kind.value, "num_sequences": len(plan.sequences), "num_tokens": plan.num_tokens},
            exc_info=error,
        )

    def _record(self, step: StepReport) -> None:
        total = self._total
        self._steps += 1
        self.last_step = step
        self._total = StepReport(
            num_sequences=total.num_sequences + step.num_sequences,
            num_decode_tokens=total.num_decode_tokens + step.num_decode_tokens,
            num_prefill_tokens=total.num_prefill_tokens + step.num_prefill_tokens,
            plan_s=total.plan_s + step.plan_s,
            pack_s=total.pack_s + step.pack_s,
            forward_s=total.forward_s + step.forward_s,
            commit_s=total.commit_s + step.commit_s,
        )
        if self._target_itl_s:
            self._prefill_budget = adapt_prefill_budget(
                self._prefill_budget,
                target_s=self._target_itl_s,
                step_s=step.step_s,
                decode_tokens=step.num_decode_tokens,
                prefill_tokens=step.num_prefill_tokens,
                lowest=self._min_prefill_tokens,
                highest=self._scheduler.limits.max_batch_tokens,
            )


def _token_ids(output: StepOutput, rows: int) -> list[int]:
    token_ids: list[int] = output.token_ids.tolist()
    if len(token_ids) != rows:
        raise ValueError(f"the backend returned {len(token_ids)} tokens for {rows} rows: this is a bug")
    return token_ids
