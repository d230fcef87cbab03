"""Dockerfile and compose files, read: users, settings, ports, mounts. What runs is `make image-test` (tests/images)."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.settings import Settings, read_settings
from tests.images.engine import BASE

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE_FILES = ("docker-compose.yml", "deploy/compose/keys.yml", "deploy/compose/gpu.yml")
TARGETS = {"gateway": (), "worker-cpu": ("cpu", "import"), "worker-cuda": ("cuda", "import")}
OURS = "ghcr.io/millrace/millrace-"


def instructions() -> dict[str, list[tuple[str, str]]]:
    """(instruction, rest) of each stage, by its name; what comes before the first stage under ""."""
    stages: dict[str, list[tuple[str, str]]] = {"": []}
    stage = ""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            stage = rest.split(" AS ")[1]
            stages[stage] = []
        stages[stage].append((word, rest))
    return stages


STAGES = instructions()


def rests(stage: str, word: str) -> list[str]:
    return [rest for each, rest in STAGES[stage] if each == word]


def settings_of(environment: dict[str, str]) -> Settings:
    """Raises SettingsError for a name or a value that is none."""
    return read_settings(argparse.Namespace(), environment)


# ---- Dockerfile ----


def test_the_dockerfile_makes_three_images_and_the_smallest_without_a_target() -> None:
    assert [stage for stage in STAGES if stage in TARGETS] == ["worker-cuda", "worker-cpu", "gateway"]
    assert list(STAGES)[-1] == "gateway"
    assert all(rests(target, "FROM") == [f"runtime AS {target}"] for target in TARGETS)


def test_every_stage_begins_with_the_one_base_or_another_stage() -> None:
    assert rests("", "ARG") == [f"PYTHON_IMAGE={BASE}"]
    for stage in filter(None, STAGES):
        origin = rests(stage, "FROM")[0].split(" AS ")[0]
        assert origin == "${PYTHON_IMAGE}" or origin in STAGES


def test_an_image_runs_without_root_and_can_be_stopped_and_asked() -> None:
    assert rests("runtime", "USER") == ["10001:10001"]
    assert rests("runtime", "STOPSIGNAL") == ["SIGTERM"]
    assert rests("runtime", "ENTRYPOINT") == ['["millrace"]']
    assert "/livez" in rests("runtime", "HEALTHCHECK")[0]
    for target in TARGETS:  # nothing of it is taken back, and no command runs where the compiler must not be
        assert {word for word, _ in STAGES[target]} <= {"FROM", "ENV", "COPY", "CMD"}
        assert rests(target, "CMD") == [f'["{target.split("-")[0]}"]']


def test_an_image_takes_packages_and_code_and_no_tools() -> None:
    for target in TARGETS:
        copied = [rest.split() for rest in rests("runtime", "COPY") + rests(target, "COPY")]
        taken = {words[1] for words in copied if words[0] in ("--from=build", "--from=kernels", "--from=packages")}
        assert taken <= {"/opt/millrace/kernels/build"}
    assert not any("models" in rest for rest in rests("gateway", "COPY"))


@pytest.mark.parametrize("target", TARGETS)
def test_an_image_installs_the_extras_it_needs(target: str) -> None:
    install = rests(f"{target}-packages", "RUN")[0].split(" && ")[0]
    extras = TARGETS[target]
    assert install == ("pip install ." if not extras else f"pip install '.[{','.join(extras)}]'")
    assert set(extras) <= set(PROJECT["project"]["optional-dependencies"])
    assert any(f"--from={target}-packages /opt/sbom /usr/share/sbom" in rest for rest in rests(target, "COPY"))


def test_the_settings_of_an_image_are_settings_and_let_nobody_in() -> None:
    environment = dict(pair.split("=", 1) for rest in rests("runtime", "ENV") for pair in rest.split())
    settings = settings_of(environment)
    assert (settings.host, settings.port, settings.metrics_port) == ("0.0.0.0", 8000, 9090)
    assert settings.open_access == "no"
    assert rests("runtime", "EXPOSE") == ["8000 9090"]


def test_a_gateway_needs_none_of_the_packages_that_its_image_lacks() -> None:
    lacking = ("onnxruntime", "onnx", "ml_dtypes", "safetensors", "ziglang", "torch")
    forbid = f"import sys; sys.modules.update(dict.fromkeys({lacking})); import services.gateway_process"
    done = subprocess.run([sys.executable, "-c", forbid], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_build_sees_the_packages_and_nothing_else_of_the_tree() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    packages = {each.rstrip("*") for each in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert allowed == packages | {"LICENSE", "README.md", "pyproject.toml", "models", "models/millpond"}
    assert all((ROOT / name).exists() for name in allowed)
    assert {"models/*", "kernels/build", "**/__pycache__"} <= set(lines)


# ---- compose ----


def load(name: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return document


MAIN = load("docker-compose.yml")
SERVICES: dict[str, dict[str, Any]] = MAIN["services"]
ALL = {(name, service): facts for name in COMPOSE_FILES for service, facts in load(name)["services"].items()}


def plain(text: str) -> str:
    """With each ${NAME:-default} its default."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_has_no_rights_and_nothing_to_write_but_its_volumes(service: str) -> None:
    facts = SERVICES[service]
    assert facts["read_only"] is True
    assert facts["cap_drop"] == ["ALL"]
    assert facts["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in facts
    assert facts["image"].startswith(OURS) or not facts["user"].startswith(("0", "root"))
    assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*", facts["image"])  # a version, and not `latest`


def test_what_is_published_is_for_this_machine_only() -> None:
    ports = [port for facts in SERVICES.values() for port in facts.get("ports", [])]
    assert "127.0.0.1:8000:8000" in ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_port_for_other_machines_comes_with_keys() -> None:
    gateway = load("deploy/compose/keys.yml")["services"]["gateway"]
    settings = settings_of(SERVICES["gateway"]["environment"] | gateway["environment"])
    assert settings.open_access == "no"
    assert settings.keys_file.startswith("/etc/millrace/keys/")
    assert [plain(port) for port in gateway["ports"]] == ["8080:8000"]


@pytest.mark.parametrize(("file", "service"), ALL)
def test_every_setting_of_a_service_is_one(file: str, service: str) -> None:
    environment = {key: plain(value) for key, value in ALL[file, service].get("environment", {}).items()}
    if ALL[file, service].get("image", OURS).startswith(OURS):
        settings_of(environment)
    assert not [key for key in environment if re.search("PASSWORD|SECRET|TOKEN", key)]


@pytest.mark.parametrize("file", COMPOSE_FILES)
def test_every_name_in_a_compose_file_leads_somewhere(file: str) -> None:
    document = load(file)
    volumes = set(MAIN["volumes"]) | set(document.get("volumes", {}))
    for facts in document["services"].values():
        assert set(facts.get("depends_on", ())) <= set(SERVICES)
        assert set(facts.get("networks", ())) <= set(MAIN["networks"])
        if (build := facts.get("build")) is not None:
            assert facts["image"].startswith(OURS + build["target"])
            assert build["target"] in TARGETS
        for source in (each.split(":")[0] for each in facts.get("volumes", ())):
            assert (ROOT / source).exists() if source.startswith("./") else source in volumes


def test_redis_is_reached_by_ours_only_and_keeps_its_data() -> None:
    inside = {name for name, facts in SERVICES.items() if "queue" in facts["networks"]}
    assert inside == {"redis", "store", "gateway", "worker", "prober"}
    assert MAIN["networks"]["queue"] == {"internal": True}
    command = " ".join(SERVICES["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]


def test_a_stop_waits_until_streams_are_drained() -> None:
    for name in ("gateway", "worker"):
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > settings_of({}).drain_s + 10


def test_prometheus_finds_every_process_by_the_name_of_its_service() -> None:
    found = [
        target for job in load("deploy/prometheus/prometheus.yml")["scrape_configs"] for target in job["dns_sd_configs"]
    ]
    names = {name for target in found for name in target["names"]}
    assert names == {"gateway", "worker", "prober"}
    assert {target["port"] for target in found} == {9090}
    assert all("watch" in SERVICES[name]["networks"] for name in (*names, "prometheus", "alertmanager", "grafana"))


def test_grafana_is_given_what_its_provisioning_names() -> None:
    provider = load("deploy/grafana/provisioning/dashboards/millrace.yaml")["providers"][0]
    assert f"./deploy/grafana/dashboards:{provider['options']['path']}:ro" in SERVICES["grafana"]["volumes"]
    source = load("deploy/grafana/provisioning/datasources/prometheus.yaml")["datasources"][0]
    assert source["url"] == "http://prometheus:9090"
