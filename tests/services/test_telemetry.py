"""What Prometheus reads is what the table says, each name once, however many engines there are."""

from __future__ import annotations

from collections import Counter

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from batcher.backend import BackendLimits
from batcher.engine import Engine
from gateway.telemetry import Completed
from services.backends.scripted import ScriptedBackend
from services.telemetry import ENGINE_METRICS, REQUEST_METRICS, EngineCollector, EngineSource, GatewayMetrics
from wire.messages import Generate

LIMITS = BackendLimits("m", 16, 4, 32, 8, 64, 50)


def source(model_id: str, tokens: int) -> EngineSource:
    engine = Engine(ScriptedBackend(LIMITS))
    engine.add(Generate("r", "m", [1, 2, 3], tokens))
    while engine.has_work:
        engine.step()
    return EngineSource(model_id, lambda: engine.load, lambda: True)


def test_two_engines_give_each_metric_one_type_and_two_samples() -> None:
    registry = CollectorRegistry()
    registry.register(EngineCollector([source("a@1", 2), source("b@2", 5)]))
    text = generate_latest(registry).decode()
    types = Counter(line.split()[2] for line in text.splitlines() if line.startswith("# TYPE"))
    assert set(types.values()) == {1}
    samples = {
        (sample.name, sample.labels.get("model_name"), sample.labels.get("kind")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert samples[("millrace_engine_steps_total", "a@1", None)] == 2
    assert samples[("millrace_engine_steps_total", "b@2", None)] == 5
    assert samples[("millrace_scheduled_tokens_total", "b@2", "prefill")] == 3


def test_every_metric_of_the_table_is_exported_and_nothing_else() -> None:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    registry.register(EngineCollector([source("a@1", 2)]))
    metrics.admitted("a@1", 3, 5)
    metrics.first_token("a@1", 0.01)
    metrics.tokens("a@1", 2, 0.02)
    metrics.refused("bad_request")
    metrics.http_answered("/generate", "POST", 200, 0.1)
    for reason in ("stop", "cancelled", "deadline_exceeded"):
        metrics.completed(Completed("r", "a@1", reason, 3, 5, 0, 0.01, 0.1, 0.0, 0.01, 0.05, 0))
    exported = {family.name for family in text_string_to_metric_families(generate_latest(registry).decode())}
    declared = {spec.name for spec in (*REQUEST_METRICS, *ENGINE_METRICS)}
    assert {name for name in exported if not name.endswith("_created")} == declared
