"""The workers of one process: opened, run until a signal or a lost backend, drained. What `up` and `worker` share."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from prometheus_client import CollectorRegistry

from services.loading import StoredModel, open_backend, open_engine, warm_up
from services.settings import Settings
from services.telemetry.device import DeviceCollector
from services.telemetry.worker import EngineCollector, LeaseMetrics
from services.worker import Worker
from wire.queue import Queue

logger = logging.getLogger(__name__)


class Crew:
    """One worker for each model. Opening loads and warms them all, which takes seconds and blocks."""

    def __init__(
        self, settings: Settings, models: Sequence[StoredModel], queue: Queue, name: str, registry: CollectorRegistry
    ) -> None:
        metrics = LeaseMetrics(registry)
        self._workers = [_open(settings, model, queue, name, metrics) for model in models]
        self._drain_s = settings.drain_s
        registry.register(EngineCollector([worker.source for worker in self._workers]))
        registry.register(DeviceCollector())

    @property
    def is_alive(self) -> bool:
        return all(worker.is_alive for worker in self._workers)

    @property
    def is_ready(self) -> bool:
        return all(worker.is_ready for worker in self._workers)

    async def announce(self) -> None:
        """Make the queue know of all, so that who reads our address may ask at once."""
        await asyncio.gather(*(worker.report() for worker in self._workers))

    async def work(self, draining: asyncio.Event, serving: asyncio.Task[None]) -> int:
        """Until `draining` is set, the server ends or a backend is lost; then drain. Exit code 1 if one was lost."""
        running = [asyncio.create_task(each.run(), name=f"worker-{each.model_id}") for each in self._workers]
        stop = asyncio.create_task(draining.wait())
        await asyncio.wait([stop, serving, *running], return_when=asyncio.FIRST_COMPLETED)
        draining.set()
        await asyncio.gather(*(worker.drain(self._drain_s) for worker in self._workers))
        ends = await asyncio.gather(*running, return_exceptions=True)
        failures = [each for each in ends if isinstance(each, Exception)]
        for failure in failures:
            logger.error("worker lost its backend", extra={"reason": str(failure)})
        return 1 if failures else 0


def _open(settings: Settings, model: StoredModel, queue: Queue, name: str, metrics: LeaseMetrics) -> Worker:
    """A model loaded, warm, and ready to take work from `queue`."""
    backend = open_backend(settings, model)
    warm_up(backend)
    engine = open_engine(settings, backend)
    model_id = model.manifest.model_id
    return Worker(
        f"{name}/{model_id}", model_id, engine, backend.limits, queue, lease_s=settings.lease_s, metrics=metrics
    )
