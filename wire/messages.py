"""What crosses a process boundary: requests one way, events the other.

The wire speaks token ids, never text and never tensors. A request's events are `Tokens* (Finished | Failed)`:
exactly one terminal event, always. Encoding is msgpack with a schema (msgspec): unknown tags, wrong types and values
out of bounds are refused while decoding; nothing on the wire is ever code. Constructing a message checks nothing:
queues decode what they encode before they accept it, so a message out of bounds never reaches another process.

Growth: a Generate with a field its reader does not know is refused (a worker must not ignore half a request), but a
field at its default does not travel: releases run side by side, and only who uses something new needs new workers.
Unknown fields of events are ignored.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

WIRE_VERSION: Final = 1

RequestId = Annotated[str, Meta(min_length=1, max_length=128)]
TokenId = Annotated[int, Meta(ge=0, lt=2**31)]
Count = Annotated[int, Meta(ge=0, lt=2**31)]
Milliseconds = Annotated[float, Meta(ge=0.0)]
Seed = Annotated[int, Meta(ge=0, le=2**63 - 1)]  # msgspec takes bounds within int64 only
FinishReason = Literal["stop", "length", "cancelled"]
Weight = Annotated[int, Meta(ge=1, le=64)]
StopStrings = Annotated[list[Annotated[str, Meta(min_length=1, max_length=4096)]], Meta(max_length=1024)]


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the next token is chosen from the logits; the meaning is defined in batcher/sampling.py.

    Filters apply in the order temperature, top_k, top_p, min_p. temperature 0 is greedy (lowest id wins a tie).
    """

    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 0.0
    top_k: Count = 0  # 0 = no limit
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.0
    seed: Seed = 0


class Generate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag="generate"):
    """One request for a completion. Travels from a gateway through the queue to one worker at a time."""

    request_id: RequestId
    model: Annotated[str, Meta(min_length=1, max_length=256)]
    prompt_ids: Annotated[list[TokenId], Meta(min_length=1)]
    max_tokens: Annotated[int, Meta(ge=1, lt=2**31)]
    sampling: SamplingParams = SamplingParams()
    # The model's end tokens and the caller's; the one that ends a request is not sent.
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=1024)] = []
    min_tokens: Count = 0  # stop tokens do not end the request before this many
    tenant: Annotated[str, Meta(max_length=128)] = ""  # salts the prefix cache; who shares fairly with the others
    priority: Annotated[int, Meta(ge=-1, le=1)] = 0  # 1 = first
    # Counts from acceptance, on the queue's clock: no other clock matters, and a request sent again stays equal.
    deadline_ms: Annotated[int, Meta(ge=1, le=2_592_000_000)] | None = None
    weight: Weight = 1  # the tenant's share among those who wait
    # Teacher forcing: the completion is given (max_tokens of them), none is sampled or sent, and Finished has its
    # likelihood. No end token ends it.
    forced_ids: list[TokenId] = []
    # Not for workers: what a gateway must know that takes over the stream.
    stop: StopStrings = []
    background: bool = False  # runs on when nobody reads

    @property
    def max_total_tokens(self) -> int:
        """The longest this sequence can get: what admission must be able to hold."""
        return len(self.prompt_ids) + self.max_tokens


class Facts(msgspec.Struct, frozen=True):
    """What any gateway must know of a request to carry on its stream; the queue keeps it as long as the log."""

    model: str
    prompt_tokens: Count
    max_tokens: Count
    min_tokens: Count
    seed: Seed
    stop: StopStrings
    tenant: str
    background: bool

    @classmethod
    def of(cls, request: Generate) -> Facts:
        return cls(
            model=request.model,
            prompt_tokens=len(request.prompt_ids),
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            seed=request.sampling.seed,
            stop=request.stop,
            tenant=request.tenant,
            background=request.background,
        )


class WorkerReport(msgspec.Struct, frozen=True):
    """What a worker says of itself, every few seconds while its engine makes progress."""

    worker_id: Annotated[str, Meta(min_length=1, max_length=256)]
    models: Annotated[list[str], Meta(max_length=1024)]
    capacity_tokens: Count  # what its KV pool holds
    free_tokens: Count
    running_requests: Count
    is_draining: bool = False


class Usage(msgspec.Struct, frozen=True):
    """Tokens billed. `cached_tokens` of the prompt were found in the prefix cache."""

    prompt_tokens: Count
    completion_tokens: Count  # tokens in the log: the stop token that ended a request was not sent and is not billed
    cached_tokens: Count = 0


class Timings(msgspec.Struct, frozen=True):
    """Where a request's time went, in ms, as the worker saw it."""

    queue_ms: Milliseconds = 0.0  # leased -> first scheduled
    prefill_ms: Milliseconds = 0.0  # first scheduled -> first token
    decode_ms: Milliseconds = 0.0  # first token -> last token
    preemptions: Count = 0


class Tokens(msgspec.Struct, frozen=True, tag="tokens"):
    """The next tokens of a completion."""

    request_id: RequestId
    first_index: Count  # position of token_ids[0] in the completion: lets a reader drop duplicates
    token_ids: Annotated[list[TokenId], Meta(min_length=1)]


class Finished(msgspec.Struct, frozen=True, tag="finished"):
    """Terminal: the completion is whole."""

    request_id: RequestId
    reason: FinishReason
    usage: Usage
    timings: Timings = Timings()
    logprob: float | None = None  # of all forced_ids, natural logarithm


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """Terminal: there will be no more tokens. `code` names a class of wire.errors."""

    request_id: RequestId
    code: Annotated[str, Meta(min_length=1, max_length=64)]
    message: Annotated[str, Meta(max_length=4096)]
    retryable: bool


Event = Tokens | Finished | Failed
Terminal = (Finished, Failed)

_encoder = msgspec.msgpack.Encoder()
_generate_decoder = msgspec.msgpack.Decoder(Generate)
_facts_decoder = msgspec.msgpack.Decoder(Facts)
_report_decoder = msgspec.msgpack.Decoder(WorkerReport)
_event_decoder: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: Generate | Event | Facts | WorkerReport) -> bytes:
    """One message as msgpack bytes. Raises TypeError, ValueError or OverflowError for what msgpack cannot hold."""
    return _encoder.encode(message)


def decode_generate(raw: bytes) -> Generate:
    """The request in `raw`. Raises msgspec.DecodeError (a ValueError) on anything that is not one."""
    try:
        return _generate_decoder.decode(raw)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error


def decode_event(raw: bytes) -> Event:
    """The event in `raw`. Raises msgspec.DecodeError (a ValueError) on anything that is not one."""
    try:
        return _event_decoder.decode(raw)
    except (UnicodeDecodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from error


def decode_facts(raw: bytes) -> Facts:
    """The facts in `raw`, as a queue has kept them. Raises msgspec.DecodeError on anything else."""
    return _facts_decoder.decode(raw)


def decode_report(raw: bytes) -> WorkerReport:
    """The report in `raw`. Raises msgspec.DecodeError on anything that is not one."""
    return _report_decoder.decode(raw)


def fingerprint(request: Generate) -> bytes:
    """16 bytes that are equal for equal bodies: what a queue keeps to tell a repeated submit from a conflicting one.

    Of a decoded request: decoding settles what may differ in writing (1 and 1.0, a tuple and a list).
    """
    return blake2b(_encoder.encode(request), digest_size=16).digest()
