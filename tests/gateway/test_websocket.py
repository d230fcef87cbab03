"""WS /generate/stream over a real server: many requests, bad frames, slow readers, and nothing left behind."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from gateway.limits import GatewayLimits
from gateway.probes import Health
from tests.gateway.support import PATIENCE_S, STORY, Rig, Script, ids_of, mute_client, rig, server, text_of, until

Frame = dict[str, object]


class Client:
    """A WebSocket client that speaks frames."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket

    async def send(self, **frame: object) -> None:
        await self.socket.send(json.dumps(frame))

    async def receive(self) -> Frame:
        async with asyncio.timeout(PATIENCE_S):
            frame: Frame = json.loads(await self.socket.recv())
        return frame

    async def until_done(self, *ids: str) -> dict[str, list[Frame]]:
        """All frames by id, until each of these has its last one."""
        frames: dict[str, list[Frame]] = {each: [] for each in ids}
        waiting = set(ids)
        while waiting:
            frame = await self.receive()
            frames[str(frame["id"])].append(frame)
            if frame["type"] in ("done", "error"):
                waiting.remove(str(frame["id"]))
        return frames


@asynccontextmanager
async def chat(script: Script | None = None, limits: GatewayLimits | None = None) -> AsyncIterator[tuple[Rig, Client]]:
    """A gateway and one socket to it."""
    async with rig(script, limits) as gateway, server(gateway.app) as address:
        async with connect(f"ws://{address}/generate/stream", max_size=None, compression=None) as socket:
            yield gateway, Client(socket)
        await gateway.until_idle()


def joined(frames: list[Frame]) -> tuple[str, list[int]]:
    text = ""
    token_ids: list[int] = []
    for frame in frames:
        if frame["type"] == "tokens":
            assert frame["index"] == len(token_ids)
            ids = frame["token_ids"]
            assert isinstance(ids, list)
            token_ids += ids
        text += str(frame.get("text", ""))
    return text, token_ids


async def test_a_request_gets_accepted_tokens_and_done() -> None:
    async with chat() as (gateway, client):
        await client.send(type="generate", id="a", prompt="Hello", seed=5)
        frames = (await client.until_done("a"))["a"]
        request = gateway.worker.requests[0]
        assert frames[0] == {
            "type": "accepted",
            "id": "a",
            "stream": request.request_id,
            "model": "millpond@0123456789ab",
            "seed": 5,
        }
        assert {frame["type"] for frame in frames[1:-1]} == {"tokens"}
        assert joined(frames) == (text_of(STORY), STORY)
        done = frames[-1]
        assert done.keys() == {"type", "id", "text", "finish_reason", "usage", "timings", "seed"}
        assert done["finish_reason"] == "stop"
        assert done["usage"] == {"prompt_tokens": 1, "completion_tokens": len(STORY), "cached_tokens": 3}


async def test_a_socket_streams_what_http_answers() -> None:
    async with chat(Script(burst=3)) as (gateway, client):
        bodies: list[Frame] = [{}, {"stop": "swam"}, {"max_tokens": 5}]
        for number, body in enumerate(bodies):
            answer = (await gateway.client.post("/generate", json={"prompt": "Hello", **body})).json()
            await client.send(type="generate", id=str(number), prompt="Hello", **body)
            frames = (await client.until_done(str(number)))[str(number)]
            assert joined(frames) == (answer["text"], answer["token_ids"])
            assert frames[-1]["finish_reason"] == answer["finish_reason"]
            assert frames[-1]["usage"] == answer["usage"]


async def test_many_requests_share_a_socket_and_stay_apart() -> None:
    async with chat(Script(answer=lambda request: request.prompt_ids[::-1], step_s=0.001)) as (gateway, client):
        prompts = {str(number): [100 + number, 7, 200 + number] for number in range(40)}
        for each, prompt in prompts.items():
            await client.send(type="generate", id=each, input_ids=prompt)
        frames = await client.until_done(*prompts)
        for each, prompt in prompts.items():
            assert joined(frames[each])[1] == prompt[::-1]
            assert [frame["type"] for frame in frames[each]].count("done") == 1
        assert gateway.telemetry.open_sockets == 1
    assert gateway.telemetry.open_sockets == 0
    assert len(gateway.telemetry.ended) == 40


