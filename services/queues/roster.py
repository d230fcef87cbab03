"""Which workers there are: who has reported of late.

Apart from the requests because nothing in a request's life depends on it but one question at the door: does anybody
serve this model? The Redis library keeps the same two tables.
"""

from __future__ import annotations

from wire.messages import WorkerReport
from wire.queue import SeenWorker


class Roster:
    """The last report of each worker, with its time in ms of the queue's clock."""

    def __init__(self, ttl_ms: int) -> None:
        self._ttl_ms = ttl_ms
        self._reports: dict[str, tuple[int, WorkerReport]] = {}

    def note(self, report: WorkerReport, now: int) -> None:
        self._forget_old(now)
        self._reports[report.worker_id] = (now, report)

    def seen(self, now: int) -> list[SeenWorker]:
        self._forget_old(now)
        return [SeenWorker(report, now - at) for _, (at, report) in sorted(self._reports.items())]

    def serves(self, model: str, now: int) -> bool:
        """Whether a worker of this model has reported of late and goes on."""
        self._forget_old(now)
        return any(model in report.models and not report.is_draining for _, report in self._reports.values())

    def _forget_old(self, now: int) -> None:
        for worker_id, (at, _) in list(self._reports.items()):
            if now - at >= self._ttl_ms:
                del self._reports[worker_id]
