"""The alerts: valid, tested for firing and for not firing, routed, explained, and made of metrics that exist."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.telemetry.table import TABLES, MetricSpec
from tests.deploy.alert_rules import (
    ALERTMANAGER,
    PROMETHEUS,
    ROOT,
    RUNBOOKS,
    Rule,
    matchers_in,
    metrics_in,
    read_yaml,
    rules,
)
from tests.drills.monitoring import Alertmanager, program, running_alertmanager

ALERTS = [rule for rule in rules() if rule.is_alert]
TEST_FILES = sorted((PROMETHEUS / "tests").glob("*.yaml"))
OURS = {spec.exposed: spec for table in TABLES.values() for spec in table}
# What others export, with the labels that they are asked for by.
THEIRS = {
    "up": {"job"},
    "certmanager_certificate_expiration_timestamp_seconds": {"name"},
    "kubelet_volume_stats_available_bytes": {"persistentvolumeclaim"},
    "kubelet_volume_stats_capacity_bytes": {"persistentvolumeclaim"},
    "node_filesystem_avail_bytes": {"mountpoint"},
    "node_filesystem_size_bytes": {"mountpoint"},
}
BASE_URL = "https://github.com/millrace/millrace/blob/main/"


def run(*command: str) -> str:
    """What it prints; fails with it if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def spec_of(metric: str) -> MetricSpec | None:
    """The row of the table that a series belongs to; a histogram has three series."""
    histogram = OURS.get(re.sub(r"_(bucket|count|sum)$", "", metric))
    return histogram if histogram is not None and histogram.kind == "histogram" else OURS.get(metric)


# --- the rules --------------------------------------------------------------------------------------------------------


def test_prometheus_takes_the_configuration_and_alertmanager_its_own() -> None:
    run(program("promtool"), "check", "config", str(PROMETHEUS / "prometheus.yml"))
    run(program("amtool"), "check-config", str(ALERTMANAGER))


@pytest.mark.parametrize("path", TEST_FILES, ids=lambda path: path.stem)
def test_alerts_fire_when_they_should_and_only_then(path: Path) -> None:
    run(program("promtool"), "test", "rules", str(path))


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_every_alert_is_tested_for_firing_and_for_not_firing(alert: Rule) -> None:
    expected = [
        bool(check["exp_samples"])
        for path in TEST_FILES
        for test in read_yaml(path)["tests"]
        for check in test["promql_expr_test"]
        if check["expr"] == f'ALERTS{{alertname="{alert.name}",alertstate="firing"}}'
    ]
    assert set(expected) == {True, False}


def test_names_are_found_in_a_query() -> None:
    query = (
        'sum by (a) (rate(x:y_total{k="v", le=~"z{1}"}[5m] offset 1h)) / on (b) group_left (c) w_1 > 0.9 and vector(2)'
    )
    assert metrics_in(query) == {"x:y_total", "w_1"}
    assert list(matchers_in('up{job="a",le!="0.3"} and z')) == [("up", "job", "a"), ("up", "le", "0.3")]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_every_metric_of_a_rule_exists(rule: Rule) -> None:
    recorded = {each.name for each in rules() if not each.is_alert}
    unknown = {name for name in metrics_in(rule.expr) - recorded - set(THEIRS) if spec_of(name) is None}
    assert metrics_in(rule.expr)
    assert not unknown


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule.name)
def test_every_label_of_a_rule_exists_and_every_limit_is_the_edge_of_a_bucket(rule: Rule) -> None:
    for metric, label, value in matchers_in(rule.expr):
        spec = spec_of(metric)
        if spec is None:
            assert label in THEIRS[metric]
        elif label == "le":
            assert metric.endswith("_bucket")
            assert float(value) in spec.buckets
        else:
            assert label in spec.labels


# --- what an alert says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_has_a_tier_and_says_what_where_and_what_to_do(alert: Rule) -> None:
    assert alert.labels["severity"] == ("info" if alert.name == "MillraceDraining" else alert_tier(alert))
    assert set(alert.annotations) == {"summary", "description", "runbook_url", "dashboard_url"}
    dashboard = re.match(r"https://grafana\.example\.com/d/([a-z-]+)", alert.annotations["dashboard_url"])
    assert dashboard is not None
    assert dashboard[1] in dashboard_uids()
    runbook = alert.annotations["runbook_url"]
    assert runbook == f"{BASE_URL}docs/runbooks/{alert.name}.md"
    assert (ROOT / runbook.removeprefix(BASE_URL)).is_file()


def dashboard_uids() -> set[str]:
    """Of the dashboards that we ship."""
    return {json.loads(path.read_text())["uid"] for path in (ROOT / "deploy/grafana/dashboards").glob("*.json")}


def alert_tier(alert: Rule) -> str:
    """The tier of the file that it stands in."""
    for path in (PROMETHEUS / "rules").glob("alerts-*.yaml"):
        if f"- alert: {alert.name}\n" in path.read_text():
            return path.stem.removeprefix("alerts-").upper()
    raise AssertionError(f"{alert.name} stands in no file of a tier")


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_a_runbook_says_what_it_means_where_to_look_what_to_do_and_when_it_is_over(alert: Rule) -> None:
    text = (RUNBOOKS / f"{alert.name}.md").read_text()
    assert re.findall(r"^#+ .*", text, flags=re.MULTILINE) == [
        f"# {alert.name}",
        "## What it means",
        "## First look",
        "## What to do",
        "## How to see that it is over",
    ]
    assert f"**{alert.labels['severity']}**" in text
    assert all(len(part.strip()) > 40 for part in text.split("\n## ")[1:])


