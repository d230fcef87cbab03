"""What a run has found, in numbers: for --json, for people, and for Prometheus."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import fmean

from prometheus_client import CollectorRegistry

from services.prober.run import Outcome
from services.prober.statistics import Interval, Paired, mean_interval, relative_drop, wilson
from services.telemetry.table import PROBE_METRICS, Instruments


@dataclass(frozen=True, slots=True)
class Report:
    """Shares from 0 to 1, likelihoods in nats a token. Without a baseline of this revision its fields are None, as the
    ends of a mean's interval are with too few items.
    """

    model: str
    items: int
    score: float
    score_low: float
    score_high: float
    agreement: float
    score_baseline: float | None
    drop_low: float | None
    drop_high: float | None
    agreement_baseline: float | None
    nll: float
    nll_low: float | None
    nll_high: float | None
    nll_baseline: float | None
    nll_rise_low: float | None
    nll_rise_high: float | None
    wrong: list[str]  # items
    missed: list[str]
    seconds: float

    @classmethod
    def of(cls, model_id: str, now: Outcome, before: Outcome | None) -> Report:
        interval = wilson(sum(now.whole.values()), len(now.whole))
        drop = None if before is None else relative_drop(Paired.of(before.whole, now.whole))
        likelihood = mean_interval([*now.nll.values()])
        has_likelihood = before is not None and before.nll.keys() == now.nll.keys()
        nll_before = before.nll if before is not None and has_likelihood else {}
        rise = mean_interval([now.nll[item] - nll for item, nll in nll_before.items()])
        return cls(
            model=model_id,
            items=len(now.whole),
            score=_share(now.whole),
            score_low=interval.low,
            score_high=interval.high,
            agreement=_share(now.step),
            score_baseline=None if before is None else _share(before.whole),
            drop_low=_low(drop),
            drop_high=_high(drop),
            agreement_baseline=None if before is None else _share(before.step),
            nll=fmean(now.nll.values()),
            nll_low=_low(likelihood),
            nll_high=_high(likelihood),
            nll_baseline=fmean(nll_before.values()) if nll_before else None,
            nll_rise_low=_low(rise),
            nll_rise_high=_high(rise),
            wrong=sorted(item for item, right in now.whole.items() if not right),
            missed=sorted(item for item, right in now.step.items() if not right),
            seconds=round(now.seconds, 3),
        )

    def as_json(self) -> str:
        return json.dumps(asdict(self))

    def as_text(self) -> str:
        lines = [
            f"{self.model}: {self.items} golden items in {self.seconds:.1f} s",
            f"score      {self.score:7.2%}   95 %: {self.score_low:.2%} to {self.score_high:.2%}",
            f"agreement  {self.agreement:7.2%}",
            f"nll        {self.nll:7.4f}   nats a token",
        ]
        if self.score_baseline is None or self.drop_low is None or self.drop_high is None:
            return "\n".join([*lines, "no baseline of this revision"])
        drop = 1 - self.score / self.score_baseline if self.score_baseline else 0.0
        lines[1] += f"   baseline {self.score_baseline:.2%}"
        lines[2] += f"   baseline {self.agreement_baseline:.2%}"
        if self.nll_baseline is not None:
            lines[3] += f"   baseline {self.nll_baseline:.4f}"
        if self.nll_rise_low is not None and self.nll_rise_high is not None:
            lines[3] += f"   rise, 95 %: {self.nll_rise_low:.4f} to {self.nll_rise_high:.4f}"
        return "\n".join([*lines, f"drop       {drop:7.2%}   95 %: {self.drop_low:.2%} to {self.drop_high:.2%}"])


class ProbeMetrics:
    """The last run that ended well."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gauges = Instruments(PROBE_METRICS, registry).gauges

    def show(self, report: Report, now_s: float) -> None:
        """`now_s`: Unix time."""
        values: Mapping[str, float | None] = {
            "millrace_probe_items": report.items,
            "millrace_probe_score": report.score,
            "millrace_probe_score_low": report.score_low,
            "millrace_probe_score_high": report.score_high,
            "millrace_probe_score_baseline": report.score_baseline,
            "millrace_probe_drop_low": report.drop_low,
            "millrace_probe_agreement": report.agreement,
            "millrace_probe_agreement_baseline": report.agreement_baseline,
            "millrace_probe_nll": report.nll,
            "millrace_probe_nll_low": report.nll_low,
            "millrace_probe_nll_high": report.nll_high,
            "millrace_probe_nll_baseline": report.nll_baseline,
            "millrace_probe_nll_rise_low": report.nll_rise_low,
            "millrace_probe_last_success_timestamp_seconds": now_s,
        }
        for name, value in values.items():
            if value is not None:
                self._gauges[name].labels(report.model).set(value)


def _low(interval: Interval | None) -> float | None:
    return None if interval is None else interval.low


def _high(interval: Interval | None) -> float | None:
    return None if interval is None else interval.high


def _share(answers: Mapping[str, bool]) -> float:
    return sum(answers.values()) / len(answers)
