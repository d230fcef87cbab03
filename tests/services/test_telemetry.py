"""What Prometheus reads is what the table says, each name once, however many engines there are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families

from batcher.backend import BackendLimits
from batcher.engine import Engine
from gateway.telemetry import Completed
from services.backends.scripted import ScriptedBackend
from services.prober.report import ProbeMetrics
from services.queue_watch import QueueWatch
from services.queues.memory import MemoryQueue
from services.telemetry.device import DeviceCollector
from services.telemetry.exposition import MetricsServer, exposed
from services.telemetry.gateway import MAX_TENANTS, GatewayMetrics
from services.telemetry.process import describe_process
from services.telemetry.table import TABLES
from services.telemetry.worker import EngineCollector, EngineSource, LeaseMetrics
from wire.errors import CODES
from wire.messages import Generate
from wire.queue import Lease

LIMITS = BackendLimits("m", 16, 4, 32, 8, 64, 50)
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def source(model_id: str, tokens: int) -> EngineSource:
    engine = Engine(ScriptedBackend(LIMITS))
    engine.add(Generate("r", "m", [1, 2, 3], tokens))
    while engine.has_work:
        engine.step()
    return EngineSource(model_id, lambda: engine.load, lambda: True)


def completed(reason: str = "stop", tenant: str = "", tokens: int = 5, trace_id: str = "") -> Completed:
    return Completed("r", "a@1", reason, 3, tokens, 0, 0.01, 0.1, 0.0, 0.01, 0.05, 0, tenant, trace_id)


def samples(registry: CollectorRegistry, name: str, label: str) -> dict[str, float]:
    families = text_string_to_metric_families(generate_latest(registry).decode())
    found = [sample for family in families for sample in family.samples if sample.name == name]
    return {sample.labels[label]: sample.value for sample in found}


def test_two_engines_give_each_metric_one_type_and_two_samples() -> None:
    registry = CollectorRegistry()
    registry.register(EngineCollector([source("a@1", 2), source("b@2", 5)]))
    text = generate_latest(registry).decode()
    types = Counter(line.split()[2] for line in text.splitlines() if line.startswith("# TYPE"))
    assert set(types.values()) == {1}
    found = {
        (sample.name, sample.labels.get("model_name"), sample.labels.get("kind")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    assert found[("millrace_engine_steps_total", "a@1", None)] == 2
    assert found[("millrace_engine_steps_total", "b@2", None)] == 5
    assert found[("millrace_scheduled_tokens_total", "b@2", "prefill")] == 3


def gateway_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    GatewayMetrics(registry)
    registry.register(QueueWatch(MemoryQueue(), ["a@1"]))
    describe_process(registry, "1.2.3", [], lambda: False)
    return registry


def worker_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(EngineCollector([source("a@1", 2)]))
    LeaseMetrics(registry)
    registry.register(DeviceCollector())
    describe_process(registry, "1.2.3", [], lambda: False)
    return registry


def prober_registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    ProbeMetrics(registry)
    return registry


@pytest.mark.parametrize(
    ("process", "opened"), [("gateway", gateway_registry), ("worker", worker_registry), ("prober", prober_registry)]
)
def test_every_metric_of_the_table_is_exported_and_nothing_else(
    process: str, opened: Callable[[], CollectorRegistry]
) -> None:
    exported = [(metric.name, metric.type, metric.documentation) for metric in opened().collect()]
    assert sorted(exported) == sorted((spec.name, spec.kind, spec.meaning) for spec in TABLES[process])


def test_no_metric_has_two_meanings() -> None:
    specs = {spec for table in TABLES.values() for spec in table}
    assert [name for name, count in Counter(spec.name for spec in specs).items() if count > 1] == []


PROMETHEUS_2 = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,*/*;q=0.1"
PROMETHEUS_3 = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3"


def openmetrics(registry: CollectorRegistry, accept: str = PROMETHEUS_2) -> list[Metric]:
    text, content_type = exposed(registry, accept)
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    return list(openmetrics_families(text.decode()))  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("accept", [PROMETHEUS_2, PROMETHEUS_3, "application/openmetrics-text"])
def test_openmetrics_has_the_names_of_the_table_whatever_the_scraper_says_of_escaping(accept: str) -> None:
    registry = gateway_registry()
    found = openmetrics(registry, accept)
    assert {family.name for family in found} == {spec.name for spec in TABLES["gateway"]}
    assert all(sample.name.startswith(family.name) for family in found for sample in family.samples)


@pytest.mark.parametrize(
    "accept", ["", "*/*", "text/plain;version=0.0.4", "application/openmetrics-text; version=0.0.1"]
)
def test_who_does_not_ask_for_openmetrics_gets_the_older_text(accept: str) -> None:
    text, content_type = exposed(gateway_registry(), accept)
    assert content_type.startswith("text/plain; version=0.0.4")
    found = {family.name for family in text_string_to_metric_families(text.decode())}
    assert {spec.name for spec in TABLES["gateway"]} <= found


@contextmanager
def scraped(registry: CollectorRegistry) -> Iterator[HTTPConnection]:
    with MetricsServer("127.0.0.1", 0, registry) as server:
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
        yield connection
        connection.close()
        server.shutdown()


def test_a_port_of_its_own_answers_metrics_and_nothing_else() -> None:
    registry = gateway_registry()
    with scraped(registry) as connection:
        connection.request("GET", "/metrics", headers={"accept": PROMETHEUS_2})
        answer = connection.getresponse()
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert b"millrace_queue_up 0.0" in answer.read()
    with scraped(registry) as connection:
        connection.request("GET", "/generate")
        assert connection.getresponse().status == 404


def exemplars(registry: CollectorRegistry) -> set[tuple[str, str]]:
    found: list[tuple[str, Any]] = [(each.name, sample) for each in openmetrics(registry) for sample in each.samples]
    return {(name, sample.exemplar.labels["trace_id"]) for name, sample in found if sample.exemplar}


def test_latencies_lead_to_the_trace_of_a_request_that_has_one() -> None:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    metrics.first_token("a@1", 0.01, "")
    metrics.completed(completed())
    assert exemplars(registry) == set()
    metrics.first_token("a@1", 0.01, TRACE)
    metrics.completed(completed(trace_id=TRACE))
    assert exemplars(registry) == {
        ("vllm:time_to_first_token_seconds", TRACE),
        ("vllm:e2e_request_latency_seconds", TRACE),
    }


def test_a_rate_of_errors_sees_the_first_one_of_each_kind() -> None:
    """A counter that appears with its first event has no rate of it (prometheus.io, "Avoid missing metrics")."""
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry, ["a@1"])
    assert samples(registry, "millrace_refused_total", "code") == dict.fromkeys(CODES, 0)
    assert {"internal", "queue_full", "unavailable", "worker_lost"} <= set(CODES)
    assert samples(registry, "millrace_requests_admitted_total", "model_name") == {"a@1": 0}
    metrics.refused("unavailable")
    assert samples(registry, "millrace_refused_total", "code")["unavailable"] == 1


def test_tenants_are_counted_by_name_up_to_a_bound() -> None:
    registry = CollectorRegistry()
    metrics = GatewayMetrics(registry)
    for tenant in ("", "team", *(f"t{index}" for index in range(MAX_TENANTS + 10)), "team"):
        metrics.admitted("a@1", tenant, 3, 5)
        metrics.completed(completed(tenant=tenant, tokens=2))
    requests = samples(registry, "millrace_tenant_requests_total", "tenant")
    assert len(requests) == MAX_TENANTS + 2
    assert (requests["team"], requests["anonymous"], requests["other"]) == (2, 1, 11)
    families = text_string_to_metric_families(generate_latest(registry).decode())
    tokens = {
        sample.labels["kind"]: sample.value
        for family in families
        for sample in family.samples
        if sample.name == "millrace_tenant_tokens_total" and sample.labels["tenant"] == "team"
    }
    assert tokens == {"prompt": 6, "generated": 4}


def test_leases_are_counted_by_their_delivery() -> None:
    registry = CollectorRegistry()
    metrics = LeaseMetrics(registry)
    metrics.serves("a@1")
    request = Generate("r", "a@1", [1], 1)
    assert samples(registry, "millrace_leases_total", "kind") == {"first": 0, "again": 0, "suspect": 0}
    for delivery, is_suspect in ((1, False), (1, False), (2, False), (3, True)):
        metrics.leased("a@1", Lease(request, 1, (), delivery, is_suspect))
    assert samples(registry, "millrace_leases_total", "kind") == {"first": 2, "again": 1, "suspect": 1}


def test_what_a_process_is_and_whether_it_drains_is_exported() -> None:
    registry = CollectorRegistry()
    draining = [False]
    describe_process(registry, "1.2.3", [], lambda: draining[0])
    assert registry.get_sample_value("millrace_build_info", {"version": "1.2.3"}) == 1
    assert registry.get_sample_value("millrace_draining") == 0
    draining[0] = True
    assert registry.get_sample_value("millrace_draining") == 1
