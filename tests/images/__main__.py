"""`python -m tests.images`: build the images, look inside, run them sealed, and kill a worker in mid-stream.

Minutes of building the first time; prints a line for each claim, and the sizes. The exit code is 1 if a claim fails, 2
if nothing here can build images.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tests.e2e.server import ROOT
from tests.images.compose import alertmanagers, ask, compose, rules, scraped, until
from tests.images.engine import BASE, Engine, EngineError, find_engine
from tests.images.scene import Scene

MIB: Final = 2**20
# Most MiB that an image may add to its base, and modules it must do without.
IMAGES: Final[Mapping[str, tuple[int, tuple[str, ...]]]] = {
    "gateway": (200, ("onnxruntime", "onnx", "torch", "ziglang")),
    "worker-cpu": (400, ("torch", "ziglang")),
}
LOOK_INSIDE: Final = Path(__file__).with_name("inside.py")
RESOLVE_S: Final = 900


class Claims:
    """What was claimed, printed as it is found true or not."""

    def __init__(self) -> None:
        self.num_failed = 0

    def check(self, claim: str, holds: bool, facts: object = "") -> None:
        self.num_failed += not holds
        print(f"{'ok    ' if holds else 'FAILED'}  {claim}{f'  ({facts})' if facts != '' else ''}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.images", description=(__doc__ or "").split(":", 1)[1])
    parser.add_argument("--cuda", action="store_true", help="also resolve the packages of worker-cuda (downloads)")
    parser.add_argument("--compose", action="store_true", help="also start docker-compose.yml (ports 8000, 9090, 9093)")
    options = parser.parse_args(arguments)
    try:
        engine = find_engine()
    except EngineError as error:
        print(error, file=sys.stderr)
        return 2
    claims = Claims()
    print(f"with {engine.name}", flush=True)
    images = {target: engine.build(target) for target in IMAGES}
    base_bytes = engine.facts("image", BASE)["Size"]
    for target, image in images.items():
        check_image(engine, image, target, base_bytes, claims)
    with tempfile.TemporaryDirectory(prefix="millrace-images-") as directory:
        check_service(engine, images, Path(directory), claims)
    if options.compose:
        check_compose(engine, images, claims)
    if options.cuda:
        print(resolve_cuda())
    else:
        print("        worker-cuda was not built: gigabytes, and nothing to run it on; --cuda resolves its packages")
    return 1 if claims.num_failed else 0


def check_image(engine: Engine, image: str, target: str, base_bytes: int, claims: Claims) -> None:
    """Its size, its user, and what is in it and must not be."""
    most_mib, without = IMAGES[target]
    size = engine.facts("image", image)["Size"]
    added_mib = (size - base_bytes) / MIB
    claims.check(
        f"{target} adds less than {most_mib} MiB to its base",
        added_mib < most_mib,
        f"{added_mib:.0f}, {size / MIB:.0f} in all",
    )
    flags = ("--entrypoint", "python", "--volume", f"{LOOK_INSIDE}:/look.py:ro")
    seen = json.loads(engine.run(image, "/look.py", *without, flags=flags))
    claims.check(f"{target} runs as 10001, in a group of the same number", seen["ids"] == [10001, 10001])
    claims.check(f"{target} can write /tmp and nothing of its own", seen["writable"] == ["/tmp"], seen["writable"])
    claims.check(f"{target} has none of {', '.join(without)}", not seen["modules"], seen["modules"] or "")
    claims.check(f"{target} has no compiler and no pip of its own", not seen["programs"], seen["programs"] or "")
    claims.check(f"{target} lists its packages", seen["packages"] > 10, f"{seen['packages']} in /usr/share/sbom")
    user = engine.facts("image", image)["Config"]
    claims.check(f"{target} is stopped by SIGTERM", user.get("StopSignal") == "SIGTERM")
    labels = user.get("Labels") or {}
    claims.check(
        f"{target} says its version and licence", {"version", "licenses"} <= {key.split(".")[-1] for key in labels}
    )


def check_service(engine: Engine, images: Mapping[str, str], directory: Path, claims: Claims) -> None:
    """A gateway and two workers in sealed containers, over a Redis of this machine."""
    with Scene.open(engine, images, directory) as scene:
        scene.import_model()
        refusal = scene.start_unlocked()
        claims.check("a gateway without keys does not open to other machines", "MILLRACE_OPEN_ACCESS" in refusal)
        scene.start()
        claims.check("containers are healthy by the images' own check", scene.are_healthy())
        whole = scene.ask()
        claims.check("a whole answer comes", len(whole) > 900, f"{len(whole)} tokens")
        story = scene.stream_and_kill()
        claims.check("the worker was killed in mid-stream", story.was_cut, f"at token {story.killed_at}")
        claims.check("another went on, and no token is lost, doubled or changed", story.token_ids == whole)
        print(f"        longest silence {story.gap_s:.2f} s, with a lease of {scene.lease_s:g} s")
        codes = scene.stop()
        claims.check("SIGTERM ends the rest with exit code 0", set(codes.values()) == {0}, codes)


def check_compose(engine: Engine, images: Mapping[str, str], claims: Claims) -> None:
    """The compose file, from nothing to an answer, and watched."""
    try:
        with compose(engine, images) as project:
            project.up()
            claims.check("docker-compose.yml starts and is healthy", True, ", ".join(project.started))
            claims.check("the README's request is answered there", "42" in ask())
            jobs = {"millrace-gateway", "millrace-prober", "millrace-worker"}
            claims.check(
                "Prometheus reaches all jobs", until(lambda: set(scraped()) >= jobs and all(scraped().values()))
            )
            claims.check(
                "Prometheus has our alerts and finds Alertmanager", rules() > 20 and until(lambda: alertmanagers() == 1)
            )
            codes = project.stop()
            claims.check("SIGTERM ends ours with exit code 0", set(codes.values()) == {0}, codes)
    except EngineError as error:
        claims.check("docker-compose.yml starts and is healthy", False, error)


def resolve_cuda() -> str:
    """What worker-cuda would install."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--only-binary=:all:"]
    command = [*pip, "--report", "-", f"{ROOT}[cuda,import]"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RESOLVE_S, check=True)
    found = [each["metadata"] for each in json.loads(done.stdout)["install"]]
    theirs = [
        f"{each['name']} {each['version']}" for each in found if "nvidia" in each["name"] or "gpu" in each["name"]
    ]
    return f"        worker-cuda resolves to {len(found)} packages: {', '.join(sorted(theirs))}"


if __name__ == "__main__":
    raise SystemExit(main())
