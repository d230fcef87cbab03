"""Real Redis servers for tests: one on a Unix socket of its own; with sentinels; a cluster."""

from __future__ import annotations

import atexit
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import pytest
from redis import Redis
from redis.exceptions import ResponseError

FAILOVER_MS = 500  # a master that is silent for this long is replaced
PATIENCE_S = 30.0

Server = TypeVar("Server", bound="RedisServer")


def redis_program() -> str:
    """Where redis-server is. Without it: a skip here, a failure in CI."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        words = "redis-server is not installed (Debian: apt install redis-server); the queue's tests need a real one"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)
    return program


class RedisServer:
    """A server on a Unix socket in `directory`, whose data outlive it there if `keeps_data`.

    `port`: of 127.0.0.1, to be reached there too; 0 = none. `options`: more of its command line.
    """

    def __init__(
        self, directory: Path, *, keeps_data: bool = False, port: int = 0, options: Sequence[str] = ()
    ) -> None:
        self._directory = directory
        self._keeps_data = keeps_data
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self.port = port
        self.socket = str(directory / "redis.sock")

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    def client(self) -> Redis:
        """For the test's own questions."""
        return Redis(unix_socket_path=self.socket)

    def is_master(self) -> bool:
        with self.client() as client:
            return bool(client.role()[0] == b"master")

    def start(self) -> None:
        """Start it, or start it again."""
        where = ["--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", self.socket]
        command = [redis_program(), *self._role(), *where, "--dir", str(self._directory), *self._options]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for _ in range(500):
            if self._answers():
                return
            time.sleep(0.02)
        raise RuntimeError(f"redis-server did not open {self.socket}")

    def _role(self) -> list[str]:
        keep = ["--appendonly", "yes", "--appendfsync", "always"] if self._keeps_data else ["--appendonly", "no"]
        return ["--save", "", *keep]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def send_signal(self, number: int) -> None:
        """To the running server."""
        assert self._process is not None
        self._process.send_signal(number)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.settimeout(1)
            probe.connect(self.socket)
            probe.sendall(b"PING\r\n")
            return probe.recv(16).startswith(b"+PONG")
        return False


@lru_cache(maxsize=1)
def redis_socket() -> str:
    """The socket of a server that lives as long as this process."""
    directory = Path(tempfile.mkdtemp(prefix="millrace-redis-"))
    server = RedisServer(directory)
    server.start()

    def stop() -> None:
        server.stop()
        shutil.rmtree(directory, ignore_errors=True)

    atexit.register(stop)
    return server.socket


# ---- several servers ----


class Sentinel(RedisServer):
    """The same program, which only watches a master."""

    def _role(self) -> list[str]:
        notes = self._directory / "sentinel.conf"  # where it writes down what it learns
        notes.touch()
        return [str(notes), "--sentinel"]

    def watch(self, name: str, master: RedisServer, quorum: int) -> None:
        with self.client() as client:
            client.execute_command("SENTINEL", "MONITOR", name, "127.0.0.1", master.port, quorum)
            client.execute_command("SENTINEL", "SET", name, "down-after-milliseconds", FAILOVER_MS)
            client.execute_command("SENTINEL", "SET", name, "failover-timeout", 3000)

    def fail_over(self, name: str) -> None:
        """Have the replica made master, as if the master had failed."""
        until("the replica is fit for it", lambda: self._fails_over(name))

    def _fails_over(self, name: str) -> bool:
        with self.client() as client, contextlib.suppress(ResponseError):
            client.execute_command("SENTINEL", "FAILOVER", name)
            return True
        return False

    def sees(self, name: str, others: int) -> bool:
        """Whether it knows the replica and so many other sentinels."""
        with self.client() as client:
            words = client.execute_command("SENTINEL", "MASTER", name)
        state = dict(zip(words[::2], words[1::2], strict=True))
        return (int(state[b"num-slaves"]), int(state[b"num-other-sentinels"])) == (1, others)


