"""A real Prometheus and a real Alertmanager on ports of their own, for tests and drills."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


def program(*names: str) -> str:
    """Where the first of them is that is there. Without any: a skip here, a failure in CI."""
    for name in names:
        if path := shutil.which(name):
            return path
    words = f"{names[0]} is not installed (Debian: apt install prometheus prometheus-alertmanager)"
    if os.environ.get("CI"):
        pytest.fail(words)
    pytest.skip(words)


def call(url: str, body: object = None) -> Any:
    """GET, or POST of `body`, as JSON; None for an empty answer."""
    encoded = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, encoded, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.loads(answer.read() or "null")


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert that Alertmanager holds: not ended yet. `is_inhibited`: another one says it already."""

    labels: frozenset[tuple[str, str]]
    is_inhibited: bool

    @property
    def name(self) -> str:
        return dict(self.labels)["alertname"]

    @property
    def severity(self) -> str:
        return dict(self.labels)["severity"]


@dataclass(frozen=True, slots=True)
class Alertmanager:
    """A running one. `address` is host:port."""

    address: str

    def post(self, alerts: Sequence[dict[str, str]]) -> None:
        """Alerts by their labels, as Prometheus sends them."""
        call(f"http://{self.address}/api/v2/alerts", [{"labels": labels} for labels in alerts])

    def alerts(self) -> list[Alert]:
        found = call(f"http://{self.address}/api/v2/alerts")
        return [Alert(frozenset(each["labels"].items()), bool(each["status"]["inhibitedBy"])) for each in found]


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A running one. `address` is host:port."""

    address: str

    def query(self, expr: str) -> list[float]:
        """The values of an instant query."""
        answer = call(f"http://{self.address}/api/v1/query?{urllib.parse.urlencode({'query': expr})}")
        return [float(each["value"][1]) for each in answer["data"]["result"]]


@contextmanager
def running_alertmanager(configuration: Path, directory: Path) -> Iterator[Alertmanager]:
    """Alertmanager with this configuration; its data go to `directory`."""
    address = free_address()
    command = [
        program("prometheus-alertmanager", "alertmanager"),
        f"--config.file={configuration}",
        f"--storage.path={directory}",
    ]
    with _running([*command, f"--web.listen-address={address}", "--cluster.listen-address="], address):
        yield Alertmanager(address)


@contextmanager
def running_prometheus(configuration: Path, directory: Path) -> Iterator[Prometheus]:
    """Prometheus with this configuration; its data go to `directory`."""
    address = free_address()
    command = [program("prometheus"), f"--config.file={configuration}", f"--storage.tsdb.path={directory}"]
    with _running([*command, f"--web.listen-address={address}"], address):
        yield Prometheus(address)


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@contextmanager
def _running(command: Sequence[str], address: str) -> Iterator[None]:
    log = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_until_ready(process, address)
        yield
    finally:
        process.terminate()
        process.wait(30)


def _wait_until_ready(process: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{address}: Prometheus or Alertmanager ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://{address}/-/ready", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.1)
    raise RuntimeError(f"{address}: Prometheus or Alertmanager is not ready after 60 s")
