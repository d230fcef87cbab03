"""The rules of deploy/prometheus as data, and the names that their PromQL reads.

promtool can check a query but does not say what is in it; a few substitutions do, for the PromQL that our rules use.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml  # type: ignore[import-untyped,unused-ignore]

ROOT: Final = Path(__file__).resolve().parents[2]
PROMETHEUS: Final = ROOT / "deploy/prometheus"
ALERTMANAGER: Final = ROOT / "deploy/alertmanager/alertmanager.yml"
RUNBOOKS: Final = ROOT / "docs/runbooks"

# by (a, b), on (a): these lists are of labels, not of metrics.
_GROUPING: Final = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)")
_STRING: Final = re.compile(r'"(?:[^"\\]|\\.)*"')
_SELECTOR: Final = re.compile(r"([A-Za-z_:][\w:]*)\{([^}]*)\}")
_MATCHER: Final = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"([^"]*)"')
_NAME: Final = re.compile(r"(?<![\w:.])[A-Za-z_:][\w:]*(?!\w|:|\s*\()")
_KEYWORDS: Final = {"and", "or", "unless", "offset", "bool"}


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: `name` of what it records, or of the alert."""

    name: str
    is_alert: bool
    expr: str
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)


def read_yaml(path: Path) -> Any:
    """A file of ours as dicts and lists."""
    return yaml.safe_load(path.read_text())


def rules() -> list[Rule]:
    """All rules of all files."""
    return [
        Rule(
            each.get("alert") or each["record"],
            "alert" in each,
            each["expr"],
            each.get("labels", {}),
            each.get("annotations", {}),
        )
        for path in sorted((PROMETHEUS / "rules").glob("*.yaml"))
        for group in read_yaml(path)["groups"]
        for each in group["rules"]
    ]


def metrics_in(expr: str) -> set[str]:
    """The series that a query reads."""
    bare = _GROUPING.sub(" ", _SELECTOR.sub(r"\1", _STRING.sub('""', expr)))
    return set(_NAME.findall(re.sub(r"\[[^\]]*\]", "", bare))) - _KEYWORDS


def matchers_in(expr: str) -> Iterator[tuple[str, str, str]]:
    """(metric, label, value) of each matcher of a query."""
    for metric, inside in _SELECTOR.findall(expr):
        for label, value in _MATCHER.findall(inside):
            yield metric, label, value