async def test_an_id_is_free_again_once_its_request_is_done() -> None:
    async with chat(Script(answer=lambda request: STORY[:2])) as (_, client):
        for _ in range(20):
            await client.send(type="generate", id="a", prompt="Hello")
            assert (await client.until_done("a"))["a"][-1]["type"] == "done"


async def test_a_request_can_be_cancelled_while_others_go_on() -> None:
    async with chat(Script(answer=lambda request: STORY * 20, step_s=0.002)) as (_, client):
        await client.send(type="generate", id="long", prompt="Hello", max_tokens=900)
        await client.send(type="generate", id="short", prompt="Hello", max_tokens=30)
        while (await client.receive())["type"] != "tokens":
            pass
        await client.send(type="cancel", id="long")
        frames = await client.until_done("long", "short")
        assert frames["long"][-1]["finish_reason"] == "cancelled"
        assert frames["short"][-1]["finish_reason"] == "length"


async def test_a_socket_that_closes_has_its_requests_cancelled() -> None:
    limits = GatewayLimits(cancel_grace_s=0.05)
    async with chat(Script(silent_after=3), limits) as (gateway, client):
        for each in "abc":
            await client.send(type="generate", id=each, prompt="Hello")
        await gateway.until_tokens(9)
        await client.socket.close()
        await gateway.until_idle()
        assert [done.finish_reason for done in gateway.telemetry.ended] == ["cancelled"] * 3


async def test_a_socket_that_breaks_has_its_requests_cancelled() -> None:
    limits = GatewayLimits(cancel_grace_s=0.0)
    async with chat(Script(step_s=0.002, answer=lambda request: STORY * 20), limits) as (gateway, client):
        await client.send(type="generate", id="a", prompt="Hello", max_tokens=900)
        await client.receive()
        client.socket.transport.abort()
        await gateway.until_idle()
        assert [done.finish_reason for done in gateway.telemetry.ended] == ["cancelled"]


async def test_a_stream_is_resumed_on_another_socket_within_the_grace() -> None:
    async with rig(Script(step_s=0.003)) as gateway, server(gateway.app) as address:
        seen: list[Frame] = []
        async with connect(f"ws://{address}/generate/stream") as socket:
            client = Client(socket)
            await client.send(type="generate", id="a", prompt="Hello")
            stream = str((await client.receive())["stream"])
            while sum(len(frame["token_ids"]) for frame in seen) < 5:  # type: ignore[misc,arg-type]
                seen.append(await client.receive())
        count = len(joined(seen)[1])
        async with connect(f"ws://{address}/generate/stream") as socket:
            client = Client(socket)
            await client.send(type="resume", id=stream, **{"from": count})
            frames = (await client.until_done(stream))[stream]
            assert frames[0]["stream"] == stream
            rest = [frame for frame in frames if frame["type"] == "tokens"]
            assert rest[0]["index"] == count
            text = joined(seen)[0] + "".join(str(frame["text"]) for frame in [*rest, frames[-1]])
            assert text == text_of(STORY)
        assert len(gateway.telemetry.ended) == 1


BAD_FRAMES: list[tuple[str | bytes, str | None, str]] = [
    ("", None, "not JSON"),
    ("hello", None, "not JSON"),
    ("[]", None, "must be a JSON object"),
    (b"\x00\x01", None, "binary"),
    ('{"type": "generate", "type": "cancel", "id": "a"}', None, "given twice"),
    ("{" * 100_000, None, "not JSON"),
    ("[" * 100_000, None, "nested too deeply"),
    ('{"type": "generate"}', None, "id must be a string"),
    ('{"type": "generate", "id": 1}', None, "id must be a string"),
    ('{"type": "generate", "id": ""}', None, "id must be a string"),
    (json.dumps({"type": "generate", "id": "x" * 129}), None, "id must be a string"),
    ('{"id": "a"}', "a", "type must be one of"),
    ('{"id": "a", "type": "shout"}', "a", "type must be one of"),
    ('{"id": "a", "type": ["cancel"]}', "a", "type must be one of"),
]


async def test_a_frame_that_makes_no_sense_is_answered_and_the_socket_lives_on() -> None:
    async with chat() as (gateway, client):
        for raw, frame_id, words in BAD_FRAMES:
            await client.socket.send(raw)
            frame = await client.receive()
            assert (frame["type"], frame["code"], frame.get("id")) == ("error", "bad_request", frame_id), raw[:80]
            assert words in str(frame["message"])
            assert frame["retryable"] is False
        await client.send(type="generate", id="a", prompt="Hello")
        assert (await client.until_done("a"))["a"][-1]["finish_reason"] == "stop"
        assert gateway.telemetry.refusals == ["bad_request"] * len(BAD_FRAMES)


