"""What outlives a connection and a gateway: streams resumed elsewhere, background requests, idempotency keys."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.gateway.support import STORY, Script, joined, rig, sse_events, stream, text_of, until, whole


async def test_another_gateway_gives_the_rest_of_a_stream_with_the_same_text() -> None:
    async with rig() as gateway, gateway.another() as second:
        generation_id, transcript = await stream(gateway, stop=["happy"], min_tokens=3, seed=5)
        again = await second.get(f"/streams/{generation_id}")
        assert joined(sse_events(again.text)) == joined(sse_events(transcript))
        last = sse_events(again.text)[-1].data
        assert (last["finish_reason"], last["seed"]) == ("stop", 5)
        rest = await second.get(f"/streams/{generation_id}", headers={"Last-Event-ID": "6"})
        assert sse_events(rest.text)[0].data["index"] == 7


async def test_a_stream_that_runs_is_followed_by_two_gateways() -> None:
    gate = asyncio.Event()
    async with rig(Script(first_step=gate)) as gateway, gateway.another() as second:
        first = asyncio.create_task(stream(gateway))
        await gateway.until_leased(1)
        generation_id = gateway.worker.requests[0].request_id
        other = asyncio.create_task(second.get(f"/streams/{generation_id}"))
        state = await second.get(f"/requests/{generation_id}")
        gate.set()
        assert state.json()["status"] == "running"
        assert joined(sse_events((await other).text)) == joined(sse_events((await first)[1])) == (text_of(STORY), STORY)


async def test_any_gateway_cancels_and_tells_how_it_went() -> None:
    async with rig(Script(silent_after=5)) as gateway, gateway.another() as second:
        streaming = asyncio.create_task(stream(gateway))
        await gateway.until_tokens(5)
        generation_id = gateway.worker.requests[0].request_id
        assert (await second.delete(f"/requests/{generation_id}")).status_code == 202
        await streaming
        state = (await second.get(f"/requests/{generation_id}")).json()
        assert (state["status"], state["finish_reason"], state["completion_tokens"]) == ("finished", "cancelled", 5)
        assert state["answer"]["token_ids"] == STORY[:5]


async def test_a_background_request_is_taken_in_at_once_and_answered_when_asked() -> None:
    async with rig() as gateway, gateway.another() as second:
        taken = await gateway.client.post("/generate", json={"prompt": "Hello", "background": True, "stop": ["happy"]})
        assert (taken.status_code, taken.json()["status"]) == (202, "queued")
        generation_id = taken.json()["id"]
        assert taken.headers["x-generation-id"] == generation_id

        async def has_finished() -> bool:
            return bool((await second.get(f"/requests/{generation_id}")).json()["status"] == "finished")

        await until(has_finished)
        state = (await second.get(f"/requests/{generation_id}")).json()
        direct = await whole(gateway, stop=["happy"])
        assert state["answer"]["text"] == direct["text"]
        assert (state["finish_reason"], state["answer"]["finish_reason"]) == ("stop", "stop")


async def test_a_background_stream_runs_on_without_its_reader() -> None:
    gate = asyncio.Event()
    async with rig(Script(first_step=gate)) as gateway:
        streaming = asyncio.create_task(stream(gateway, background=True))
        await gateway.until_leased(1)
        streaming.cancel()
        await asyncio.gather(streaming, return_exceptions=True)
        gate.set()
        await gateway.until_idle()
        state = await gateway.client.get(f"/requests/{gateway.worker.requests[0].request_id}")
        assert (state.json()["finish_reason"], state.json()["answer"]["token_ids"]) == ("stop", STORY)


async def keyed(client: httpx.AsyncClient, key: str, **body: object) -> httpx.Response:
    return await client.post("/generate", json={"prompt": "Hello", **body}, headers={"Idempotency-Key": key})


async def test_a_hundred_requests_with_one_key_are_one_generation() -> None:
    async with rig() as gateway, gateway.another() as second:
        answers = await asyncio.gather(
            *(keyed(client, "k", temperature=1.0) for client in (gateway.client, second) for _ in range(50))
        )
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.headers["x-generation-id"] for answer in answers}) == 1
        assert len({(answer.json()["text"], answer.json()["seed"]) for answer in answers}) == 1
        assert len(gateway.worker.requests) == 1
        assert gateway.telemetry.admissions <= 1
        later = await keyed(second, "k", temperature=1.0, stream=True)
        assert joined(sse_events(later.text))[1] == answers[0].json()["token_ids"]
        assert len(gateway.worker.requests) == 1


async def test_another_key_is_another_generation_and_another_body_a_conflict() -> None:
    async with rig() as gateway:
        one, two = await keyed(gateway.client, "one"), await keyed(gateway.client, "two")
        assert one.headers["x-generation-id"] != two.headers["x-generation-id"]
        clash = await keyed(gateway.client, "one", max_tokens=3)
        assert (clash.status_code, clash.json()["error"]["param"]) == (409, "Idempotency-Key")
        assert (await keyed(gateway.client, "one")).status_code == 200
        await gateway.until_idle()


@pytest.mark.parametrize("key", ["", "a b", "ä".encode("latin-1").decode("latin-1"), "k" * 256])
async def test_a_key_that_is_none_is_refused(key: str) -> None:
    async with rig() as gateway:
        raw = [(b"idempotency-key", key.encode("latin-1")), (b"content-type", b"application/json")]
        response = await gateway.client.post("/generate", content=b'{"prompt": "Hello"}', headers=raw)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "Idempotency-Key")
