"""Write Grafana's dashboards to deploy/grafana/dashboards. `--check` fails if one is stale."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Final

from scripts.dashboards.grafana import Dashboard
from scripts.dashboards.model import MODEL
from scripts.dashboards.overview import OVERVIEW
from scripts.dashboards.queue import QUEUE
from scripts.dashboards.release import RELEASE
from scripts.dashboards.tenants import TENANTS
from scripts.dashboards.worker import WORKER

TARGET: Final = Path(__file__).resolve().parents[1] / "deploy/grafana/dashboards"
DASHBOARDS: Final = (OVERVIEW, MODEL, WORKER, QUEUE, TENANTS, RELEASE)


def path_of(dashboard: Dashboard) -> Path:
    return TARGET / f"{dashboard.uid}.json"


def text_of(dashboard: Dashboard) -> str:
    return json.dumps(dashboard.as_json(), indent=1, ensure_ascii=False) + "\n"


def stale_files() -> list[str]:
    """The files that differ from what the tables say, that are missing, or that no table makes."""
    wanted = {path_of(each): text_of(each) for each in DASHBOARDS}
    found = {path: path.read_text() for path in TARGET.glob("*.json")}
    return sorted(path.name for path in wanted | found if wanted.get(path) != found.get(path))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if a file is stale")
    if parser.parse_args().check:
        stale = stale_files()
        print(f"stale: {', '.join(stale)}; run python -m scripts.make_dashboards" if stale else "as the tables say")
        return 1 if stale else 0
    for dashboard in DASHBOARDS:
        path_of(dashboard).write_text(text_of(dashboard))
    return 0


if __name__ == "__main__":
    sys.exit(main())
