"""A gateway and two workers in containers, a Redis of this machine, and one client that watches a stream survive."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx

from tests.images.engine import Engine, EngineError
from tests.redis_server import RedisServer, free_ports

START_S: Final = 60.0
KILL_AT: Final = 100  # tokens
BODY: Final[Mapping[str, Any]] = {"input_ids": [5, 6, 7, 8], "max_tokens": 1000, "ignore_eos": True}


@dataclass
class Story:
    """What the client of one stream saw."""

    token_ids: list[int] = field(default_factory=list)
    killed_at: int | None = None
    was_cut: bool = False  # another worker has had to take over
    gap_s: float = 0.0


class Scene:
    """Use `with Scene.open(...)`. Containers and volume have names of their own and are gone afterwards."""

    lease_s: Final = 1.0

    def __init__(self, engine: Engine, images: Mapping[str, str], directory: Path) -> None:
        self._engine = engine
        self._images = images
        redis, gateway, *workers = free_ports(4)
        self.redis = RedisServer(directory, keeps_data=True, port=redis)
        self._prefix = f"millrace-test-{secrets.token_hex(4)}"
        self._ports = {"gateway": gateway, "worker-1": workers[0], "worker-2": workers[1]}
        self._client = httpx.Client(base_url=f"http://127.0.0.1:{gateway}", timeout=60)

    @classmethod
    @contextmanager
    def open(cls, engine: Engine, images: Mapping[str, str], directory: Path) -> Iterator[Scene]:
        scene = cls(engine, images, directory)
        with ExitStack() as stack:
            scene.redis.start()
            stack.callback(scene.redis.stop)
            stack.callback(scene._remove)
            stack.callback(scene._client.close)
            yield scene

    def start_unlocked(self) -> str:
        """What a gateway says that was told nothing about who may use it."""
        port = self._ports["gateway"]
        flags = [*self._store(), "--env", f"MILLRACE_PORT={port}", "--env", f"MILLRACE_REDIS_URL={self._redis_url}"]
        try:
            return self._engine.run(self._images["gateway"], "gateway", flags=flags)
        except EngineError as refusal:
            return str(refusal)

    def import_model(self) -> None:
        """The shipped model, into the volume."""
        words = ("models", "import", "/opt/millrace/models/millpond", "--name", "millpond", "--json")
        self._engine.run(self._images["worker-cpu"], *words, flags=self._store(writable=True))

    def start(self) -> None:
        """All three, ready."""
        for name, port in self._ports.items():
            image = self._images["gateway" if name == "gateway" else "worker-cpu"]
            settings = {
                "host": "127.0.0.1",
                "port": port,
                "metrics_port": 0,
                "redis_url": self._redis_url,
                "lease_s": self.lease_s,
                "threads": 1,
                "kv_memory_bytes": 64 * 2**20,
            }
            words = [word for key, value in settings.items() for word in ("--env", f"MILLRACE_{key.upper()}={value}")]
            self._engine.start(f"{self._prefix}-{name}", image, flags=[*self._store(), *words])
        for name in self._ports:
            self._wait_ready(name)

    def are_healthy(self) -> bool:
        """By the command that each image brings. Raises EngineError with what it said."""
        for name in self._ports:
            command = self._engine.health_command(self._images["gateway" if name == "gateway" else "worker-cpu"])
            self._engine("exec", f"{self._prefix}-{name}", *command)
        return True

    def ask(self) -> list[int]:
        """The tokens of the whole answer."""
        answer = self._client.post("/generate", json=BODY)
        answer.raise_for_status()
        token_ids: list[int] = answer.json()["token_ids"]
        return token_ids

    def stream_and_kill(self) -> Story:
        """Stream the same, and kill the worker that computes it."""
        story = Story()
        pids = {name: self._pid(name) for name in self._ports if name != "gateway"}
        with self._client.stream("POST", "/generate", json={**BODY, "stream": True}) as answer:
            last_s = time.monotonic()
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                part = json.loads(line.removeprefix("data: "))
                story.gap_s = max(story.gap_s, time.monotonic() - last_s)
                last_s = time.monotonic()
                if part.get("token_ids"):
                    assert part["index"] == len(story.token_ids), part
                    story.token_ids += part["token_ids"]
                if story.killed_at is None and len(story.token_ids) >= KILL_AT:
                    story.killed_at = len(story.token_ids)
                    busy = [name for name in pids if self._metric(name, "vllm:num_requests_running")]
                    for name in busy:
                        os.kill(pids.pop(name), signal.SIGKILL)  # at once: the engine's own kill takes its time
        story.was_cut = any(self._metric(name, r'millrace_leases_total\{.*kind="again".*\}') for name in pids)
        return story

    def stop(self) -> Mapping[str, int]:
        """Exit codes of those that still run, after SIGTERM."""
        running = [name for name in self._ports if self._facts(name)["State"]["Running"]]
        for name in running:
            self._engine("stop", "-t", "30", f"{self._prefix}-{name}")
        return {name: self._facts(name)["State"]["ExitCode"] for name in running}

    @property
    def _redis_url(self) -> str:
        return f"redis://{self.redis.host}/0"

    def _store(self, *, writable: bool = False) -> Sequence[str]:
        return ("--volume", f"{self._prefix}-store:/models{'' if writable else ':ro'}")

    def _facts(self, name: str) -> dict[str, Any]:
        return self._engine.facts("container", f"{self._prefix}-{name}")

    def _pid(self, name: str) -> int:
        pid: int = self._facts(name)["State"]["Pid"]
        return pid

    def _wait_ready(self, name: str) -> None:
        end_s = time.monotonic() + START_S
        while time.monotonic() < end_s:
            with suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{self._ports[name]}/readyz").status_code == 200:
                    return
            time.sleep(0.1)
        raise EngineError(
            f"{name} was not ready within {START_S:g} s:\n{self._engine('logs', f'{self._prefix}-{name}')}"
        )

    def _metric(self, name: str, pattern: str) -> float:
        """The sum of the samples whose name and labels are like `pattern`."""
        text = httpx.get(f"http://127.0.0.1:{self._ports[name]}/metrics").text
        return sum(map(float, re.findall(rf"^{pattern}(?:{{[^}}]*}})? (\S+)$", text, flags=re.MULTILINE)))

    def _remove(self) -> None:
        for name in self._ports:
            with suppress(EngineError):
                self._engine("rm", "--force", "--volumes", f"{self._prefix}-{name}")
        with suppress(EngineError):
            self._engine("volume", "rm", f"{self._prefix}-store")
