"""What holds for every request, whatever its route: ids, sizes, hosts, and one shape for all errors."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import threading
from collections.abc import AsyncIterator

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route, WebSocketRoute
from starlette.types import Message

from gateway.app import create_app
from gateway.limits import GatewayLimits
from gateway.models import Models
from gateway.probes import Health
from gateway.prompts import Prompts
from services.queues.memory import MemoryQueue
from tests.gateway.support import Script, rig, served_model, server
from wire.messages import Generate

BODY = {"prompt": "Hello"}
POST = b"POST /generate HTTP/1.1\r\nHost: a\r\n"


@pytest.mark.parametrize("given", ["a", "0123-abc_DEF.x:y", "f" * 128])
async def test_a_request_id_is_echoed(given: str) -> None:
    async with rig() as gateway:
        for response in (
            await gateway.client.post("/generate", json=BODY, headers={"X-Request-Id": given}),
            await gateway.client.get("/nowhere", headers={"X-Request-Id": given}),
        ):
            assert response.headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "f" * 129, "a b", 'a"b', "ü", "a;b"])
async def test_a_request_id_that_could_break_a_log_line_is_replaced(given: str | None) -> None:
    async with rig() as gateway:
        headers = {} if given is None else {"X-Request-Id": given.encode("utf-8")}
        response = await gateway.client.get("/nowhere", headers=headers)  # type: ignore[arg-type]
        assert response.headers["x-request-id"].startswith("req-")
        assert response.json()["error"]["request_id"] == response.headers["x-request-id"]


async def test_a_body_over_the_limit_is_refused_by_its_announced_length() -> None:
    async with rig(limits=GatewayLimits(max_body_bytes=100)) as gateway:
        response = await gateway.client.post("/generate", json={"prompt": "x" * 100})
        assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
        assert "100 bytes" in response.json()["error"]["message"]
        assert (await gateway.client.post("/generate", json=BODY)).status_code == 200


async def chunks(count: int) -> AsyncIterator[bytes]:
    for _ in range(count):
        yield b"x" * 10_000


@pytest.mark.parametrize("count", [20, 1_000])
async def test_a_body_over_the_limit_is_refused_by_what_arrives_and_the_client_sees_it(count: int) -> None:
    async with (
        rig() as gateway,
        server(gateway.app) as address,
        httpx.AsyncClient(base_url=f"http://{address}") as client,
    ):
        headers = {"content-type": "application/json"}
        response = await client.post("/generate", content=chunks(count), headers=headers)
        if count * 10_000 > 1 << 20:
            assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
            announced = await client.post("/generate", content=b"x" * 10_000_000, headers=headers)
            assert announced.status_code == 413
        else:
            assert "not JSON" in response.json()["error"]["message"]


async def test_a_body_without_end_is_cut_off() -> None:
    async with rig(limits=GatewayLimits(max_body_bytes=1_000)) as gateway, server(gateway.app) as address:
        host, port = address.split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(POST + b"Transfer-Encoding: chunked\r\nContent-Type: application/json\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"

        async def send_for_ever() -> None:
            while True:
                writer.write(chunk)
                await writer.drain()

        with pytest.raises(ConnectionError):
            await send_for_ever()
        writer.close()
        assert gateway.telemetry.http == [("/generate", "POST", 413)]


async def test_a_body_that_does_not_arrive_in_time_is_refused() -> None:
    async with rig(limits=GatewayLimits(max_body_s=0.1)) as gateway, server(gateway.app) as address:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(POST + b"Content-Length: 9\r\nContent-Type: application/json\r\n\r\n{")
        answer = (await reader.read()).decode()
        writer.close()
        assert answer.startswith("HTTP/1.1 400 ")
        assert "connection: close" in answer
        assert "did not arrive within 0.1 s" in answer


async def test_a_client_that_asks_before_it_sends_is_told_not_to() -> None:
    async with rig() as gateway, server(gateway.app) as address:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(POST + b"Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n")
        answer = (await reader.read()).decode()
        writer.close()
        assert answer.startswith("HTTP/1.1 413 ")


async def test_a_compressed_body_is_refused_unopened() -> None:
    bomb = gzip.compress(b'{"prompt": "' + b"x" * 10_000_000 + b'"}')
    async with rig() as gateway:
        for encoding in ("gzip", "br", "deflate", "gzip, identity"):
            headers = {"content-type": "application/json", "content-encoding": encoding}
            response = await gateway.client.post("/generate", content=bomb, headers=headers)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "Content-Encoding")


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"]
)
async def test_a_body_that_does_not_say_it_is_json_is_refused(content_type: str | None) -> None:
    # Those types are what any web page may send anywhere without asking first.
    async with rig() as gateway:
        headers = {} if content_type is None else {"content-type": content_type}
        for path in ("/generate", "/tokenize", "/detokenize"):
            response = await gateway.client.post(path, content=json.dumps(BODY), headers=headers)
            assert (response.status_code, response.json()["error"]["param"]) == (400, "Content-Type")


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
async def test_a_body_that_says_it_is_json_is_read(content_type: str) -> None:
    async with rig() as gateway:
        response = await gateway.client.post(
            "/generate", content=json.dumps(BODY), headers={"content-type": content_type}
        )
        assert response.status_code == 200


async def raw_status(gateway_app: object, headers: list[tuple[bytes, bytes]]) -> tuple[int, bytes]:
    """GET /version with exactly these headers, which no client would send."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
        "path": "/version", "raw_path": b"/version", "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    await gateway_app(scope, receive, send)  # type: ignore[operator]
    return sent[0]["status"], sent[1]["body"]


