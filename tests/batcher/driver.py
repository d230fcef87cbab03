"""Runs an engine to its end and holds what comes out against the promises every run must keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from batcher.backend import BackendErrorKind, BackendLimits
from batcher.engine import Engine
from services.backends.scripted import ScriptedBackend
from wire.messages import Failed, Finished, Generate, SamplingParams, Tokens
from wire.queue import Append


@dataclass(slots=True)
class Story:
    """What was said about one request under one epoch."""

    start: int  # index of the first token it may say
    tokens: list[int] = field(default_factory=list)
    end: Finished | Failed | None = None

    @property
    def reason(self) -> str:
        """How it ended: a finish reason or an error code."""
        assert self.end is not None
        return self.end.reason if isinstance(self.end, Finished) else self.end.code


class Recorder:
    """Refuses gaps, repeats, words after the last word, and words about nobody."""

    def __init__(self) -> None:
        self.stories: dict[tuple[str, int], Story] = {}

    def expect(self, request_id: str, epoch: int, start: int) -> None:
        self.stories[request_id, epoch] = Story(start)

    def hear(self, appends: Sequence[Append]) -> None:
        for append in appends:
            event = append.event
            story = self.stories[event.request_id, append.epoch]
            assert story.end is None, f"{event} after {story.end}"
            if isinstance(event, Tokens):
                assert event.first_index == story.start + len(story.tokens)
                assert event.token_ids
                story.tokens.extend(event.token_ids)
            else:
                story.end = event
                if isinstance(event, Finished):
                    assert event.usage.completion_tokens == story.start + len(story.tokens)


class Run:
    """An engine on a scripted backend, checked after every step. Time is a number that `tick` moves."""

    def __init__(
        self,
        limits: BackendLimits,
        *,
        prefix_cache: bool = True,
        fault: Callable[[int], BackendErrorKind | None] = lambda forward: None,
        poison_token: int | None = None,
        step_s: float = 0.0,
        token_s: float = 0.0,
        target_itl_s: float = 0.0,
        min_prefill_tokens: int = 32,
        max_attempts: int = 3,
    ) -> None:
        self.time_s = 100.0
        self.limits = limits
        self.backend = ScriptedBackend(
            limits, step_s=step_s, token_s=token_s, fault=fault, poison_token=poison_token, sleep=self.tick
        )
        self.engine = Engine(
            self.backend,
            lambda: self.time_s,
            prefix_cache=prefix_cache,
            target_itl_s=target_itl_s,
            min_prefill_tokens=min_prefill_tokens,
            max_attempts=max_attempts,
        )
        self.recorder = Recorder()
        self.num_steps = 0

    def tick(self, seconds: float) -> None:
        self.time_s += seconds

    def add(self, generate: Generate, so_far: Sequence[int] = (), epoch: int = 1) -> None:
        self.recorder.expect(generate.request_id, epoch, len(so_far))
        self.engine.add(generate, so_far, epoch)

    def step(self) -> list[Append]:
        appends = self.engine.step()
        self.engine.check()
        self.recorder.hear(appends)
        self.num_steps += 1
        return appends

    def finish(self, at_most: int = 2_000) -> dict[str, Story]:
        """Step until nothing is left; everybody has had a last word and the pool is whole."""
        for _ in range(at_most):
            if not self.engine.has_work:
                break
            self.step()
        assert not self.engine.has_work, f"not finished after {at_most} steps"
        self.assert_whole()
        return {request_id: story for (request_id, _), story in self.recorder.stories.items()}

    def assert_whole(self) -> None:
        load = self.engine.load
        assert (load.running, load.waiting) == (0, 0)
        assert (load.free_blocks, load.kv_usage) == (load.total_blocks, 0.0)
        assert load.free_tokens == load.capacity_tokens


def generate(
    request_id: str = "r",
    prompt: Sequence[int] = (1, 2, 3),
    max_tokens: int = 4,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    stop: Sequence[int] = (),
    min_tokens: int = 0,
    tenant: str = "",
    priority: int = 0,
) -> Generate:
    """A request with the defaults that most tests want."""
    return Generate(
        request_id,
        "scripted",
        list(prompt),
        max_tokens,
        sampling=SamplingParams(temperature=temperature, seed=seed),
        stop_token_ids=list(stop),
        min_tokens=min_tokens,
        tenant=tenant,
        priority=priority,
    )
