"""The manifests: valid for the oldest and newest Kubernetes we promise, of settings that exist, as safe as we say."""

from __future__ import annotations

import copy
import json
import re
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Final

import jsonschema
import kubernetes_validate
import pytest

from scripts.make_prometheus_rule import TARGET, prometheus_rule
from services.settings import package_version, read_settings
from tests.deploy.crd_schemas import CUSTOM
from tests.deploy.rendered import (
    K8S,
    STACKS,
    all_workloads,
    containers_of,
    find,
    of_kind,
    pod_of,
    quantity,
    rendered,
    settings_of,
    workloads,
)

# The image volume is a field since 1.31; preStop's sleep is on since 1.30.
VERSIONS: Final = {stack: ("1.31" if stack == "image" else "1.30", "1.37") for stack in STACKS}
CLOSING_S: Final = 5  # what a process takes after its drain (services/serving.py)

Rule = Callable[[str, Any], Iterator[str]]


@lru_cache(maxsize=1024)
def _validate(text: str, version: str) -> None:
    """Stacks share most of what they have: each once."""
    kubernetes_validate.validate(json.loads(text), version, strict=True)


@pytest.mark.parametrize("stack", STACKS)
def test_every_manifest_is_valid_to_the_letter(stack: str) -> None:
    for manifest in rendered(stack):
        if (schema := CUSTOM.get(manifest["kind"])) is not None:
            jsonschema.Draft202012Validator(schema).validate(manifest)
            continue
        for version in VERSIONS[stack]:
            _validate(json.dumps(manifest, sort_keys=True), version)


@pytest.mark.parametrize(
    ("stack", "kind", "name", "spoil"),
    [
        ("cpu", "ScaledObject", "worker", lambda spec: spec.update(minReplicas=1)),  # an HPA's word
        ("cpu", "ScaledObject", "worker", lambda spec: spec["triggers"][0]["metadata"].update(ignoreNullValues=False)),
        ("cpu", "ServiceMonitor", "millrace", lambda spec: spec["endpoints"][0].update(targetport=9090)),
        ("cpu", "HTTPRoute", "gateway", lambda spec: spec["rules"][0]["timeouts"].update(request="0")),  # no unit
        ("cpu", "Certificate", "millrace", lambda spec: spec.pop("issuerRef")),
        ("cpu", "Gateway", "public", lambda spec: spec["listeners"][0].update(port=0)),
        ("cpu", "PrometheusRule", "millrace", lambda spec: spec["groups"][0]["rules"][0].pop("expr")),
    ],
)
def test_our_schemas_refuse_what_is_wrong(stack: str, kind: str, name: str, spoil: Callable[[Any], object]) -> None:
    manifest = copy.deepcopy(find(stack, kind, name))
    spoil(manifest["spec"])
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(CUSTOM[kind]).validate(manifest)


def test_every_component_is_rendered_somewhere() -> None:
    used = {part for parts in STACKS.values() for part in parts}
    for page in K8S.glob("*/*/kustomization.yaml"):
        used |= {f"components/{name}" for name in re.findall(r"\.\./(?:components/)?([a-z-]+)", page.read_text())}
    shipped = {f"components/{path.parent.name}" for path in (K8S / "components").glob("*/kustomization.yaml")}
    assert shipped <= used


# ---- rules that hold for everything that makes pods: each yields what is wrong ----


def is_unprivileged(_: str, workload: Any) -> Iterator[str]:
    pod = pod_of(workload)
    asked = {"runAsNonRoot": True, "runAsUser": 10001, "seccompProfile": {"type": "RuntimeDefault"}}
    yield from (f"pod: {name}" for name, value in asked.items() if pod["securityContext"].get(name) != value)
    asked = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    for container in containers_of(workload):
        yield from (
            f"{container['name']}: {name}" for name in asked if container["securityContext"].get(name) != asked[name]
        )
        yield from (f"{container['name']}: {name}" for name in container["securityContext"] if name not in asked)
    yield from (name for name in ("hostNetwork", "hostPID", "hostIPC") if name in pod)
    yield from (f"hostPath: {each['name']}" for each in pod.get("volumes", ()) if "hostPath" in each)


def has_no_way_to_the_cluster(_: str, workload: Any) -> Iterator[str]:
    pod = pod_of(workload)
    yield from (name for name in ("automountServiceAccountToken", "enableServiceLinks") if pod.get(name) is not False)


def is_bounded(_: str, workload: Any) -> Iterator[str]:
    for container in containers_of(workload):
        resources = container["resources"]
        for name in ("cpu", "memory"):
            if name not in resources["requests"]:
                yield f"{container['name']}: no request of {name}"
        if "memory" not in resources["limits"]:
            yield f"{container['name']}: no limit of memory"
    for volume in pod_of(workload).get("volumes", ()):
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"{volume['name']}: an emptyDir without end"


