"""The gateway's surroundings in tests: the shipped tokenizer as a model, a scripted worker, servers and clients.

Real objects through real seams: the memory queue, requests through the ASGI interface or a real uvicorn.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import hypothesis
import tokenizers
import uvicorn
from fastapi import FastAPI

from gateway.app import create_app
from gateway.chat import ChatTemplate
from gateway.detokenize import byte_level_alphabet
from gateway.limits import GatewayLimits
from gateway.models import Models, ServedModel
from gateway.probes import Health
from gateway.telemetry import Completed
from gateway.text import Tokenizer
from services.queues.memory import MemoryQueue
from wire.messages import Event, Failed, Finished, FinishReason, Generate, Timings, Tokens, Usage
from wire.queue import Append, Lease, LeaseBudget, Queue, RefusalReason

MILLPOND = Path(__file__).parents[2] / "models" / "millpond"
CONTEXT = 4_096
EOS = 1
PATIENCE_S = 10.0

without_deadline = hypothesis.settings(deadline=None)  # a busy machine is not a finding

VOCABULARY = tokenizers.Tokenizer.from_file(str(MILLPOND / "tokenizer.json")).get_vocab()
TOKENIZER = Tokenizer.from_file(MILLPOND / "tokenizer.json")


def served_model(name: str = "millpond", revision: str = "0123456789ab", max_model_len: int = CONTEXT) -> ServedModel:
    """The shipped model as the gateway sees it, with a longer context."""
    config = json.loads((MILLPOND / "tokenizer_config.json").read_text())
    special = {key: config[key] for key in ("bos_token", "eos_token", "pad_token")}
    return ServedModel(
        name=name,
        revision=revision,
        tokenizer=TOKENIZER,
        max_model_len=max_model_len,
        vocab_size=2_048,
        eos_token_ids=(EOS,),
        chat=ChatTemplate(config["chat_template"], special, budget_s=5.0),
    )


def ids_of(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def byte_ids(text: str) -> list[int]:
    """One token for each byte of the text: where pieces end is then known whatever the merges are."""
    character = {byte: char for char, byte in byte_level_alphabet().items()}
    return [VOCABULARY[character[byte]] for byte in text.encode()]


def text_of(token_ids: Sequence[int]) -> str:
    return TOKENIZER.decode(token_ids, skip_special_tokens=True)


async def until(is_true: Callable[[], Awaitable[bool]]) -> None:
    """Wait for what no event announces."""
    async with asyncio.timeout(PATIENCE_S):
        while not await is_true():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


STORY = ids_of("Once upon a time a duck 🦆 swam across the Müggelsee. It was very happy. The end.")


@dataclass
class Script:
    """What the worker answers to a request: these tokens (the story, over and over), in events of `burst`."""

    answer: Callable[[Generate], Sequence[int]] = lambda request: STORY
    logprob: Callable[[Generate], float] = lambda request: -0.5 * len(request.forced_ids)
    burst: int = 1
    step_s: float = 0.0
    first_step: asyncio.Event | None = None  # nothing before it is set
    fail_after: int | None = None  # then Failed(worker_lost)
    silent_after: int | None = None  # then nothing, for ever


@dataclass
class ScriptedWorker:
    """Leases whatever comes and publishes what the script says, as a real worker would: fenced and cancellable."""

    queue: Queue
    models: tuple[str, ...]
    script: Script = field(default_factory=Script)
    requests: list[Generate] = field(default_factory=list)
    running: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self) -> None:
        budget = LeaseBudget("w", self.models, max_requests=1_000, max_tokens=10**9, capacity_tokens=10**9)
        try:
            while True:
                for lease in await self.queue.lease(budget, wait_s=60.0):
                    self.requests.append(lease.request)
                    task = asyncio.create_task(self._serve(lease))
                    self.running.add(task)
                    task.add_done_callback(self.running.discard)
        finally:
            for task in self.running:
                task.cancel()
            await asyncio.gather(*self.running, return_exceptions=True)

    async def _serve(self, lease: Lease) -> None:
        script, request = self.script, lease.request
        if script.first_step is not None:
            await script.first_step.wait()
        answer = [] if request.forced_ids else script.answer(request)
        reason: FinishReason = "stop" if len(answer) < request.max_tokens else "length"
        answer = answer[: request.max_tokens]
        sent = len(lease.token_ids)
        while sent < len(answer):
            if sent == script.fail_after:
                await self._publish(lease, Failed(request.request_id, "worker_lost", "the worker was lost", True))
                return
            if sent == script.silent_after:
                await self._silence(lease)
                reason = "cancelled"
                break
            if not await self._publish(
                lease, Tokens(request.request_id, sent, list(answer[sent : sent + script.burst]))
            ):
                reason = "cancelled"
                break
            sent = min(sent + script.burst, len(answer))
            await asyncio.sleep(script.step_s)
        usage = Usage(len(request.prompt_ids), sent, cached_tokens=3)
        timings = Timings(queue_ms=1.0, prefill_ms=2.0, decode_ms=3.0)
        logprob = script.logprob(request) if request.forced_ids else None
        await self._publish(lease, Finished(request.request_id, reason, usage, timings, logprob))

    async def _silence(self, lease: Lease) -> None:
        async def is_refused() -> bool:
            return bool(await self.queue.renew([(lease.request.request_id, lease.epoch)]))

        await until(is_refused)

    async def _publish(self, lease: Lease, event: Event) -> bool:
        refusals = await self.queue.publish([Append(lease.epoch, event)])
        return not any(refusal.reason is RefusalReason.CANCELLED for refusal in refusals)


@dataclass
class Recorder:
    """Telemetry that remembers."""

    http: list[tuple[str, str, int]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    admissions: int = 0
    token_count: int = 0
    first_tokens: int = 0
    traces: list[str] = field(default_factory=list)  # of the first tokens
    resumptions: int = 0
    ended: list[Completed] = field(default_factory=list)
    open_sockets: int = 0

    def http_answered(self, route: str, method: str, status: int, seconds: float) -> None:
        self.http.append((route, method, status))

    def refused(self, code: str) -> None:
        self.refusals.append(code)

    def admitted(self, model: str, tenant: str, prompt_tokens: int, max_tokens: int) -> None:
        self.admissions += 1

    def first_token(self, model: str, seconds: float, trace_id: str) -> None:
        self.first_tokens += 1
        self.traces.append(trace_id)

    def tokens(self, model: str, count: int, seconds: float) -> None:
        self.token_count += count

    def completed(self, completed: Completed) -> None:
        self.ended.append(completed)

    def resumed(self) -> None:
        self.resumptions += 1

    def sockets(self, change: int) -> None:
        self.open_sockets += change


@dataclass
class Rig:
    """A gateway with everything around it."""

    app: FastAPI
    queue: MemoryQueue
    worker: ScriptedWorker
    telemetry: Recorder
    client: httpx.AsyncClient
    health: list[Health]  # the last one counts
    models: Models

    async def is_idle(self) -> bool:
        depth = await self.queue.depth()
        return depth.queued_requests == depth.running_requests == 0

    async def until_ended(self, count: int) -> None:
        """Wait until this many requests have ended for the gateway."""

        async def have_ended() -> bool:
            return len(self.telemetry.ended) >= count

        await until(have_ended)

    async def until_tokens(self, count: int) -> None:
        """Wait until the gateway has seen exactly this many tokens."""

        async def have_come() -> bool:
            return self.telemetry.token_count == count

        await until(have_come)

    async def until_leased(self, count: int) -> None:
        """Wait until the worker has leased this many requests."""

        async def are_leased() -> bool:
            return len(self.worker.requests) >= count

        await until(are_leased)

    @asynccontextmanager
    async def another(self) -> AsyncIterator[httpx.AsyncClient]:
        """A client of a second gateway over the same queue."""
        health = self.health[-1]
        app = create_app(self.queue, self.models, health=lambda: health)
        transport = httpx.ASGITransport(app=app)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://another") as client,
        ):
            yield client

    async def until_idle(self) -> None:
        """Wait until nothing waits or runs in the queue."""
        await until(self.is_idle)


@asynccontextmanager
async def rig(
    script: Script | None = None,
    limits: GatewayLimits | None = None,
    *,
    max_queued_tokens: int = 4_000_000,
    log_ttl_ms: int = 300_000,
    models: Models | None = None,
) -> AsyncIterator[Rig]:
    """An application and a client that talks to it in process; afterwards nothing may be left running."""
    before = asyncio.all_tasks()
    queue = MemoryQueue(max_queued_tokens=max_queued_tokens, log_ttl_ms=log_ttl_ms)
    models = models or Models([served_model()])
    worker = ScriptedWorker(queue, tuple(m.model_id for m in models.served), script or Script())
    telemetry = Recorder()
    health = [Health(is_live=True, is_ready=True)]
    app = create_app(
        queue, models, limits=limits or GatewayLimits(), health=lambda: health[-1], telemetry=telemetry, version="1.2.3"
    )
    working = asyncio.create_task(worker.run())
    transport = httpx.ASGITransport(app=app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test") as client,
    ):
        yield Rig(app, queue, worker, telemetry, client, health, models)
    working.cancel()
    with suppress(asyncio.CancelledError):
        await working
    await queue.close()
    await asyncio.sleep(0)
    left = {task for task in asyncio.all_tasks() - before if not task.done()}
    if left:
        raise AssertionError(f"tasks left behind: {left}")


@asynccontextmanager
async def server(app: FastAPI, *, send_buffer_bytes: int | None = None) -> AsyncIterator[str]:
    """The application behind a real uvicorn; yields host:port."""
    listener = socket.create_server(("127.0.0.1", 0))
    if send_buffer_bytes is not None:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    config = uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=2)
    running = uvicorn.Server(config)
    serving = asyncio.create_task(running.serve(sockets=[listener]))

    async def is_up() -> bool:
        return running.started

    await until(is_up)
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        running.should_exit = True
        await serving
        listener.close()


@contextmanager
def mute_client(address: str) -> Iterator[socket.socket]:
    """A connection that takes next to nothing: small buffers, and nobody reads."""
    host, port = address.split(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2_048)
    client.connect((host, int(port)))
    client.setblocking(False)  # the server runs on the same event loop
    try:
        yield client
    finally:
        client.close()


@dataclass
class SseEvent:
    """One parsed server-sent event."""

    id: str | None
    event: str
    data: dict[str, object]


def sse_events(transcript: str) -> list[SseEvent]:
    """Parse a transcript as the standard says: fields by line, dispatched by an empty line, comments ignored."""
    events: list[SseEvent] = []
    for block in transcript.split("\n\n"):
        fields: dict[str, str] = {}
        for line in block.splitlines():
            name, _, value = line.partition(":")
            if name:
                fields[name] = value.removeprefix(" ")
        if "data" in fields:
            events.append(SseEvent(fields.get("id"), fields.get("event", "message"), json.loads(fields["data"])))
    return events


async def whole(gateway: Rig, **body: object) -> dict[str, object]:
    """POST /generate, not streamed."""
    response = await gateway.client.post("/generate", json={"prompt": "Hello", **body})
    assert response.status_code == 200, response.text
    answer: dict[str, object] = response.json()
    return answer


async def stream(gateway: Rig, **body: object) -> tuple[str, str]:
    """The generation id and the transcript."""
    response = await gateway.client.post("/generate", json={"prompt": "Hello", "stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8", response.headers["content-type"]
    return response.headers["x-generation-id"], response.text


def joined(events: list[SseEvent]) -> tuple[str, list[int]]:
    """The text and the ids of a stream that begins at token 0."""
    text = ""
    token_ids: list[int] = []
    for event in events:
        ids = event.data["token_ids"]
        assert isinstance(ids, list), event
        assert event.data["index"] == len(token_ids), event
        text += str(event.data["text"])
        token_ids += ids
    return text, token_ids