async def test_too_many_frames_that_make_no_sense_close_the_socket() -> None:
    async with chat(Script(silent_after=2), GatewayLimits(ws_max_bad_frames=3, cancel_grace_s=0.0)) as (
        gateway,
        client,
    ):
        await client.send(type="generate", id="a", prompt="Hello")
        await gateway.until_tokens(2)
        for _ in range(4):
            await client.socket.send("nonsense")
        await client.socket.wait_closed()
        assert client.socket.close_code == 1008
        await gateway.until_idle()


# The generate frame's fields are POST /generate's, so a few examples stand for its table.
BAD_REQUESTS: list[tuple[Frame, str, str | None, str]] = [
    ({"type": "generate", "temperature": "hot", "prompt": "a"}, "bad_request", "temperature", "number from"),
    ({"type": "generate"}, "bad_request", "prompt", "there is no prompt"),
    ({"type": "generate", "prompt": "a", "n": 2}, "bad_request", "n", "not supported yet"),
    ({"type": "generate", "prompt": "a", "colour": 1}, "bad_request", "colour", "unknown field"),
    ({"type": "generate", "prompt": "a", "stream": False}, "bad_request", "stream", "always streams"),
    ({"type": "generate", "prompt": "a", "model": "gpt"}, "unknown_model", "model", "served: millpond"),
    ({"type": "generate", "input_ids": [70] * 5_000}, "context_length_exceeded", None, "over"),
    ({"type": "cancel"}, "unknown_request", "id", "no request with this id"),
    ({"type": "cancel", "from": 1}, "bad_request", "from", "unknown field"),
    ({"type": "resume"}, "unknown_request", None, "never accepted"),
    ({"type": "resume", "from": -1}, "bad_request", "from", "integer from 0"),
    ({"type": "resume", "from": "0"}, "bad_request", "from", "integer from 0"),
    ({"type": "resume", "prompt": "a"}, "bad_request", "prompt", "unknown field"),
]


async def test_a_request_that_is_refused_is_an_error_frame_with_its_id() -> None:
    async with chat(limits=GatewayLimits(ws_max_bad_frames=1)) as (gateway, client):
        for body, code, param, words in BAD_REQUESTS:
            await client.send(id="a", **body)
            frame = await client.receive()
            assert (frame["type"], frame["id"], frame["code"]) == ("error", "a", code)
            assert frame.get("param") == param
            assert words in str(frame["message"])
        assert gateway.worker.requests == []


async def test_an_id_in_use_is_refused_and_its_request_goes_on() -> None:
    async with chat(Script(step_s=0.003)) as (_, client):
        await client.send(type="generate", id="a", prompt="Hello")
        await client.receive()
        await client.send(type="generate", id="a", prompt="Hello")
        frames: list[Frame] = []
        while not frames or frames[-1]["type"] != "done":
            frames.append(await client.receive())
        errors = [frame for frame in frames if frame["type"] == "error"]
        assert [(frame["code"], frame["param"]) for frame in errors] == [("conflict", "id")]
        assert joined([frame for frame in frames if frame["type"] != "error"]) == (text_of(STORY), STORY)


async def test_requests_over_the_cap_of_a_socket_are_refused() -> None:
    gate = asyncio.Event()
    async with chat(Script(first_step=gate), GatewayLimits(ws_max_requests=2)) as (_, client):
        for each in "abc":
            await client.send(type="generate", id=each, prompt="Hello")
        frames = [await client.receive() for _ in range(3)]
        (error,) = [frame for frame in frames if frame["type"] == "error"]
        assert (error["id"], error["code"], error["retryable"], error["retry_after_s"]) == (
            "c",
            "queue_full",
            True,
            1.0,
        )
        gate.set()
        await client.until_done("a", "b")
        await client.send(type="generate", id="c", prompt="Hello")
        await client.until_done("c")


async def test_a_worker_that_is_lost_is_an_error_frame() -> None:
    async with chat(Script(fail_after=2)) as (_, client):
        await client.send(type="generate", id="a", prompt="Hello")
        frames = (await client.until_done("a"))["a"]
        assert [frame["type"] for frame in frames] == ["accepted", "tokens", "tokens", "error"]
        assert (frames[-1]["code"], frames[-1]["retryable"]) == ("worker_lost", True)


