"""Scaling as it is shipped: the query in a real Prometheus, thresholds and pace against a simulated load."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from services.backends.sizing import StepLimits, count_blocks
from services.loading import StoredModel
from services.telemetry.table import QUEUE_METRICS
from tests.deploy.autoscaler import HPA_EVERY_S, Hpa, Keda
from tests.deploy.load import CAPACITY, SCRAPE_EVERY_S, START_S, Cluster, Sample, demand
from tests.deploy.rendered import K8S, find, settings_of
from tests.drills.monitoring import program

HOUR: Final = 3600


def keda(stack: str = "cpu") -> Any:
    return find(stack, "ScaledObject", "worker")["spec"]


def hpa() -> Hpa:
    return Hpa.of(find("hpa", "HorizontalPodAutoscaler", "worker")["spec"])


class SlowHpa:
    """An HPA looks every 15 s."""

    def __init__(self) -> None:
        self._hpa = hpa()

    def decide(self, now_s: int, current: int, readings: Sequence[float | None]) -> int:
        return self._hpa.decide(now_s, current, readings) if now_s % HPA_EVERY_S == 0 else current


def query() -> str:
    text: str = keda()["triggers"][0]["metadata"]["query"]
    return text


# ---- the query ----


def _tokens(instance: str, model: str, waiting: float, running: float) -> list[Sample]:
    common = {"__name__": "millrace_queue_tokens", "model_name": model, "instance": instance, "namespace": "millrace"}
    return [({**common, "state": "waiting"}, waiting), ({**common, "state": "running"}, running)]


def _capacity(instance: str, model: str, tokens: float) -> list[Sample]:
    common = {"__name__": "millrace_replica_capacity_tokens", "model_name": model, "instance": instance}
    return [({**common, "namespace": "millrace"}, tokens)]


TABLES: Final[Mapping[str, tuple[list[Sample], float | None]]] = {
    "one gateway": ([*_tokens("a", "m@1", 512, 1536), *_capacity("a", "m@1", 1024)], 2.0),
    "the second gateway says the same": (
        [
            *_tokens("a", "m@1", 512, 1536),
            *_tokens("b", "m@1", 512, 1536),
            *_capacity("a", "m@1", 1024),
            *_capacity("b", "m@1", 1024),
        ],
        2.0,
    ),
    "a gateway that is a little behind": (
        [*_tokens("a", "m@1", 512, 1536), *_tokens("b", "m@1", 256, 1024), *_capacity("a", "m@1", 1024)],
        2.0,
    ),
    "two revisions during a release": (
        [
            *_tokens("a", "m@1", 0, 1024),
            *_tokens("b", "m@2", 0, 512),
            *_capacity("a", "m@1", 1024),
            *_capacity("b", "m@2", 512),
        ],
        2.0,
    ),
    "nobody asks": ([*_tokens("a", "m@1", 0, 0), *_capacity("a", "m@1", 1024)], 0.0),
    "no worker was ever seen": (_tokens("a", "m@1", 512, 0), None),
    "no gateway is scraped": ([], None),
}


def test_prometheus_computes_what_the_simulation_computes(tmp_path: Path) -> None:
    def series(labels: Mapping[str, str], value: float) -> dict[str, str]:
        inside = ",".join(f'{name}="{text}"' for name, text in labels.items() if name != "__name__")
        return {"series": f"{labels['__name__']}{{{inside}}}", "values": f"{value:g}x10"}

    tests = [
        {
            "name": name,
            "interval": "15s",
            "input_series": [series(*sample) for sample in samples],
            "promql_expr_test": [
                {
                    "expr": query(),
                    "eval_time": "1m",
                    "exp_samples": [] if expected is None else [{"labels": "{}", "value": expected}],
                }
            ],
        }
        for name, (samples, expected) in TABLES.items()
    ]
    page = tmp_path / "scaling.yaml"
    page.write_text(yaml.safe_dump({"rule_files": [], "tests": tests}))
    ran = subprocess.run([program("promtool"), "test", "rules", str(page)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert {name: demand(samples) for name, (samples, _) in TABLES.items()} == {
        name: expected for name, (_, expected) in TABLES.items()
    }


def test_keda_and_the_adapter_ask_the_same() -> None:
    (rule,) = yaml.safe_load((K8S / "components/hpa/adapter-rule.yaml").read_text())["externalRules"]
    assert rule["metricsQuery"].replace("<<.LabelMatchers>>", 'namespace="millrace"') == query()
    metric = find("hpa", "HorizontalPodAutoscaler", "worker")["spec"]["metrics"][0]["external"]["metric"]["name"]
    assert rule["name"]["as"] == metric
    assert hpa().targets == Keda.of(keda()).hpa.targets


def test_what_scaling_reads_is_exported() -> None:
    exported = {spec.exposed for spec in QUEUE_METRICS}
    texts = [query(), *(each["metadata"].get("valueLocation", "") for each in keda("zero")["triggers"])]
    read = set(re.findall(r"millrace_\w+", " ".join(texts)))
    assert read == {"millrace_queue_tokens", "millrace_replica_capacity_tokens", "millrace_queue_requests"}
    assert read <= exported


def test_the_capacity_that_is_said_before_a_worker_was_seen_is_what_a_worker_has() -> None:
    gateway = settings_of("zero", find("zero", "Deployment", "gateway"))
    assert gateway["MILLRACE_REPLICA_CAPACITY_TOKENS"] == f"{CAPACITY:.0f}"
    assert gateway["MILLRACE_UNSERVED"] == "wait"


def test_that_capacity_is_what_the_shipped_models_cache_holds(shipped: StoredModel) -> None:
    worker = settings_of("zero", find("zero", "Deployment", "worker"))
    limits = StepLimits(512, 256, int(worker["MILLRACE_KV_MEMORY_BYTES"]), threads=2)
    assert count_blocks(shipped.manifest, limits) * shipped.manifest.kv_cache.block_size == CAPACITY


# ---- the load ----


def ramp(second: int) -> float:
    """From half a worker's worth to four and a half over ten minutes; over after 40."""
    return 0.0 if second > 2400 else 0.5 + 4.0 * min(1.0, second / 600)


