"""A real redis-server for tests: started once a process on a socket of its own, gone with it."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
import time
from functools import lru_cache
from pathlib import Path

import pytest


@lru_cache(maxsize=1)
def redis_socket() -> str:
    """The server's socket. Without redis-server: a skip here, a failure in CI."""
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        words = "redis-server is not installed (Debian: apt install redis-server); the queue's tests need a real one"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)
    directory = Path(tempfile.mkdtemp(prefix="millrace-redis-"))
    socket = directory / "redis.sock"
    server = subprocess.Popen(
        [
            program,
            "--port",
            "0",
            "--unixsocket",
            str(socket),
            "--dir",
            str(directory),
            "--save",
            "",
            "--appendonly",
            "no",
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def stop() -> None:
        server.terminate()
        server.wait()
        shutil.rmtree(directory, ignore_errors=True)

    atexit.register(stop)
    for _ in range(200):
        if socket.exists():
            return str(socket)
        time.sleep(0.02)
    raise RuntimeError(f"{program} did not open {socket}")
