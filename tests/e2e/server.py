"""A real `millrace up` in a process of its own, on a port the system picks, with a store of the test's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Server:
    """A running server; `output` is what it has printed so far."""

    process: subprocess.Popen[str]
    address: str
    started_s: float
    output: list[str] = field(default_factory=list)

    @property
    def websocket(self) -> str:
        return self.address.replace("http", "ws") + "/generate/stream"

    def client(self) -> httpx.Client:
        """A connection of its own; close it."""
        return httpx.Client(base_url=self.address, timeout=30)

    def metric(self, name: str) -> float:
        """The sum of a metric's samples."""
        with self.client() as client:
            text = client.get("/metrics").text
        values = re.findall(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", text, flags=re.MULTILINE)
        assert values, f"no metric {name} in:\n{text}"
        return sum(map(float, values))

    def wait_idle(self) -> None:
        """Until nothing runs or waits and every KV block is back."""
        deadline = time.monotonic() + 20
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        while any(self.metric(name) for name in names):
            assert time.monotonic() < deadline, "something still runs"
            time.sleep(0.05)


@contextmanager
def serve(store: Path, command: str = "up", **settings: str) -> Iterator[Server]:
    """Start `millrace up` (or another command, with its flags), wait for its address; on the way out SIGTERM.

    A clean exit is demanded, of a process that the test has not killed.
    """
    environment: Mapping[str, str] = {
        **{name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")},
        "MILLRACE_STORE": str(store),
        "MILLRACE_PORT": "0",
        "MILLRACE_KV_MEMORY_BYTES": str(64 * 2**20),
        **{f"MILLRACE_{name.upper()}": value for name, value in settings.items()},
    }
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "services.cli", *command.split()],
        cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    output: list[str] = []
    reader: threading.Thread | None = None
    try:
        address = _address(process, output)
        reader = threading.Thread(target=lambda: output.extend(process.stdout or ()), daemon=True)
        reader.start()
        yield Server(process, address, time.monotonic() - start, output)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        code = process.wait(30)
        if reader is not None:
            reader.join(10)
        if process.stdout is not None:
            process.stdout.close()
    assert code in (0, -signal.SIGKILL), "".join(output)


def _address(process: subprocess.Popen[str], output: list[str]) -> str:
    assert process.stdout is not None
    for line in process.stdout:
        output.append(line)
        found = re.search(r" at (http://\S+)", line)
        if found:
            return found.group(1)
    raise AssertionError(f"the server ended with {process.wait()}:\n{''.join(output)}")
