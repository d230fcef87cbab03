"""Traces: whose request this is in somebody's tracing, and that the metrics of its latency lead there."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
import websockets

from gateway.trace import sampled_trace
from tests.gateway.support import rig, server, stream

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE}-{PARENT}-01"


@pytest.mark.parametrize(
    ("header", "trace"),
    [
        (SAMPLED, TRACE),
        (f"00-{TRACE}-{PARENT}-03", TRACE),  # flags that are not known here
        (f"cc-{TRACE}-{PARENT}-01", TRACE),  # a later version
        (f"cc-{TRACE}-{PARENT}-01-more", TRACE),
        (f"00-{TRACE}-{PARENT}-00", ""),  # nobody keeps it
        (f"00-{TRACE}-{PARENT}-01-more", ""),
        (f"cc-{TRACE}-{PARENT}-01more", ""),
        (f"ff-{TRACE}-{PARENT}-01", ""),
        (f"00-{'0' * 32}-{PARENT}-01", ""),
        (f"00-{TRACE}-{'0' * 16}-01", ""),
        (f"00-{TRACE.upper()}-{PARENT}-01", ""),
        (f"00-{TRACE[1:]}-{PARENT}-01", ""),
        (f" {SAMPLED}", ""),
        (f"{SAMPLED}\n", ""),
        ("", ""),
        ("x" * 10_000, ""),
        (None, ""),
    ],
)
def test_a_header_names_a_trace_if_it_is_well_formed_and_sampled(header: str | None, trace: str) -> None:
    assert sampled_trace(None if header is None else header.encode()) == trace


async def test_each_request_has_its_own_trace_or_none() -> None:
    async with rig() as gateway:
        other = f"00-{TRACE[::-1]}-{PARENT}-01"
        for headers in (
            {"traceparent": SAMPLED},
            {},
            {"traceparent": "nonsense"},
            [("traceparent", SAMPLED), ("traceparent", other)],
            {"traceparent": other},
        ):
            answer = await gateway.client.post("/generate", json={"prompt": "Hello"}, headers=httpx.Headers(headers))
            assert answer.status_code == 200
        assert gateway.telemetry.traces == [TRACE, "", "", "", TRACE[::-1]]
        assert [each.trace_id for each in gateway.telemetry.ended] == gateway.telemetry.traces


async def test_requests_of_a_socket_belong_to_the_trace_that_opened_it() -> None:
    async with (
        rig() as gateway,
        server(gateway.app) as address,
        websockets.connect(
            f"ws://{address}/generate/stream", additional_headers={"traceparent": SAMPLED}, proxy=None
        ) as socket,
    ):
        await socket.send(json.dumps({"type": "generate", "id": "a", "prompt": "Hello"}))
        async with asyncio.timeout(10):
            while json.loads(await socket.recv())["type"] != "done":
                pass
        assert gateway.telemetry.traces == [TRACE]


async def test_a_stream_that_is_read_again_is_counted_here_or_elsewhere() -> None:
    async with rig() as gateway:
        generation_id, _ = await stream(gateway)
        assert gateway.telemetry.resumptions == 0
        assert (await gateway.client.get(f"/streams/{generation_id}?from=3")).status_code == 200
        assert (await gateway.client.get("/streams/unknown")).status_code == 404
        assert gateway.telemetry.resumptions == 1
        async with gateway.another() as second:
            assert (await second.get(f"/streams/{generation_id}")).status_code == 200
        assert len(gateway.telemetry.ended) == 1  # it is not one more request
