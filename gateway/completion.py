"""Events to chunks: the one path that a streamed, a whole, a resumed and a WebSocket completion share.

`Completion` holds the state of one reader and does no I/O. `follow` drives it over the queue's events; `fold` joins
what `follow` yields into the whole answer. A chunk's text depends on token ids only, never on how events were cut,
and a reader always starts at token 0: so one that resumes at n gets the very text that was due there.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from gateway.answers import Answer, Chunk, End, Timings
from gateway.ledger import Ledger, Ticket
from gateway.stop import StopMatcher
from wire.errors import Internal, MillraceError, Unavailable, error_from_code
from wire.messages import Event, Failed, Finished, FinishReason, Tokens, Usage

SETTLE_S: Final = 1.0  # after a stop string: how long to wait for the worker's last word, for its timings


class Completion:
    """One reader's place in one completion."""

    __slots__ = ("_detokenizer", "_min_tokens", "_start", "_stop", "next_index", "stopped")

    def __init__(self, ticket: Ticket, start: int) -> None:
        self._detokenizer = ticket.model.tokenizer.detokenizer()
        self._stop = StopMatcher(ticket.facts.stop) if ticket.facts.stop else None
        self._min_tokens = ticket.facts.min_tokens
        self._start = start
        self.next_index = 0
        self.stopped = False  # a stop string was found at token next_index - 1

    def feed(self, event: Tokens) -> Chunk | None:
        """The chunk that these tokens make; None if there is nothing in it at or after `start`."""
        if event.first_index > self.next_index:
            raise Internal(f"token {self.next_index} of {event.request_id} is missing: this is a bug")
        new_ids = event.token_ids[self.next_index - event.first_index :]
        first = max(self.next_index, self._start)
        pieces: list[str] = []
        for token_id in new_ids:
            piece = self._push(token_id)
            if self.next_index > self._start:
                pieces.append(piece)
            if self.stopped:
                break
        if not pieces:
            return None
        skip = first - event.first_index
        return Chunk(first, "".join(pieces), event.token_ids[skip : skip + len(pieces)])

    def _push(self, token_id: int) -> str:
        piece = self._detokenizer.push(token_id)
        self.next_index += 1
        # As in vLLM, text of the first min_tokens tokens is not searched.
        if self._stop is None or self.next_index <= self._min_tokens:
            return piece
        piece = self._stop.push(piece)
        self.stopped = self._stop.found
        return piece

    def tail(self) -> str:
        """The text still held back when nothing follows."""
        if self.stopped:
            return ""
        tail = self._detokenizer.flush()
        if self._stop is None:
            return tail
        tail = self._stop.push(tail)
        return tail if self._stop.found else tail + self._stop.flush()


async def follow(ledger: Ledger, ticket: Ticket, start: int = 0) -> AsyncGenerator[Chunk | End, None]:
    """The chunks from token `start`, then exactly one End. Raises the error that a Failed names, or UnknownRequest."""
    completion = Completion(ticket, start)
    events = ledger.queue.events(ticket.id)
    try:
        async for event in events:
            if isinstance(event, Tokens):
                chunk = completion.feed(event)
                ledger.saw(ticket, completion.next_index)
                if chunk is not None:
                    yield chunk
                if completion.stopped:
                    await ledger.cancel(ticket)
                    last = await _last_word(events)
                    yield _end(ledger, ticket, completion, last, "stop")
                    return
            elif isinstance(event, Finished):
                yield _end(ledger, ticket, completion, event, event.reason)
                return
            else:
                ledger.failed(ticket, event.code)
                raise error_from_code(event.code)(event.message)
    finally:
        if isinstance(events, AsyncGenerator):
            await events.aclose()
    raise Unavailable("the queue has closed")


async def _last_word(events: AsyncIterator[Event]) -> Finished | None:
    try:
        async with asyncio.timeout(SETTLE_S):
            async for event in events:
                if isinstance(event, Finished):
                    return event
                if isinstance(event, Failed):
                    return None
    except (TimeoutError, MillraceError):
        pass  # the answer is whole without it
    return None


def _end(ledger: Ledger, ticket: Ticket, completion: Completion, last: Finished | None, reason: FinishReason) -> End:
    usage = Usage(
        prompt_tokens=ticket.facts.prompt_tokens,
        completion_tokens=completion.next_index,
        cached_tokens=last.usage.cached_tokens if last else 0,
    )
    worker = last.timings if last else None
    ledger.finished(ticket, reason, usage, worker)
    return End(
        index=completion.next_index,
        text=completion.tail(),
        token_ids=[],
        finish_reason=reason,
        usage=usage,
        timings=Timings(
            queue_ms=round(worker.queue_ms, 3) if worker else 0.0,
            prefill_ms=round(worker.prefill_ms, 3) if worker else 0.0,
            decode_ms=round(worker.decode_ms, 3) if worker else 0.0,
            ttft_ms=None if ticket.ttft_s is None else round(ticket.ttft_s * 1e3, 3),
            total_ms=round((time.perf_counter() - ticket.arrived_at) * 1e3, 3),
        ),
        seed=ticket.facts.seed,
    )


async def fold(ticket: Ticket, parts: AsyncIterator[Chunk | End]) -> Answer:
    """The whole answer: its text and ids are the chunks', joined."""
    texts: list[str] = []
    token_ids: list[int] = []
    async for part in parts:
        texts.append(part.text)
        token_ids += part.token_ids
        if isinstance(part, End):
            return Answer(
                id=ticket.id,
                model=ticket.model.model_id,
                text="".join(texts),
                token_ids=token_ids,
                finish_reason=part.finish_reason,
                usage=part.usage,
                timings=part.timings,
                seed=part.seed,
            )
    raise Internal("a completion ended without an end: this is a bug")
