"""What a dashboard is made of, and its JSON as Grafana 10 and later read it.

The only file that knows Grafana's fields: pages (overview.py and its neighbours) say what is shown and what is normal.
Places on the grid and panel ids are counted here, so that nothing overlaps and a panel is one entry of a table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Final, Literal

SCHEMA_VERSION: Final = 39  # of Grafana 10.4 and 11; newer ones read it
WIDTH: Final = 24  # columns of the grid
TAG: Final = "millrace"
RUNBOOKS_URL: Final = "https://github.com/millrace/millrace/blob/main/docs/runbooks"
DATASOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}

Kind = Literal["lines", "areas", "number", "heatmap", "table"]  # areas are lines, one on top of the other
Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Query:
    """One query. `legend` names its lines ({{label}} is replaced), or its column of a table."""

    expr: str
    legend: str
    unit: str = ""  # of a table's column


@dataclass(frozen=True, slots=True)
class Limit:
    """From `value` on, numbers have this color; among lines it is a dashed one."""

    value: float
    color: str


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. `meaning` says what it shows and what is normal; `unit` is one of Grafana's.

    `alerts`: those that watch the same numbers; the panel links to their runbooks. `urls`: of a table's column, where
    `${__value.text}` is the cell.
    """

    title: str
    meaning: str
    unit: str
    queries: Sequence[Query]
    kind: Kind = "lines"
    width: int = 8
    limits: Sequence[Limit] = ()
    below: str = "green"  # the color under all limits
    can_be_negative: bool = False  # else the axis begins at 0
    highest: float | None = None  # where the axis ends, if it is known
    alerts: Sequence[str] = ()
    hidden: Sequence[str] = ()  # a table's columns that nobody needs
    urls: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """Panels side by side, in as many lines as they need, under one title."""

    title: str
    panels: Sequence[Panel]
    height: int = 8


