"""docker-compose.yml, started as an operator would, as far as the engine of this machine allows.

Docker takes the official images and waits for health by itself. podman has no registry here: Redis, Prometheus and
Alertmanager are Debian's, in images of the official names; Grafana is in no Debian package and stays out. podman 4
cannot wait for a service's health, so the order is kept by hand.
"""

from __future__ import annotations

import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx
import yaml

from tests.e2e.server import ROOT
from tests.images.engine import BASE, Engine, EngineError, output

FILE: Final = ROOT / "docker-compose.yml"
GATEWAY: Final = "http://127.0.0.1:8000"
PROMETHEUS: Final = "http://127.0.0.1:9090"
HEALTHY_S: Final = 120.0
# With podman, in this order, each healthy before the next. `store` is a command that ends.
ORDER: Final = ("redis", "store", "gateway", "worker", "prober", "prometheus", "alertmanager")
PACKAGES: Final = "redis-server prometheus prometheus-alertmanager wget"
# Of the official images what the compose file relies on: the data directory's owner and the first word.
STAND_INS: Final[Mapping[str, str]] = {
    "redis": "RUN install -d -o 999 -g 999 /data\nWORKDIR /data",
    "prometheus": (
        'RUN install -d -o 65534 -g 65534 /prometheus\nWORKDIR /prometheus\nENTRYPOINT ["/usr/bin/prometheus"]'
    ),
    "alertmanager": (
        "RUN install -d -o 65534 -g 65534 /alertmanager\nWORKDIR /alertmanager\n"
        'ENTRYPOINT ["/usr/bin/prometheus-alertmanager"]'
    ),
}


@dataclass(frozen=True, slots=True)
class Compose:
    """A project of its own name; `command` takes up, down and so on."""

    engine: Engine
    command: Sequence[str]
    project: str
    services: Mapping[str, Any]  # as the file says

    @property
    def started(self) -> list[str]:
        """The services that run here."""
        return [name for name in ORDER if name != "store"] + (["grafana"] if self.engine.name == "docker" else [])

    def __call__(self, *words: str) -> str:
        return output([*self.command, *words], 2 * HEALTHY_S)

    def up(self) -> None:
        """All services, healthy. Raises EngineError."""
        if self.engine.name == "docker":
            self("up", "--detach", "--wait", "--wait-timeout", f"{HEALTHY_S:g}")
            return
        for service in ORDER:
            if service == "store":
                self("run", "--rm", "--no-deps", service)
            else:
                self("up", "--detach", "--no-build", "--no-deps", service)
                self.await_healthy(service)

    def await_healthy(self, service: str) -> None:
        """By the health check of the file, or else of the image."""
        test = self.services[service].get("healthcheck", {}).get("test", [])
        command = test[1:] or self.engine.health_command(self.services[service]["image"])
        last = ""

        def is_healthy() -> bool:
            nonlocal last
            try:
                self.engine("exec", self.container(service), *command)
            except EngineError as error:
                last = str(error)
                return False
            return True

        if not until(is_healthy):
            logs = self.engine("logs", "--tail", "30", self.container(service))
            raise EngineError(f"{service} was not healthy within {HEALTHY_S:g} s: {last}\n{logs}")

    def container(self, service: str) -> str:
        joint = "-" if self.engine.name == "docker" else "_"
        return joint.join((self.project, service, "1"))

    def stop(self) -> dict[str, int]:
        """Exit codes of our services after SIGTERM."""
        ours = [service for service in self.started if "millrace" in self.services[service]["image"]]
        for service in ours:
            self.engine("stop", "-t", "45", self.container(service))
        return {
            service: self.engine.facts("container", self.container(service))["State"]["ExitCode"] for service in ours
        }


@contextmanager
def compose(engine: Engine, images: Mapping[str, str]) -> Iterator[Compose]:
    """The project, not started; its containers, networks and volumes are gone afterwards. Raises EngineError."""
    services = yaml.safe_load(FILE.read_text())["services"]
    command = _command(engine)
    for target, image in images.items():
        service = "gateway" if target == "gateway" else "worker"
        engine("tag", image, services[service]["image"])
    if engine.name != "docker":
        for service, rest in STAND_INS.items():
            install = f"apt-get update -qq && apt-get install -qq -y --no-install-recommends {PACKAGES}"
            engine.build_text(f"FROM {BASE}\nRUN {install}\n{rest}\n", services[service]["image"])
    project = f"millrace-test-{secrets.token_hex(4)}"
    made = Compose(engine, [*command, "--project-name", project, "--file", str(FILE)], project, services)
    try:
        yield made
    finally:
        with suppress(EngineError):
            made("down", "--volumes")


def _command(engine: Engine) -> list[str]:
    if engine.name == "docker":
        return [*engine.command, "compose"]
    found = shutil.which("podman-compose", path=str(Path(sys.executable).parent)) or shutil.which("podman-compose")
    if found is None:
        raise EngineError("podman-compose is not installed (pip install 'millrace[images]')")
    podman, *rest = engine.command
    return [
        found,
        "--podman-path",
        podman,
        f"--podman-args={' '.join(rest)}",
        f"--podman-run-args={' '.join(engine.run_flags)}",
    ]


def scraped() -> dict[str, int]:
    """Targets that Prometheus reaches, by job."""
    answer = httpx.get(f"{PROMETHEUS}/api/v1/query", params={"query": "sum by (job) (up)"})
    found = answer.json()["data"]["result"]
    return {each["metric"]["job"]: int(float(each["value"][1])) for each in found}


def rules() -> int:
    """Alerts that Prometheus has loaded."""
    groups = httpx.get(f"{PROMETHEUS}/api/v1/rules").json()["data"]["groups"]
    return sum(rule["type"] == "alerting" for group in groups for rule in group["rules"])


def alertmanagers() -> int:
    """How many Prometheus has found."""
    return len(httpx.get(f"{PROMETHEUS}/api/v1/alertmanagers").json()["data"]["activeAlertmanagers"])


def ask() -> str:
    """The first request of the README."""
    body = {"messages": [{"role": "user", "content": "What is 12 + 30?"}]}
    answer = httpx.post(f"{GATEWAY}/generate", json=body, timeout=60)
    answer.raise_for_status()
    return str(answer.json()["text"])


def until(holds: Callable[[], bool]) -> bool:
    """Whether it holds before HEALTHY_S have passed."""
    end_s = time.monotonic() + HEALTHY_S
    while time.monotonic() < end_s:
        with suppress(httpx.HTTPError, KeyError, subprocess.TimeoutExpired):
            if holds():
                return True
        time.sleep(0.5)
    return False
