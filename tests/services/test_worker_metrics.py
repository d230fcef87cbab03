"""What a worker counts of its leases: how they came, how they were lost, how long publishing took."""

from __future__ import annotations

import asyncio
import threading

from prometheus_client import CollectorRegistry

from batcher.engine import Engine
from services.backends.scripted import ScriptedBackend
from services.queues.memory import MemoryQueue
from services.telemetry.worker import LeaseMetrics
from services.worker import Worker
from tests.contracts.queues import PATIENCE_S
from tests.services.test_worker import LIMITS, generate, read, running


def value(registry: CollectorRegistry, name: str, **labels: str) -> float | None:
    return registry.get_sample_value(f"millrace_{name}", {"model_name": "m", "engine": "0", **labels})


async def test_a_hung_worker_counts_its_fenced_lease_and_the_next_one_a_second_delivery() -> None:
    queue = MemoryQueue(lease_ms=200, max_deliveries=3)
    hang, is_hung = threading.Event(), threading.Event()

    def sleep(_: float) -> None:
        is_hung.set()
        hang.wait(PATIENCE_S)

    registries = [CollectorRegistry(), CollectorRegistry()]
    first, second = (
        Worker(name, "m", Engine(backend), LIMITS, queue, lease_s=0.2, metrics=LeaseMetrics(registry))
        for name, backend, registry in (
            ("first", ScriptedBackend(LIMITS, step_s=0.001, sleep=sleep), registries[0]),
            ("second", ScriptedBackend(LIMITS), registries[1]),
        )
    )
    assert value(registries[0], "leases_total", kind="first") == value(registries[0], "leases_fenced_total") == 0
    async with running(first):
        await queue.submit(generate("request"))
        await asyncio.to_thread(is_hung.wait, PATIENCE_S)
        first._draining = True  # so that it does not take it again
        async with running(second):
            tokens, _ = await read(queue, "request")
            hang.set()
            async with asyncio.timeout(PATIENCE_S):
                while not value(registries[0], "leases_fenced_total"):  # noqa: ASYNC110  # no event announces it
                    await asyncio.sleep(0.01)
    assert len(tokens) == 20
    assert [value(registries[0], "leases_total", kind=kind) for kind in ("first", "again", "suspect")] == [1, 0, 0]
    assert [value(registries[1], "leases_total", kind=kind) for kind in ("first", "again", "suspect")] == [0, 1, 0]
    assert value(registries[1], "leases_fenced_total") == 0
    published = value(registries[1], "publish_seconds_count")
    assert published
    assert published <= len(tokens) + 1
    await queue.close()