@dataclass(frozen=True, slots=True)
class Variable:
    """A choice at the top: the values of `query`, several at once, all of them to begin with."""

    name: str
    label: str
    query: str
    regex: str = ""  # what of a value is the choice


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard. `uid` is part of its address: links and alerts hold it, so it never changes."""

    uid: str
    title: str
    about: str
    rows: Sequence[Row]
    variables: Sequence[Variable] = ()
    since: str = "now-3h"

    def panels(self) -> list[Panel]:
        return [panel for row in self.rows for panel in row.panels]

    def as_json(self) -> Json:
        return {
            "uid": self.uid,
            "title": f"Millrace / {self.title}",
            "description": self.about,
            "tags": [TAG],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": False,
            "graphTooltip": 1,  # one cross-hair in all panels
            "time": {"from": self.since, "to": "now"},
            "refresh": "30s",
            "timezone": "browser",
            "links": _links(),
            "templating": {"list": [_datasource_variable(), *(_variable(each) for each in self.variables)]},
            "annotations": {"list": [_annotation(*each) for each in EVENTS]},
            "panels": list(_laid_out(self.rows)),
        }


# What is drawn as a vertical line through all panels: name, query, text, color.
EVENTS: Final = (
    (
        "Alerts", 'max by (alertname, model) (ALERTS{alertstate="firing",severity=~"P0|P1"})',
        "{{alertname}} {{model}}", "red",
    ),
    ("Drains", "max by (instance) (millrace_draining) == 1", "{{instance}} drains", "blue"),
)  # fmt: skip


def _annotation(name: str, expr: str, text: str, color: str) -> Json:
    switches = {"enable": True, "hide": False, "iconColor": color}
    return {"name": name, "datasource": DATASOURCE, "expr": expr, "step": "60s", "titleFormat": text, **switches}


def _links() -> list[Json]:
    same = {"keepTime": True, "includeVars": True}
    others = {"type": "dashboards", "title": "Millrace", "tags": [TAG], "asDropdown": False, **same}
    runbooks = {"type": "link", "title": "Runbooks", "url": f"{RUNBOOKS_URL}/README.md", "icon": "doc"}
    return [others, {**runbooks, "tags": [], "targetBlank": True}]


def _datasource_variable() -> Json:
    return {"type": "datasource", "name": "datasource", "label": "Data source", "query": "prometheus", "current": {}}


def _variable(variable: Variable) -> Json:
    everything = {"text": ["All"], "value": ["$__all"]}
    return {
        "type": "query",
        "name": variable.name,
        "label": variable.label,
        "datasource": DATASOURCE,
        "query": {"query": variable.query, "refId": "Variable"},
        "definition": variable.query,
        "regex": variable.regex,
        "refresh": 2,  # when the time range changes
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "current": everything,
    }


# ---- places ----


def _laid_out(rows: Sequence[Row]) -> Iterator[Json]:
    """Panels from left to right, line by line, each row under its title."""
    number, top = 0, 0
    for row in rows:
        place = {"x": 0, "y": top, "w": WIDTH, "h": 1}
        number += 1
        yield {"type": "row", "id": number, "title": row.title, "collapsed": False, "gridPos": place, "panels": []}
        left, top = 0, top + 1
        for panel in row.panels:
            if left + panel.width > WIDTH:
                left, top = 0, top + row.height
            number += 1
            place = {"x": left, "y": top, "w": panel.width, "h": row.height}
            yield {"id": number, "gridPos": place, **_panel(panel)}
            left += panel.width
        top += row.height


# ---- panels ----

_LEGEND: Final = {"displayMode": "list", "placement": "bottom", "showLegend": True}
_LINES: Final = {"drawStyle": "line", "lineWidth": 1, "showPoints": "auto", "spanNulls": False}
_AREAS: Final = {**_LINES, "fillOpacity": 25, "stacking": {"mode": "normal", "group": "A"}}
_TOOLTIP: Final = {"mode": "multi", "sort": "desc"}

# Grafana's name of each kind, its options, and what its fields are drawn with.
_KINDS: Final[Mapping[Kind, tuple[str, Json, Json]]] = {
    "lines": ("timeseries", {"legend": _LEGEND, "tooltip": _TOOLTIP}, {**_LINES, "fillOpacity": 8}),
    "areas": ("timeseries", {"legend": _LEGEND, "tooltip": _TOOLTIP}, _AREAS),
    "number": (
        "stat",
        {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "value",
         "graphMode": "area", "textMode": "auto", "justifyMode": "auto", "orientation": "auto"},
        {},
    ),
    "heatmap": (
        "heatmap",
        {"calculate": False, "cellGap": 1, "color": {"mode": "scheme", "scheme": "Spectral", "steps": 64},
         "exemplars": {"color": "orange"}, "filterValues": {"le": 1e-9}, "legend": {"show": True},
         "rowsFrame": {"layout": "auto"},
         "tooltip": {"show": True, "mode": "single", "yHistogram": False}},
        {},
    ),
    "table": ("table", {"showHeader": True, "cellHeight": "sm"}, {"align": "auto", "filterable": False}),
}  # fmt: skip


def _panel(panel: Panel) -> Json:
    kind, options, custom = _KINDS[panel.kind]
    if panel.kind == "heatmap":
        options = {**options, "yAxis": {"axisPlacement": "left", "unit": panel.unit}}
    made: Json = {
        "type": kind,
        "title": panel.title,
        "description": panel.meaning,
        "datasource": DATASOURCE,
        "targets": [_target(panel, each, letter) for each, letter in zip(panel.queries, ascii_uppercase, strict=False)],
        "fieldConfig": {"defaults": _defaults(panel, custom), "overrides": _columns(panel)},
        "options": options,
        "links": [
            {"title": f"Runbook: {alert}", "url": f"{RUNBOOKS_URL}/{alert}.md", "targetBlank": True}
            for alert in panel.alerts
        ],
    }
    if panel.kind == "table":
        hide = {"excludeByName": dict.fromkeys(("Time", *panel.hidden), True), "indexByName": {}, "renameByName": {}}
        made["transformations"] = [{"id": "merge", "options": {}}, {"id": "organize", "options": hide}]
    return made


def _target(panel: Panel, query: Query, letter: str) -> Json:
    is_now = panel.kind == "table"
    return {
        "refId": letter,
        "datasource": DATASOURCE,
        "editorMode": "code",
        "expr": query.expr,
        "legendFormat": query.legend,
        "format": {"table": "table", "heatmap": "heatmap"}.get(panel.kind, "time_series"),
        "instant": is_now,
        "range": not is_now,
        # Trace ids of single requests, which latencies carry; once a panel is enough.
        "exemplar": "_seconds_bucket" in query.expr and letter == "A" and not is_now,
    }


def _defaults(panel: Panel, custom: Json) -> Json:
    steps: list[Json] = [{"value": None, "color": panel.below}]
    steps += [{"value": each.value, "color": each.color} for each in panel.limits]
    draws_lines = panel.kind in ("lines", "areas")
    if draws_lines:
        custom = {**custom, "thresholdsStyle": {"mode": "dashed" if panel.limits else "off"}}
    defaults: Json = {
        "unit": panel.unit,
        "color": {"mode": "palette-classic" if draws_lines else "thresholds"},
        "thresholds": {"mode": "absolute", "steps": steps},
        "custom": custom,
    }
    ends = {"min": None if panel.can_be_negative else 0, "max": panel.highest}
    return defaults | {name: value for name, value in ends.items() if value is not None}


def _columns(panel: Panel) -> list[Json]:
    """A table's columns: the name, unit and link of each. Grafana calls the value of query A `Value #A`."""
    if panel.kind != "table":
        return []
    several = len(panel.queries) > 1
    settings: list[tuple[str, Json]] = [
        (f"Value #{letter}" if several else "Value", {"displayName": each.legend, "unit": each.unit or panel.unit})
        for each, letter in zip(panel.queries, ascii_uppercase, strict=False)
    ]
    settings += [
        (column, {"links": [{"title": "Runbook", "url": url, "targetBlank": True}]})
        for column, url in (panel.urls or {}).items()
    ]
    return [
        {
            "matcher": {"id": "byName", "options": column},
            "properties": [{"id": name, "value": value} for name, value in given.items()],
        }
        for column, given in settings
    ]
