"""The CUDA backend's own logic, on a device made of numpy: graphs, padding, looking ahead, errors, memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher.backend import BackendError, BackendErrorKind
from batcher.engine import Engine
from kernels.cuda.device import CudaError
from services.backends.cuda import Bucket, CudaBackend, kind_of, round_up_to_power
from tests.backends import Chunk, forward, packed
from tests.services.cuda_emulation import emulated_backend
from wire.messages import Failed, Finished, Generate, SamplingParams, Tokens

Requests = Sequence[Generate]


def request(number: int, prompt_tokens: int, new_tokens: int, temperature: float = 0.0) -> Generate:
    ids = np.random.default_rng(number).integers(0, 300, prompt_tokens).tolist()
    sampling = SamplingParams(temperature=temperature, seed=number + 1)
    return Generate(f"r{number}", "pond", ids, new_tokens, sampling)


def answers(backend: CudaBackend, requests: Requests, *, late: Requests = ()) -> dict[str, list[int]]:
    """Every request's tokens; those in `late` come one after another while the others run."""
    engine = Engine(backend)
    tokens: dict[str, list[int]] = {each.request_id: [] for each in (*requests, *late)}
    waiting = list(late)
    for each in requests:
        engine.add(each)
    steps = 0
    while engine.has_work or waiting:
        if waiting and steps % 3 == 2:
            engine.add(waiting.pop(0))
        for append in engine.step():
            assert not isinstance(append.event, Failed), append.event
            if isinstance(append.event, Tokens):
                tokens[append.event.request_id] += append.event.token_ids
        steps += 1
    engine.check()
    return tokens


PLAIN, _ = emulated_backend(use_graphs=False)
REQUESTS = [request(0, 5, 12), request(1, 30, 9, 0.9), request(2, 1, 20), request(3, 250, 16, 1.2)]


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_graphs_and_looking_ahead_change_no_token(count: int, look_ahead: bool) -> None:
    backend, device = emulated_backend(look_ahead=look_ahead)
    assert answers(backend, REQUESTS[:count]) == answers(PLAIN, REQUESTS[:count])
    assert device.captures > 0
    backend.close()


def test_requests_that_come_and_go_are_not_disturbed_by_wrong_guesses() -> None:
    backend, _ = emulated_backend(look_ahead=True)
    late = [request(10 + number, 3 + number, 4 + number % 3, 0.8) for number in range(8)]
    assert answers(backend, REQUESTS[:2], late=late) == answers(PLAIN, REQUESTS[:2], late=late)


@settings(max_examples=8, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.0, 1.0])), min_size=1, max_size=7))
def test_any_load_gives_the_plain_backends_tokens(shapes: list[tuple[int, int, float]]) -> None:
    backend, _ = emulated_backend(look_ahead=True)
    requests = [request(number, *shape) for number, shape in enumerate(shapes)]
    assert answers(backend, requests[::2], late=requests[1::2]) == answers(PLAIN, requests[::2], late=requests[1::2])


def test_a_steady_stream_is_computed_ahead_and_never_across_a_block() -> None:
    """250 + 16 tokens cross the end of a block of 256: the device cannot know the next block, and must not guess."""
    backend, _ = emulated_backend(look_ahead=True, batch_tokens=256)
    engine = Engine(backend)
    engine.add(request(3, 250, 16))
    ahead = []
    while engine.has_work:
        engine.step()
        ahead.append(backend.is_ahead)
    # Step 0 is the prompt, step 1 captures the graph; step 6 computes position 255, the last of its block, and step 7
    # the first of a longer context, whose graph is captured then.
    assert ahead == [False] * 2 + [True] * 4 + [False] * 2 + [True] * (len(ahead) - 8)


def test_graphs_are_captured_before_they_are_needed() -> None:
    backend, device = emulated_backend(batch_seqs=4)
    backend.prepare(blocks=2)
    captures = device.captures
    assert captures == 6  # 1, 2, 4 rows with 1 and 2 blocks
    answers(backend, [request(number, 9, 5) for number in range(4)])
    assert device.captures == captures


def test_padding_rows_write_nothing() -> None:
    """Three rows in a bucket of four: the fourth must not touch block 0, which belongs to somebody."""
    backend, _ = emulated_backend()
    ids = list(range(40))
    owner = forward(backend, [Chunk(ids, 0, 40, [0])])
    for start in (20, 21):
        forward(backend, [Chunk(ids, start, start + 1, [block]) for block in (5, 6, 7)])
    assert forward(backend, [Chunk(ids, 39, 40, [0])]).token_ids == owner.token_ids


