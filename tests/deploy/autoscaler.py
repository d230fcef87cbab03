"""What KEDA and the HPA do with a metric, as documented, second by second and without a cluster.

The HPA: kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale, sections "Algorithm details",
"Stabilization window", "Scaling policies" (an external metric with an average value). KEDA 2.21: documentation of
ScaledObject, fallback and the two scalers; that a fallback starts nobody at zero replicas is in its scale executor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tests.deploy.rendered import quantity

HPA_EVERY_S: Final = 15
TOLERANCE: Final = 0.1

Reading = float | None  # None: the metric could not be had


@dataclass(frozen=True, slots=True)
class Direction:
    """How fast replicas may change one way."""

    window_s: int
    policies: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, behavior: Mapping[str, Any]) -> Direction:
        return cls(behavior.get("stabilizationWindowSeconds", 0), behavior["policies"])


@dataclass
class Hpa:
    """One autoscaler; `targets` are average values, one a metric."""

    targets: Sequence[float]
    low: int
    high: int
    up: Direction
    down: Direction
    recommended: list[tuple[int, int]] = field(default_factory=list)  # (second, replicas)
    changes: list[tuple[int, int]] = field(default_factory=list)  # (second, replicas more or less)

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Hpa:
        """From an HPA's manifest."""
        targets = [quantity(each["external"]["target"]["averageValue"]) for each in spec["metrics"]]
        behavior = spec["behavior"]
        up, down = Direction.of(behavior["scaleUp"]), Direction.of(behavior["scaleDown"])
        return cls(targets, spec["minReplicas"], spec["maxReplicas"], up, down)

    def decide(self, now_s: int, current: int, readings: Sequence[Reading]) -> int:
        """How many replicas there should be; `readings` in the order of the targets."""
        wanted = self._wanted(current, readings)
        self.recommended.append((now_s, wanted))
        ups = [each for at_s, each in self.recommended if at_s >= now_s - self.up.window_s]
        downs = [each for at_s, each in self.recommended if at_s >= now_s - self.down.window_s]
        stable = min(max(current, min(ups)), max(downs))
        if stable > current:
            stable = min(stable, max(self._limit(now_s, current, each, 1) for each in self.up.policies))
        elif stable < current:
            stable = max(stable, min(self._limit(now_s, current, each, -1) for each in self.down.policies))
        stable = min(max(stable, self.low), self.high)
        if stable != current:
            self.changes.append((now_s, stable - current))
        return stable

    def _wanted(self, current: int, readings: Sequence[Reading]) -> int:
        proposals = []
        for target, reading in zip(self.targets, readings, strict=True):
            if reading is not None:
                is_near = abs(reading / (target * current) - 1) <= TOLERANCE
                proposals.append(current if is_near else math.ceil(reading / target))
        if not proposals or (None in readings and max(proposals) < current):
            return current  # what is not known takes nobody away
        return min(max(*proposals, self.low), self.high)

    def _limit(self, now_s: int, current: int, policy: Mapping[str, Any], sign: int) -> int:
        recent = [
            change for at_s, change in self.changes if at_s > now_s - policy["periodSeconds"] and change * sign > 0
        ]
        start = current - sum(recent)
        if policy["type"] == "Pods":
            return start + sign * int(policy["value"])
        change = start * (1 + sign * policy["value"] / 100)
        return int(math.ceil(change) if sign > 0 else math.floor(change))


@dataclass
class Keda:
    """A ScaledObject: it moves replicas between none and one itself, and feeds an HPA with the rest."""

    spec: Mapping[str, Any]
    hpa: Hpa
    failures: list[int]
    active_s: int = 0  # when a trigger was last active

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Keda:
        """From a ScaledObject's manifest."""
        metadata = [trigger["metadata"] for trigger in spec["triggers"]]
        targets = [float(each.get("threshold") or each["targetValue"]) for each in metadata]
        behavior = spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"]
        up, down = Direction.of(behavior["scaleUp"]), Direction.of(behavior["scaleDown"])
        hpa = Hpa(targets, max(1, spec["minReplicaCount"]), spec["maxReplicaCount"], up, down)
        return cls(spec, hpa, [0] * len(targets))

    def decide(self, now_s: int, current: int, readings: Sequence[Reading]) -> int:
        """How many replicas there should be; `readings` in the order of the triggers."""
        seen = [self._seen(each, reading) for each, reading in zip(self.spec["triggers"], readings, strict=True)]
        if now_s % self.spec["pollingInterval"] == 0:
            current = self._activate(now_s, current, seen)
        if current and now_s % HPA_EVERY_S == 0:
            current = self.hpa.decide(
                now_s, current, [self._fall_back(i, current, each) for i, each in enumerate(seen)]
            )
        return current

    def _seen(self, trigger: Mapping[str, Any], reading: Reading) -> Reading:
        """Nothing counts as nought, unless the trigger says that it is an error."""
        ignores_null = trigger["type"] == "prometheus" and trigger["metadata"].get("ignoreNullValues", "true") == "true"
        return 0.0 if reading is None and ignores_null else reading

    def _activate(self, now_s: int, current: int, seen: Sequence[Reading]) -> int:
        if any(each for each in seen):
            self.active_s = now_s
            return current or max(1, self.spec["minReplicaCount"])
        if None in seen and self.spec["fallback"]["replicas"]:
            return current  # the fallback is the HPA's, and at zero there is none
        is_over = now_s - self.active_s > self.spec["cooldownPeriod"]
        return 0 if is_over and self.spec["minReplicaCount"] == 0 else current

    def _fall_back(self, index: int, current: int, reading: Reading) -> Reading:
        if reading is not None:
            self.failures[index] = 0
            return reading
        self.failures[index] += 1
        fallback = self.spec["fallback"]
        if self.failures[index] <= fallback["failureThreshold"]:
            return None
        least = current if fallback["behavior"] == "currentReplicasIfHigher" else 0
        return float(max(least, fallback["replicas"]) * self.hpa.targets[index])
