"""One path from events to text: however events are cut and wherever a reader starts, the completion is the same."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.answers import Chunk
from gateway.completion import Completion
from gateway.ledger import Ticket
from tests.gateway.support import TOKENIZER, ids_of, served_model, text_of, without_deadline
from wire.errors import Internal
from wire.messages import Facts, Generate, Tokens

MODEL = served_model()
some_ids = st.lists(st.integers(0, 300), min_size=1, max_size=40)  # special tokens, bytes and short words
some_stops = st.lists(st.sampled_from(["a", "th", "e ", "\n", " s", "ing", "�"]), max_size=3)


def ticket(stop: Sequence[str] = (), min_tokens: int = 0) -> Ticket:
    request = Generate("r", MODEL.model_id, [5], max_tokens=1_000, min_tokens=min_tokens, stop=list(stop))
    return Ticket("r", Facts.of(request), MODEL, arrived_at=0.0)


def read(of: Ticket, token_ids: Sequence[int], cuts: Sequence[int], start: int = 0) -> tuple[Completion, list[Chunk]]:
    """What a reader makes of these tokens in events cut at `cuts`."""
    completion = Completion(of, start)
    borders = sorted({0, len(token_ids), *(cut % (len(token_ids) + 1) for cut in cuts)})
    chunks = []
    for first, end in pairwise(borders):
        chunk = completion.feed(Tokens("r", first, list(token_ids[first:end])))
        if chunk is not None:
            chunks.append(chunk)
        if completion.stopped:
            break
    return completion, chunks


def joined(completion: Completion, chunks: list[Chunk]) -> tuple[str, list[int]]:
    text = "".join(chunk.text for chunk in chunks) + completion.tail()
    return text, [token_id for chunk in chunks for token_id in chunk.token_ids]


@without_deadline
@given(some_ids, st.lists(st.integers(0, 40)))
def test_without_stop_strings_the_text_is_the_whole_decode(token_ids: list[int], cuts: list[int]) -> None:
    assert joined(*read(ticket(), token_ids, cuts)) == (text_of(token_ids), token_ids)


@without_deadline
@given(some_ids, some_stops, st.integers(0, 10), st.lists(st.integers(0, 40)), st.lists(st.integers(0, 40)))
def test_how_events_are_cut_does_not_matter(
    token_ids: list[int], stops: list[str], min_tokens: int, cuts: list[int], other_cuts: list[int]
) -> None:
    of = ticket(stops, min_tokens)
    assert joined(*read(of, token_ids, cuts)) == joined(*read(of, token_ids, other_cuts))


@without_deadline
@given(some_ids, some_stops, st.integers(0, 45), st.lists(st.integers(0, 40)), st.lists(st.integers(0, 40)))
def test_a_reader_that_resumes_gets_exactly_the_rest(
    token_ids: list[int], stops: list[str], start: int, cuts: list[int], other_cuts: list[int]
) -> None:
    of = ticket(stops)
    whole, every_token = read(of, token_ids, range(41))
    resumed, rest = read(of, token_ids, other_cuts, start)
    due = [chunk for chunk in every_token if chunk.index >= start]
    assert joined(resumed, rest) == joined(whole, due)
    assert whole.stopped == resumed.stopped
    if rest:
        assert rest[0].index == start
        assert rest[-1].index + len(rest[-1].token_ids) == resumed.next_index


@without_deadline
@given(some_ids, st.lists(st.integers(0, 40)))
def test_events_that_come_twice_change_nothing(token_ids: list[int], cuts: list[int]) -> None:
    completion = Completion(ticket(), 0)
    chunks = []
    for cut in sorted(cut % (len(token_ids) + 1) for cut in [*cuts, len(token_ids)]):
        if cut:  # always from the beginning
            chunk = completion.feed(Tokens("r", 0, token_ids[:cut]))
            chunks += [chunk] if chunk else []
    assert joined(completion, chunks) == (text_of(token_ids), token_ids)


def test_the_stop_string_is_not_in_the_text_but_its_tokens_are_counted() -> None:
    token_ids = ids_of("one two three four")
    completion, chunks = read(ticket([" two th"]), token_ids, range(41))
    text, ids = joined(completion, chunks)
    assert completion.stopped
    assert text == "one"
    assert ids == token_ids[: completion.next_index]
    assert " two th" not in text_of(ids[:-1])
    assert " two th" in text_of(ids)


def test_stop_strings_are_not_looked_for_in_the_first_min_tokens() -> None:
    token_ids = ids_of("stop stop stop")
    unbounded, _ = read(ticket(["stop"]), token_ids, range(41))
    bounded, chunks = read(ticket(["stop"], min_tokens=unbounded.next_index), token_ids, range(41))
    assert unbounded.next_index < bounded.next_index < len(token_ids)
    assert joined(bounded, chunks)[0] == "stop "


def test_text_held_back_for_a_stop_string_that_never_came_is_in_the_tail() -> None:
    token_ids = ids_of("wait for it")
    completion, chunks = read(ticket([" it never came"]), token_ids, range(41))
    assert "".join(chunk.text for chunk in chunks) == "wait for"
    assert completion.tail() == " it"


def test_a_gap_in_the_indices_is_a_bug_and_not_a_silent_splice() -> None:
    completion = Completion(ticket(), 0)
    completion.feed(Tokens("r", 0, [70]))
    with pytest.raises(Internal, match="token 1 of r is missing"):
        completion.feed(Tokens("r", 2, [71]))


def test_a_resumed_character_comes_whole() -> None:
    token_ids = ids_of("a🦆b")
    middle = len(token_ids) - 2  # inside the duck
    assert TOKENIZER.decode(token_ids[middle:], skip_special_tokens=True) != "🦆b"
    assert joined(*read(ticket(), token_ids, [], start=middle))[0] == "🦆b"
