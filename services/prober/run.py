"""One run: every question through the real queue, behind everybody else's work, a few at a time.

A run answers all questions or it fails: what could not be asked says nothing of the model's quality, and a probe that
does not get through is noticed by its age.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

from gateway.models import ServedModel
from services.prober.golden import Question, is_right
from wire.errors import MillraceError, QueueFull, Unavailable, error_from_code
from wire.messages import Failed, Generate, Tokens
from wire.queue import Queue

TENANT: Final = "millrace-prober"  # a place of its own in the fair shares and in the prefix cache
LAST: Final = -1  # priority
PATIENCE_S: Final = 300.0  # for one question: under load, those with priority come first
TRIES: Final = 2
LONGEST_WAIT_S: Final = 30.0  # before a full queue is asked again
WORST_NLL: Final = 1_000.0  # stands for impossible: an infinite mean could not be compared, nor written to a baseline


class ProbeFailed(Exception):
    """A run did not get its answers; the message says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    token_ids: Sequence[int]
    logprob: float  # of all forced ids; 0 if there are none


@dataclass(frozen=True, slots=True)
class Outcome:
    """By golden item: was the whole answer right, was the next token, and how unlikely was the right answer?

    `nll`: mean negative log-likelihood of a token of the answer, in nats; a baseline may lack it.
    """

    whole: dict[str, bool] = field(default_factory=dict)
    step: dict[str, bool] = field(default_factory=dict)
    nll: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def note(self, question: Question, answer: Answer, model: ServedModel) -> None:
        if question.kind == "likelihood":
            self.nll[question.item] = min(WORST_NLL, -answer.logprob / len(question.forced_ids))
        else:
            found = self.whole if question.kind == "whole" else self.step
            found[question.item] = is_right(question, answer.token_ids, model)


class Prober:
    """Asks one model the same questions, run after run."""

    def __init__(
        self,
        queue: Queue,
        model: ServedModel,
        questions: Sequence[Question],
        *,
        concurrency: int,
        patience_s: float = PATIENCE_S,
        longest_wait_s: float = LONGEST_WAIT_S,
    ) -> None:
        self.model = model
        self._queue = queue
        self._questions = questions
        self._concurrency = concurrency
        self._patience_s = patience_s
        self._longest_wait_s = longest_wait_s

    async def run(self) -> Outcome:
        """Ask everything. Raises ProbeFailed; then, and when cancelled, nothing is left running."""
        started_s = time.monotonic()
        found = Outcome()
        left = iter(self._questions)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._concurrency):
                    group.create_task(self._work(left, found))
        except ExceptionGroup as failures:
            failed, bugs = failures.split(ProbeFailed)
            if bugs is not None or failed is None:
                raise
            raise ProbeFailed(str(failed.exceptions[0])) from None
        return replace(found, seconds=time.monotonic() - started_s)

    async def _work(self, left: Iterator[Question], found: Outcome) -> None:
        for question in left:
            found.note(question, await self._answer(question), self.model)

    async def _answer(self, question: Question) -> Answer:
        problem = ""
        for _ in range(TRIES):
            try:
                async with asyncio.timeout(self._patience_s):
                    return await self._ask(question)
            except TimeoutError:
                problem = f"no answer within {self._patience_s:g} s"
            except MillraceError as error:
                problem = error.message
        raise ProbeFailed(f"{question.item}: {problem}")

    async def _ask(self, question: Question) -> Answer:
        request = Generate(
            request_id=f"probe-{secrets.token_hex(16)}",
            model=self.model.model_id,
            prompt_ids=question.prompt_ids,
            max_tokens=question.max_tokens,
            stop_token_ids=list(self.model.eos_token_ids),
            tenant=TENANT,
            priority=LAST,
            deadline_ms=max(1, round(self._patience_s * 1000)),
            forced_ids=list(question.forced_ids),
        )
        has_ended = False
        try:
            await self._submit(request)
            token_ids: list[int] = []
            async for event in self._queue.events(request.request_id):
                if isinstance(event, Tokens):
                    token_ids += event.token_ids
                    continue
                has_ended = True
                if isinstance(event, Failed):
                    raise error_from_code(event.code)(event.message)
                if event.reason == "cancelled":
                    raise Unavailable("cancelled by somebody else")
                if question.forced_ids and event.logprob is None:
                    raise Unavailable("the worker gave no likelihood")
                return Answer(token_ids, event.logprob or 0.0)
            raise Unavailable("the queue has closed")
        finally:
            if not has_ended:
                with suppress(MillraceError):  # the queue is away: it lets go of what nobody reads
                    await self._queue.abandon(request.request_id)

    async def _submit(self, request: Generate) -> None:
        while True:
            try:
                await self._queue.submit(request)
                return
            except QueueFull as full:
                await asyncio.sleep(min(full.retry_after_s or 1.0, self._longest_wait_s))
