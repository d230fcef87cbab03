"""What travels comes out as it went in, and nothing else comes in: every message, by properties and by table."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire.messages import (
    Event,
    Failed,
    Finished,
    FinishReason,
    Generate,
    SamplingParams,
    Terminal,
    Timings,
    Tokens,
    Usage,
    decode_event,
    decode_generate,
    encode,
    fingerprint,
)

counts = st.integers(0, 2**31 - 1)
texts = st.text(st.characters(codec="utf-8"), max_size=40)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
milliseconds = st.floats(0.0, allow_nan=False)
sampling_params = st.builds(
    SamplingParams,
    temperature=st.floats(0.0, 100.0),
    top_k=counts,
    top_p=st.floats(0.0, 1.0, exclude_min=True),
    min_p=st.floats(0.0, 1.0),
    seed=st.integers(0, 2**63 - 1),
)
requests = st.builds(
    Generate,
    request_id=names,
    model=names,
    prompt_ids=st.lists(counts, min_size=1, max_size=20),
    max_tokens=st.integers(1, 2**31 - 1),
    sampling=sampling_params,
    stop_token_ids=st.lists(counts, max_size=5),
    min_tokens=counts,
    tenant=texts,
    priority=st.integers(-1, 1),
    deadline_ms=st.none() | st.integers(1, 2_592_000_000),
)
token_events = st.builds(Tokens, names, counts, st.lists(counts, min_size=1, max_size=20))
finished_events = st.builds(
    Finished,
    names,
    st.sampled_from(get_args(FinishReason)),
    st.builds(Usage, counts, counts, counts),
    st.builds(Timings, milliseconds, milliseconds, milliseconds, counts),
)
failed_events = st.builds(Failed, names, names, texts, st.booleans())
events = token_events | finished_events | failed_events


def test_a_field_at_its_default_does_not_travel() -> None:
    """So a release that knows more can be understood by one that knows less, as long as nobody uses what is new."""
    least = msgspec.msgpack.decode(encode(Generate("r", "m", [1], 2)))
    assert least.keys() - {"sampling"} == {"type", "request_id", "model", "prompt_ids", "max_tokens"}
    assert not least.get("sampling")
    more = msgspec.msgpack.decode(encode(Generate("r", "m", [1], 2, sampling=SamplingParams(top_k=3), priority=1)))
    assert more.keys() - least.keys() <= {"sampling", "priority"}
    assert more["sampling"] == {"top_k": 3}


@given(requests)
def test_every_request_comes_out_as_it_went_in(request: Generate) -> None:
    assert decode_generate(encode(request)) == request


@given(events)
def test_every_event_comes_out_as_it_went_in_and_with_its_type(event: Event) -> None:
    decoded = decode_event(encode(event))
    assert decoded == event
    assert type(decoded) is type(event)
    assert isinstance(decoded, Terminal) != isinstance(decoded, Tokens)


@given(requests)
def test_the_longest_sequence_is_prompt_and_max_tokens(request: Generate) -> None:
    assert request.max_total_tokens == len(request.prompt_ids) + request.max_tokens


@given(requests, requests)
def test_fingerprints_are_equal_exactly_when_bodies_are(one: Generate, other: Generate) -> None:
    assert fingerprint(one) == fingerprint(decode_generate(encode(one)))
    assert (fingerprint(one) == fingerprint(other)) == (encode(one) == encode(other))


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_arbitrary_bytes_are_refused_and_never_break_the_decoder(raw: bytes) -> None:
    for decode in (decode_event, decode_generate):
        with pytest.raises(msgspec.DecodeError):
            decode(raw)


@given(events, st.data())
def test_a_cut_or_prolonged_event_is_refused(event: Event, data: st.DataObject) -> None:
    raw = encode(event)
    with pytest.raises(msgspec.DecodeError):
        decode_event(raw[: data.draw(st.integers(0, len(raw) - 1))])
    with pytest.raises(msgspec.DecodeError):
        decode_event(raw + data.draw(st.binary(min_size=1, max_size=5)))


@given(requests, st.data())
@settings(max_examples=300)
def test_a_damaged_request_is_refused_or_is_another_request_within_bounds(
    request: Generate, data: st.DataObject
) -> None:
    raw = bytearray(encode(request))
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        survived = decode_generate(bytes(raw))
    except msgspec.DecodeError:
        return
    assert decode_generate(encode(survived)) == survived


@given(requests, events)
def test_requests_are_no_events_and_events_no_requests(request: Generate, event: Event) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_event(encode(request))
    with pytest.raises(msgspec.ValidationError):
        decode_generate(encode(event))


def wire_map(message: Generate | Event, changes: dict[str, Any] | None = None) -> bytes:
    """The message as msgpack with some fields replaced, whatever the schema says; None removes a field."""
    fields: dict[str, Any] = msgspec.msgpack.decode(encode(message))
    fields.update(changes or {})
    return msgspec.msgpack.encode({name: value for name, value in fields.items() if value is not None})


REQUEST = Generate("r", "m", [1, 2], 8)
SAMPLING: dict[str, Any] = msgspec.to_builtins(SamplingParams())
OUT_OF_BOUNDS: list[dict[str, Any]] = [
    {"type": "event"},
    {"request_id": None},
    {"request_id": ""},
    {"request_id": "x" * 129},
    {"request_id": 7},
    {"request_id": b"r"},
    {"model": ""},
    {"model": "x" * 257},
    {"prompt_ids": []},
    {"prompt_ids": [-1]},
    {"prompt_ids": [2**31]},
    {"prompt_ids": [2**64 - 1]},
    {"prompt_ids": [1.0]},
    {"prompt_ids": [True]},
    {"prompt_ids": "12"},
    {"max_tokens": 0},
    {"max_tokens": -1},
    {"max_tokens": 2**31},
    {"max_tokens": "8"},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [1] * 1025},
    {"min_tokens": -1},
    {"tenant": "x" * 129},
    {"priority": 2},
    {"priority": -2},
    {"deadline_ms": 0},
    {"deadline_ms": 2_592_000_001},
    {"deadline_ms": 1.5},
    {"sampling": {**SAMPLING, "temperature": -0.1}},
    {"sampling": {**SAMPLING, "temperature": 100.1}},
    {"sampling": {**SAMPLING, "temperature": float("nan")}},
    {"sampling": {**SAMPLING, "temperature": float("inf")}},
    {"sampling": {**SAMPLING, "top_p": 0.0}},
    {"sampling": {**SAMPLING, "top_p": 1.1}},
    {"sampling": {**SAMPLING, "min_p": 1.1}},
    {"sampling": {**SAMPLING, "min_p": float("nan")}},
    {"sampling": {**SAMPLING, "top_k": -1}},
    {"sampling": {**SAMPLING, "seed": -1}},
    {"sampling": {**SAMPLING, "seed": 2**63}},
    {"sampling": {**SAMPLING, "repetition_penalty": 1.1}},
    {"logprobs": 5},
]


@pytest.mark.parametrize("changes", OUT_OF_BOUNDS, ids=lambda changes: f"{changes!r:.60}")
def test_a_request_with_a_field_out_of_bounds_or_unknown_is_refused(changes: dict[str, Any]) -> None:
    assert decode_generate(wire_map(REQUEST)) == REQUEST
    with pytest.raises(msgspec.ValidationError):
        decode_generate(wire_map(REQUEST, changes))


TOKENS = Tokens("r", 0, [1])
FINISHED = Finished("r", "stop", Usage(1, 1))
FAILED = Failed("r", "internal", "words", False)
BAD_EVENTS: list[tuple[Event, dict[str, Any]]] = [
    (TOKENS, {"type": "token"}),
    (TOKENS, {"request_id": ""}),
    (TOKENS, {"first_index": -1}),
    (TOKENS, {"first_index": 2**31}),
    (TOKENS, {"first_index": None}),
    (TOKENS, {"token_ids": []}),
    (TOKENS, {"token_ids": [-1]}),
    (TOKENS, {"token_ids": [2**31]}),
    (TOKENS, {"token_ids": [None]}),
    (FINISHED, {"reason": "error"}),
    (FINISHED, {"usage": None}),
    (FINISHED, {"usage": {"prompt_tokens": -1, "completion_tokens": 0}}),
    (FINISHED, {"usage": {"prompt_tokens": 1}}),
    (FINISHED, {"timings": {"queue_ms": float("nan")}}),
    (FINISHED, {"timings": {"prefill_ms": -1.0}}),
    (FAILED, {"code": ""}),
    (FAILED, {"code": "x" * 65}),
    (FAILED, {"message": "x" * 4097}),
    (FAILED, {"retryable": 1}),
]


@pytest.mark.parametrize(("event", "changes"), BAD_EVENTS, ids=lambda value: f"{value!r:.60}")
def test_an_event_out_of_bounds_is_refused(event: Event, changes: dict[str, Any]) -> None:
    assert decode_event(wire_map(event)) == event
    with pytest.raises(msgspec.ValidationError):
        decode_event(wire_map(event, changes))


def test_a_field_of_an_event_that_a_newer_peer_sends_is_ignored() -> None:
    assert decode_event(wire_map(FINISHED, {"energy_j": 3.0})) == FINISHED


HOSTILE = {
    "a map deeper than the stack": b"\x82\xa4type\xa6tokens\xa1x" + b"\x91" * 100_000,
    "a list that claims 4 billion items": b"\x82\xa4type\xa6tokens\xa9token_ids\xdd\xff\xff\xff\xff",
    "a text that is not UTF-8": b"\x82\xa4type\xa6tokens\xaarequest_id\xa2\xff\xfe",
    "an extension type": b"\xd4\x05\x00",
    "a timestamp": b"\xd6\xff\x00\x00\x00\x00",
    "nothing": b"",
}


@pytest.mark.parametrize("raw", HOSTILE.values(), ids=HOSTILE)
def test_hostile_bytes_are_refused_like_any_others(raw: bytes) -> None:
    for decode in (decode_event, decode_generate):
        with pytest.raises(msgspec.DecodeError):
            decode(raw)


def test_what_msgpack_cannot_hold_is_refused_when_encoding() -> None:
    for unsendable in (Tokens("\ud800", 0, [1]), Tokens("r", 0, [2**64]), Tokens("r", 0, [object()])):  # type: ignore[list-item]
        with pytest.raises((TypeError, ValueError, OverflowError)):
            encode(unsendable)
