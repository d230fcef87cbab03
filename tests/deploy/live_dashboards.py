"""`python -m tests.deploy.live_dashboards`: every query of every panel against a real installation that does something.

Redis, a gateway, a worker, a prober and Prometheus with our rules run as in a drill; requests are answered, refused,
resumed and too late. Prints how many numbers each query returned; the exit code is 1 if one returned none for no
reason.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.deploy.panel_queries import PanelQuery, ask_metadata, dashboards, num_points, queries
from tests.drills.monitoring import Prometheus, call
from tests.drills.prober import probing, true_exam
from tests.drills.stack import Size, Stack, clients
from tests.shipped import shipped_settings

RUN_S: Final = 15
PROBE_S: Final = 120
PACE: Final = 600  # an hour ago is six seconds ago, so that there are baselines
# Panel and legend of queries that may return nothing here, and why.
EMPTY: Final = {
    ("Firing", "firing"): "no alert fires",
    ("Firing over time", "{{severity}}"): "no alert fires",
    ("Refused by the queue", "{{code}}"): "the queue has room and a worker",
    ("Memory", "limit"): "this Redis has none",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """How many numbers a query returned, and why it may return none."""

    query: PanelQuery
    points: int

    @property
    def excuse(self) -> str:
        return EMPTY.get((self.query.panel, self.query.legend), "")

    @property
    def is_missing(self) -> bool:
        return not self.points and not self.excuse


@contextmanager
def busy_installation(store: Path, directory: Path) -> Iterator[Stack]:
    """One in which everything that the dashboards show has happened, but for faults."""
    stack = Stack(store, directory, PACE, Size(has_prober=True))
    with stack.open(), probing(stack, true_exam(stack)), clients(stack, every_s=0.3, max_tokens=30):
        with stack.gateway.client() as client:
            end_s = time.monotonic() + RUN_S
            while time.monotonic() < end_s:
                body = {"input_ids": list(range(100, 164)), "max_tokens": 20, "ignore_eos": True}
                answer = client.post("/generate", json=body)
                client.get(f"/streams/{answer.headers['x-generation-id']}", params={"from": 3})
                client.post("/generate", json={**body, "max_tokens": 600, "deadline_ms": 20})
                client.post("/generate", json={**body, "max_tokens": -1})
            await_probe(stack.prometheus)
        yield stack


def await_probe(prometheus: Prometheus) -> None:
    """The prober comes behind everybody else: its first run takes as long as the machine lets it."""
    end_s = time.monotonic() + PROBE_S
    while not call(f"http://{prometheus.address}/api/v1/query?query=millrace_probe_items")["data"]["result"]:
        if time.monotonic() > end_s:
            raise TimeoutError(f"no run of the prober has ended within {PROBE_S} s")
        time.sleep(1)
    time.sleep(2)  # the rules look again


def answers(stack: Stack) -> list[Answer]:
    """Of all queries, over the time that the installation has run."""
    end_s = time.time()
    found = []
    for dashboard in dashboards():
        choices = ask_metadata(stack.prometheus, dashboard)
        assert all(choices.values()), f"a variable of {dashboard['uid']} has no values: {choices}"
        for query in queries(dashboard):
            points = num_points(stack.prometheus, query, choices, end_s - 2 * RUN_S, end_s)
            found.append(Answer(query, points))
    return found


def main() -> int:
    with (
        tempfile.TemporaryDirectory(prefix="millrace-dashboards-") as directory,
        busy_installation(shipped_settings().store, Path(directory)) as stack,
    ):
        found = answers(stack)
    for answer in found:
        print(f"{answer.points:6}  {answer.query.name}{f'  ({answer.excuse})' if not answer.points else ''}")
    missing = sum(answer.is_missing for answer in found)
    print(f"{len(found)} queries, {missing} without data and without a reason")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
