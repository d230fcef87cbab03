"""The drills: for each tier, how to bring about what its alerts are about, and how to mend it.

A drill has one installation and one or more acts. An act's `cause` is a context: entering it breaks something, leaving
it mends it. Between the two all its alerts must come, and after it all must go.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Final

from tests.drills.prober import missed_exam, probing, true_exam
from tests.drills.stack import Size, Stack, clients


class DrillFailed(Exception):
    """An alert did not come, did not go, or was there before its cause."""


def finds(query: str) -> Callable[[Stack], bool]:
    """Whether the query has a result."""
    return lambda stack: bool(stack.prometheus.query(query))


@dataclass(frozen=True, slots=True)
class Act:
    """One fault. `alerts` must come within `comes_s`, and within `goes_s` of its end it is_mended and they are gone."""

    words: str
    cause: Callable[[Stack], AbstractContextManager[None]]
    alerts: Sequence[str]
    is_mended: Callable[[Stack], bool]
    comes_s: float = 60.0
    goes_s: float = 90.0


@dataclass(frozen=True, slots=True)
class Drill:
    """`load` runs from beginning to end; `is_ready` is when the first act may begin."""

    acts: Sequence[Act]
    size: Size = Size()
    load: Callable[[Stack], AbstractContextManager[None]] = lambda stack: clients(stack, every_s=1.0, max_tokens=8)
    is_ready: Callable[[Stack], bool] = finds("millrace_queue_up == 1")


@contextmanager
def workers_stand_still(stack: Stack) -> Iterator[None]:
    """SIGSTOP: they neither work nor say goodbye."""
    for worker in stack.workers:
        worker.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for worker in stack.workers:
            worker.process.send_signal(signal.SIGCONT)


@contextmanager
def redis_stands_still(stack: Stack) -> Iterator[None]:
    """SIGSTOP: connections stand and nothing answers."""
    stack.redis.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        stack.redis.send_signal(signal.SIGCONT)


@contextmanager
def model_is_worse(stack: Stack) -> Iterator[None]:
    """The prober asks for what the model does not say; afterwards, to the end, it asks again for what it does."""
    true, missed = true_exam(stack), missed_exam(stack)
    with probing(stack, missed):
        yield
    stack.keep(probing(stack, true))


@contextmanager
def long_answers(stack: Stack) -> Iterator[None]:
    """More long answers at once than the KV pool holds."""
    with clients(stack, every_s=0.03, max_tokens=200, prompt_tokens=72):
        yield


DRILLS: Final[Mapping[str, Drill]] = {
    "p0": Drill(
        [
            Act(
                "all workers stand still under load",
                workers_stand_still,
                ["MillraceNothingServed", "MillraceThroughputDrop", "MillraceWorkersGone"],
                finds("model:millrace_generated_tokens:rate5m > 20"),
            )
        ],
        Size(workers=2),
        lambda stack: clients(stack, every_s=0.2, max_tokens=24),
        finds("model:millrace_generated_tokens:baseline > 20"),
    ),
    "p1": Drill(
        [
            Act(
                "the model answers worse than its baseline",
                model_is_worse,
                ["MillraceAccuracyDrift"],
                finds("millrace_probe_score >= millrace_probe_score_baseline"),
            ),
            Act(
                "Redis stands still",
                redis_stands_still,
                ["MillraceRedisUnreachable"],
                finds("millrace_queue_up == 1"),
            ),
        ],
        Size(has_prober=True),
    ),
    "p2": Drill(
        [
            Act(
                "more long answers than the KV pool holds",
                long_answers,
                ["MillraceKvPressure"],  # MillraceDeviceSaturated too, where nobody else uses the core
                finds("vllm:kv_cache_usage_perc < 0.5"),
                comes_s=90,
            )
        ],
        Size(kv_memory_bytes=4 * 2**20, is_slow=True),
    ),
}


def run_drill(stack: Stack, drill: Drill, say: Callable[[str], None]) -> None:
    """Raises DrillFailed. `say` gets one line for each thing that happens, with its time since the cause."""
    with drill.load(stack):
        _wait("the installation is ready", lambda: drill.is_ready(stack), 180)
        for act in drill.acts:
            _run_act(stack, act, say)


def _run_act(stack: Stack, act: Act, say: Callable[[str], None]) -> None:
    early = set(act.alerts) & {alert.name for alert in stack.alertmanager.alerts()}
    if early:
        raise DrillFailed(f"before the cause there is already {', '.join(sorted(early))}")
    seen: dict[str, float] = {}

    def look(start: float) -> set[str]:
        """The names of what is there; a new one is said."""
        alerts = stack.alertmanager.alerts()
        for alert in alerts:
            if alert.name not in seen:
                seen[alert.name] = time.monotonic() - start
                silent = ", silenced by another" if alert.is_inhibited else ""
                say(f"  {seen[alert.name]:5.1f} s  {alert.name} ({alert.severity}{silent})")
        return {alert.name for alert in alerts}

    with act.cause(stack):
        start = time.monotonic()
        say(f"{act.words}:")
        _wait(f"{', '.join(act.alerts)} fire", lambda: look(start) >= set(act.alerts), act.comes_s)
    mended = time.monotonic()
    say("mended:")
    _wait("what was mended is well", lambda: act.is_mended(stack), act.goes_s)
    say(f"  {time.monotonic() - mended:5.1f} s  it is well again")
    left = set(act.alerts)
    while left:
        gone = left - {alert.name for alert in stack.alertmanager.alerts()}
        for name in sorted(gone):
            say(f"  {time.monotonic() - mended:5.1f} s  {name} is over")
        left -= gone
        if time.monotonic() > mended + act.goes_s:
            raise DrillFailed(f"after {act.goes_s:g} s there is still {', '.join(sorted(left))}")
        time.sleep(0.25)


def _wait(what: str, holds: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        if time.monotonic() > deadline:
            raise DrillFailed(f"{what}: not within {limit_s:g} s")
        time.sleep(0.25)
