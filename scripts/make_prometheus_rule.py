"""The rules of deploy/prometheus/rules as one PrometheusRule, for clusters with the Prometheus Operator.

Kustomize cannot put a file into a field, so this is a copy, and a test holds it to the rules.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import yaml

DEPLOY: Final = Path(__file__).resolve().parents[1] / "deploy"
RULES: Final = DEPLOY / "prometheus/rules"
TARGET: Final = DEPLOY / "k8s/components/monitoring/prometheusrule.yaml"
HEAD: Final = "# Made of deploy/prometheus/rules by `python -m scripts.make_prometheus_rule`; do not edit.\n"


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # yaml has no types here
    """Expressions of several lines stay so."""


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def prometheus_rule() -> str:
    """The manifest's text, groups in the order of the files' names."""
    groups = [group for path in sorted(RULES.glob("*.yaml")) for group in yaml.safe_load(path.read_text())["groups"]]
    manifest = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "millrace"},
        "spec": {"groups": groups},
    }
    return HEAD + str(yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=120))


if __name__ == "__main__":
    TARGET.write_text(prometheus_rule())