@pytest.mark.parametrize("host", [b"a/b", b"a?b", b"a#b", b"a b", b"a@b", b"", b"a:b", b"a:123456", b"[::1", b"\xff"])
async def test_a_malformed_host_is_refused(host: bytes) -> None:
    async with rig() as gateway:
        status, body = await raw_status(gateway.app, [(b"host", host)])
        assert (status, json.loads(body)["error"]["param"]) == (400, "Host")


async def test_two_hosts_are_refused() -> None:
    async with rig() as gateway:
        status, body = await raw_status(gateway.app, [(b"host", b"a"), (b"host", b"b")])
        assert (status, json.loads(body)["error"]["param"]) == (400, "Host")


async def test_only_allowed_hosts_are_answered_when_some_are_named() -> None:
    limits = GatewayLimits(allowed_hosts=frozenset({"localhost", "[::1]"}))
    async with rig(limits=limits) as gateway:
        for host, status in ((b"localhost", 200), (b"LOCALHOST:8000", 200), (b"[::1]:80", 200), (b"evil.example", 400)):
            assert (await raw_status(gateway.app, [(b"host", host)]))[0] == status


@pytest.mark.parametrize("length", [b"-1", b"abc", b"1e3", b"", b"9" * 30])
async def test_a_malformed_content_length_is_refused(length: bytes) -> None:
    async with rig() as gateway:
        status, body = await raw_status(gateway.app, [(b"host", b"a"), (b"content-length", length)])
        assert (status, json.loads(body)["error"]["param"]) == (400, "Content-Length")


class BrokenQueue(MemoryQueue):
    """A queue with a bug."""

    async def submit(self, request: Generate) -> bool:
        raise RuntimeError("secret: /etc/passwd")


async def test_a_bug_is_an_internal_error_without_its_text_and_the_log_has_it(caplog: pytest.LogCaptureFixture) -> None:
    app = create_app(BrokenQueue(), Models([served_model()]), health=lambda: Health(is_live=True, is_ready=True))
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        with caplog.at_level(logging.WARNING):
            response = await client.post("/generate", json=BODY, headers={"X-Request-Id": "abc"})
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal"
    assert response.json()["error"]["retryable"] is False
    assert "secret" not in response.text
    (record,) = [record for record in caplog.records if record.message == "unexpected error"]
    assert vars(record)["request_id"] == "abc"
    assert record.exc_info is not None


async def test_every_route_is_known_and_answers_its_errors_in_the_one_shape() -> None:
    async with rig(limits=GatewayLimits(max_body_bytes=10)) as gateway:
        known = {
            "/generate": {"POST"},
            "/streams/{request_id}": {"GET"},
            "/requests/{request_id}": {"GET", "DELETE"},
            "/tokenize": {"POST"},
            "/detokenize": {"POST"},
            "/livez": {"GET"},
            "/readyz": {"GET"},
            "/version": {"GET"},
            "/openapi.json": {"GET", "HEAD"},
        }
        found: dict[str, set[str]] = {}
        sockets = []
        for route in flat(gateway.app.routes):
            if isinstance(route, APIRoute | Route):
                found.setdefault(route.path, set()).update(route.methods or ())
            elif isinstance(route, WebSocketRoute):
                sockets.append(route.path)
        assert found == known
        assert sockets == ["/generate/stream"]
        for path in known:
            # No route takes PATCH, and none a body of this size.
            for method, status in (("PATCH", 405), ("POST", 413)):
                large = b"x" * 11 if status == 413 else b""
                response = await gateway.client.request(method, path, content=large)
                assert response.status_code == status
                error = response.json()["error"]
                assert error.keys() == {"code", "message", "retryable", "request_id"}
                assert error["request_id"] == response.headers["x-request-id"]


