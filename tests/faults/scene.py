"""Gateways, workers and Redis as real processes, and what a fault may need of them: a bad network, workers that break
on command, clocks that can be set."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import cast

from redis import Redis

from tests.e2e.server import ROOT, Server
from tests.faults.clock import Clock
from tests.faults.proxy import Proxy
from tests.redis_server import RedisServer

PREFIX = "mr:{0}:"
START_S = 60.0
END_S = 30.0


@dataclass(frozen=True, slots=True)
class Stage:
    """What processes there are, and what about them can be made bad."""

    gateways: int = 1
    workers: int = 2
    lease_s: float = 1.0
    has_proxy: bool = False  # between the processes and Redis
    has_breakable_workers: bool = False  # tests.faults.worker
    has_clocks: bool = False  # each process reads one of its own


@dataclass
class Process(Server):
    """A running gateway or worker."""

    clock: Clock | None = None

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)

    @property
    def has_ended(self) -> bool:
        return self.process.poll() is not None


class Scene:
    """The processes. Faults change them from a thread or between awaits; clients only ask where gateways are."""

    def __init__(self, store: Path, directory: Path, stage: Stage, checkouts: Sequence[Path] = (ROOT,)) -> None:
        """`checkouts`: of this repository; processes of each command are started from them in turn."""
        self.stage = stage
        self._checkouts = {command: cycle(checkouts) for command in ("gateway", "worker")}
        self.redis = RedisServer(directory, keeps_data=True)
        self.gateways: list[Process] = []
        self.workers: list[Process] = []
        self.proxy: Proxy | None = None
        self._store = store
        self._directory = directory
        self._started: list[Process] = []

    @contextmanager
    def open(self) -> Iterator[Scene]:
        """Start everything; at the end SIGTERM, and a clean exit is demanded of all that nobody has killed."""
        with ExitStack() as stack:
            self.redis.start()
            stack.callback(self.redis.stop)
            if self.stage.has_proxy:
                self.proxy = stack.enter_context(Proxy.open(self.redis.socket))
            stack.callback(self._kill)
            with ThreadPoolExecutor() as pool:
                gateways = [pool.submit(self.new_gateway) for _ in range(self.stage.gateways)]
                workers = [pool.submit(self.new_worker) for _ in range(self.stage.workers)]
                self.gateways = [each.result() for each in gateways]
                self.workers = [each.result() for each in workers]
            yield self
            self._end()

    def new_gateway(self) -> Process:
        return self._start("services.cli", "gateway")

    def new_worker(self) -> Process:
        return self._start("tests.faults.worker" if self.stage.has_breakable_workers else "services.cli", "worker")

    @property
    def addresses(self) -> list[str]:
        """Of the gateways, those included that have just died."""
        return [gateway.address for gateway in self.gateways]

    def ended(self) -> list[Process]:
        """Processes that are not there though they should be."""
        return [each for each in (*self.gateways, *self.workers) if each.has_ended]

    # ---- what Redis knows ----

    def num_accepted(self) -> int:
        """Requests that the queue has taken in."""
        with self._client() as client:
            return int(cast(bytes | None, client.get(PREFIX + "arrivals")) or 0)

    def num_leases(self) -> int:
        """Leases handed out: as many as requests, if no worker has lost one."""
        with self._client() as client:
            return int(cast(bytes | None, client.get(PREFIX + "epoch")) or 0)

    def num_unfinished(self) -> int:
        """Requests that wait or run."""
        with self._client() as client:
            found = cast(list[bytes | None], client.hmget(PREFIX + "acct", ["wr", "rr"]))
            return sum(int(number or 0) for number in found)

    def num_dead_letters(self) -> int:
        """Requests that were given up."""
        with self._client() as client:
            return cast(int, client.xlen(PREFIX + "dead"))

    def _client(self) -> Redis:
        return Redis(unix_socket_path=self.redis.socket)

    # ---- processes ----

    def _start(self, module: str, command: str) -> Process:
        """Start one and wait for its address. Raises AssertionError if it ends instead."""
        clock = Clock(self._directory / f"clock-{len(os.listdir(self._directory))}") if self.stage.has_clocks else None
        process = subprocess.Popen(
            [sys.executable, "-m", module, command],
            cwd=next(self._checkouts[command]), env=self._environment(clock),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        found = Process(process, "", 0.0, clock=clock)
        self._started.append(found)
        is_up = threading.Event()
        threading.Thread(target=_listen, args=(found, is_up), daemon=True).start()
        if not is_up.wait(START_S) or not found.address:
            raise AssertionError(f"{command} has no address:\n{''.join(found.output)}")
        return found

    def _environment(self, clock: Clock | None) -> Mapping[str, str]:
        settings = {
            "store": str(self._store),
            "port": "0",
            "kv_memory_bytes": str(64 * 2**20),
            "redis_url": self.redis.url if self.proxy is None else self.proxy.url,
            "lease_s": str(self.stage.lease_s),
            "threads": "1",
            "log_level": "warning",
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
        own = {f"MILLRACE_{name.upper()}": value for name, value in settings.items()}
        return inherited | own | dict(clock.environment if clock is not None else {})

    def _end(self) -> None:
        left = [each for each in self._started if not each.has_ended]
        for each in left:
            each.process.send_signal(signal.SIGTERM)
        for each in left:
            assert each.process.wait(END_S) == 0, "".join(each.output)

    def _kill(self) -> None:
        for each in self._started:
            if not each.has_ended:
                each.kill()
            each.process.wait()


def _listen(found: Process, is_up: threading.Event) -> None:
    """Keep what the process says, and its address once it has said it."""
    assert found.process.stdout is not None
    with found.process.stdout as lines:
        for line in lines:
            found.output.append(line)
            if not is_up.is_set() and (address := re.search(r" at (http://\S+)", line)):
                found.address = address.group(1)
                is_up.set()
    is_up.set()  # it has ended