def test_a_step_whose_logits_are_wanted_is_not_overtaken() -> None:
    """Given tokens are compared with the logits: those of a step that was guessed ahead would be another's."""
    forced = Generate("forced", "pond", [3, 4, 5], 12, forced_ids=list(range(20, 32)))

    def likelihood(backend: CudaBackend) -> float | None:
        engine = Engine(backend)
        for each in (*REQUESTS[:2], forced):
            engine.add(each)
        ends: dict[str, Finished] = {}
        while engine.has_work:
            for append in engine.step():
                if isinstance(append.event, Finished):
                    ends[append.event.request_id] = append.event
        return ends["forced"].logprob

    backend, _ = emulated_backend(look_ahead=True)
    found = likelihood(backend)
    assert found is not None
    assert found == likelihood(PLAIN)


def test_logits_that_are_gone_are_refused_and_not_made_up() -> None:
    backend, _ = emulated_backend(look_ahead=True)
    chunk = Chunk(list(range(12)), 10, 11, [1])
    forward(backend, [Chunk(chunk.token_ids, 0, 10, [1])])
    forward(backend, [chunk])  # captures
    output = backend.forward(*packed([chunk], backend.limits.block_size))
    assert backend.is_ahead
    with pytest.raises(RuntimeError, match="look_ahead"):
        output.read_logits()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (CudaError("cuMemAlloc", 2, "CUDA_ERROR_OUT_OF_MEMORY"), BackendErrorKind.CAPACITY),
        (RuntimeError("Failed to allocate memory for requested buffer of size 99"), BackendErrorKind.CAPACITY),
        (RuntimeError("cuBLAS error 3 in a product of 1 x 2 x 3"), BackendErrorKind.CAPACITY),
        (MemoryError(), BackendErrorKind.CAPACITY),
        (CudaError("cuEventSynchronize", 700, "CUDA_ERROR_ILLEGAL_ADDRESS"), BackendErrorKind.FATAL),
        (CudaError("cuEventSynchronize", 214, "CUDA_ERROR_ECC_UNCORRECTABLE"), BackendErrorKind.FATAL),
        (RuntimeError("CUDNN failure 4000"), BackendErrorKind.FATAL),
    ],
)
def test_what_fails_on_the_device_says_what_the_batcher_may_do(error: Exception, kind: BackendErrorKind) -> None:
    assert kind_of(error) is kind
    backend, device = emulated_backend()
    device.fails_with = error
    with pytest.raises(BackendError) as caught:
        forward(backend, [Chunk([1, 2, 3], 0, 3, [0])])
    assert caught.value.kind is kind


def test_a_step_that_did_not_fit_is_tried_again_smaller_and_loses_nothing() -> None:
    backend, device = emulated_backend()
    engine = Engine(backend)
    requests = [request(number, 20, 6) for number in range(3)]
    for each in requests:
        engine.add(each)
    tokens: dict[str, list[int]] = {each.request_id: [] for each in requests}
    steps = 0
    while engine.has_work:
        if steps in (1, 3):
            device.fails_with = CudaError("cuMemAlloc", 2, "CUDA_ERROR_OUT_OF_MEMORY")
        for append in engine.step():
            if isinstance(append.event, Tokens):
                tokens[append.event.request_id] += append.event.token_ids
        steps += 1
    assert tokens == answers(PLAIN, requests)


def test_closing_gives_all_device_memory_back() -> None:
    backend, device = emulated_backend(look_ahead=True)
    answers(backend, REQUESTS[:2])
    assert device.allocations > 0
    backend.close()
    assert device.allocations == 0


@pytest.mark.parametrize(("value", "most", "expected"), [(1, 256, 1), (3, 256, 4), (8, 256, 8), (9, 12, 12), (5, 1, 1)])
def test_sizes_are_rounded_up_to_powers_of_two_within_the_limit(value: int, most: int, expected: int) -> None:
    assert round_up_to_power(value, most) == expected


def test_buckets_are_values() -> None:
    assert Bucket(1, 2) == Bucket(1, 2)
    assert len({Bucket(1, 2), Bucket(1, 2), Bucket(2, 1)}) == 2
