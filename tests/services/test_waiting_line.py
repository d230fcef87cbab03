"""The order of waiting requests: what any sequence of arrivals, leases and returns must keep."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.queues.waiting_line import Place, WaitingLine
from wire.queue import LeaseBudget

MAX_OVERTAKES = 5
arrivals = st.lists(st.tuples(st.integers(-1, 1), st.integers(1, 100)), max_size=30)  # priority, tokens


def budget(max_requests: int, max_tokens: int, capacity_tokens: int = 100) -> LeaseBudget:
    return LeaseBudget("w", ("m",), max_requests, max_tokens, capacity_tokens)


def line_of(requests: list[tuple[int, int]]) -> tuple[WaitingLine, dict[str, Place]]:
    line = WaitingLine(MAX_OVERTAKES)
    places = {f"r{i}": Place(-priority, 0, i, tokens, f"r{i}") for i, (priority, tokens) in enumerate(requests)}
    for place in places.values():
        line.add("m", place)
    return line, places


@given(arrivals, st.integers(0, 10), st.integers(0, 300), st.integers(1, 100))
def test_what_is_picked_fits_the_budget_and_is_in_order(
    requests: list[tuple[int, int]], max_requests: int, max_tokens: int, capacity_tokens: int
) -> None:
    line, places = line_of(requests)
    picked = [places[each] for each in line.pick(budget(max_requests, max_tokens, capacity_tokens))]
    assert picked == sorted(picked)
    assert len(picked) <= max_requests
    assert sum(place.tokens for place in picked if place.tokens <= capacity_tokens) <= max_tokens


@given(arrivals, st.integers(1, 10))
def test_with_room_for_all_the_line_is_strictly_by_priority_and_age(
    requests: list[tuple[int, int]], max_requests: int
) -> None:
    line, places = line_of(requests)
    handed_out = []
    while picked := line.pick(budget(max_requests, 10**9)):
        for each in picked:
            line.remove("m", places[each])
            handed_out.append(places[each])
    assert handed_out == sorted(places.values())


@given(st.lists(st.tuples(st.integers(1, 100), st.integers(0, 100), st.integers(1, 4)), min_size=1, max_size=60))
def test_who_joins_as_the_kth_is_overtaken_at_most_k_times_the_bound(steps: list[tuple[int, int, int]]) -> None:
    """A stream of arrivals, and of workers with little room."""
    line = WaitingLine(MAX_OVERTAKES)
    waiting: list[Place] = []
    still_allowed: dict[str, int] = {}
    for arrival, (tokens, room, max_requests) in enumerate(steps):
        joining = Place(0, 0, arrival, tokens, f"r{arrival}")
        line.add("m", joining)
        waiting.append(joining)
        still_allowed[joining.request_id] = len(waiting) * MAX_OVERTAKES
        for picked in line.pick(budget(max_requests, room)):
            (taken,) = (each for each in waiting if each.request_id == picked)
            for overtaken in waiting[: waiting.index(taken)]:
                still_allowed[overtaken.request_id] -= 1
                assert still_allowed[overtaken.request_id] >= 0
            waiting.remove(taken)
            line.remove("m", taken)


def test_a_pick_looks_no_further_than_it_may_skip() -> None:
    line, _ = line_of([(0, 50)] * (MAX_OVERTAKES + 1) + [(0, 1)])
    assert line.pick(budget(10, 1)) == []
    line, _ = line_of([(0, 50)] * MAX_OVERTAKES + [(0, 1)])
    assert line.pick(budget(10, 1)) == [f"r{MAX_OVERTAKES}"]


def test_a_request_that_was_taken_and_comes_back_may_be_overtaken_afresh() -> None:
    line, places = line_of([(0, 50)])
    for i in range(1, 20):
        place = Place(0, 0, i, 1, f"r{i}")
        line.add("m", place)
        if line.pick(budget(1, 1)):
            line.remove("m", place)
    assert line.pick(budget(1, 1)) == []
    line.remove("m", places["r0"])
    line.add("m", places["r0"])
    assert line.pick(budget(1, 1)) == [f"r{MAX_OVERTAKES + 1}"]
