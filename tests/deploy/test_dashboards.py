"""The dashboards: as their tables say, valid, whole, of metrics that exist, and not empty where something happens."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from scripts.dashboards.grafana import DATASOURCE, RUNBOOKS_URL, TAG
from scripts.make_dashboards import stale_files
from services.settings import Settings
from services.telemetry.table import REQUEST_METRICS, TABLES
from tests.deploy.alert_rules import PROMETHEUS, ROOT, RUNBOOKS, matchers_in, metrics_in, read_yaml, rules
from tests.deploy.live_dashboards import EMPTY, answers, busy_installation
from tests.deploy.panel_queries import (
    BUILT_IN,
    Json,
    PanelQuery,
    dashboards,
    filled_in,
    panels,
    queries,
    variables_in,
)
from tests.drills.monitoring import program

GRAFANA = ROOT / "deploy/grafana"
UIDS = {f"millrace-{page}" for page in ("overview", "model", "worker", "queue", "tenants", "release")}
ALERTS = [rule for rule in rules() if rule.is_alert]
RECORDED = {rule.name for rule in rules() if not rule.is_alert}
# What Prometheus itself adds, with the labels that we ask for.
PROMETHEUS_OWN = {"up": {"job"}, "ALERTS": {"alertname", "alertstate", "severity", "model"}}
TARGET_LABELS = {"job", "instance"}
# The labels of each series of ours; a histogram has three.
SERIES = {
    f"{spec.exposed}{part}": {*spec.labels, *(["le"] if part == "_bucket" else [])}
    for table in TABLES.values()
    for spec in table
    for part in (("_bucket", "_count", "_sum") if spec.kind == "histogram" else ("",))
}

every_dashboard = pytest.mark.parametrize("dashboard", dashboards(), ids=lambda dashboard: dashboard["uid"])


def all_queries() -> list[PanelQuery]:
    return [query for dashboard in dashboards() for query in queries(dashboard)]


# --- the files --------------------------------------------------------------------------------------------------------


def test_the_files_are_what_the_tables_make() -> None:
    assert stale_files() == []


def test_addresses_are_those_that_others_know() -> None:
    assert {dashboard["uid"] for dashboard in dashboards()} == UIDS


@every_dashboard
def test_no_data_source_is_named(dashboard: Json) -> None:
    def used(part: object) -> Iterator[object]:
        if isinstance(part, dict):
            for name, value in part.items():
                yield from [value] if name == "datasource" else used(value)
        elif isinstance(part, list):
            for value in part:
                yield from used(value)

    assert list(used(dashboard))
    assert all(each == DATASOURCE for each in used(dashboard))
    assert dashboard["templating"]["list"][0]["name"] == "datasource"
    assert all("datasource" in target for panel in panels(dashboard) for target in panel["targets"])


@every_dashboard
def test_panels_have_ids_of_their_own_and_do_not_overlap(dashboard: Json) -> None:
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    places = [tuple(panel["gridPos"][name] for name in "xywh") for panel in dashboard["panels"]]
    for x, y, width, height in places:
        assert x >= 0 <= y
        assert width > 0 < height
        assert x + width <= 24
    for (x, y, width, height), (x2, y2, width2, height2) in itertools.combinations(places, 2):
        assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y


@every_dashboard
def test_a_panel_says_what_it_shows_in_which_unit_and_what_is_normal(dashboard: Json) -> None:
    for panel in panels(dashboard):
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert re.search(r"Normal: |Promised: ", panel["description"]), panel["title"]
        assert panel["targets"], panel["title"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert all(target["legendFormat"] for target in panel["targets"]), panel["title"]


# --- the queries ------------------------------------------------------------------------------------------------------


def parses(expressions: Sequence[str], directory: Path) -> bool:
    """Whether Prometheus takes them all, as the queries of rules."""
    path = directory / "queries.json"  # which is YAML too
    recorded = [{"record": f"query:{number}", "expr": expr} for number, expr in enumerate(expressions)]
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": recorded}]}))
    done = subprocess.run([program("promtool"), "check", "rules", path], capture_output=True, timeout=60)
    return done.returncode == 0


def test_prometheus_takes_every_query(tmp_path: Path) -> None:
    events = [event["expr"] for dashboard in dashboards() for event in dashboard["annotations"]["list"]]
    assert parses([filled_in(expr, {}) for expr in [*events, *(query.expr for query in all_queries())]], tmp_path)
    assert not parses(["sum by (le (up)"], tmp_path)


@pytest.mark.parametrize("query", all_queries(), ids=lambda query: query.name)
def test_a_query_reads_series_and_labels_that_exist(query: PanelQuery) -> None:
    expr = filled_in(query.expr, {})
    read = metrics_in(expr)
    assert read
    assert read <= SERIES.keys() | RECORDED | PROMETHEUS_OWN.keys()
    labels = {metric: SERIES.get(metric, PROMETHEUS_OWN.get(metric, set())) | TARGET_LABELS for metric in read}
    for metric, label, _ in matchers_in(expr):
        assert label in labels[metric] or (metric in RECORDED and label == metric.split(":")[0])
    grouped = {label.strip() for found in re.findall(r"by \(([^)]*)\)", expr) for label in found.split(",")}
    assert grouped <= set().union(*labels.values())
    for label in re.findall(r"{{(\w+)}}", query.legend):
        assert label in grouped or label in {metric.split(":")[0] for metric in read}, "it would be empty"


@every_dashboard
def test_a_query_asks_only_for_choices_that_there_are(dashboard: Json) -> None:
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    asked = set().union(*(variables_in(query.expr) for query in queries(dashboard)))
    assert asked - BUILT_IN.keys() <= names
    for variable in dashboard["templating"]["list"][1:]:
        (metric,) = re.findall(r"label_values\(([\w:]+)", variable["definition"])
        assert metric in SERIES


def test_every_metric_of_ours_is_shown_somewhere() -> None:
    shown = set().union(*(metrics_in(filled_in(query.expr, {})) for query in all_queries()))
    for table in TABLES.values():
        for spec in table:
            assert shown & {spec.exposed, *(f"{spec.exposed}_{part}" for part in ("bucket", "count"))}, spec.name


def test_latencies_are_shown_as_quantiles_and_the_first_token_as_a_heatmap() -> None:
    found = {
        (quantile, metric.removesuffix("_bucket"))
        for query in all_queries()
        for quantile in re.findall(r"histogram_quantile\(([\d.]+), ", query.expr)
        for metric in metrics_in(filled_in(query.expr, {}))
    }
    for spec in REQUEST_METRICS:
        if spec.kind == "histogram" and spec.name.endswith("_seconds"):
            assert {("0.5", spec.name), ("0.95", spec.name), ("0.99", spec.name)} <= found
    heatmaps = [panel for each in dashboards() for panel in panels(each) if panel["type"] == "heatmap"]
    shown = {metric for panel in heatmaps for metric in metrics_in(filled_in(panel["targets"][0]["expr"], {}))}
    assert "vllm:time_to_first_token_seconds_bucket" in shown
    assert all(target["format"] == "heatmap" for panel in heatmaps for target in panel["targets"])


# --- from one page to the next ----------------------------------------------------------------------------------------


@every_dashboard
def test_dashboards_lead_to_each_other_with_what_is_chosen(dashboard: Json) -> None:
    assert TAG in dashboard["tags"]
    (others,) = [link for link in dashboard["links"] if link["type"] == "dashboards"]
    assert others["tags"] == [TAG]
    assert others["includeVars"]
    assert others["keepTime"]


@every_dashboard
def test_links_lead_to_runbooks_that_exist(dashboard: Json) -> None:
    links = [*dashboard["links"], *(link for panel in panels(dashboard) for link in panel["links"])]
    urls = [link["url"] for link in links if "url" in link]
    assert len(urls) > 1
    for url in urls:
        assert url.startswith(f"{RUNBOOKS_URL}/")
        assert (RUNBOOKS / url.removeprefix(f"{RUNBOOKS_URL}/")).is_file(), url


def test_every_alert_on_our_metrics_has_a_panel_that_leads_to_its_runbook() -> None:
    linked = {link["url"] for dashboard in dashboards() for panel in panels(dashboard) for link in panel["links"]}
    known = SERIES.keys() | RECORDED | {"up"}
    assert {alert.annotations["runbook_url"] for alert in ALERTS if metrics_in(alert.expr) & known} <= linked


def test_alerts_lead_to_a_dashboard_with_the_choice_that_they_make() -> None:
    choices = {each["uid"]: {variable["name"] for variable in each["templating"]["list"]} for each in dashboards()}
    for alert in ALERTS:
        url = urlsplit(alert.annotations["dashboard_url"])
        assert {name.removeprefix("var-") for name in parse_qs(url.query)} <= choices[url.path.removeprefix("/d/")]


def test_alerts_on_our_metrics_lead_to_a_dashboard_that_shows_them() -> None:
    shown = {
        each["uid"]: {link["url"] for panel in panels(each) for link in panel["links"] if "url" in link}
        for each in dashboards()
    }
    known = SERIES.keys() | RECORDED | {"up"}
    for alert in ALERTS:
        if metrics_in(alert.expr) & known:
            uid = urlsplit(alert.annotations["dashboard_url"]).path.removeprefix("/d/")
            assert alert.annotations["runbook_url"] in shown[uid], (alert.name, uid)


def test_firing_alerts_of_all_tiers_are_counted_on_the_overview() -> None:
    (overview,) = [dashboard for dashboard in dashboards() if dashboard["uid"] == "millrace-overview"]
    counted = {
        value
        for query in queries(overview)
        for metric, label, value in matchers_in(query.expr)
        if (metric, label) == ("ALERTS", "severity")
    }
    assert {alert.labels["severity"] for alert in ALERTS} - {"info"} <= counted


# --- in Grafana and in a running installation -------------------------------------------------------------------------


def test_grafana_is_told_of_the_pace_of_scrapes_and_reads_dashboards_from_files() -> None:
    (source,) = read_yaml(GRAFANA / "provisioning/datasources/prometheus.yaml")["datasources"]
    assert source["type"] == DATASOURCE["type"]
    pace = read_yaml(PROMETHEUS / "prometheus.yml")["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == pace
    (provider,) = read_yaml(GRAFANA / "provisioning/dashboards/millrace.yaml")["providers"]
    assert (provider["type"], provider["allowUiUpdates"]) == ("file", False)


def test_every_query_returns_something_from_a_busy_installation_or_has_a_reason_not_to(
    shipped_settings: Settings, tmp_path: Path
) -> None:
    with busy_installation(shipped_settings.store, tmp_path) as stack:
        found = answers(stack)
    assert [answer.query.name for answer in found if answer.is_missing] == []
    assert EMPTY.keys() <= {(answer.query.panel, answer.query.legend) for answer in found}
