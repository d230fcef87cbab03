"""What happens to every connection before any route sees it: pure ASGI, one object.

Gives each request an id, counts its body as it arrives (bytes and time), and refuses what no route should have to
think about: compressed bodies, malformed or foreign Host headers, web pages that may not open sockets, clients without
a key. Routes find the caller in the scope. It is also the last `except` of a request.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Iterable
from typing import Final

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.caller import CALLER, NOBODY, Caller
from gateway.keys import AUTHORIZATION, OPEN_PATHS, KeyRing
from gateway.limits import GatewayLimits
from gateway.problems import REQUEST_ID, error_response
from gateway.telemetry import Telemetry
from gateway.trace import TRACEPARENT, sampled_trace, trace_id
from wire.errors import BadRequest, MillraceError, RequestTooLarge, Unauthorized

logger = logging.getLogger(__name__)

CLIENT_CLOSED: Final = 499  # nginx's word for a request whose client has left
POLICY_VIOLATION: Final = 1008
DISCARD_BYTES: Final = 16 << 20  # of a body that is refused
DISCARD_S: Final = 2.0
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_HOST: Final = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::[0-9]{1,5})?")
_METHODS: Final = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"))
_WANTED: Final = frozenset(
    (
        *(b"authorization", b"x-request-id", b"host", b"origin", b"content-length", b"content-encoding", b"expect"),
        TRACEPARENT,
    )
)


class Edge:
    """Middleware around the whole application. Without `keys` everybody may come in, as nobody in particular."""

    def __init__(self, app: ASGIApp, limits: GatewayLimits, telemetry: Telemetry, keys: KeyRing | None) -> None:
        self._app = app
        self._limits = limits
        self._telemetry = telemetry
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        headers, twice = _headers(scope["headers"])
        _enter_trace(headers, twice)
        exchange = _Exchange(_request_id(headers), receive, send, self._limits)
        scope[REQUEST_ID] = exchange.request_id
        try:
            exchange.check_headers(headers)
            self._check_host(headers, twice)
            if scope["path"] not in OPEN_PATHS:
                scope[CALLER] = self._caller(headers, twice)
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            pass
        except Exception as error:
            if exchange.status is not None:
                raise  # too late for an answer: the server closes the connection
            exchange.is_refused = True
            await self._refusal(error, exchange.request_id)(scope, exchange.receive, exchange.send)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - started
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._telemetry.http_answered(route, method, exchange.status or CLIENT_CLOSED, seconds)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, twice = _headers(scope["headers"])
        _enter_trace(headers, twice)
        scope[REQUEST_ID] = request_id = _request_id(headers)
        try:
            self._check_host(headers, twice)
            self._check_origin(headers)
            scope[CALLER] = self._caller(headers, twice)
        except MillraceError as error:
            await receive()  # websocket.connect
            if "websocket.http.response" in scope.get("extensions", {}):
                await self._refusal(error, request_id)(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": POLICY_VIOLATION})
            return

        async def receive_while_welcome() -> Message:
            """A socket may outlive its key: no frame is taken after that, as no request would be."""
            message = await receive()
            if message["type"] == "websocket.receive":
                try:
                    self._caller(headers, twice)
                except MillraceError as error:
                    self._telemetry.refused(error.code)
                    await send({"type": "websocket.close", "code": POLICY_VIOLATION})
                    return {"type": "websocket.disconnect", "code": POLICY_VIOLATION}
            return message

        await self._app(scope, receive_while_welcome, send)

    def _caller(self, headers: dict[bytes, bytes], twice: set[bytes]) -> Caller:
        if self._keys is None:
            return NOBODY
        if b"authorization" in twice:
            raise Unauthorized("there is more than one Authorization header", param=AUTHORIZATION)
        return self._keys.caller(headers.get(b"authorization"))

    def _refusal(self, error: Exception, request_id: str) -> Response:
        response = error_response(error, request_id, self._telemetry)
        if isinstance(error, Unauthorized):
            response.headers["WWW-Authenticate"] = "Bearer"
        return response

    def _check_host(self, headers: dict[bytes, bytes], twice: set[bytes]) -> None:
        raw = headers.get(b"host")
        if raw is None:
            return  # HTTP/1.0; nothing here depends on it
        match = _HOST.fullmatch(raw.decode("latin-1"))
        if match is None or b"host" in twice:
            raise BadRequest("the Host header is malformed", param="Host")
        allowed = self._limits.allowed_hosts
        if allowed and match["name"].lower() not in allowed:
            raise BadRequest(
                "the Host header names a host that is not served here (setting allowed_hosts)", param="Host"
            )

    def _check_origin(self, headers: dict[bytes, bytes]) -> None:
        origin = headers.get(b"origin")  # only browsers send one; they let any page open a socket anywhere
        if origin is not None and origin.decode("latin-1") not in self._limits.allowed_origins:
            raise BadRequest("web pages of this origin may not connect", param="Origin")


class _Exchange:
    """One HTTP request and its response, as they pass through."""

    __slots__ = (
        "_body_bytes",
        "_has_body",
        "_limits",
        "_may_discard",
        "_receive",
        "_send",
        "is_refused",
        "request_id",
        "status",
    )

    def __init__(self, request_id: str, receive: Receive, send: Send, limits: GatewayLimits) -> None:
        self.request_id = request_id
        self.status: int | None = None
        self.is_refused = False  # what is left of the body will not be read
        self._receive = receive
        self._send = send
        self._limits = limits
        self._body_bytes = 0
        self._has_body = False  # all of it
        self._may_discard = True

    def check_headers(self, headers: dict[bytes, bytes]) -> None:
        self._may_discard = b"expect" not in headers  # such a client waits to be told that it may send
        encoding = headers.get(b"content-encoding", b"identity")
        if encoding.lower() != b"identity":
            raise BadRequest("compressed bodies are not accepted", param="Content-Encoding")
        length = headers.get(b"content-length")
        if length is None:
            return
        if not (length.isdigit() and len(length) < 20):
            raise BadRequest("the Content-Length header is malformed", param="Content-Length")
        self._check_size(int(length))

    async def receive(self) -> Message:
        """The next message, while the body is within its size and its time."""
        if self._has_body:
            return await self._receive()
        try:
            async with asyncio.timeout(self._limits.max_body_s):
                message = await self._receive()
        except TimeoutError:
            self._may_discard = False
            raise self._refusal(BadRequest(f"the body did not arrive within {self._limits.max_body_s:g} s")) from None
        self._note(message)
        self._check_size(self._body_bytes)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            own = [(b"x-request-id", self.request_id.encode())]
            if self.is_refused and not await self._has_discarded_the_rest():
                own.append((b"connection", b"close"))
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await self._send(message)

    def _note(self, message: Message) -> None:
        self._body_bytes += len(message.get("body", b""))
        self._has_body = message["type"] == "http.disconnect" or not message.get("more_body", False)

    def _check_size(self, size: int) -> None:
        if size > (limit := self._limits.max_body_bytes):
            raise self._refusal(RequestTooLarge(f"the body has more than {limit:,} bytes, the limit of this server"))

    def _refusal(self, error: MillraceError) -> MillraceError:
        self.is_refused = True
        return error

    async def _has_discarded_the_rest(self) -> bool:
        """Take in what the client is still sending, within reason: closing now would reset the connection, and many
        clients would then never see the answer."""
        try:
            async with asyncio.timeout(DISCARD_S):
                while self._may_discard and not self._has_body and self._body_bytes < DISCARD_BYTES:
                    self._note(await self._receive())
        except TimeoutError:
            pass
        return self._has_body


def _headers(raw: Iterable[tuple[bytes, bytes]]) -> tuple[dict[bytes, bytes], set[bytes]]:
    """The headers that matter here, and the names of those that came twice."""
    headers: dict[bytes, bytes] = {}
    twice: set[bytes] = set()
    for name, value in raw:
        if name in _WANTED:
            if name in headers:
                twice.add(name)
            headers[name] = value
    return headers, twice


def _enter_trace(headers: dict[bytes, bytes], twice: set[bytes]) -> None:
    trace_id.set(sampled_trace(None if TRACEPARENT in twice else headers.get(TRACEPARENT)))


def _request_id(headers: dict[bytes, bytes]) -> str:
    """The client's, if it could not break a log line, else a new one."""
    given = headers.get(b"x-request-id")
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return f"req-{secrets.token_hex(12)}"
