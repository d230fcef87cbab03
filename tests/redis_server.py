"""A real redis-server for tests, on a Unix socket of its own."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import pytest


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
    """A server on a Unix socket in `directory`, whose data outlive it there if `keeps_data`."""

    def __init__(self, directory: Path, *, keeps_data: bool = False) -> None:
        self._directory = directory
        self._keeps_data = keeps_data
        self._process: subprocess.Popen[bytes] | None = None
        self.socket = str(directory / "redis.sock")

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        """Start it, or start it again."""
        keep = ["--appendonly", "yes", "--appendfsync", "always"] if self._keeps_data else ["--appendonly", "no"]
        command = [redis_program(), "--port", "0", "--unixsocket", self.socket, "--dir", str(self._directory)]
        self._process = subprocess.Popen(
            [*command, "--save", "", *keep], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(500):
            if self._answers():
                return
            time.sleep(0.02)
        raise RuntimeError(f"redis-server did not open {self.socket}")

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
