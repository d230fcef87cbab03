"""Redis and its sentinels on this machine, started by the scripts and configurations that the manifests ship.

What differs from a pod is put in by replacing text: directories, ports, and a loopback address for each host name.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from tests.deploy.rendered import find, of_kind, pod_of, settings_of
from tests.redis_server import free_ports, redis_program, until

PASSWORD: Final = "0123456789abcdef"
REPLICATION: Final = "fedcba9876543210"


@dataclass
class ShippedPod:
    """One pod of a StatefulSet."""

    directory: Path
    host: str
    port: int
    files: Mapping[str, str]
    words: Mapping[str, str]  # what is replaced in them
    pod_name: str
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run start.sh as the container does, and wait until it answers."""
        for name in ("etc", "run", "data"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        for name, text in self.files.items():
            (self.directory / "etc" / name).write_text(self._here(text))
        environment = {
            **os.environ,
            "POD_NAME": self.pod_name,
            "REDIS_PASSWORD": PASSWORD,
            "REPLICATION_PASSWORD": REPLICATION,
        }
        command = ["sh", str(self.directory / "etc/start.sh")]
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.directory)
        until(f"{self.pod_name} answers", self.answers)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def client(self, user: str | None = None, password: str | None = None) -> Redis:
        once = Retry(NoBackoff(), 0)
        return Redis(self.host, self.port, username=user, password=password, socket_timeout=5, retry=once)

    def answers(self) -> bool:
        """As the probes see it: an answer, though it were a refusal."""
        try:
            with self.client() as client:
                return bool(client.ping())
        except RedisError as error:
            return "uthentication" in str(error) or "NOAUTH" in str(error)

    def _here(self, text: str) -> str:
        words = {
            "/etc/redis": f"{self.directory}/etc",
            "/run/redis": f"{self.directory}/run",
            "/data": f"{self.directory}/data",
            "bind * -::*": f"bind {self.host}",
            **self.words,
        }
        for word, here in words.items():
            text = text.replace(word, here)
        return text


def files_of(stack: str, name: str) -> Mapping[str, str]:
    """What the StatefulSet's ConfigMap holds."""
    (volume,) = [each for each in pod_of(find(stack, "StatefulSet", name))["volumes"] if "configMap" in each]
    (found,) = [
        each["data"] for each in of_kind(stack, "ConfigMap") if each["metadata"]["name"] == volume["configMap"]["name"]
    ]
    return dict(found)


@contextlib.contextmanager
def shipped_redis(directory: Path) -> Iterator[tuple[ShippedPod, str]]:
    """The base's one Redis, and the URL that gateways and workers have for it."""
    redis_program()
    (port,) = free_ports(1)
    pod = ShippedPod(
        directory / "redis-0", "127.0.0.1", port, files_of("local", "redis"), {"6379": str(port)}, "redis-0"
    )
    try:
        pod.start()
        yield pod, _url("local", {"@redis:6379": f"@127.0.0.1:{port}"})
    finally:
        pod.kill()


@contextlib.contextmanager
def shipped_sentinels(directory: Path) -> Iterator[tuple[Sequence[ShippedPod], Sequence[ShippedPod], str]]:
    """Three Redis, three sentinels, and the URL."""
    redis_program()
    port, sentinel_port = free_ports(2)
    hosts = {f"redis-{i}.redis": f"127.0.11.{i + 1}" for i in range(3)}
    hosts |= {f"sentinel-{i}.sentinel": f"127.0.12.{i + 1}" for i in range(3)}
    ports = {"26379": str(sentinel_port), "6379": str(port)}
    quick = {"millrace 5000": "millrace 1000", 'save ""': 'save ""\nrepl-diskless-sync-delay 0'}
    words = {**hosts, **ports, **quick}

    def pods(kind: str, at: int) -> list[ShippedPod]:
        found = []
        for i in range(3):
            name = f"{kind}-{i}"
            here = {**words, f"$POD_NAME.{kind}": hosts[f"{name}.{kind}"]}
            found.append(ShippedPod(directory / name, hosts[f"{name}.{kind}"], at, files_of("cpu", kind), here, name))
        return found

    servers, watchers = pods("redis", port), pods("sentinel", sentinel_port)
    try:
        for pod in [*servers, *watchers]:
            pod.start()
        yield servers, watchers, _url("cpu", words)
    finally:
        for pod in [*watchers, *servers]:
            pod.kill()


def _url(stack: str, words: Mapping[str, str]) -> str:
    url = settings_of(stack, find(stack, "Deployment", "worker"))["MILLRACE_REDIS_URL"]
    for word, here in words.items():
        url = url.replace(word, here)
    return url.replace("$(REDIS_PASSWORD)", PASSWORD)