def is_watched(_: str, workload: Any) -> Iterator[str]:
    if workload["kind"] == "Job":
        return
    for container in pod_of(workload)["containers"]:
        yield from (f"no {probe}" for probe in ("livenessProbe", "readinessProbe") if probe not in container)
        for probe in ("livenessProbe", "startupProbe"):  # neither may ask Redis: /readyz does
            if container.get(probe, {}).get("httpGet", {}).get("path", "/livez") != "/livez":
                yield f"{probe} asks {container[probe]['httpGet']['path']}"


def is_of_one_version(_: str, workload: Any) -> Iterator[str]:
    for container in containers_of(workload):
        name, _, tag = container["image"].rpartition(":")
        if not name or tag == "latest" or ("/millrace/" in name and tag != package_version()):
            yield container["image"]


def references_what_stands_before(_: str, workload: Any) -> Iterator[str]:
    """Kubernetes leaves $(NAME) as it is, in silence, unless NAME is defined earlier."""
    for container in containers_of(workload):
        known: set[str] = set()
        for each in container.get("env", ()):
            yield from (name for name in re.findall(r"\$\((\w+)\)", each.get("value", "")) if name not in known)
            known.add(each["name"])
        words = " ".join([*container.get("args", ()), *container.get("command", ())])
        yield from (name for name in re.findall(r"\$\((\w+)\)", words) if name not in known)


def may_be_evicted_one_at_a_time(stack: str, workload: Any) -> Iterator[str]:
    many = workload["spec"].get("replicas", 2) > 1 and workload["kind"] != "Job"
    labels = workload["spec"]["template"]["metadata"]["labels"].items()
    budgets = [
        each["spec"]
        for each in of_kind(stack, "PodDisruptionBudget")
        if each["spec"]["selector"]["matchLabels"].items() <= labels
    ]
    if many and [budget.get("maxUnavailable") for budget in budgets] != [1]:
        yield f"budgets: {budgets}"
    if many and not ({"topologySpreadConstraints", "affinity"} & pod_of(workload).keys()):
        yield "may all land on one node"


def writes_only_where_it_may(_: str, workload: Any) -> Iterator[str]:
    volumes = {each["name"]: each for each in pod_of(workload).get("volumes", ())}
    for container in pod_of(workload)["containers"]:
        for mount in container.get("volumeMounts", ()):
            is_content = mount["name"] in ("store", "keys", "config", "checkpoint", "baseline")
            if is_content and not mount.get("readOnly") and workload["kind"] != "Job":
                yield f"{mount['name']} is not readOnly"
            if mount["name"] not in volumes and workload["kind"] != "StatefulSet":
                yield f"{mount['name']} is no volume"


