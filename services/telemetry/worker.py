"""A worker's metrics: what its engine has done, read at each scrape, and what it does with leases, counted as it does.

A step pays nothing for being watched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from batcher.engine import EngineLoad
from services.telemetry.table import ENGINE_LABEL, ENGINE_METRICS, LEASE_METRICS, Instruments, families
from wire.queue import Lease


@dataclass(frozen=True, slots=True)
class EngineSource:
    """One engine to watch."""

    model_id: str
    load: Callable[[], EngineLoad]
    is_alive: Callable[[], bool]


class EngineCollector(Collector):
    """One for all engines, because a metric's name and type may be said only once in an answer."""

    def __init__(self, sources: Sequence[EngineSource]) -> None:
        self._sources = sources

    def collect(self) -> Iterable[Metric]:
        samples: dict[str, list[tuple[tuple[str, ...], float]]] = {spec.name: [] for spec in ENGINE_METRICS}
        for each in self._sources:
            for name, values in _engine_values(each.load(), is_alive=each.is_alive()).items():
                samples[name] += [((each.model_id, ENGINE_LABEL, *extra), value) for extra, value in values.items()]
        yield from families(ENGINE_METRICS, samples)


def _engine_values(load: EngineLoad, *, is_alive: bool) -> dict[str, dict[tuple[str, ...], float]]:
    """The value of each row of ENGINE_METRICS, by the labels it has beside MODEL."""
    return {
        "vllm:num_requests_running": {(): load.running},
        "vllm:num_requests_waiting": {(): load.waiting},
        "vllm:kv_cache_usage_perc": {(): load.kv_usage},
        "vllm:prefix_cache_queries": {(): load.prefix_queried_tokens},
        "vllm:prefix_cache_hits": {(): load.prefix_hit_tokens},
        "vllm:num_preemptions": {(): load.preemptions},
        "millrace_engine_steps": {(): load.steps},
        "millrace_engine_step_seconds": {
            ("plan",): load.plan_s,
            ("pack",): load.pack_s,
            ("forward",): load.forward_s,
            ("commit",): load.commit_s,
        },
        "millrace_scheduled_tokens": {("prefill",): load.prefill_tokens, ("decode",): load.decode_tokens},
        "millrace_up": {(): float(is_alive)},
    }


class LeaseMetrics:
    """What the workers of one process do with leases. All methods are called on the event loop."""

    def __init__(self, registry: CollectorRegistry) -> None:
        made = Instruments(LEASE_METRICS, registry)
        self._leases = made.counters["millrace_leases"]
        self._fenced = made.counters["millrace_leases_fenced"]
        self._publish = made.histograms["millrace_publish_seconds"]

    def serves(self, model: str) -> None:
        """Its counters begin at 0, so that a rate sees the first event too."""
        for kind in ("first", "again", "suspect"):
            self._leases.labels(model, ENGINE_LABEL, kind)
        self._fenced.labels(model, ENGINE_LABEL)
        self._publish.labels(model, ENGINE_LABEL)

    def leased(self, model: str, lease: Lease) -> None:
        """A request came from the queue."""
        kind = "suspect" if lease.is_suspect else "first" if lease.delivery == 1 else "again"
        self._leases.labels(model, ENGINE_LABEL, kind).inc()

    def fenced(self, model: str) -> None:
        """A lease turned out to be another's, or at its end."""
        self._fenced.labels(model, ENGINE_LABEL).inc()

    def published(self, model: str, seconds: float) -> None:
        """One publish call has returned."""
        self._publish.labels(model, ENGINE_LABEL).observe(seconds)