def test_every_runbook_has_its_alert_and_its_line_in_the_list() -> None:
    pages = {path.stem for path in RUNBOOKS.glob("*.md")} - {"README"}
    assert pages == {alert.name for alert in ALERTS}
    listed = re.findall(r"\]\((\w+)\.md\)", (RUNBOOKS / "README.md").read_text())
    assert sorted(listed) == sorted(pages)


def queries_of(alert: Rule) -> list[str]:
    """What its runbook says to look at, one query a line."""
    blocks = re.findall(r"```promql\n(.*?)```", (RUNBOOKS / f"{alert.name}.md").read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines()]


def test_every_query_of_a_runbook_is_one_and_reads_metrics_that_exist(tmp_path: Path) -> None:
    known = {each.name for each in rules() if not each.is_alert} | set(THEIRS)
    queries = {f"runbook:{alert.name}:{n}": q for alert in ALERTS for n, q in enumerate(queries_of(alert))}
    assert {name.split(":")[1] for name in queries} == {alert.name for alert in ALERTS}  # none without a first look
    for place, query in queries.items():
        assert all(name in known or spec_of(name) for name in metrics_in(query)), f"{place}: {query}"
    groups = [{"name": "runbooks", "rules": [{"record": place, "expr": query} for place, query in queries.items()]}]
    (tmp_path / "queries.json").write_text(json.dumps({"groups": groups}))  # JSON is YAML
    run(program("promtool"), "check", "rules", str(tmp_path / "queries.json"))


def test_alerts_of_one_model_carry_it_without_its_revision() -> None:
    """Alertmanager compares this label (inhibit_rules): an alert without it is nobody's shadow."""
    for alert in ALERTS:
        if "$labels.model_name" in "".join(alert.annotations.values()):
            assert alert.labels.get("model") == '{{ reReplaceAll "@.*" "" $labels.model_name }}', alert.name


# --- who hears of it --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alertmanager(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Alertmanager]:
    """A real one with our configuration."""
    with running_alertmanager(ALERTMANAGER, tmp_path_factory.mktemp("alertmanager")) as running:
        yield running


@pytest.mark.parametrize(
    ("labels", "receiver"),
    [
        ({"severity": "P0", "alertname": "MillraceNothingServed", "model": "millpond"}, "pager"),
        ({"severity": "P1", "alertname": "MillraceAccuracyDrift", "model": "millpond"}, "on-call"),
        ({"severity": "P2", "alertname": "MillraceDiskFilling"}, "tickets"),
        ({"severity": "info", "alertname": "MillraceDraining", "model": "millpond"}, "nobody"),
        ({"severity": "unheard-of"}, "on-call"),  # somebody must hear of it
        ({}, "on-call"),
    ],
)
def test_a_tier_has_its_receiver(labels: dict[str, str], receiver: str) -> None:
    given = [f"{name}={value}" for name, value in labels.items()]
    command = ("config", "routes", "test", f"--config.file={ALERTMANAGER}", f"--verify.receivers={receiver}")
    run(program("amtool"), *command, *given)


def test_receivers_lead_nowhere_and_hold_no_secret() -> None:
    hooks = [hook for each in read_yaml(ALERTMANAGER)["receivers"] for hook in each.get("webhook_configs", [])]
    assert hooks
    assert all(set(hook) == {"url", "send_resolved"} and ".invalid/" in hook["url"] for hook in hooks)


@pytest.mark.parametrize(
    ("cause", "quiet", "loud"),
    [
        ("MillraceWorkersGone", ["MillraceThroughputDrop", "MillraceAccuracyDrift"], ["MillraceDiskFilling"]),
        ("MillraceGatewaysGone", ["MillraceSlowTokens", "MillraceAccuracyDrift"], ["MillraceDiskFilling"]),
        ("MillraceNothingServed", ["MillraceThroughputDrop"], ["MillraceAccuracyDrift"]),
        # A release explains less, never nothing.
        ("MillraceDraining", ["MillraceThroughputDrop"], ["MillraceNothingServed", "MillraceAccuracyDrift"]),
        ("MillraceErrorBudgetBurn", ["MillraceErrorBudgetSlowBurn"], ["MillraceNothingServed"]),
        ("MillraceSaturatedAndQueueing", ["MillraceDeviceSaturated"], ["MillraceSlowFirstToken"]),
    ],
)
def test_a_cause_silences_its_shadows_of_the_same_model_and_region(
    cause: str, quiet: list[str], loud: list[str], alertmanager: Alertmanager
) -> None:
    """In a real Alertmanager: amtool knows nothing of inhibition. A region a case keeps cases apart."""
    here = f"of-{cause}"
    given = [labels(name, "millpond", here) for name in (cause, *quiet, *loud)]
    given += [labels(name, "millpond", f"{here}-elsewhere") for name in quiet]
    if "model" in labels(cause, "millpond", here):
        given += [labels(name, "other", here) for name in quiet]
    alertmanager.post(given)
    expected = {frozenset(labels(name, "millpond", here).items()) for name in quiet}
    deadline = time.monotonic() + 30
    while silent(alertmanager, here) != expected:
        assert time.monotonic() < deadline, silent(alertmanager, here)
        time.sleep(0.1)


def silent(alertmanager: Alertmanager, region: str) -> set[frozenset[tuple[str, str]]]:
    """The alerts of the regions so called that another one silences."""
    return {
        alert.labels
        for alert in alertmanager.alerts()
        if alert.is_inhibited and dict(alert.labels)["region"].startswith(region)
    }


def labels(name: str, model: str, region: str) -> dict[str, str]:
    """As Prometheus sends them; what concerns no model has no such label."""
    alert = next(each for each in ALERTS if each.name == name)
    own = {"alertname": name, "severity": alert.labels["severity"], "region": region}
    return {**own, "model": model} if "$labels.model" in alert.annotations["dashboard_url"] else own
