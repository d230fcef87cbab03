"""Our Prometheus configuration with time running faster, so that a drill need not wait for minutes and days.

Every duration of every rule is divided by the pace: ranges, offsets, `for` and `keep_firing_for`. Scrapes and
evaluations come every second, which sets the floors: a rate needs at least two samples, so a range has four. Thresholds
stay what they are, and so do the durations that are plain numbers of seconds (an hour without a probe, 30 s in the
queue): those alerts cannot be drilled this way.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped,unused-ignore]

SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
TICK_S: Final = 1
SHORTEST_RANGE_S: Final = 4 * TICK_S

_DURATION: Final = re.compile(r"(\d+)([smhdw])")
_IN_QUERY: Final = re.compile(r"(\[|\boffset )(\d+[smhdw])")


def faster(duration: str, pace: int, floor_s: int = TICK_S) -> str:
    """`duration` divided by `pace`, in whole seconds, `floor_s` at least. Raises ValueError for one like 1h30m."""
    parts = _DURATION.fullmatch(duration)
    if parts is None:
        raise ValueError(f"{duration!r} is not one number with one unit")
    seconds = int(parts[1]) * SECONDS[parts[2]]
    return f"{max(floor_s, round(seconds / pace))}s"


def faster_query(query: str, pace: int) -> str:
    """A query whose ranges and offsets are shorter."""

    def shorter(found: re.Match[str]) -> str:
        return found[1] + faster(found[2], pace, SHORTEST_RANGE_S if found[1] == "[" else TICK_S)

    return _IN_QUERY.sub(shorter, query)


def faster_rules(rules: Any, pace: int) -> Any:
    """A rule file whose every duration is shorter."""

    def faster_rule(rule: dict[str, Any]) -> dict[str, Any]:
        holds = {name: faster(rule[name], pace) for name in ("for", "keep_firing_for") if name in rule}
        return rule | holds | {"expr": faster_query(rule["expr"], pace)}

    return {"groups": [group | {"rules": [faster_rule(rule) for rule in group["rules"]]} for group in rules["groups"]]}


def write_configuration(
    source: Path, target: Path, pace: int, targets: dict[str, list[str]], alertmanager: str
) -> Path:
    """Write the configuration of the folder `source` into `target`, at this pace, for these scrape targets by job.

    Returns the path of its prometheus.yml.
    """
    configuration = yaml.safe_load((source / "prometheus.yml").read_text())
    configuration["global"] |= {"scrape_interval": f"{TICK_S}s", "evaluation_interval": f"{TICK_S}s"}
    configuration["alerting"]["alertmanagers"] = [{"static_configs": [{"targets": [alertmanager]}]}]
    configuration["scrape_configs"] = [
        {"job_name": each["job_name"], "static_configs": [{"targets": targets.get(each["job_name"], [])}]}
        for each in configuration["scrape_configs"]
    ]
    (target / "rules").mkdir()
    for path in (source / "rules").glob("*.yaml"):
        rules = faster_rules(yaml.safe_load(path.read_text()), pace)
        (target / "rules" / path.name).write_text(yaml.safe_dump(rules, sort_keys=False))
    written = target / "prometheus.yml"
    written.write_text(yaml.safe_dump(configuration, sort_keys=False))
    return written
