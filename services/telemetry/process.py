"""What every process that serves says of itself: its version, its models, whether it drains."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry

from model_store.manifest import ModelManifest
from services.telemetry.table import PROCESS_METRICS, Instruments


def describe_process(
    registry: CollectorRegistry, version: str, models: Iterable[ModelManifest], is_draining: Callable[[], bool]
) -> None:
    """Export it. `is_draining` is asked at each scrape."""
    gauges = Instruments(PROCESS_METRICS, registry).gauges
    gauges["millrace_build_info"].labels(version).set(1)
    for model in models:
        gauges["millrace_model_info"].labels(model.model_id, model.revision).set(1)
    gauges["millrace_draining"].set_function(lambda: float(is_draining()))
