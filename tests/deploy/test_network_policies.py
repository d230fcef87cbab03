"""Who may speak to whom: a table, held against the policies."""

from __future__ import annotations

import itertools
from typing import Final

from tests.deploy.network import Pod, allows, component
from tests.deploy.rendered import of_kind, workloads

GATEWAY, WORKER, PROBER = component("gateway"), component("worker"), component("prober")
REDIS, SENTINEL = component("redis"), component("sentinel")
OURS: Final = {"gateway": GATEWAY, "worker": WORKER, "prober": PROBER, "redis": REDIS, "sentinel": SENTINEL}
STRANGERS: Final = {
    "proxy": Pod({"app": "proxy"}, "ingress"),
    "prometheus": Pod({"app.kubernetes.io/name": "prometheus"}, "monitoring"),
    "keda": Pod({"app": "keda-operator"}, "keda"),
    "dns": Pod({"k8s-app": "kube-dns"}, "kube-system"),
    "neighbour": Pod({"app.kubernetes.io/component": "gateway"}, "other"),
}
PODS: Final = OURS | STRANGERS
PORTS: Final = (53, 443, 6379, 8000, 9090, 26379)

ALLOWED: Final = {
    # Clients come from anywhere: the gateway asks for keys.
    *((source, "gateway", 8000) for source in STRANGERS),
    *(("prometheus", target, 9090) for target in ("gateway", "worker", "prober")),
    ("keda", "gateway", 9090),
    *((source, "redis", 6379) for source in OURS),
    *((source, "sentinel", 26379) for source in OURS),
    *((source, "dns", 53) for source in OURS),
}


def test_what_is_listed_may_speak_and_nothing_else() -> None:
    policies = of_kind("cpu", "NetworkPolicy")
    found = {
        (source, target, port)
        for (source, target), port in itertools.product(itertools.permutations(PODS, 2), PORTS)
        if {source, target} & OURS.keys() and allows(policies, PODS[source], PODS[target], port)
    }
    among_themselves = {
        (name, name, port)
        for name, port in itertools.product(OURS, PORTS)
        if allows(policies, OURS[name], OURS[name], port)
    }
    assert found | among_themselves == ALLOWED


def test_names_are_asked_over_udp_too() -> None:
    assert allows(of_kind("cpu", "NetworkPolicy"), WORKER, STRANGERS["dns"], 53, "UDP")


def test_the_table_knows_every_pod_of_ours() -> None:
    for stack in ("cpu", "gpu"):
        roles = {
            each["spec"]["template"]["metadata"]["labels"]["app.kubernetes.io/component"] for each in workloads(stack)
        }
        assert roles == OURS.keys()


def test_a_cluster_without_policies_lets_everything_through() -> None:
    assert allows([], STRANGERS["neighbour"], REDIS, 6379)