def flat(routes: object) -> list[object]:
    """Routes, and those of routers inside, however the framework nests them."""
    found: list[object] = []
    for route in routes:  # type: ignore[attr-defined]
        inner = getattr(route, "routes", None) or getattr(getattr(route, "original_router", None), "routes", None)
        found += flat(inner) if inner else [route]
    return found


async def test_the_probes_say_what_health_says() -> None:
    async with rig() as gateway:
        assert (await gateway.client.get("/livez")).json() == {"status": "live"}
        assert (await gateway.client.get("/readyz")).json() == {"status": "ready"}
        gateway.health.append(Health(is_live=True, is_ready=False, reason="the model is loading"))
        assert (await gateway.client.get("/livez")).status_code == 200
        response = await gateway.client.get("/readyz")
        assert (response.status_code, response.json()["error"]["message"]) == (503, "the model is loading")
        assert response.headers["retry-after"] == "1"
        gateway.health.append(Health(is_live=False, is_ready=False))
        assert (await gateway.client.get("/livez")).status_code == 503


async def test_the_version_names_the_models() -> None:
    async with rig() as gateway:
        assert (await gateway.client.get("/version")).json() == {
            "name": "millrace",
            "version": "1.2.3",
            "wire_version": 1,
            "models": ["millpond@0123456789ab"],
        }


async def test_tokenize_gives_the_ids_that_generate_would_use_and_detokenize_gives_the_text_back() -> None:
    async with rig(limits=GatewayLimits(inline_chars=10)) as gateway:
        messages = [{"role": "user", "content": "Who swims in the pond? 🦆"}]
        for prompt in ({"prompt": "A long enough text 🦆."}, {"messages": messages}, {"input_ids": [0, 70, 1]}):
            tokenized = (await gateway.client.post("/tokenize", json=prompt)).json()
            await gateway.client.post("/generate", json=prompt)
            assert tokenized["token_ids"] == gateway.worker.requests[-1].prompt_ids
            assert tokenized["num_tokens"] == len(tokenized["token_ids"])
            assert tokenized["max_model_len"] == 4_096
            back = (await gateway.client.post("/detokenize", json={"token_ids": tokenized["token_ids"]})).json()
            again = (await gateway.client.post("/tokenize", json={"prompt": back["text"]})).json()
            assert again["token_ids"] == tokenized["token_ids"]
        assert (await gateway.client.post("/detokenize", json={"token_ids": []})).json()["text"] == ""


async def test_long_texts_are_tokenized_beside_the_event_loop() -> None:
    prompts = Prompts(GatewayLimits(inline_chars=100))
    assert await prompts.apart(100, threading.get_ident) == threading.get_ident()
    assert await prompts.apart(101, threading.get_ident) != threading.get_ident()
    prompts.close()


async def test_http_telemetry_has_bounded_labels() -> None:
    async with rig() as gateway:
        await gateway.client.post("/generate", json=BODY)
        await gateway.client.get("/streams/gen-whatever")
        await gateway.client.get("/no/such/path")
        await gateway.client.request("BREW", "/generate")
        assert gateway.telemetry.http == [
            ("/generate", "POST", 200),
            ("/streams/{request_id}", "GET", 404),
            ("other", "GET", 404),
            ("/generate", "other", 405),
        ]


async def test_the_openapi_document_describes_bodies_answers_and_errors() -> None:
    async with rig(Script()) as gateway:
        document = (await gateway.client.get("/openapi.json")).json()
        schemas = document["components"]["schemas"]
        assert {"GenerateBody", "Answer", "ErrorAnswer", "Usage", "ChatMessage"} <= schemas.keys()
        generate = document["paths"]["/generate"]["post"]
        reference = generate["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        assert reference == "#/components/schemas/GenerateBody"
        assert schemas["GenerateBody"]["additionalProperties"] is False
        references = set()

        def collect(node: object) -> None:
            if isinstance(node, dict):
                if "$ref" in node:
                    references.add(node["$ref"])
                for value in node.values():
                    collect(value)
            elif isinstance(node, list):
                for value in node:
                    collect(value)

        collect(document)
        assert {reference.removeprefix("#/components/schemas/") for reference in references} <= schemas.keys()
        for operations in document["paths"].values():
            for operation in operations.values():
                assert "422" not in operation["responses"]
                assert "4XX" in operation["responses"]
