"""The queries of the dashboards, read from their JSON and put to a Prometheus as Grafana does it."""

from __future__ import annotations

import json
import math
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from scripts.make_dashboards import TARGET
from tests.drills.monitoring import Prometheus, call

Json = dict[str, Any]
# Grafana's own, as long as a drill's scrapes every second need them.
BUILT_IN: Final = {"__rate_interval": "8s", "__range": "60s"}
ANYTHING: Final = ".*"

_VARIABLE: Final = re.compile(r"\$(\w+)")
_LABEL_VALUES: Final = re.compile(r"label_values\((.+), (\w+)\)")


@dataclass(frozen=True, slots=True)
class PanelQuery:
    """One query of one panel. `is_now`: an instant's, else a range's."""

    dashboard: str
    panel: str
    legend: str
    expr: str
    is_now: bool

    @property
    def name(self) -> str:
        return f"{self.dashboard}: {self.panel}: {self.legend}"


def dashboards() -> list[Json]:
    """All of them, as they are shipped."""
    return [json.loads(path.read_text()) for path in sorted(TARGET.glob("*.json"))]


def panels(dashboard: Json) -> list[Json]:
    """Those that show something: titles of rows do not."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries(dashboard: Json) -> list[PanelQuery]:
    return [
        PanelQuery(dashboard["uid"], panel["title"], target["legendFormat"], target["expr"], target["instant"])
        for panel in panels(dashboard)
        for target in panel["targets"]
    ]


def variables_in(expr: str) -> set[str]:
    return set(_VARIABLE.findall(expr))


def filled_in(expr: str, choices: Mapping[str, str]) -> str:
    """The query with what is chosen in place of variables; everything where nothing is."""
    return _VARIABLE.sub(lambda found: (BUILT_IN | dict(choices)).get(found[1], ANYTHING), expr)


def ask_metadata(prometheus: Prometheus, dashboard: Json) -> dict[str, str]:
    """What Grafana's variables stand for when all is chosen: their values, found as Grafana finds them."""
    choices: dict[str, str] = {}
    for variable in dashboard["templating"]["list"]:
        if variable["type"] != "query":
            continue
        parts = _LABEL_VALUES.fullmatch(filled_in(variable["definition"], choices))
        assert parts is not None, f"{variable['definition']} is no query for the values of a label"
        given = urllib.parse.urlencode({"match[]": parts[1]})
        values = call(f"http://{prometheus.address}/api/v1/label/{parts[2]}/values?{given}")["data"]
        if variable["regex"]:
            found = [re.search(variable["regex"].strip("/"), value) for value in values]
            values = sorted({each[1] for each in found if each is not None})
        # As in Grafana: escaped for a regular expression that stands in a string.
        choices[variable["name"]] = "|".join(re.escape(value) for value in values).replace("\\", "\\\\")
    return choices


def num_points(
    prometheus: Prometheus, query: PanelQuery, choices: Mapping[str, str], start_s: float, end_s: float
) -> int:
    """How many numbers it returns between two moments (Unix time), or at the later one."""
    expr = filled_in(query.expr, choices)
    if query.is_now:
        path, given = "query", {"query": expr, "time": str(end_s)}
    else:
        path, given = "query_range", {"query": expr, "start": str(start_s), "end": str(end_s), "step": "1"}
    answer = call(f"http://{prometheus.address}/api/v1/{path}?{urllib.parse.urlencode(given)}")
    series = answer["data"]["result"]
    points = [point for each in series for point in each.get("values", [each["value"]] if "value" in each else [])]
    return sum(not math.isnan(float(value)) for _, value in points)