async def test_a_draining_server_refuses_new_requests_on_old_sockets() -> None:
    async with chat() as (gateway, client):
        gateway.health.append(Health(is_live=True, is_ready=False, is_draining=True))
        await client.send(type="generate", id="a", prompt="Hello")
        frame = await client.receive()
        assert (frame["code"], frame["retryable"]) == ("unavailable", True)


async def test_a_frame_that_is_too_large_is_answered_and_the_socket_closed() -> None:
    async with chat(limits=GatewayLimits(ws_max_frame_bytes=1_000)) as (_, client):
        await client.send(type="generate", id="a", prompt="ü" * 495)
        assert (await client.receive())["code"] == "request_too_large"
        with pytest.raises(ConnectionClosed):
            await client.receive()
        assert client.socket.close_code == 1009


async def test_a_reader_that_takes_nothing_is_cut() -> None:
    limits = GatewayLimits(max_stall_s=0.3, cancel_grace_s=0.0)
    script = Script(answer=lambda request: STORY * 200)
    async with rig(script, limits) as gateway, server(gateway.app, send_buffer_bytes=4_096) as address:
        with mute_client(address) as client:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(
                client,
                b"GET /generate/stream HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            )
            assert (await loop.sock_recv(client, 1_000)).startswith(b"HTTP/1.1 101 ")
            frame = b'{"type":"generate","id":"a","prompt":"Hello","max_tokens":4000}'
            await loop.sock_sendall(client, bytes([0x81, 0x80 | len(frame), 0, 0, 0, 0]) + frame)  # masked with zeros
            await gateway.until_ended(1)

            async def is_closed() -> bool:
                return gateway.telemetry.open_sockets == 0

            await until(is_closed)
            await gateway.until_idle()
        assert [done.finish_reason for done in gateway.telemetry.ended] == ["cancelled"]


async def test_a_slow_reader_gets_every_token() -> None:
    async with chat(Script(answer=lambda request: STORY * 20)) as (_, client):
        await client.send(type="generate", id="a", prompt="Hello", max_tokens=900)
        frames: list[Frame] = []
        while not frames or frames[-1]["type"] != "done":
            await asyncio.sleep(0.002)
            frames.append(await client.receive())
        assert joined(frames)[1] == (STORY * 20)[:900]


@pytest.mark.parametrize(
    ("origin", "allowed", "is_let_in"),
    [
        (None, frozenset[str](), True),
        ("https://evil.example", frozenset[str](), False),
        ("https://evil.example", frozenset({"https://chat.example"}), False),
        ("https://chat.example", frozenset({"https://chat.example"}), True),
        ("https://chat.example.evil.example", frozenset({"https://chat.example"}), False),
        ("null", frozenset({"https://chat.example"}), False),
    ],
)
async def test_only_web_pages_that_are_listed_may_connect(
    origin: str | None, allowed: frozenset[str], is_let_in: bool
) -> None:
    async with rig(limits=GatewayLimits(allowed_origins=allowed)) as gateway, server(gateway.app) as address:
        connecting = connect(f"ws://{address}/generate/stream", origin=origin)  # type: ignore[arg-type]
        if is_let_in:
            async with connecting as socket:
                await Client(socket).send(type="generate", id="a", prompt="Hello")
                assert (await Client(socket).receive())["type"] == "accepted"
        else:
            with pytest.raises(InvalidStatus) as caught:
                await connecting
            assert caught.value.response.status_code == 400
            error = json.loads(caught.value.response.body or b"")["error"]
            assert (error["code"], error["param"]) == ("bad_request", "Origin")


async def test_only_allowed_hosts_may_be_connected_to() -> None:
    async with (
        rig(limits=GatewayLimits(allowed_hosts=frozenset({"localhost"}))) as gateway,
        server(gateway.app) as address,
    ):
        with pytest.raises(InvalidStatus):
            await connect(f"ws://{address}/generate/stream")


async def test_a_burst_of_tiny_frames_is_answered_one_by_one() -> None:
    async with chat() as (gateway, client):
        for _ in range(2_000):
            await client.socket.send('{"type":"cancel","id":"a"}')
        for _ in range(2_000):
            assert (await client.receive())["code"] == "unknown_request"
        await client.send(type="generate", id="a", input_ids=ids_of("Hello"))
        await client.until_done("a")
        assert await gateway.is_idle()
