"""Streams outlive connections: resuming, cancelling, leaving, and what happens when nobody reads."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from gateway.limits import GatewayLimits
from tests.gateway.support import STORY, Script, joined, mute_client, rig, server, sse_events, stream, text_of, whole


@pytest.mark.parametrize("start", [0, 1, 5, 20, 10_000])
async def test_a_stream_can_be_resumed_at_any_token(start: int) -> None:
    async with rig() as gateway:
        generation_id, transcript = await stream(gateway)
        due = [event.data for event in sse_events(transcript) if int(str(event.data["index"])) >= start]
        again = await gateway.client.get(f"/streams/{generation_id}?from={start}")
        rest = [event.data for event in sse_events(again.text)]
        # The log is whole by now, so the tokens come in one event.
        assert "".join(str(part["text"]) for part in rest) == "".join(str(part["text"]) for part in due)
        assert rest[-1]["finish_reason"] == "stop"
        if start < len(STORY):
            assert (rest[0]["index"], rest[0]["token_ids"]) == (start, STORY[start:])


async def test_the_last_event_id_says_what_was_seen_and_is_newer_than_the_query() -> None:
    async with rig() as gateway:
        generation_id, _ = await stream(gateway)
        again = await gateway.client.get(f"/streams/{generation_id}?from=999", headers={"Last-Event-ID": "4"})
        assert sse_events(again.text)[0].data["token_ids"] == STORY[5:]


async def test_a_resumed_stream_stops_at_the_same_stop_string() -> None:
    async with rig() as gateway:
        generation_id, transcript = await stream(gateway, stop=["across"])
        again = await gateway.client.get(f"/streams/{generation_id}")
        assert joined(sse_events(again.text)) == joined(sse_events(transcript))
        assert sse_events(again.text)[-1].data["finish_reason"] == "stop"


async def test_two_readers_of_one_stream_get_the_same() -> None:
    async with rig(Script(step_s=0.002)) as gateway, server(gateway.app) as address, httpx.AsyncClient() as client:
        async with client.stream(
            "POST", f"http://{address}/generate", json={"prompt": "Hello", "stream": True}
        ) as first:
            second = await client.get(f"http://{address}/streams/{first.headers['x-generation-id']}")
            transcript = (await first.aread()).decode()
        assert joined(sse_events(second.text)) == joined(sse_events(transcript)) == (text_of(STORY), STORY)
        assert gateway.telemetry.token_count == len(STORY)
        assert len(gateway.telemetry.ended) == 1


async def test_a_request_can_be_cancelled_and_its_stream_says_so() -> None:
    async with rig(Script(silent_after=5)) as gateway:
        streaming = asyncio.create_task(stream(gateway))
        await gateway.until_tokens(5)
        (request,) = gateway.worker.requests
        state = await gateway.client.get(f"/requests/{request.request_id}")
        assert (state.json()["status"], state.json()["completion_tokens"]) == ("running", 5)
        response = await gateway.client.delete(f"/requests/{request.request_id}")
        assert (response.status_code, response.json()) == (202, {"id": request.request_id})
        _, transcript = await streaming
        last = sse_events(transcript)[-1].data
        assert last["finish_reason"] == "cancelled"
        assert last["usage"] == {"prompt_tokens": len(request.prompt_ids), "completion_tokens": 5, "cached_tokens": 3}
        again = await gateway.client.delete(f"/requests/{request.request_id}")
        assert again.status_code == 202
        state = await gateway.client.get(f"/requests/{request.request_id}")
        assert (state.json()["status"], state.json()["finish_reason"]) == ("finished", "cancelled")


async def test_the_state_of_a_request_that_has_been_leased_is_running() -> None:
    gate = asyncio.Event()
    async with rig(Script(first_step=gate)) as gateway:
        asking = asyncio.create_task(whole(gateway))
        await gateway.until_leased(1)
        state = await gateway.client.get(f"/requests/{gateway.worker.requests[0].request_id}")
        assert state.json() == {
            "id": gateway.worker.requests[0].request_id,
            "model": "millpond@0123456789ab",
            "status": "running",
            "completion_tokens": 0,
            "finish_reason": None,
            "answer": None,
        }
        gate.set()
        await asking


async def test_a_client_that_leaves_a_stream_has_its_request_cancelled_after_the_grace() -> None:
    limits = GatewayLimits(cancel_grace_s=0.1)
    async with rig(Script(silent_after=5), limits) as gateway, server(gateway.app) as address:
        async with httpx.AsyncClient() as client:
            async with client.stream(
                "POST", f"http://{address}/generate", json={"prompt": "Hello", "stream": True}
            ) as response:
                async for _ in response.aiter_lines():
                    break
            left_at = asyncio.get_running_loop().time()
            assert not await gateway.is_idle()
        await gateway.until_idle()
        assert asyncio.get_running_loop().time() - left_at >= 0.09
        assert [done.finish_reason for done in gateway.telemetry.ended] == ["cancelled"]


async def test_a_client_that_comes_back_within_the_grace_finds_its_stream() -> None:
    limits = GatewayLimits(cancel_grace_s=5.0)
    async with (
        rig(Script(step_s=0.005), limits) as gateway,
        server(gateway.app) as address,
        httpx.AsyncClient() as client,
    ):
        seen: list[str] = []
        async with client.stream(
            "POST", f"http://{address}/generate", json={"prompt": "Hello", "stream": True}
        ) as response:
            generation_id = response.headers["x-generation-id"]
            async for line in response.aiter_lines():
                seen.append(line)
                if line.startswith("id: 3"):
                    break
        rest = await client.get(f"http://{address}/streams/{generation_id}", headers={"Last-Event-ID": "3"})
        events = sse_events(rest.text)
        assert events[0].data["index"] == 4
        assert [i for event in events for i in event.data["token_ids"]] == STORY[4:]  # type: ignore[attr-defined]
        assert events[-1].data["finish_reason"] == "stop"


async def test_a_client_that_leaves_before_the_whole_answer_has_its_request_cancelled_at_once() -> None:
    limits = GatewayLimits(cancel_grace_s=60.0)
    async with rig(Script(silent_after=5), limits) as gateway, server(gateway.app) as address:
        async with httpx.AsyncClient(timeout=0.2) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(f"http://{address}/generate", json={"prompt": "Hello"})
        await gateway.until_idle()
        assert gateway.telemetry.http[-1] == ("/generate", "POST", 499)


async def test_a_reader_that_takes_nothing_is_cut() -> None:
    limits = GatewayLimits(max_stall_s=0.3, cancel_grace_s=0.0)
    script = Script(answer=lambda request: STORY * 200, step_s=0.0)
    async with rig(script, limits) as gateway, server(gateway.app, send_buffer_bytes=4_096) as address:
        body = b'{"prompt":"Hello","stream":true,"max_tokens":4000}'
        head = b"POST /generate HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        with mute_client(address) as client:
            await asyncio.get_running_loop().sock_sendall(client, head % len(body) + body)
            await gateway.until_ended(1)
            await gateway.until_idle()
        assert [done.finish_reason for done in gateway.telemetry.ended] == ["cancelled"]