def burst(second: int) -> float:
    return 5.0 if 600 <= second < 1200 else 0.8


SCALERS: Final[Mapping[str, Callable[[], Any]]] = {"keda": lambda: Keda.of(keda()), "hpa": SlowHpa}


@pytest.mark.parametrize("kind", SCALERS)
def test_a_ramp_is_followed_and_left_again(kind: str) -> None:
    cluster = Cluster(ramp, replicas=2)
    cluster.run(SCALERS[kind](), HOUR)
    assert cluster.replicas_at(1200) == 6  # 4.5 / 0.8
    assert all(waiting <= replicas for replicas, waiting in cluster.history[1200:2400])  # nobody waits
    assert max(waiting for _, waiting in cluster.history) < 6.0
    assert cluster.replicas_at(2400 + 290) == 6  # the window of five minutes
    counts = [replicas for replicas, _ in cluster.history[2400:]]
    assert all(before - after <= 1 for before, after in zip(counts, counts[60:], strict=False))  # one a minute
    assert counts[-1] == 2


@pytest.mark.parametrize("kind", SCALERS)
def test_a_burst_is_met_within_two_minutes_and_the_backlog_is_worked_off(kind: str) -> None:
    cluster = Cluster(burst, replicas=2)
    cluster.run(SCALERS[kind](), 1800)
    assert cluster.replicas_at(600 + SCRAPE_EVERY_S + HPA_EVERY_S) >= 4
    assert cluster.replicas_at(720) >= 7
    last_wait_s = max(second for second, (_, waiting) in enumerate(cluster.history[:1200]) if waiting > 7)
    assert last_wait_s < 600 + 240
    assert max(replicas for replicas, _ in cluster.history) <= keda()["maxReplicaCount"]


@pytest.mark.parametrize("kind", SCALERS)
def test_a_load_that_trembles_moves_nothing(kind: str) -> None:
    cluster = Cluster(lambda second: 2.4 + (0.2 if second % 60 < 30 else -0.2), replicas=4)
    cluster.run(SCALERS[kind](), HOUR)
    settled = [replicas for replicas, _ in cluster.history[600:]]
    assert len(set(settled)) == 1


@pytest.mark.parametrize("kind", SCALERS)
def test_a_dead_prometheus_takes_no_worker_away(kind: str) -> None:
    cluster = Cluster(lambda _: 4.0, replicas=6, is_prometheus_dead=lambda second: 600 <= second < 3000)
    cluster.run(SCALERS[kind](), HOUR)
    assert min(replicas for replicas, _ in cluster.history[600:]) >= 5


def test_without_our_word_for_it_a_dead_prometheus_would() -> None:
    spec = copy.deepcopy(keda())
    del spec["triggers"][0]["metadata"]["ignoreNullValues"]
    cluster = Cluster(lambda _: 4.0, replicas=6, is_prometheus_dead=lambda second: second >= 600)
    cluster.run(Keda.of(spec), HOUR)
    assert cluster.replicas_at(HOUR - 1) == spec["minReplicaCount"]


def _morning(second: int) -> float:
    """Quiet until 1,200 s, then two minutes of work, then quiet."""
    return 0.5 if 1200 <= second < 1320 else 0.0


@pytest.mark.parametrize(
    "dies_at_s", [10**9, 0, 900], ids=["Prometheus lives", "was never there", "dies while nobody works"]
)
def test_to_zero_and_back(dies_at_s: int) -> None:
    cluster = Cluster(_morning, replicas=1, is_prometheus_dead=lambda second: second >= dies_at_s)
    spec = keda("zero")
    cluster.run(Keda.of(spec), HOUR, num_triggers=len(spec["triggers"]))
    if dies_at_s > 0:
        assert cluster.replicas_at(spec["cooldownPeriod"] + 10) == 0  # quiet from the start
        assert cluster.replicas_at(1199) == 0
    assert cluster.replicas_at(1200 + spec["pollingInterval"]) >= 1  # by the gateway's own word, not by the next scrape
    assert cluster.history[1320 + START_S][1] < 0.2  # what had waited is done
    if dies_at_s > HOUR:
        assert cluster.replicas_at(HOUR - 1) == 0
    else:
        assert cluster.replicas_at(HOUR - 1) >= 1  # who cannot see keeps what there is


def test_without_the_second_trigger_nobody_would_come_back_while_prometheus_is_dead() -> None:
    spec = copy.deepcopy(keda("zero"))
    del spec["triggers"][1]
    cluster = Cluster(_morning, replicas=1, is_prometheus_dead=lambda second: second >= 900)
    cluster.run(Keda.of(spec), HOUR)
    assert cluster.replicas_at(HOUR - 1) == 0
