"""Schemas of the custom resources that deploy/k8s uses, for validation without a cluster.

Ours, and strict: they know only the fields that we use, so a new one must be looked up and entered here first. Written
from the documentation of KEDA 2.21, Prometheus Operator, Gateway API v1 and cert-manager.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

Schema = dict[str, Any]

TEXT: Final[Schema] = {"type": "string", "minLength": 1}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
PORT: Final[Schema] = {"type": "integer", "minimum": 1, "maximum": 65535}
TEXTS: Final[Schema] = {"type": "object", "additionalProperties": {"type": "string"}}
DURATION: Final[Schema] = {"type": "string", "pattern": "^([0-9]+(ms|s|m|h|d))+$"}
BOOLEAN_TEXT: Final[Schema] = {"enum": ["true", "false"]}
NUMBER_TEXT: Final[Schema] = {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?$"}


def only(needed: Mapping[str, Schema], **optional: Schema) -> Schema:
    """An object with these fields and no others."""
    return {
        "type": "object",
        "additionalProperties": False,
        "required": sorted(needed),
        "properties": {**needed, **optional},
    }


def many(item: Schema) -> Schema:
    return {"type": "array", "minItems": 1, "items": item}


def _resource(version: str, kind: str, spec: Schema) -> Schema:
    metadata = only({"name": TEXT}, namespace=TEXT, labels=TEXTS, annotations=TEXTS)
    return only({"apiVersion": {"const": version}, "kind": {"const": kind}, "metadata": metadata, "spec": spec})


def _trigger(kind: str, metadata: Schema) -> Schema:
    types = {"enum": ["AverageValue", "Value", "Utilization"]}
    return only({"type": {"const": kind}, "metadata": metadata}, name=TEXT, metricType=types)


_POLICY = only(
    {"type": {"enum": ["Pods", "Percent"]}, "value": PORT, "periodSeconds": {"type": "integer", "maximum": 1800}}
)
_PACE = only({"policies": many(_POLICY)}, stabilizationWindowSeconds={"type": "integer", "minimum": 0, "maximum": 3600})
_PROMETHEUS = _trigger(
    "prometheus",
    only(
        {"serverAddress": TEXT, "query": TEXT, "threshold": NUMBER_TEXT},
        activationThreshold=NUMBER_TEXT,
        ignoreNullValues=BOOLEAN_TEXT,
    ),
)
_METRICS_API = _trigger(
    "metrics-api",
    only(
        {"url": TEXT, "valueLocation": TEXT, "targetValue": NUMBER_TEXT},
        format={"enum": ["json", "prometheus", "xml", "yaml"]},
        activationTargetValue=NUMBER_TEXT,
    ),
)
_FALLBACK = only(
    {"failureThreshold": COUNT, "replicas": COUNT},
    behavior={"enum": ["static", "currentReplicas", "currentReplicasIfHigher", "currentReplicasIfLower"]},
)
SCALED_OBJECT: Final = _resource(
    "keda.sh/v1alpha1",
    "ScaledObject",
    only(
        {"scaleTargetRef": only({"name": TEXT}), "triggers": many({"oneOf": [_PROMETHEUS, _METRICS_API]})},
        minReplicaCount=COUNT,
        maxReplicaCount=COUNT,
        pollingInterval=COUNT,
        cooldownPeriod=COUNT,
        fallback=_FALLBACK,
        advanced=only(
            {"horizontalPodAutoscalerConfig": only({"behavior": only({"scaleUp": _PACE, "scaleDown": _PACE})})}
        ),
    ),
)

_RELABELING = only({"sourceLabels": many(TEXT), "targetLabel": TEXT}, replacement=TEXT)
SERVICE_MONITOR: Final = _resource(
    "monitoring.coreos.com/v1",
    "ServiceMonitor",
    only(
        {
            "selector": only({"matchLabels": TEXTS}),
            "endpoints": many(only({"port": TEXT}, interval=DURATION, relabelings=many(_RELABELING))),
        }
    ),
)

_ALERT = only(
    {"alert": TEXT, "expr": TEXT}, labels=TEXTS, annotations=TEXTS, **{"for": DURATION, "keep_firing_for": DURATION}
)
_RECORD = only({"record": {"type": "string", "pattern": "^[a-zA-Z_:][a-zA-Z0-9_:]*$"}, "expr": TEXT}, labels=TEXTS)
PROMETHEUS_RULE: Final = _resource(
    "monitoring.coreos.com/v1",
    "PrometheusRule",
    only({"groups": many(only({"name": TEXT, "rules": many({"oneOf": [_ALERT, _RECORD]})}, interval=DURATION))}),
)

_HOSTNAME: Final[Schema] = {
    "type": "string",
    "pattern": r"^(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$",
}
_GATEWAY_DURATION: Final[Schema] = {"type": "string", "pattern": "^([0-9]{1,5}(h|m|s|ms)){1,4}$"}
_REDIRECT = only({"scheme": {"enum": ["http", "https"]}, "statusCode": {"enum": [301, 302]}})
HTTP_ROUTE: Final = _resource(
    "gateway.networking.k8s.io/v1",
    "HTTPRoute",
    only(
        {
            "parentRefs": many(only({"name": TEXT}, sectionName=TEXT)),
            "rules": many(
                only(
                    {},
                    matches=many(only({"path": only({"type": {"enum": ["Exact", "PathPrefix"]}, "value": TEXT})})),
                    filters=many(only({"type": {"const": "RequestRedirect"}, "requestRedirect": _REDIRECT})),
                    timeouts=only({}, request=_GATEWAY_DURATION, backendRequest=_GATEWAY_DURATION),
                    backendRefs=many(only({"name": TEXT, "port": PORT})),
                )
            ),
        },
        hostnames=many(_HOSTNAME),
    ),
)
_TLS = only({"mode": {"enum": ["Terminate", "Passthrough"]}, "certificateRefs": many(only({"name": TEXT}))})
_LISTENER = only({"name": TEXT, "port": PORT, "protocol": {"enum": ["HTTP", "HTTPS"]}}, hostname=_HOSTNAME, tls=_TLS)
GATEWAY: Final = _resource(
    "gateway.networking.k8s.io/v1", "Gateway", only({"gatewayClassName": TEXT, "listeners": many(_LISTENER)})
)

CERTIFICATE: Final = _resource(
    "cert-manager.io/v1",
    "Certificate",
    only(
        {
            "secretName": TEXT,
            "dnsNames": many(_HOSTNAME),
            "issuerRef": only({"name": TEXT, "kind": {"enum": ["Issuer", "ClusterIssuer"]}}),
        },
        privateKey=only(
            {"algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]}},
            size={"enum": [256, 384, 521, 2048, 4096]},
            rotationPolicy={"enum": ["Always", "Never"]},
        ),
    ),
)

CUSTOM: Final[Mapping[str, Schema]] = {
    "ScaledObject": SCALED_OBJECT,
    "ServiceMonitor": SERVICE_MONITOR,
    "PrometheusRule": PROMETHEUS_RULE,
    "HTTPRoute": HTTP_ROUTE,
    "Gateway": GATEWAY,
    "Certificate": CERTIFICATE,
}
