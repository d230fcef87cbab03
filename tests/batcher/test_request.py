"""The request's own arithmetic, and the transitions of its status."""

from __future__ import annotations

from itertools import product

import pytest

from batcher.request import TRANSITIONS, Request, RequestStatus
from wire.messages import Generate, Timings, Usage


def make(
    *,
    prompt: tuple[int, ...] = (1, 2, 3),
    so_far: tuple[int, ...] = (),
    stop: tuple[int, ...] = (),
    min_tokens: int = 0,
) -> Request:
    generate = Generate("r", "m", list(prompt), 8, stop_token_ids=list(stop), min_tokens=min_tokens, tenant="t")
    return Request(generate, so_far, epoch=3, now=10.0, arrival=5)


def test_a_resumed_request_stands_where_an_uninterrupted_one_would() -> None:
    resumed, fresh = make(so_far=(7, 8)), make()
    fresh.token_ids.extend((7, 8))
    assert resumed.token_ids == fresh.token_ids
    assert (resumed.num_output_tokens, resumed.num_pending_tokens, resumed.num_computed_tokens) == (2, 5, 0)
    assert resumed.usage() == fresh.usage() == Usage(3, 2, 0)


@pytest.mark.parametrize(("old", "new"), list(product(RequestStatus, RequestStatus)))
def test_the_status_moves_only_along_the_table(old: RequestStatus, new: RequestStatus) -> None:
    request = make()
    request.status = old
    if new in TRANSITIONS[old]:
        request.move_to(new)
        assert request.status is new
    else:
        with pytest.raises(ValueError, match="this is a bug"):
            request.move_to(new)


def test_end_states_lead_nowhere() -> None:
    ends = {status for status, after in TRANSITIONS.items() if not after}
    assert ends == {RequestStatus.FINISHED, RequestStatus.FAILED, RequestStatus.DROPPED}
    for status in RequestStatus:
        request = make()
        request.status = status
        assert request.has_ended == (status in ends)


@pytest.mark.parametrize(
    ("token_id", "min_tokens", "so_far", "ends"),
    [(9, 0, (), True), (8, 0, (), False), (9, 1, (), False), (9, 1, (4,), True), (9, 3, (4, 9), False)],
)
def test_a_stop_token_ends_only_after_min_tokens(
    token_id: int, min_tokens: int, so_far: tuple[int, ...], ends: bool
) -> None:
    assert make(stop=(9,), min_tokens=min_tokens, so_far=so_far).ends_with(token_id) is ends


def test_block_hashes_grow_with_the_tokens_and_never_change() -> None:
    request = make(prompt=tuple(range(10)))
    first = request.block_hashes(2, 4)
    request.token_ids.extend((10, 11))
    assert request.block_hashes(3, 4)[:2] == first
    assert request.block_hashes(3, 4) == make(prompt=tuple(range(12))).block_hashes(3, 4)


def test_a_hash_covers_everything_before_its_block() -> None:
    one, other = make(prompt=(1, 2, 5, 6)), make(prompt=(3, 4, 5, 6))
    assert one.block_hashes(2, 2)[1] != other.block_hashes(2, 2)[1]


def test_timings_are_spans_and_spans_that_never_began_are_zero() -> None:
    request = make()
    assert request.timings() == Timings()
    request.first_scheduled_s, request.first_token_s, request.last_token_s = 10.5, 11.5, 13.5
    request.preemptions = 2
    assert request.timings() == Timings(queue_ms=500.0, prefill_ms=1000.0, decode_ms=2000.0, preemptions=2)
