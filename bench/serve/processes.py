"""The processes under load, with a store and a Redis of their own, all gone afterwards.

`separate` is redis-server, `millrace gateway` and `millrace worker`; `embedded` is `millrace up`. Their settings are
the defaults but for what a run names: nothing of the caller's environment or store comes in.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from services.model_commands import SHIPPED_DIRECTORY, SHIPPED_NAME, SHIPPED_SCHEME

ROOT = Path(__file__).resolve().parents[2]
PARKED_NAME = "parked"  # the shipped model once more, under a name that no worker serves
START_S = 60.0
STOP_S = 60.0
SPARE_FILES = 200  # of a process: besides its clients' connections


@dataclass(frozen=True, slots=True)
class System:
    """What runs: where it answers, and its processes by name."""

    port: int
    pids: Mapping[str, int]
    redis_url: str = ""  # empty: there is none

    @property
    def redis_socket(self) -> str:
        return self.redis_url.removeprefix("unix://")


@contextlib.contextmanager
def separate(*, parks: bool = False, **settings: str) -> Iterator[System]:
    """Gateway, worker and Redis (AOF, everysec), ready.

    `parks`: the gateway also knows PARKED_NAME, whose requests wait as no worker serves it; then requests name a model.
    """
    with contextlib.ExitStack() as stack:
        models = (SHIPPED_NAME, PARKED_NAME) if parks else (SHIPPED_NAME,)
        directory = stack.enter_context(_scratch(*models))
        redis, url = _start_redis(stack, directory)
        settings = {**settings, "redis_url": url}
        gateway, port = _start(stack, directory, "gateway", settings | {"models": ",".join(models)})
        worker, _ = _start(stack, directory, "worker", settings)
        yield System(port, {"gateway": gateway, "worker": worker, "redis": redis}, url)


@contextlib.contextmanager
def embedded(**settings: str) -> Iterator[System]:
    """One process that does all, ready."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_scratch(SHIPPED_NAME))
        pid, port = _start(stack, directory, "up", settings)
        yield System(port, {"up": pid})


def allow_connections(count: int) -> None:
    """Let this process, and those it starts, have `count` connections. Raises SystemExit if the limit is lower."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + SPARE_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise SystemExit(f"{count:,} connections need {needed:,} open files; this machine allows {hard:,} (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextlib.contextmanager
def _scratch(*models: str) -> Iterator[Path]:
    """A directory with a store that holds the shipped model under these names."""
    with tempfile.TemporaryDirectory(prefix="millrace-serve-") as name:
        directory = Path(name)
        for model in models:
            command = ["models", "import", str(SHIPPED_DIRECTORY), "--name", model, "--scheme", SHIPPED_SCHEME]
            done = subprocess.run(
                _millrace(*command), cwd=ROOT, env=_environment({"store": str(directory / "store")}), text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )  # fmt: skip
            if done.returncode:
                raise SystemExit(f"the shipped model could not be imported:\n{done.stderr}")
        yield directory


def _start_redis(stack: contextlib.ExitStack, directory: Path) -> tuple[int, str]:
    program = shutil.which("redis-server") or shutil.which("valkey-server")
    if program is None:
        raise SystemExit("redis-server is not installed (Debian: apt install redis-server)")
    path = directory / "redis.sock"
    keeps = ["--save", "", "--appendonly", "yes", "--appendfsync", "everysec"]
    process = subprocess.Popen(
        [program, "--port", "0", "--unixsocket", str(path), "--dir", str(directory), *keeps], stdout=subprocess.DEVNULL
    )
    stack.callback(_stop, process)

    def answers() -> bool:
        with socket.socket(socket.AF_UNIX) as probe, contextlib.suppress(OSError):
            probe.settimeout(1)
            probe.connect(str(path))
            probe.sendall(b"PING\r\n")
            return probe.recv(16).startswith(b"+PONG")
        return False

    _await(answers, process, "redis-server")
    return process.pid, f"unix://{path}"


def _start(stack: contextlib.ExitStack, directory: Path, command: str, settings: Mapping[str, str]) -> tuple[int, int]:
    """`millrace COMMAND`, ready: its process id and its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    own = {"store": str(directory / "store"), "port": str(port), "log_level": "warning"}
    process = subprocess.Popen(
        _millrace(command), cwd=ROOT, env=_environment(own | dict(settings)), stdout=subprocess.DEVNULL
    )
    stack.callback(_stop, process)

    def answers() -> bool:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5).close()
            return True
        return False

    _await(answers, process, f"millrace {command}")
    return process.pid, port


def _await(answers: Callable[[], bool], process: subprocess.Popen[bytes], name: str) -> None:
    deadline = time.monotonic() + START_S
    while not answers():
        if process.poll() is not None:
            raise SystemExit(f"{name} ended with code {process.returncode} before it was ready; see above")
        if time.monotonic() > deadline:
            raise SystemExit(f"{name} was not ready within {START_S:.0f} s")
        time.sleep(0.05)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _millrace(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "services.cli", *arguments]


def _environment(settings: Mapping[str, str]) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MILLRACE_")}
    return inherited | {f"MILLRACE_{name.upper()}": value for name, value in settings.items()}
