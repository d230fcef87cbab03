"""Whether the network policies let one pod speak to another: as documented, for the selectors that we use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

OURS: Final = "millrace"

Labels = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Pod:
    """An end of a connection; of ours unless another namespace is given."""

    labels: Labels
    namespace: str = OURS


def component(name: str) -> Pod:
    """A pod of ours by its role."""
    return Pod({"app.kubernetes.io/name": "millrace", "app.kubernetes.io/component": name})


def allows(policies: Sequence[Mapping[str, Any]], source: Pod, target: Pod, port: int, protocol: str = "TCP") -> bool:
    """Both ends must permit it: the source what goes out, the target what comes in."""
    specs = [each["spec"] for each in policies]
    return _permits(specs, "Egress", source, target, port, protocol) and _permits(
        specs, "Ingress", target, source, port, protocol
    )


def _permits(specs: Iterable[Mapping[str, Any]], way: str, pod: Pod, peer: Pod, port: int, protocol: str) -> bool:
    """A pod that no policy selects for this way is open; one that is selected needs a rule."""
    chosen = [
        spec
        for spec in specs
        if pod.namespace == OURS and way in spec["policyTypes"] and _selects(spec["podSelector"], pod.labels)
    ]
    rules = [rule for spec in chosen for rule in spec.get(way.lower(), ())]
    side = "from" if way == "Ingress" else "to"
    return not chosen or any(
        _is_peer(rule.get(side), peer) and _is_port(rule.get("ports"), port, protocol) for rule in rules
    )


def _is_peer(peers: Sequence[Mapping[str, Any]] | None, pod: Pod) -> bool:
    """Without a list anybody is; without a namespace selector only who is in ours."""
    return peers is None or any(
        (
            _selects(each["namespaceSelector"], {"kubernetes.io/metadata.name": pod.namespace})
            if "namespaceSelector" in each
            else pod.namespace == OURS
        )
        and _selects(each.get("podSelector", {}), pod.labels)
        for each in peers
    )


def _is_port(ports: Sequence[Mapping[str, Any]] | None, port: int, protocol: str) -> bool:
    return ports is None or any((each["port"], each.get("protocol", "TCP")) == (port, protocol) for each in ports)


def _selects(selector: Mapping[str, Any], labels: Labels) -> bool:
    unknown = selector.keys() - {"matchLabels", "matchExpressions"}
    assert not unknown, f"a selector that this does not read: {unknown}"
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        each["operator"] == "In" and labels.get(each["key"]) in each["values"]
        for each in selector.get("matchExpressions", ())
    )
