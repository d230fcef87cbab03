"""API keys at the door: who is let in, as whom, and what nobody gets to see."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import msgspec
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from gateway.app import create_app
from gateway.caller import Caller
from gateway.keys import MAX_FILE_BYTES, MAX_KEYS, OPEN_PATHS, BadKeyFile, Key, KeyFile, KeyRing, digest_of, read_keys
from tests.gateway.support import PATIENCE_S, Rig, rig, server, stream, whole
from wire.errors import Forbidden, MillraceError, Unauthorized

NOW = datetime.now(UTC)
HOUR = timedelta(hours=1)
SECRETS = {name: f"mr-{name * 43}"[:46] for name in ("a", "b", "old", "gone", "soon", "two")}
STRANGER = f"mr-{'x' * 43}"


def key(name: str, **fields: object) -> Key:
    return msgspec.convert(
        {"id": f"key-{name}", "sha256": digest_of(SECRETS[name].encode()), "tenant": f"team-{name}", "created": NOW}
        | fields,
        Key,
    )


KEYS = (
    key("a", weight=3),
    key("b"),
    key("two", tenant="team-a"),
    key("old", expires=NOW - HOUR),
    key("gone", revoked=NOW),
    key("soon", expires=NOW + HOUR),
)


def write(path: Path, *keys: Key) -> Path:
    """As `millrace keys` does: whole, by a rename."""
    fresh = path.with_suffix(".fresh")
    fresh.write_bytes(msgspec.json.encode(KeyFile(version=1, keys=list(keys))))
    fresh.rename(path)
    return path


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(write(tmp_path / "keys.json", *KEYS))


def header(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {SECRETS[name]}"}


def bearer(name: str) -> bytes:
    return f"Bearer {SECRETS[name]}".encode()


# --- the file ---------------------------------------------------------------------------------------------------------


def entry(**fields: object) -> dict[str, object]:
    return {"id": "k", "sha256": "0" * 64, "tenant": "t", "created": "2026-01-01T00:00:00Z"} | fields


def file_of(*keys: dict[str, object], **fields: object) -> bytes:
    return json.dumps({"version": 1, "keys": keys} | fields).encode()


BAD_FILES = {
    "nothing": b"",
    "not JSON": b"keys: []",
    "not UTF-8": file_of(entry(note="\xff")).replace(b"\\u00ff", b"\xff"),
    "a list": b"[]",
    "nesting without end": b"[" * 100_000,
    "no version": b'{"keys": []}',
    "another version": file_of(version=2),
    "an unknown field beside the keys": file_of(default_tenant="t"),
    "an unknown field of a key": file_of(entry(models=["small"])),
    "a secret": file_of(entry(secret=STRANGER)),
    "no digest": file_of({name: value for name, value in entry().items() if name != "sha256"}),
    "a short digest": file_of(entry(sha256="0" * 63)),
    "a digest in capitals": file_of(entry(sha256="A" * 64)),
    "no tenant": file_of(entry(tenant="")),
    "a tenant with a space": file_of(entry(tenant="team a")),
    "a tenant with a line end": file_of(entry(tenant="team\n")),
    "a long tenant": file_of(entry(tenant="t" * 65)),
    "an id that could break a log line": file_of(entry(id='k"')),
    "no weight": file_of(entry(weight=0)),
    "too much weight": file_of(entry(weight=65)),
    "a time of no zone": file_of(entry(expires="2026-01-01T00:00:00")),
    "a time that is none": file_of(entry(revoked="yes")),
    "revoked is no time": file_of(entry(revoked=True)),
    "a note of two lines": file_of(entry(note="a\nb")),
    "one id twice": file_of(entry(), entry(sha256="1" * 64)),
    "one secret for two": file_of(entry(), entry(id="l", tenant="other")),
    "too many keys": file_of(*(entry(id=str(i), sha256=f"{i:064x}") for i in range(MAX_KEYS + 1))),
    "too many bytes": file_of() + b" " * MAX_FILE_BYTES,
}


@pytest.mark.parametrize("raw", BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_breaks_its_schema_is_refused_and_not_quoted(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(raw)
    with pytest.raises(BadKeyFile) as caught:
        read_keys(path)
    assert str(path) in str(caught.value)
    assert STRANGER not in str(caught.value)


def test_as_many_keys_as_may_be_are_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_bytes(file_of(*(entry(id=str(i), sha256=f"{i:064x}") for i in range(MAX_KEYS))))
    assert len(read_keys(path)) == MAX_KEYS


@pytest.mark.parametrize("path", ["/no/such/file", "/dev/zero", "/dev"])
def test_what_is_not_a_file_is_refused(path: str) -> None:
    with pytest.raises(BadKeyFile, match=f"cannot read keys from {path}"):
        read_keys(Path(path))


# --- one header -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("authorization", "caller"),
    [
        (bearer("a"), Caller("team-a", 3)),
        (bearer("b"), Caller("team-b", 1)),
        (bearer("two"), Caller("team-a", 1)),  # a tenant may have several keys
        (bearer("soon"), Caller("team-soon", 1)),
        (bearer("a").replace(b"Bearer", b"bEARER"), Caller("team-a", 3)),  # RFC 9110, 11.1: no matter the case
    ],
)
def test_a_key_speaks_for_its_tenant_with_its_weight(ring: KeyRing, authorization: bytes, caller: Caller) -> None:
    assert ring.caller(authorization) == caller


A = SECRETS["a"].encode()
STRANGE_HEADERS = [
    None, b"", b"Bearer", b"Bearer ", A, b"Basic " + A, b"Bearer" + A, b"Bearer  " + A, b"Bearer " + A + b" ",
    b"Bearer " + A + b"\n", b"Bearer " + A[:-1], b"Bearer " + A + b"a", b"Bearer " + A.upper(), b"Bearer \xff" + A[1:],
    b"Bearer " + A + b", Bearer " + A, b"Bearer " + b"a" * 1_000_000, b"Bearer " + STRANGER.encode(),
    b"Bearer " + digest_of(A).encode(), b"Bearer key-a",
]  # fmt: skip


@pytest.mark.parametrize("authorization", STRANGE_HEADERS, ids=range(len(STRANGE_HEADERS)))
def test_whatever_is_not_exactly_a_known_key_is_nobody(ring: KeyRing, authorization: bytes | None) -> None:
    with pytest.raises(Unauthorized) as caught:
        ring.caller(authorization)
    assert caught.value.param == "Authorization"
    assert SECRETS["a"] not in caught.value.message


@pytest.mark.parametrize(("name", "words"), [("old", "key-old is expired"), ("gone", "key-gone is revoked")])
def test_a_key_that_has_ended_is_told_so(ring: KeyRing, name: str, words: str) -> None:
    with pytest.raises(Forbidden, match=words):
        ring.caller(bearer(name))


def test_a_file_without_keys_lets_nobody_in(tmp_path: Path) -> None:
    with pytest.raises(Unauthorized):
        KeyRing(write(tmp_path / "keys.json")).caller(bearer("a"))


# --- a file that changes ----------------------------------------------------------------------------------------------


def is_let_in(ring: KeyRing, name: str) -> bool:
    try:
        ring.caller(bearer(name))
    except MillraceError:
        return False
    return True


def test_changes_are_heard_of_and_a_broken_file_leaves_the_last_good_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "keys.json", key("a"))
    ring = KeyRing(path, look_every_s=0)
    assert not is_let_in(ring, "b")
    write(path, key("a"), key("b"))
    assert is_let_in(ring, "b")
    write(path, key("a", revoked=NOW), key("b"))
    assert not is_let_in(ring, "a")

    for break_it in (lambda: path.write_bytes(file_of(entry(secret=STRANGER))), path.unlink):
        caplog.clear()
        break_it()
        assert is_let_in(ring, "b")
        assert not is_let_in(ring, "a")
        assert [(record.levelname, record.message) for record in caplog.records] == [
            ("ERROR", "keys not read, the last good ones stay in force")
        ]
        assert STRANGER not in str(vars(caplog.records[0]))

    write(path, key("a"))
    assert is_let_in(ring, "a")
    assert not is_let_in(ring, "b")


def test_a_file_changed_in_place_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.json", key("a"))
    ring = KeyRing(path, look_every_s=0)
    path.write_bytes(msgspec.json.encode(KeyFile(version=1, keys=[key("a"), key("b")])))
    assert is_let_in(ring, "b")


def test_a_file_that_did_not_change_is_not_read_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ring = KeyRing(write(tmp_path / "keys.json", key("a")), look_every_s=0)
    for _ in range(3):
        assert is_let_in(ring, "a")
    assert [record.message for record in caplog.records] == ["keys read"]


def test_the_file_is_not_looked_at_for_every_request(tmp_path: Path) -> None:
    path = write(tmp_path / "keys.json", key("a"))
    ring = KeyRing(path, look_every_s=3_600)
    write(path, key("b"))
    assert is_let_in(ring, "a")


def test_without_good_keys_there_is_nothing_to_begin_with(tmp_path: Path) -> None:
    with pytest.raises(BadKeyFile):
        KeyRing(tmp_path / "keys.json")


# --- the door ---------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def keyed(tmp_path: Path) -> AsyncIterator[Rig]:
    """A gateway that asks for keys and looks at their file at every request."""
    async with rig() as gateway:
        ring = KeyRing(write(tmp_path / "keys.json", *KEYS), look_every_s=0)
        health = gateway.health[-1]
        app = create_app(gateway.queue, gateway.models, health=lambda: health, telemetry=gateway.telemetry, keys=ring)
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test") as client,
        ):
            yield dataclasses.replace(gateway, app=app, client=client)


async def operations(gateway: Rig) -> list[tuple[str, str]]:
    document = (await gateway.client.get("/openapi.json")).json()
    described = [(method, path) for path, methods in document["paths"].items() for method in methods]
    return [*described, ("get", "/no/such/route"), ("get", "/"), ("options", "/generate"), ("get", "/livez/")]


async def test_every_route_but_the_probes_wants_a_key(tmp_path: Path) -> None:
    async with keyed(tmp_path) as gateway:
        checked = await operations(gateway)
        assert {"/generate", "/streams/{request_id}", "/tokenize", "/livez"} <= {path for _, path in checked}
        for method, path in checked:
            response = await gateway.client.request(method, path)
            if path in OPEN_PATHS:
                assert response.status_code == 200
                continue
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), (method, path)
            error = response.json()["error"]
            assert (error["code"], error["param"], error["retryable"]) == ("unauthorized", "Authorization", False)
            assert error["request_id"] == response.headers["x-request-id"]
            response = await gateway.client.request(method, path, headers=header("a"))
            assert response.status_code not in (401, 403), (method, path)
            response = await gateway.client.request(method, path, headers=header("gone"))
            assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")
            assert "www-authenticate" not in response.headers
        assert set(gateway.telemetry.refusals) >= {"unauthorized", "forbidden"}
        assert ("other", "GET", 401) in gateway.telemetry.http
        assert not gateway.worker.requests


async def test_two_headers_are_refused_even_if_both_are_good(tmp_path: Path) -> None:
    async with keyed(tmp_path) as gateway:
        twice = [("Authorization", f"Bearer {SECRETS[name]}") for name in ("a", "b")]
        assert (await gateway.client.get("/requests/x", headers=twice)).status_code == 401


async def test_a_request_carries_the_tenant_and_the_weight_of_its_key(tmp_path: Path) -> None:
    async with keyed(tmp_path) as gateway:
        for name in ("a", "b", "two"):
            gateway.client.headers = httpx.Headers(header(name))
            await whole(gateway)
        callers = [(each.tenant, each.weight) for each in gateway.worker.requests]
        assert callers == [("team-a", 3), ("team-b", 1), ("team-a", 1)]


async def test_without_keys_everybody_is_nobody() -> None:
    async with rig() as gateway:
        await gateway.client.post("/generate", json={"prompt": "Hello"}, headers=header("a"))
        assert [(each.tenant, each.weight) for each in gateway.worker.requests] == [("", 1)]


async def test_what_a_tenant_asked_is_there_for_its_keys_only(tmp_path: Path) -> None:
    async with keyed(tmp_path) as gateway:
        gateway.client.headers = httpx.Headers(header("a"))
        generation_id, _ = await stream(gateway)
        for method, path in (
            ("GET", f"/streams/{generation_id}"),
            ("GET", f"/requests/{generation_id}"),
            ("DELETE", f"/requests/{generation_id}"),
        ):
            for name, is_theirs in (("two", True), ("b", False)):
                response = await gateway.client.request(method, path, headers=header(name))
                assert response.is_success == is_theirs, (method, path, name)
                assert is_theirs or response.json()["error"]["code"] == "unknown_request"


async def test_a_body_without_a_key_is_not_taken_in(tmp_path: Path) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65_536

    async with keyed(tmp_path) as gateway, server(gateway.app) as address:
        async with asyncio.timeout(PATIENCE_S), httpx.AsyncClient(base_url=f"http://{address}") as client:
            response = await client.post("/generate", content=b"x" * 1_000_000)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer")
            with pytest.raises(httpx.TransportError):
                await client.post("/generate", content=chunks())
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /generate HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\nExpect: 100-continue\r\n\r\n")
        answer = (await reader.read()).decode()
        writer.close()
        assert answer.startswith("HTTP/1.1 401 ")  # and not 100 first


async def test_a_socket_wants_a_key_as_well(tmp_path: Path) -> None:
    async with keyed(tmp_path) as gateway, server(gateway.app) as address:
        url = f"ws://{address}/generate/stream"
        for headers, status in (({}, 401), ({"Authorization": f"Bearer {STRANGER}"}, 401), (header("old"), 403)):
            with pytest.raises(InvalidStatus) as refused:
                await connect(url, additional_headers=headers)
            assert refused.value.response.status_code == status
            assert refused.value.response.headers.get("WWW-Authenticate") == ("Bearer" if status == 401 else None)
        async with connect(url, additional_headers=header("a")) as socket:
            await socket.send('{"type": "generate", "id": "1", "prompt": "Hello", "max_tokens": 1}')
            async with asyncio.timeout(PATIENCE_S):
                while json.loads(await socket.recv())["type"] != "done":
                    pass
        assert [(each.tenant, each.weight) for each in gateway.worker.requests] == [("team-a", 3)]


async def test_a_socket_takes_no_frame_once_its_key_is_revoked(tmp_path: Path) -> None:
    async with keyed(tmp_path) as gateway, server(gateway.app) as address:
        async with connect(f"ws://{address}/generate/stream", additional_headers=header("a")) as socket:
            write(tmp_path / "keys.json", key("a", revoked=NOW))
            await socket.send('{"type": "generate", "id": "1", "prompt": "Hello"}')
            with pytest.raises(ConnectionClosed):
                await asyncio.wait_for(socket.recv(), PATIENCE_S)
            assert socket.close_code == 1008
        assert not gateway.worker.requests


async def test_no_key_is_ever_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    said = ""
    async with keyed(tmp_path) as gateway:
        for name in ("a", "old", "gone"):
            for path in ("/requests/x", "/version", "/nowhere"):
                said += (await gateway.client.get(path, headers=header(name))).text
        for authorization in (f"Bearer {STRANGER}", f"Basic {STRANGER}", STRANGER):
            said += (await gateway.client.get("/requests/x", headers={"Authorization": authorization})).text
        said += repr(gateway.telemetry)
    said += "".join(str(vars(record)) for record in caplog.records)
    assert "key-old is expired" in said
    for secret in (*SECRETS.values(), STRANGER):
        assert secret not in said
        assert digest_of(secret.encode()) not in said


async def test_the_openapi_document_says_where_a_key_is_wanted(tmp_path: Path) -> None:
    async with keyed(tmp_path) as gateway, gateway.another() as without_keys:
        document = (await gateway.client.get("/openapi.json")).json()
        assert document["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
        assert document["security"] == [{"key": []}]
        open_paths = {
            path for path, each in document["paths"].items() if all(o.get("security") == [] for o in each.values())
        }
        assert open_paths == OPEN_PATHS & document["paths"].keys() == {"/livez", "/readyz", "/version"}
        assert "security" not in (await without_keys.get("/openapi.json")).json()