RULES: Final[tuple[Rule, ...]] = (
    is_unprivileged,
    has_no_way_to_the_cluster,
    is_bounded,
    is_watched,
    is_of_one_version,
    references_what_stands_before,
    may_be_evicted_one_at_a_time,
    writes_only_where_it_may,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_workload_keeps_the_rule(rule: Rule) -> None:
    wrong = {
        f"{stack}: {workload['kind']} {workload['metadata']['name']}": found
        for stack, workload in all_workloads()
        if (found := list(rule(stack, workload)))
    }
    assert wrong == {}


SPOILED: Final[dict[Rule, Callable[[Any], object]]] = {
    is_unprivileged: lambda pod: pod["containers"][0]["securityContext"].update(privileged=True),
    has_no_way_to_the_cluster: lambda pod: pod.pop("enableServiceLinks"),
    is_bounded: lambda pod: pod["containers"][0]["resources"]["limits"].pop("memory"),
    is_watched: lambda pod: pod["containers"][0]["livenessProbe"]["httpGet"].update(path="/readyz"),
    is_of_one_version: lambda pod: pod["containers"][0].update(image="ghcr.io/millrace/millrace-gateway"),
    references_what_stands_before: lambda pod: pod["containers"][0]["env"].reverse(),
    may_be_evicted_one_at_a_time: lambda pod: pod.pop("topologySpreadConstraints"),
    writes_only_where_it_may: lambda pod: pod["containers"][0]["volumeMounts"][0].update(readOnly=False),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_rule_finds_what_breaks_it(rule: Rule) -> None:
    workload = copy.deepcopy(find("cpu", "Deployment", "gateway"))
    assert list(rule("cpu", workload)) == []
    SPOILED[rule](pod_of(workload))
    assert list(rule("cpu", workload))


# ---- what the manifests and the processes must agree on ----


def _processes() -> Iterator[tuple[str, Any]]:
    return ((stack, each) for stack, each in all_workloads() if each["kind"] == "Deployment")


def test_the_processes_accept_every_setting() -> None:
    for stack, workload in _processes():
        read_settings(Namespace(), settings_of(stack, workload))


def test_a_drain_ends_before_the_pod_is_killed() -> None:
    for stack, workload in _processes():
        if workload["metadata"]["name"] == "prober":
            continue  # it drains nothing
        (container,) = pod_of(workload)["containers"]
        waits_s = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        drain_s = read_settings(Namespace(), settings_of(stack, workload)).drain_s
        assert waits_s + drain_s + CLOSING_S <= pod_of(workload)["terminationGracePeriodSeconds"]


def test_ports_are_those_that_the_processes_listen_on() -> None:
    for stack, workload in _processes():
        settings = read_settings(Namespace(), settings_of(stack, workload))
        (container,) = pod_of(workload)["containers"]
        ports = {each["name"]: each["containerPort"] for each in container["ports"]}
        assert ports == {"http": settings.port, "metrics": settings.metrics_port}


def test_gateways_ask_for_keys_except_in_the_local_overlay() -> None:
    for stack, workload in _processes():
        if workload["metadata"]["name"] == "gateway":
            settings = read_settings(Namespace(), settings_of(stack, workload))
            assert (settings.keys_file == "", settings.open_access) == (
                stack == "local",
                "yes" if stack == "local" else "no",
            )


def test_no_secret_is_in_a_manifest_except_the_one_everybody_knows() -> None:
    secrets = [
        (stack, each["metadata"]["name"].rsplit("-", 1)[0]) for stack in STACKS for each in of_kind(stack, "Secret")
    ]
    assert sorted(secrets) == [("local", "millrace-keys"), ("local", "millrace-redis")]


def test_every_configmap_and_claim_that_a_pod_names_is_there_or_is_the_operators() -> None:
    ours_to_make = {"millrace-checkpoint", "millrace-probe-baseline"}
    for stack, workload in all_workloads():
        made = {
            each["metadata"]["name"] for each in of_kind(stack, "ConfigMap", "PersistentVolumeClaim")
        } | ours_to_make
        made |= {"millrace-store"} if stack == "import" else set()
        text = str(workload)
        named = re.findall(r"'(?:configMap|configMapRef|configMapKeyRef)': \{[^}]*'name': '([^']+)'", text)
        named += re.findall(r"'claimName': '([^']+)'", text)
        assert set(named) <= made


def test_a_worker_has_memory_for_its_cache_beside_its_model() -> None:
    for stack in ("local", "cpu"):
        worker = find(stack, "Deployment", "worker")
        cache = read_settings(Namespace(), settings_of(stack, worker)).kv_memory_bytes
        assert 0 < cache <= quantity(pod_of(worker)["containers"][0]["resources"]["limits"]["memory"]) / 2


def test_redis_has_room_to_rewrite_its_file() -> None:
    for stack in ("local", "cpu"):
        (config,) = [each["data"]["redis.conf"] for each in of_kind(stack, "ConfigMap") if "redis.conf" in each["data"]]
        (limit,) = re.findall(r"^maxmemory (\d+)mb$", config, flags=re.MULTILINE)
        memory = pod_of(find(stack, "StatefulSet", "redis"))["containers"][0]["resources"]["limits"]["memory"]
        assert 2 * int(limit) * 2**20 <= quantity(memory)


def test_redis_of_the_sentinel_component_is_that_of_the_base_and_more() -> None:
    base = (K8S / "base/redis/redis.conf").read_text()
    assert (K8S / "components/sentinel/redis.conf").read_text().startswith(base)


def test_whatever_is_scaled_has_no_number_of_its_own() -> None:
    for stack in STACKS:
        for scaler in of_kind(stack, "ScaledObject", "HorizontalPodAutoscaler"):
            assert "replicas" not in find(stack, "Deployment", scaler["spec"]["scaleTargetRef"]["name"])["spec"]


def test_gpu_workers_update_without_a_spare_gpu() -> None:
    worker = find("gpu", "Deployment", "worker")
    assert worker["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}
    (container,) = pod_of(worker)["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "worker-cuda" in container["image"]


def test_streams_are_not_cut_by_the_route() -> None:
    (rule,) = find("cpu", "HTTPRoute", "gateway")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "0s", "backendRequest": "0s"}


def test_services_lead_to_ports_of_pods() -> None:
    for stack in STACKS:
        pods = [(each["spec"]["template"]["metadata"]["labels"], pod_of(each)) for each in workloads(stack)]
        for service in of_kind(stack, "Service"):
            chosen = [pod for labels, pod in pods if service["spec"]["selector"].items() <= labels.items()]
            names = {port["name"] for pod in chosen for container in pod["containers"] for port in container["ports"]}
            assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
            assert len(chosen) == 1


def test_prometheus_finds_the_three_kinds_of_process_under_their_jobs() -> None:
    (monitor,) = of_kind("cpu", "ServiceMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    services = [each for each in of_kind("cpu", "Service") if wanted <= each["metadata"]["labels"].items()]
    (relabeling,) = monitor["spec"]["endpoints"][0]["relabelings"]
    jobs = {
        relabeling["replacement"].replace("$1", each["metadata"]["labels"]["app.kubernetes.io/component"])
        for each in services
    }
    assert jobs == {"millrace-gateway", "millrace-worker", "millrace-prober"}


def test_the_rules_of_the_cluster_are_those_of_prometheus() -> None:
    assert TARGET.read_text() == prometheus_rule(), "run `python -m scripts.make_prometheus_rule`"
