"""An installation on one machine: Redis, gateway, workers, Prometheus with our rules, Alertmanager; and clients."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import httpx

from tests.deploy.alert_rules import ALERTMANAGER, PROMETHEUS
from tests.drills.monitoring import Alertmanager, Prometheus, free_address, running_alertmanager, running_prometheus
from tests.drills.pace import write_configuration
from tests.e2e.server import Server, serve
from tests.redis_server import RedisServer

MOST_OPEN: Final = 400  # requests of a load at once


@dataclass(frozen=True, slots=True)
class Size:
    """What a drill needs of the machine."""

    workers: int = 1
    kv_memory_bytes: int = 64 * 2**20
    has_prober: bool = False  # a drill starts one at `prober_address`
    is_slow: bool = False  # workers on one core, with portable kernels: a small load fills them


class Stack:
    """Use `with stack.open()`. Faults reach its parts by their signals."""

    def __init__(self, store: Path, directory: Path, pace: int, size: Size) -> None:
        self.store = store
        self.directory = directory
        self._pace = pace
        self._size = size
        self._stack = ExitStack()
        self.redis = RedisServer(directory, keeps_data=True)
        self.workers: list[Server] = []
        self.prober_address = free_address()
        self.gateway: Server
        self.prometheus: Prometheus
        self.alertmanager: Alertmanager

    @property
    def settings(self) -> dict[str, str]:
        """Of every process. One thread each: a drill is no benchmark."""
        return {
            "redis_url": self.redis.url,
            "threads": "1",
            "log_level": "warning",
            "kv_memory_bytes": str(self._size.kv_memory_bytes),
            "kernels": "portable" if self._size.is_slow else "auto",
        }

    @contextmanager
    def open(self) -> Iterator[Stack]:
        """Everything runs; at the end everything ends."""
        with self._stack:
            self.redis.start()
            self._stack.callback(self.redis.stop)
            self.gateway = self._start("gateway")
            with on_one_core() if self._size.is_slow else nullcontext():
                self.workers = [self._start("worker") for _ in range(self._size.workers)]
            manager = running_alertmanager(ALERTMANAGER, self.directory / "alertmanager")
            self.alertmanager = self._stack.enter_context(manager)
            prometheus = running_prometheus(self._configuration(), self.directory / "prometheus")
            self.prometheus = self._stack.enter_context(prometheus)
            yield self

    def keep(self, part: AbstractContextManager[None]) -> None:
        """One more part, until the end."""
        self._stack.enter_context(part)

    def _start(self, command: str) -> Server:
        return self._stack.enter_context(serve(self.store, command, **self.settings))

    def _configuration(self) -> Path:
        targets = {
            "millrace-gateway": [_host(self.gateway)],
            "millrace-worker": [_host(worker) for worker in self.workers],
            "millrace-prober": [self.prober_address] if self._size.has_prober else [],
        }
        directory = self.directory / "configuration"
        directory.mkdir()
        return write_configuration(PROMETHEUS, directory, self._pace, targets, self.alertmanager.address)


@contextmanager
def on_one_core() -> Iterator[None]:
    """Processes started meanwhile run on one core of ours, which is then all that they may use."""
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(ours)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, ours)


def _host(server: Server) -> str:
    return server.address.removeprefix("http://")


@contextmanager
def clients(stack: Stack, *, every_s: float, max_tokens: int, prompt_tokens: int = 16) -> Iterator[None]:
    """A request every `every_s` seconds, answered or not: what is asked for does not depend on how it is served.

    No prompt begins like another, so none is found in the prefix cache.
    """
    over = threading.Event()
    firsts = itertools.cycle(range(100, 900))

    async def ask(client: httpx.AsyncClient) -> None:
        prompt = [next(firsts), *range(100, 99 + prompt_tokens)]
        try:
            await client.post("/generate", json={"input_ids": prompt, "max_tokens": max_tokens, "ignore_eos": True})
        except httpx.HTTPError:
            return  # a fault was drilled: what clients see then is not what this is about

    async def send() -> None:
        limits = httpx.Limits(max_connections=MOST_OPEN)
        async with httpx.AsyncClient(base_url=stack.gateway.address, timeout=120, limits=limits) as client:
            asking: set[asyncio.Task[None]] = set()
            while not over.is_set():
                if len(asking) < MOST_OPEN:
                    asking.add(asyncio.create_task(ask(client)))
                asking = {task for task in asking if not task.done()}
                await asyncio.sleep(every_s)
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)

    thread = threading.Thread(target=lambda: asyncio.run(send()), name="clients", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(30)
