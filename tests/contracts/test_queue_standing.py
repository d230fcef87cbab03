"""The queue's contract: what gateways are told of requests and workers, and what becomes of what nobody reads."""

from __future__ import annotations

import pytest

from tests.contracts.conftest import OpenRig
from tests.contracts.queues import (
    MODEL,
    QueueOptions,
    budget,
    completion,
    finished,
    generate,
    lease_one,
    submit_and_lease,
    tokens,
)
from wire.errors import Unavailable, UnknownRequest
from wire.messages import Facts, Finished, Generate, SamplingParams, Usage, WorkerReport
from wire.queue import Queue, Standing, Status


async def test_a_submit_says_whether_the_request_is_new(queue: Queue) -> None:
    assert await queue.submit(generate()) is True
    assert await queue.submit(generate()) is False


async def test_what_a_gateway_must_know_is_kept_as_long_as_the_log(open_rig: OpenRig) -> None:
    rig = await open_rig(QueueOptions(log_ttl_ms=5_000))
    queue = rig.queue
    request = Generate(
        "r", MODEL, [7, 8, 9], 5, SamplingParams(seed=2**53 - 1), min_tokens=2, tenant="t", stop=["a", "ü"]
    )
    facts = Facts(MODEL, 3, 5, 2, 2**53 - 1, ["a", "ü"], "t", background=False)
    await queue.submit(request)
    assert await queue.standing("r") == Standing(facts, Status.WAITING, 0, None)
    lease = await lease_one(queue)
    assert await queue.publish([tokens(lease, 0, 5, 6)]) == []
    assert await queue.standing("r") == Standing(facts, Status.RUNNING, 2, None)
    assert await queue.publish([finished(lease, 2)]) == []
    assert await queue.standing("r") == Standing(facts, Status.ENDED, 2, Finished("r", "stop", Usage(3, 2)))
    await rig.advance(5_000)
    with pytest.raises(UnknownRequest):
        await queue.standing("r")


async def test_what_nobody_reads_is_cancelled(queue: Queue) -> None:
    await queue.submit(generate("waits"))
    await queue.abandon("waits")
    lease = await submit_and_lease(queue, generate("runs"))
    await queue.abandon("runs")
    assert [refusal.reason.value for refusal in await queue.renew([("runs", lease.epoch)])] == ["cancelled"]
    assert await queue.publish([finished(lease, 0)]) == []
    for request_id in ("waits", "runs"):
        terminal = (await completion(queue, request_id)).terminal
        assert isinstance(terminal, Finished)
        assert terminal.reason == "cancelled"
    await queue.abandon("runs")
    await queue.abandon("never seen")


async def test_a_background_request_runs_on_and_its_log_is_kept_longer(open_rig: OpenRig) -> None:
    rig = await open_rig(QueueOptions(log_ttl_ms=1_000, background_ttl_ms=9_000))
    queue = rig.queue
    lease = await submit_and_lease(queue, generate(background=True))
    await queue.abandon("r")
    assert await queue.renew([("r", lease.epoch)]) == []
    assert await queue.publish([tokens(lease, 0, 4), finished(lease, 1)]) == []
    await rig.advance(8_000)
    assert (await completion(queue)).token_ids == [4]
    await rig.advance(1_000)
    with pytest.raises(UnknownRequest):
        await queue.standing("r")


async def test_a_background_request_can_still_be_cancelled(queue: Queue) -> None:
    await queue.submit(generate(background=True))
    await queue.cancel("r")
    assert (await queue.standing("r")).status is Status.ENDED


def report(worker_id: str, *models: str, is_draining: bool = False) -> WorkerReport:
    return WorkerReport(worker_id, list(models or (MODEL,)), 1_000, 700, 3, is_draining)


async def test_workers_are_known_until_they_fall_silent(open_rig: OpenRig) -> None:
    rig = await open_rig(QueueOptions(worker_ttl_ms=10_000))
    queue = rig.queue
    await queue.report(report("b"))
    await rig.advance(4_000)
    await queue.report(report("a", "other"))
    assert [(seen.report, seen.age_ms) for seen in await queue.workers()] == [
        (report("a", "other"), 0),
        (report("b"), 4_000),
    ]
    await rig.advance(6_000)
    assert [seen.report.worker_id for seen in await queue.workers()] == ["a"]


async def test_what_no_worker_serves_is_refused_if_the_queue_is_to_do_so(open_rig: OpenRig) -> None:
    rig = await open_rig(QueueOptions(worker_ttl_ms=10_000, refuses_unserved=True))
    queue = rig.queue
    with pytest.raises(Unavailable, match="no worker serves m") as refused:
        await queue.submit(generate("early"))
    assert refused.value.retry_after_s
    await queue.report(report("w", "other"))
    with pytest.raises(Unavailable):
        await queue.submit(generate("early"))
    await queue.report(report("w"))
    assert await queue.submit(generate("served")) is True
    await queue.report(report("w", is_draining=True))
    with pytest.raises(Unavailable):
        await queue.submit(generate("late"))
    assert await queue.submit(generate("served")) is False  # what was accepted stays
    await queue.report(report("w2"))
    await rig.advance(9_999)
    await queue.submit(generate("in time"))
    await rig.advance(1)
    with pytest.raises(Unavailable):
        await queue.submit(generate("too late"))


async def test_what_no_worker_serves_waits_for_one_up_to_its_deadline(open_rig: OpenRig) -> None:
    rig = await open_rig(QueueOptions())
    queue = rig.queue
    await queue.submit(generate("patient"))
    await queue.submit(generate("hurried", deadline_ms=60_000))
    await rig.advance(60_000)
    assert (await queue.standing("hurried")).status is Status.ENDED
    await queue.report(report("w"))
    assert [lease.request.request_id for lease in await queue.lease(budget())] == ["patient"]
