"""Stop strings: found wherever token borders fall, and nothing held back longer than needed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.stop import StopMatcher
from tests.gateway.support import without_deadline

texts = st.text(alphabet="ab\n🦆", max_size=12)
stop_lists = st.lists(st.text(alphabet="ab\n🦆", min_size=1, max_size=4), min_size=1, max_size=4)


@without_deadline
@given(st.lists(texts, max_size=12), stop_lists)
def test_the_text_ends_before_the_first_stop_string_that_a_piece_completes(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    sent, seen = "", ""
    for piece in pieces:
        sent += matcher.push(piece)
        seen += piece
        hits = [seen.find(stop) for stop in stops if stop in seen]
        assert matcher.found == bool(hits)
        if hits:
            assert sent == seen[: min(hits)]
            return
    assert sent + matcher.flush() == seen


@without_deadline
@given(st.lists(texts, max_size=12), stop_lists)
def test_only_what_may_become_a_stop_string_is_held_back(pieces: list[str], stops: list[str]) -> None:
    matcher = StopMatcher(stops)
    sent, seen = "", ""
    for piece in pieces:
        sent += matcher.push(piece)
        seen += piece
        if matcher.found:
            return
        held = seen[len(sent) :]
        assert held == "" or any(stop.startswith(held) for stop in stops)


@pytest.mark.parametrize(
    ("stops", "pieces", "sent"),
    [
        (["\n\n"], ["one", "\n", "\ntwo"], ["one", "", ""]),  # over a border
        (["\n\n"], ["one\n", "two"], ["one", "\ntwo"]),  # it was only one
        (["END"], ["E", "N", "E", "ND"], ["", "", "EN", ""]),  # starts again inside
        (["aab"], ["aa", "ab"], ["", "a"]),  # overlaps itself
        (["b", "ab"], ["xab"], ["x"]),  # the earliest start wins
    ],
)
def test_examples(stops: list[str], pieces: list[str], sent: list[str]) -> None:
    matcher = StopMatcher(stops)
    assert [matcher.push(piece) for piece in pieces] == sent
