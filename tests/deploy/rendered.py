"""What kustomize makes of deploy/k8s: each overlay as shipped, and components that no overlay has, over the base."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

Manifest = Mapping[str, Any]

K8S: Final = Path(__file__).resolve().parents[2] / "deploy/k8s"

# Every component stands in one of these at least; a test says so.
STACKS: Final[Mapping[str, Sequence[str]]] = {
    "local": ["overlays/local"],
    "cpu": ["overlays/cpu"],
    "gpu": ["overlays/gpu"],
    "import": ["import"],
    "hpa": ["base", "components/hpa"],
    "zero": ["base", "components/keda", "components/scale-to-zero"],
    "image": ["base", "components/image-volume"],
    "baseline": ["base", "components/probe-baseline"],
}


@lru_cache(maxsize=len(STACKS))
def rendered(stack: str) -> Sequence[Manifest]:
    """All manifests of a stack, as they would be applied."""
    root, *components = STACKS[stack]
    if not components:
        return _kustomize(K8S / root)
    with tempfile.TemporaryDirectory(prefix="millrace-stack-") as directory:
        away = Path(os.path.relpath(K8S, directory))
        text = yaml.safe_dump(
            {"resources": [str(away / root)], "components": [str(away / each) for each in components]}
        )
        (Path(directory) / "kustomization.yaml").write_text(text)
        return _kustomize(Path(directory))


def find(stack: str, kind: str, name: str) -> Any:
    """The one manifest of this kind and name."""
    (found,) = [each for each in rendered(stack) if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def of_kind(stack: str, *kinds: str) -> list[Any]:
    return [each for each in rendered(stack) if each["kind"] in kinds]


def workloads(stack: str) -> list[Any]:
    """What makes pods."""
    return of_kind(stack, "Deployment", "StatefulSet", "Job")


def pod_of(workload: Manifest) -> Any:
    return workload["spec"]["template"]["spec"]


def containers_of(workload: Manifest) -> list[Any]:
    """All of them, those that come first too."""
    pod = pod_of(workload)
    return [*pod.get("initContainers", ()), *pod["containers"]]


def settings_of(stack: str, workload: Manifest) -> dict[str, str]:
    """The MILLRACE_ variables of its main container, from ConfigMaps and from values of its own."""
    maps = {each["metadata"]["name"]: each["data"] for each in of_kind(stack, "ConfigMap")}
    (container,) = pod_of(workload)["containers"]
    found: dict[str, str] = {}
    for source in container.get("envFrom", ()):
        found |= maps[source["configMapRef"]["name"]]
    found |= {each["name"]: each["value"] for each in container.get("env", ()) if "value" in each}
    return {name: value for name, value in found.items() if name.startswith("MILLRACE_")}


def all_workloads() -> Iterator[tuple[str, Any]]:
    for stack in STACKS:
        for workload in workloads(stack):
            yield stack, workload


def quantity(text: str) -> float:
    """A quantity of Kubernetes as a number: 500m, 2, 768Mi."""
    for suffix, factor in {"m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}.items():
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


def _kustomize(directory: Path) -> list[Manifest]:
    program = shutil.which("kubectl")
    if program is None:
        words = "kubectl is not installed; the manifests are rendered by `kubectl kustomize`"
        if os.environ.get("CI"):
            pytest.fail(words)
        pytest.skip(words)
    ran = subprocess.run([program, "kustomize", str(directory)], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return [each for each in yaml.safe_load_all(ran.stdout) if each]