class Topology:
    """Servers that belong together. `master` has the queue's data to begin with, `replica` takes over from it."""

    def __init__(self, servers: Sequence[RedisServer], url: str, master: RedisServer, replica: RedisServer) -> None:
        self.servers = servers
        self.url = url
        self.master = master
        self.replica = replica

    @contextlib.contextmanager
    def clients(self) -> Iterator[list[Redis]]:
        """One to each server, for the test's own questions."""
        with contextlib.ExitStack() as stack:
            yield [stack.enter_context(server.client()) for server in self.servers]

    def num_connections(self, name: str) -> int:
        """Of a client of this name, to all servers."""
        with self.clients() as clients:
            lists = [client.execute_command("CLIENT", "LIST") for client in clients]  # type: ignore[no-untyped-call]
        return sum(each.count(f" name={name} ".encode()) for each in lists)

    def settle(self) -> None:
        """Wait until the replica has what the master has now."""
        target = _replication(self.master)["master_repl_offset"]

        def has_caught_up() -> bool:
            state = _replication(self.replica)
            return state.get("master_link_status") == "up" and int(state["slave_repl_offset"]) >= int(target)

        until("the replica has caught up", has_caught_up)


def _replication(server: RedisServer) -> dict[str, str]:
    with server.client() as client:
        state: dict[str, str] = client.info("replication")
    return state


@contextlib.contextmanager
def sentinels(directory: Path, name: str = "mine", count: int = 3) -> Iterator[Topology]:
    """A master, its replica, and sentinels that know the master by this name."""
    with contextlib.ExitStack() as stack:
        ports = free_ports(2 + count)
        master = _start(stack, RedisServer, directory, ports[0])
        follow = ("--replicaof", "127.0.0.1", str(master.port))
        with master.client() as client:
            client.config_set("repl-diskless-sync-delay", 0)
        replica = _start(stack, RedisServer, directory, ports[1], follow)
        watching = [_start(stack, Sentinel, directory, port) for port in ports[2:]]
        url = f"redis+sentinel://{','.join(each.host for each in watching)}/{name}"
        topology = Topology([master, replica, *watching], url, master, replica)
        topology.settle()
        for each in watching:
            each.watch(name, master, quorum=count // 2 + 1)
        until("sentinels know each other", lambda: all(each.sees(name, count - 1) for each in watching))
        yield topology


@contextlib.contextmanager
def cluster(directory: Path, slot: int) -> Iterator[Topology]:
    """Three masters, and a replica of the one that has `slot`."""
    with contextlib.ExitStack() as stack:
        ports, buses = free_ports(4), free_ports(4)
        servers = []
        for port, bus in zip(ports, buses, strict=True):
            words = ("--cluster-enabled", "yes", "--cluster-port", str(bus))
            times = ("--cluster-node-timeout", str(FAILOVER_MS), "--repl-diskless-sync-delay", "0")
            servers.append(_start(stack, RedisServer, directory, port, (*words, *times)))
        clients = [stack.enter_context(server.client()) for server in servers]
        bounds = (0, 5461, 10923, 16384)
        for number, client in enumerate(clients[:3]):
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        for port, bus in zip(ports[1:], buses[1:], strict=True):
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", port, bus)
        owner = next(number for number in range(3) if slot < bounds[number + 1])
        until("nodes know each other", lambda: all(_has_nodes(client, 4) for client in clients))
        clients[3].execute_command("CLUSTER", "REPLICATE", clients[owner].execute_command("CLUSTER", "MYID"))
        url = f"redis+cluster://{','.join(server.host for server in servers[:3])}"
        topology = Topology(servers, url, servers[owner], servers[3])
        topology.settle()
        yield topology


def _has_nodes(client: Redis, count: int) -> bool:
    state: bytes = client.execute_command("CLUSTER", "INFO")  # type: ignore[no-untyped-call]
    return b"cluster_state:ok" in state and f"cluster_known_nodes:{count}\r".encode() in state


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, below those that the system gives to outgoing connections."""
    found: list[int] = []
    for port in random.sample(range(20_000, 30_000), 10_000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"fewer than {count} ports are free")


def until(claim: str, is_true: Callable[[], bool]) -> None:
    """Wait for something that servers bring about between themselves."""
    end_s = time.monotonic() + PATIENCE_S
    while not is_true():
        if time.monotonic() > end_s:
            raise AssertionError(f"not within {PATIENCE_S:g} s: {claim}")
        time.sleep(0.02)


def _start(
    stack: contextlib.ExitStack, kind: type[Server], directory: Path, port: int, options: Sequence[str] = ()
) -> Server:
    home = directory / str(port)
    home.mkdir()
    server = kind(home, port=port, options=options)
    server.start()
    stack.callback(server.stop, signal.SIGKILL)
    return server
