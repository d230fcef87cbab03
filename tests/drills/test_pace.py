"""Rules at a faster pace are the same rules."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.deploy.alert_rules import PROMETHEUS, metrics_in, read_yaml
from tests.drills.monitoring import program
from tests.drills.pace import faster, faster_query, faster_rules, write_configuration


@pytest.mark.parametrize(
    ("duration", "expected"),
    [("5m", "5s"), ("1h", "60s"), ("1d", "1440s"), ("1w", "10080s"), ("90s", "2s"), ("15s", "1s")],  # 1 s at least
)
def test_a_duration_is_divided(duration: str, expected: str) -> None:
    assert faster(duration, 60) == expected


def test_a_duration_of_two_units_is_refused() -> None:
    with pytest.raises(ValueError, match="1h30m"):
        faster("1h30m", 60)


def test_only_ranges_and_offsets_of_a_query_change() -> None:
    query = 'rate(a:rate5m{b="1h"}[1m]) > 14 * 86400 and c[1d] offset 1h'
    assert faster_query(query, 60) == 'rate(a:rate5m{b="1h"}[4s]) > 14 * 86400 and c[1440s] offset 60s'


@pytest.mark.parametrize("path", sorted((PROMETHEUS / "rules").glob("*.yaml")), ids=lambda path: path.stem)
def test_all_rules_are_there_and_read_the_same(path: Path) -> None:
    before = [rule for group in read_yaml(path)["groups"] for rule in group["rules"]]
    after = [rule for group in faster_rules(read_yaml(path), 60)["groups"] for rule in group["rules"]]
    assert [set(rule) for rule in after] == [set(rule) for rule in before]
    assert [metrics_in(rule["expr"]) for rule in after] == [metrics_in(rule["expr"]) for rule in before]
    assert [rule["expr"] for rule in after] != [rule["expr"] for rule in before]


def test_prometheus_takes_the_faster_configuration(tmp_path: Path) -> None:
    targets = {"millrace-gateway": ["127.0.0.1:1"]}
    written = write_configuration(PROMETHEUS, tmp_path, 60, targets, "127.0.0.1:2")
    checked = subprocess.run([program("promtool"), "check", "config", str(written)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    jobs = {each["job_name"]: each["static_configs"] for each in read_yaml(written)["scrape_configs"]}
    assert jobs["millrace-gateway"] == [{"targets": ["127.0.0.1:1"]}]
    assert set(jobs) == {"millrace-gateway", "millrace-worker", "millrace-prober"}
