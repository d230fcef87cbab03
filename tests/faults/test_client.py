"""The drill's clients see what an SSE client must see: whole events only, and nothing twice because of themselves."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import numpy as np
import pytest

from batcher.backend import ModelInput
from tests.faults.client import Manner, Refused, record
from tests.faults.history import History, Verdict, judge
from tests.faults.worker import POISON, is_poisoned

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nx-generation-id: gen-1\r\n\r\n"
FIRST = b'42\r\nid: 1\ndata: {"index": 0, "text": "ab", "token_ids": [5, 6]}\n\n\r\n'
SECOND = b'42\r\nid: 3\ndata: {"index": 2, "text": "cd", "token_ids": [7, 8]}\n\n\r\n'
END = b'2a\r\ndata: {"finish_reason": "length"}\n\n\r\n0\r\n\r\n'
KEEP_ALIVE = b"e\r\n: keep-alive\n\n\r\n"


@asynccontextmanager
async def gateway(answers: Sequence[bytes]) -> AsyncIterator[tuple[str, list[str]]]:
    """One of `answers` a connection, which is then closed; the address, and the heads of the requests as they come."""
    heads: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
        writer.write(answers[len(heads) - 1])
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", heads


async def read(address: str, manner: Manner) -> History:
    async with asyncio.timeout(20):
        return await record(lambda: [address], {"input_ids": [1]}, manner, random.Random(1))


async def test_a_broken_stream_is_resumed_after_the_last_whole_event() -> None:
    answers = [HEAD + FIRST + KEEP_ALIVE + SECOND[:-5], HEAD + SECOND + END]
    async with gateway(answers) as (address, heads):
        history = await read(address, Manner(resumes=True))
    assert judge(history, [5, 6, 7, 8]).lost == 0
    assert [(first, token_ids) for _, first, token_ids in history.events] == [(0, [5, 6]), (2, [7, 8])]
    assert history.resumes == 1
    assert heads[1].startswith("GET /streams/gen-1 ")
    assert "Last-Event-ID: 1\r\n" in heads[1]


async def test_an_answer_that_breaks_before_its_id_is_asked_for_again_under_the_same_key() -> None:
    async with gateway([HEAD[:30], HEAD + FIRST + SECOND + END]) as (address, heads):
        history = await read(address, Manner(resumes=True))
    assert history.finish_reason == "length"
    keys = [line for head in heads for line in head.splitlines() if line.startswith("Idempotency-Key: ")]
    assert len(keys) == 2
    assert keys[0] == keys[1]


async def test_who_does_not_resume_has_lost_the_rest() -> None:
    async with gateway([HEAD + FIRST]) as (address, _):
        history = await read(address, Manner())
    verdict = judge(history, [5, 6, 7, 8])
    assert (verdict.lost, verdict.doubled, verdict.changed) == (2, 0, 0)


async def test_clients_that_drop_come_back_until_they_have_it_all() -> None:
    async with gateway([HEAD + FIRST + SECOND + END] * 1000) as (address, heads):
        histories = [await record(lambda: [address], {}, Manner(True, drops=True), random.Random(n)) for n in range(50)]
    # This gateway does not look at Last-Event-ID: a client that came back has tokens twice, if it had seen them.
    assert all(history.finish_reason == "length" for history in histories)
    assert len(heads) == 50 + sum(history.resumes for history in histories)
    assert len(heads) > 50


@pytest.mark.parametrize("status", [b"503 Service Unavailable", b"429 Too Many Requests"])
async def test_a_refusal_is_no_broken_promise(status: bytes) -> None:
    async with gateway([b"HTTP/1.1 " + status + b"\r\n\r\n"]) as (address, _):
        with pytest.raises(Refused):
            await read(address, Manner(resumes=True))


async def test_any_other_answer_is_an_error() -> None:
    async with gateway([b'HTTP/1.1 500 Internal\r\n\r\n{"error": {"code": "worker_lost"}}']) as (address, _):
        history = await read(address, Manner(resumes=True))
    assert history.error is not None
    assert "worker_lost" in history.error


@pytest.mark.parametrize(
    ("events", "finish_reason", "verdict"),
    [
        ([(0.0, 0, [5, 6]), (0.5, 2, [7, 8])], "length", Verdict(0, 0, 0, 0.5)),
        ([(0.0, 0, [5, 6]), (0.5, 1, [6, 7, 8])], "length", Verdict(0, 1, 0, 0.5)),
        ([(0.0, 0, [5, 6]), (0.5, 3, [8])], "length", Verdict(1, 0, 0, 0.5)),
        ([(0.0, 0, [5, 9]), (0.5, 2, [7, 8])], "length", Verdict(0, 0, 1, 0.5)),
        ([(0.0, 0, [5, 6, 7, 8, 9])], "length", Verdict(0, 0, 1, 0.0)),
        ([(0.0, 0, [5, 6]), (2.0, 2, [7, 8])], None, Verdict(1, 0, 0, 2.0)),
        ([], None, Verdict(4, 0, 0, 0.0)),
    ],
)
def test_the_judge_counts_what_went_wrong(
    events: list[tuple[float, int, list[int]]], finish_reason: str | None, verdict: Verdict
) -> None:
    assert judge(History({}, events, finish_reason), [5, 6, 7, 8]) == verdict


@pytest.mark.parametrize(
    ("input_ids", "positions", "poisoned"),
    [
        ([1, *POISON, 9], [8, 0, 1, 2, 3, 4, 5], True),  # after another's decode
        ([*POISON], [1, 2, 3, 4, 5], False),  # not at the start of a prompt
        ([*POISON[:-1], 9], [0, 1, 2, 3, 0], False),  # cut short by the next sequence
        ([], [], False),
    ],
)
def test_a_batch_is_poisoned_if_a_prompt_in_it_begins_so(
    input_ids: list[int], positions: list[int], poisoned: bool
) -> None:
    batch = ModelInput(
        input_ids=np.array(input_ids, np.int64),
        positions=np.array(positions, np.int64),
        **{name: np.zeros(0, np.int32) for name in ("cu_seqlens", "past_lens", "slot_mapping", "logits_rows")},
        block_table=np.zeros((0, 0), np.int32),
    )
    assert is_poisoned(batch) is poisoned
