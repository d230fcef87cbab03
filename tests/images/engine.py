"""What builds and runs containers here: Docker where its engine answers, else buildah and podman without a registry.

The one place that knows how they differ. Both run as on a server: Linux, host network.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.e2e.server import ROOT
from tests.images.base import make_base_files

BASE: Final = "docker.io/library/python:3.11-slim-bookworm"  # as in the Dockerfile
REGISTRY: Final = "ghcr.io/millrace/millrace-"
STORAGE: Final = Path("~/.cache/millrace-images").expanduser()  # layers outlive a run
BUILD_S: Final = 1800
COMMAND_S: Final = 120

# As docker-compose.yml and deploy/k8s run ours: no root, no rights, nothing to write.
SEALED: Final = (
    *("--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--network", "host"),
)


class EngineError(Exception):
    """A command of the engine failed; the message is what it said."""


@dataclass(frozen=True, slots=True)
class Engine:
    """`command` takes run, stop, inspect and so on. Raises EngineError, of every method."""

    name: str
    command: Sequence[str]
    build_command: Sequence[str]
    run_flags: Sequence[str] = ()

    def __call__(self, *arguments: str, timeout_s: float = COMMAND_S) -> str:
        """What `arguments` print."""
        return output([*self.command, *arguments], timeout_s)

    def build(self, target: str) -> str:
        """The image of a target of our Dockerfile."""
        image = f"{REGISTRY}{target}:test"
        output([*self.build_command, "--target", target, "--tag", image, str(ROOT)], BUILD_S)
        return image

    def build_text(self, text: str, image: str) -> None:
        """An image of a Dockerfile's text that copies nothing."""
        with tempfile.TemporaryDirectory(prefix="millrace-image-") as directory:
            (Path(directory) / "Dockerfile").write_text(text)
            output([*self.build_command, "--tag", image, directory], BUILD_S)

    def start(self, name: str, image: str, *words: str, flags: Sequence[str] = ()) -> None:
        """A sealed container in the background."""
        self("run", "--detach", "--name", name, *self.run_flags, *SEALED, *flags, image, *words)

    def run(self, image: str, *words: str, flags: Sequence[str] = ()) -> str:
        """What a sealed container prints until it ends."""
        return self("run", "--rm", *self.run_flags, *SEALED, *flags, image, *words)

    def facts(self, kind: str, name: str) -> dict[str, Any]:
        """What the engine knows of an image or a container."""
        found: list[dict[str, Any]] = json.loads(self(kind, "inspect", name))
        return found[0]

    def health_command(self, image: str) -> list[str]:
        """What the image's HEALTHCHECK runs."""
        facts = self.facts("image", image)
        check = facts.get("Healthcheck") or facts.get("HealthCheck") or facts["Config"]["Healthcheck"]
        command: list[str] = check["Test"][1:]
        return command


def find_engine() -> Engine:
    """The engine of this machine. Raises EngineError if there is none."""
    docker = shutil.which("docker")
    if docker is not None and subprocess.run([docker, "info"], capture_output=True, check=False).returncode == 0:
        return Engine("docker", [docker], [docker, "build"])
    podman, buildah = shutil.which("podman"), shutil.which("buildah")
    if podman is None or buildah is None:
        raise EngineError(
            "no Docker engine answers, and podman and buildah are not installed"
            " (Debian: apt install buildah podman runc netavark aardvark-dns debootstrap)"
        )
    return _podman(podman, buildah)


def _podman(podman: str, buildah: str) -> Engine:
    STORAGE.mkdir(parents=True, exist_ok=True)
    where = ("--root", str(STORAGE / "layers"), "--runroot", str(STORAGE / "run"))
    bud = [buildah, *where, "bud", "--isolation", "chroot", "--format", "docker"]  # OCI's format has no HEALTHCHECK
    # How this machine reaches its package index: its own pip configuration and certificates, where it has them.
    trusted = [path for path in ("/etc/pip.conf", "/etc/ssl/certs") if Path(path).exists()]
    mounts = [word for path in trusted for word in ("--volume", f"{path}:{path}:ro")]
    engine = Engine(
        "podman",
        # crun refuses machines with both kinds of cgroups.
        [podman, *where, "--runtime", "runc", "--cgroup-manager", "cgroupfs"],
        [*bud, "--layers", "--pull-never", *mounts],
        ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=4096:4096"),
    )
    try:
        engine.facts("image", BASE)
    except EngineError:
        output([*bud, "--tag", BASE, str(make_base_files(STORAGE / "base"))], BUILD_S)
    return engine


def output(command: Sequence[str], timeout_s: float) -> str:
    """What a command prints. Raises EngineError with its words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode != 0:
        raise EngineError(
            f"{' '.join(command)}\nended with {done.returncode}\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
        )
    return done.stdout
