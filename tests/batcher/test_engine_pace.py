"""Pace: a long prompt holds nobody up by more than a chunk, the share adapts, and a step's own cost stays small."""

from __future__ import annotations

import sys
from types import FrameType

import pytest

from batcher.engine import Engine
from services.backends.scripted import ScriptedBackend
from tests.backends import alone, scripted_limits
from tests.batcher.driver import Run, generate
from wire.messages import Tokens

LIMITS = scripted_limits(num_blocks=400, block_size=4, max_batch_tokens=16, max_batch_seqs=8, max_model_len=600)


def streams(run: Run, count: int) -> list[str]:
    """That many requests in mid-stream."""
    names = [f"stream{i}" for i in range(count)]
    for i, name in enumerate(names):
        run.add(generate(name, [i, 1, 2], 200))
    while run.engine.load.decode_tokens < 2 * count:
        run.step()
    return names


def test_while_a_long_prompt_is_computed_every_stream_gets_a_token_in_every_step() -> None:
    run = Run(LIMITS)
    names = streams(run, 4)
    run.add(generate("long", [5] * 300, 2))
    while not run.recorder.stories["long", 1].tokens:
        appends = run.step()
        told = sorted(append.event.request_id for append in appends if isinstance(append.event, Tokens))
        assert [name for name in told if name != "long"] == names
        assert run.engine.last_step is not None
        assert run.engine.last_step.num_prefill_tokens <= 16 - 4
    stories = run.finish()
    assert stories["long"].tokens == alone(generate("long", [5] * 300, 2), LIMITS.vocab_size)[0]


def test_steps_stay_under_the_target_while_streams_run_and_use_the_whole_budget_when_none_do() -> None:
    limits = scripted_limits(
        num_blocks=800, block_size=4, max_batch_tokens=256, max_batch_seqs=8, max_model_len=3000, vocab_size=20
    )
    run = Run(limits, step_s=0.005, token_s=0.001, target_itl_s=0.050, min_prefill_tokens=8)
    names = streams(run, 3)
    run.add(generate("long", [5] * 1200, 1))
    shares = []
    while not run.recorder.stories["long", 1].tokens:
        run.step()
        assert run.engine.last_step is not None
        if run.engine.last_step.num_decode_tokens:
            assert run.engine.last_step.step_s <= 0.050 + 1e-9
            shares.append(run.engine.last_step.num_prefill_tokens)
    # 5 ms a step, 3 ms for the streams: 42 prompt tokens would fill the 50 ms.
    assert shares[0] == 8
    assert max(shares) >= 30
    for name in names:
        run.engine.cancel(name)
    run.add(generate("alone", [6] * 700, 1))
    run.step()
    assert run.engine.last_step is not None
    assert run.engine.last_step.num_prefill_tokens == 256


def test_without_a_target_prompts_take_what_is_free() -> None:
    run = Run(LIMITS, step_s=10.0)
    streams(run, 2)
    run.add(generate("long", [5] * 40, 1))
    for _ in range(2):
        run.step()
        assert run.engine.last_step is not None
        assert run.engine.last_step.num_prefill_tokens == 14


def calls_of_a_step(engine: Engine) -> int:
    """How many Python functions a step calls: a measure of its cost that no busy neighbour can disturb."""
    calls = 0

    def count(frame: FrameType, kind: str, argument: object) -> None:
        nonlocal calls
        calls += kind in ("call", "c_call")

    sys.setprofile(count)
    try:
        engine.step()
    finally:
        sys.setprofile(None)
    return calls


def full_engine(num_waiting: int, num_blocks: int) -> Engine:
    limits = scripted_limits(num_blocks=num_blocks, block_size=4, max_batch_tokens=64, max_batch_seqs=4)
    engine = Engine(ScriptedBackend(limits))
    for i in range(4 + num_waiting):
        engine.add(generate(f"r{i}", [i % 50, i % 7, 3], 30))
    for _ in range(5):
        engine.step()
    assert engine.load.waiting >= num_waiting
    return engine


@pytest.mark.parametrize("num_blocks", [100, 10])
def test_a_thousand_waiting_requests_cost_a_step_nothing(num_blocks: int) -> None:
    few, many = full_engine(5, num_blocks), full_engine(1000, num_blocks)
    assert calls_of_a_step(many) <= calls_of_a_step(few) + 5


def test_a_decoding_sequence_costs_a_bounded_number_of_calls() -> None:
    def step_of(count: int) -> int:
        limits = scripted_limits(num_blocks=400, block_size=16, max_batch_seqs=32)
        engine = Engine(ScriptedBackend(limits))
        for i in range(count):
            engine.add(generate(f"r{i}", [i, 2, 3], 60))
        for _ in range(6):
            engine.step()
        return calls_of_a_step(engine)

    per_sequence = (step_of(32) - step_of(8)) / 24
    assert per_sequence < 120  # about 60 of the batcher, the rest of the scripted backend
