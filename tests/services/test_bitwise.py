"""The promise on the real kernels: a request's tokens AND logits are the same bits, whatever else happens to it.

Batched = isolated, chunked = whole, preempted = unpreempted, resumed = uninterrupted, prefix cached = computed, one
thread = two. Each example runs random arrivals through an engine over the w8a8 artifact and compares every logits row
with the same request run alone, unchunked, in a pool of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batcher.engine import Engine
from services.backends.onnxruntime import OnnxRuntimeBackend
from services.backends.sizing import StepLimits, bytes_per_block
from services.loading import StoredModel
from tests.services.recording import RecordingBackend
from wire.messages import Failed, Finished, Generate, SamplingParams, Tokens

VOCABULARY = 200  # of the model's; small, so that prompts share prefixes


@dataclass(frozen=True)
class Arrival:
    """A request and the step at which it comes in."""

    generate: Generate
    at_step: int


class OneModel:
    """Backends of one artifact in the sizes that the properties need; opening one costs more than an example."""

    def __init__(self, model: StoredModel) -> None:
        self._model = model
        self._open: dict[tuple[int, int, int], OnnxRuntimeBackend] = {}

    def backend(self, *, blocks: int = 512, batch_tokens: int = 512, threads: int = 2) -> RecordingBackend:
        key = (blocks, batch_tokens, threads)
        if key not in self._open:
            kv_memory_bytes = blocks * bytes_per_block(self._model.manifest)
            limits = StepLimits(batch_tokens, min(64, batch_tokens), kv_memory_bytes, threads, shares_cores=True)
            self._open[key] = OnnxRuntimeBackend(self._model.directory, self._model.manifest, limits)
        return RecordingBackend(self._open[key])

    def close(self) -> None:
        for backend in self._open.values():
            backend.close()


@pytest.fixture(scope="module")
def one_model(shipped: StoredModel) -> Iterator[OneModel]:
    model = OneModel(shipped)
    yield model
    model.close()


@st.composite
def arrivals(draw: st.DrawFn, longest_tail: int = 60, most_new: int = 12) -> list[Arrival]:
    shared = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=0, max_size=40))
    found = []
    for index in range(draw(st.integers(1, 6))):
        tail = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=longest_tail))
        prompt = (shared if draw(st.booleans()) else []) + tail
        sampling = SamplingParams(
            temperature=draw(st.sampled_from([0.0, 0.0, 0.8, 1.5])),
            top_k=draw(st.sampled_from([0, 0, 20])),
            top_p=draw(st.sampled_from([1.0, 0.9])),
            seed=index + 1,
        )
        generate = Generate(f"r{index}", "m", prompt, draw(st.integers(1, most_new)), sampling)
        found.append(Arrival(generate, draw(st.integers(0, 10))))
    return found


def run(backend: RecordingBackend, requests: list[Arrival], *, logged: int = 0) -> dict[str, list[int]]:
    """Run to the end; `logged` tokens of each answer are given as already produced elsewhere (resume)."""
    engine = Engine(backend)
    waiting, ended = list(requests), set[str]()
    tokens: dict[str, list[int]] = {each.generate.request_id: [] for each in requests}
    step = 0
    while waiting or engine.has_work:
        for arrival in [each for each in waiting if each.at_step <= step]:
            waiting.remove(arrival)
            engine.add(arrival.generate, (), 1)
        for append in engine.step() if engine.has_work else []:
            match append.event:
                case Tokens(request_id, first_index, token_ids):
                    assert first_index == len(tokens[request_id]) + logged
                    tokens[request_id] += token_ids
                case Finished(request_id):
                    ended.add(request_id)
                case Failed() as failed:
                    pytest.fail(f"{failed}")
        engine.check()
        step += 1
        assert step < 5000
    assert ended == set(tokens)
    return tokens


def alone(one_model: OneModel, requests: list[Arrival]) -> tuple[RecordingBackend, dict[str, list[int]]]:
    backend, tokens = one_model.backend(), dict[str, list[int]]()
    for arrival in requests:
        tokens |= run(backend, [replace(arrival, at_step=0)])
    return backend, tokens


def assert_same_bits(seen: RecordingBackend, expected: RecordingBackend) -> None:
    assert seen.rows.keys() == expected.rows.keys()
    for key, row in expected.rows.items():
        np.testing.assert_array_equal(seen.rows[key].view(np.uint32), row.view(np.uint32), err_msg=str(key))


slow = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@slow
@given(requests=arrivals())
def test_batched_with_random_arrivals_equals_isolated(one_model: OneModel, requests: list[Arrival]) -> None:
    expected, tokens = alone(one_model, requests)
    seen = one_model.backend()
    assert run(seen, requests) == tokens
    assert_same_bits(seen, expected)


@slow
@given(requests=arrivals(), chunk=st.sampled_from([1, 3, 16, 33]))
def test_chunked_prefill_equals_whole(one_model: OneModel, requests: list[Arrival], chunk: int) -> None:
    expected, tokens = alone(one_model, requests)
    seen = one_model.backend(batch_tokens=chunk)
    assert run(seen, requests) == tokens
    assert_same_bits(seen, expected)


@slow
@given(requests=arrivals(longest_tail=40, most_new=40))
def test_preempted_in_a_tiny_pool_equals_unpreempted(one_model: OneModel, requests: list[Arrival]) -> None:
    expected, tokens = alone(one_model, requests)
    seen = one_model.backend(blocks=8)  # 128 tokens: one of these requests always fits, two that grow do not
    assert run(seen, requests) == tokens
    assert_same_bits(seen, expected)


@slow
@given(requests=arrivals())
def test_one_thread_equals_two(one_model: OneModel, requests: list[Arrival]) -> None:
    seen, expected = one_model.backend(threads=1), one_model.backend(threads=2)
    assert run(seen, requests) == run(expected, requests)
    assert_same_bits(seen, expected)


@slow
@given(requests=arrivals(), data=st.data())
def test_resumed_at_any_token_equals_uninterrupted(
    one_model: OneModel, requests: list[Arrival], data: st.DataObject
) -> None:
    arrival = requests[0]
    expected, whole = alone(one_model, [arrival])
    tokens = whole[arrival.generate.request_id]
    logged = data.draw(st.integers(0, len(tokens) - 1))
    seen = one_model.backend()
    engine = Engine(seen)
    engine.add(arrival.generate, tokens[:logged], 2)
    rest: list[int] = []
    while engine.has_work:
        for append in engine.step():
            assert append.epoch == 2
            if isinstance(append.event, Tokens):
                assert append.event.first_index == logged + len(rest)
                rest += append.event.token_ids
    assert tokens[:logged] + rest == tokens
    for key, row in seen.rows.items():
        assert row.tobytes() == expected.rows[key].tobytes()


def test_the_properties_do_batch_and_do_preempt(one_model: OneModel) -> None:
    """The examples above prove something only if batches form and pools run out."""
    requests = [Arrival(Generate(f"r{i}", "m", [i + 1] * 31, 40, SamplingParams(seed=i)), 0) for i in range(6)]
    wide = one_model.backend()
    run(wide, requests)
    assert wide.largest_batch == 6
    engine = Engine(one_model.backend(blocks=8))
    for arrival in requests:
        engine.add(arrival.generate, (), 1)
    while engine.has_work:
        engine.step()
        engine.check()
    assert engine.load.preemptions > 0
