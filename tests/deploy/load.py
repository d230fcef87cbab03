"""Workers under a load, as a fluid: tokens come in, wait or run, and leave as fast as ready workers compute them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from tests.deploy.autoscaler import Reading

SCRAPE_EVERY_S: Final = 15
START_S: Final = 40  # until a new worker is ready: image there, model loaded
CAPACITY: Final = 87_376.0  # KV tokens of a worker, as the manifests size it
STAY_S: Final = 8.0  # how long a request keeps its place in a worker

Sample = tuple[Mapping[str, str], float]  # labels with __name__, value


def demand(samples: Sequence[Sample]) -> Reading:
    """The scaling query's arithmetic; None where the query has no result.

    For each model the tokens of all states (of gateways the largest) over a worker's capacity; all models together.
    """
    tokens: dict[tuple[str, str], float] = {}
    capacity: dict[str, float] = {}
    for labels, value in samples:
        model = labels["model_name"]
        if labels["__name__"] == "millrace_queue_tokens":
            key = (model, labels["state"])
            tokens[key] = max(tokens.get(key, 0.0), value)
        elif labels["__name__"] == "millrace_replica_capacity_tokens":
            capacity[model] = max(capacity.get(model, 0.0), value)
    shares = [value / capacity[model] for (model, _), value in tokens.items() if model in capacity]
    return sum(shares) if shares else None


class Scaler(Protocol):
    def decide(self, now_s: int, current: int, readings: Sequence[Reading]) -> int: ...


@dataclass
class Cluster:
    """Two gateways, their Prometheus, and workers. `offered` is the load by second, in workers' worth."""

    offered: Callable[[int], float]
    replicas: int
    is_prometheus_dead: Callable[[int], bool] = lambda _: False
    outstanding: float = 0.0
    started_s: list[int] = field(default_factory=list)  # of each worker
    scraped: Reading = None
    history: list[tuple[int, float]] = field(default_factory=list)  # by second: replicas, outstanding in workers' worth

    def __post_init__(self) -> None:
        self.started_s = [-START_S] * self.replicas

    def run(self, scaler: Scaler, until_s: int, num_triggers: int = 1) -> None:
        for now_s in range(until_s):
            ready = sum(now_s - at_s >= START_S for at_s in self.started_s)
            done = min(self.outstanding, ready * CAPACITY) / STAY_S
            self.outstanding += self.offered(now_s) * CAPACITY / STAY_S - done
            if self.outstanding < 1:  # a fluid never ends; tokens do
                self.outstanding = 0.0
            if now_s % SCRAPE_EVERY_S == 0:
                self.scraped = None if self.is_prometheus_dead(now_s) else demand(self.samples(ready))
            readings = [self.scraped, self._waiting(ready)][:num_triggers]
            self._scale(now_s, scaler.decide(now_s, len(self.started_s), readings))
            self.history.append((len(self.started_s), self.outstanding / CAPACITY))

    def samples(self, ready: int) -> list[Sample]:
        """What both gateways say."""
        running = min(self.outstanding, ready * CAPACITY)
        states = {"waiting": self.outstanding - running, "running": running}
        found: list[Sample] = []
        for instance in ("a", "b"):
            common = {"model_name": "millpond@1", "instance": instance}
            tokens = {"__name__": "millrace_queue_tokens", **common}
            found += [({**tokens, "state": state}, value) for state, value in states.items()]
            found.append(({"__name__": "millrace_replica_capacity_tokens", **common}, CAPACITY))
        return found

    def _waiting(self, ready: int) -> float:
        """Requests of 512 tokens that no worker has, as a gateway's own /metrics says."""
        return float(max(0.0, self.outstanding - ready * CAPACITY) // 512)

    def _scale(self, now_s: int, wanted: int) -> None:
        while len(self.started_s) < wanted:
            self.started_s.append(now_s)
        del self.started_s[wanted:]

    def replicas_at(self, second: int) -> int:
        return self.history[second][0]
