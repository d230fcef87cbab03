"""What Prometheus reads of real processes: all of the table and nothing else, also when no worker is there."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from services.prober.process import ProbeOptions, probe
from services.settings import Settings
from services.telemetry.table import TABLES
from tests.e2e.server import Server, serve
from tests.redis_server import RedisServer

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
QUESTION = {"messages": [{"role": "user", "content": "What is 12 + 30?"}], "max_tokens": 8}


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    server.start()
    yield server
    server.stop()


def scrape(server: Server) -> dict[str, Metric]:
    with server.client() as client:
        answer = client.get("/metrics", headers={"accept": "application/openmetrics-text;version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    return {metric.name: metric for metric in text_string_to_metric_families(answer.text)}  # type: ignore[no-untyped-call]


def value(server: Server, name: str, **labels: str) -> float | None:
    found = [s.value for s in scrape(server)[name].samples if labels.items() <= s.labels.items()]
    return found[0] if found else None


def until(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_gateway_says_what_waits_before_any_worker_is_there(shipped_settings: Settings, redis: RedisServer) -> None:
    store, over = shipped_settings.store, {"redis_url": redis.url, "unserved": "wait", "redis_replicas": "1"}
    with serve(store, "gateway", **over, replica_capacity_tokens="4096") as gateway:
        assert scrape(gateway).keys() == {spec.name for spec in TABLES["gateway"]}
        assert value(gateway, "millrace_queue_up") == 1
        assert value(gateway, "millrace_replica_capacity_tokens") == 4096
        assert value(gateway, "millrace_workers", state="ready") == 0
        assert value(gateway, "millrace_redis_expected_replicas") == 1
        with gateway.client() as client:
            body = {**QUESTION, "background": True}
            assert client.post("/generate", json=body, headers={"traceparent": f"00-{TRACE}-{'1' * 16}-01"}).is_success
            until(lambda: value(gateway, "millrace_queue_requests", state="waiting") == 1)
            assert (value(gateway, "millrace_queue_tokens", state="waiting") or 0) > 8
            until(lambda: (value(gateway, "millrace_queue_oldest_waiting_seconds") or 0) > 0)
        with serve(store, "worker", **over) as worker:
            assert scrape(worker).keys() == {spec.name for spec in TABLES["worker"]}
            until(lambda: value(gateway, "millrace_queue_requests", state="waiting") == 0)
            until(lambda: value(gateway, "millrace_workers", state="ready") == 1)
            assert value(gateway, "millrace_replica_capacity_tokens") not in (None, 4096)
            assert value(worker, "millrace_leases", kind="first") == 1
            until(lambda: (value(worker, "millrace_device_utilization_ratio", device="cpu") or 0) > 0)
            with gateway.client() as client:
                header = {"traceparent": f"00-{TRACE}-{'1' * 16}-01"}
                assert client.post("/generate", json=QUESTION, headers=header).is_success
            for name in ("vllm:time_to_first_token_seconds", "vllm:e2e_request_latency_seconds"):
                samples = scrape(gateway)[name].samples
                assert {s.exemplar.labels["trace_id"] for s in samples if s.exemplar} == {TRACE}
        redis.stop()
        until(lambda: value(gateway, "millrace_queue_up") == 0)


def test_one_process_exports_both_tables(server: Server) -> None:
    names = {spec.name for process in ("gateway", "worker") for spec in TABLES[process]}
    assert scrape(server).keys() == names
    assert value(server, "millrace_queue_up") == 1
    until(lambda: value(server, "millrace_workers", state="ready") == 1)


def test_a_prober_measures_a_worker_against_its_own_baseline(
    shipped_settings: Settings, redis: RedisServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline, over = tmp_path / "baseline.json", {"redis_url": redis.url, "log_level": "warning"}
    settings = replace(shipped_settings, **over)  # type: ignore[arg-type]
    options = ProbeOptions("millpond", most_items=48, record=baseline, as_json=True)
    assert probe(settings, replace(options, most_items=1)) == 1
    assert "no worker serves" in capsys.readouterr().err
    assert not baseline.exists()
    with serve(shipped_settings.store, "worker", **over):
        assert probe(settings, options) == 0
        recorded = json.loads(capsys.readouterr().out)
        assert recorded["items"] == 48
        assert recorded["score"] > 0.8 < recorded["agreement"]
        assert recorded["score_low"] < recorded["score"] <= recorded["score_high"]
        flags = f"probe --items 48 --baseline {baseline} --every 1"
        with serve(shipped_settings.store, flags, **over) as prober:
            until(lambda: value(prober, "millrace_probe_items") == 48)
            assert scrape(prober).keys() == {spec.name for spec in TABLES["prober"]}
            # The same bits as when it was recorded, so not one answer differs.
            assert value(prober, "millrace_probe_score") == recorded["score"]
            assert value(prober, "millrace_probe_score_baseline") == recorded["score"]
            assert value(prober, "millrace_probe_agreement_baseline") == recorded["agreement"]
            assert (value(prober, "millrace_probe_drop_low") or 1.0) < 0
            assert value(prober, "millrace_probe_nll") == recorded["nll"] > 0
            assert value(prober, "millrace_probe_nll_baseline") == recorded["nll"]
            assert value(prober, "millrace_probe_nll_rise_low") == 0
            first = value(prober, "millrace_probe_last_success_timestamp_seconds") or 0.0
            until(lambda: (value(prober, "millrace_probe_last_success_timestamp_seconds") or 0.0) > first)
            with prober.client() as client:
                assert client.get("/readyz").status_code == client.get("/livez").status_code == 200
