"""A strict reader of Kubernetes' structural schemas: what an API server with `fieldValidation: Strict` would refuse.

Not a test file: conftest.py loads it. Custom kinds are read from the CRDs of the fact sheets, and the places that those
leave open are closed here by Kubernetes' own types. Kinds without a CRD have small schemas of their own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

Schema = dict[str, Any]

_RANGES = {"int32": 1 << 31, "int64": 1 << 63}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
}


class Schemas:
    """Complaints about objects of all kinds that a deployment has."""

    def __init__(self, crds: Path) -> None:
        self._by_kind: dict[tuple[str, str], Schema] = dict(_CORE)
        for file in ("knative-serving/service", "knative-eventing/eventtype", "kserve/servingruntimes"):
            self._read(crds / f"{file}.yaml")
        self._read(crds / "kserve/inferenceservices.yaml")
        for file in ("broker", "trigger", "sequence"):
            self._read(crds / f"knative-eventing/{file}.yaml")
        _close_knative_service(self._by_kind["serving.knative.dev/v1", "Service"])
        _close_eventing(self._by_kind)

    def _read(self, path: Path) -> None:
        spec = yaml.load(path.read_bytes(), Loader=yaml.CSafeLoader)["spec"]
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            schema["properties"] |= {"apiVersion": _TEXT, "kind": _TEXT, "metadata": _META}
            schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
            self._by_kind[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema

    def complaints(self, tree: Mapping[str, Any]) -> list[str]:
        kind = (tree.get("apiVersion", ""), tree.get("kind", ""))
        schema = self._by_kind.get(kind)
        if schema is None:
            return [f"{kind}: no schema for this kind"]
        name = f"{kind[1]} {tree.get('metadata', {}).get('name')}"
        return [f"{name}: {text}" for text in _check(schema, tree, "")]


def _check(schema: Schema, value: Any, path: str) -> Iterator[str]:
    at = path or "."
    if schema.get("x-kubernetes-int-or-string"):
        if isinstance(value, bool) or not isinstance(value, int | str):
            yield f"{at}: {value!r} is neither a whole number nor text"
        elif isinstance(value, str):
            yield from _check_text(schema, value, at)
        return
    kind = schema.get("type")
    if kind is None:
        assert schema.get("x-kubernetes-preserve-unknown-fields"), f"a schema without a type at {at}"
        return
    if not isinstance(value, _TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
        yield f"{at}: {value!r} is no {kind}"
        return
    if "enum" in schema and value not in schema["enum"]:
        yield f"{at}: {value!r} is none of {schema['enum']}"
    if isinstance(value, dict):
        yield from _check_object(schema, value, path)
    elif isinstance(value, list):
        yield from _check_list(schema, value, path)
    elif isinstance(value, str):
        yield from _check_text(schema, value, at)
    elif not isinstance(value, bool):
        yield from _check_number(schema, value, at)


def _check_object(schema: Schema, value: Mapping[str, Any], path: str) -> Iterator[str]:
    members = schema.get("properties", {})
    others = schema.get("additionalProperties")
    for name in schema.get("required", ()):
        if name not in value:
            yield f"{path}.{name}: is required"
    for name, member in value.items():
        below = f"{path}.{name}"
        if not isinstance(name, str):
            yield f"{path or '.'}: the key {name!r} is no text"
        elif name in members:
            yield from _check(members[name], member, below)
        elif isinstance(others, dict):
            yield from _check(others, member, below)
        elif not schema.get("x-kubernetes-preserve-unknown-fields"):
            yield f"{below}: unknown field"


def _check_list(schema: Schema, value: list[Any], path: str) -> Iterator[str]:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
        yield f"{path}: {len(value)} items"
    for index, item in enumerate(value):
        yield from _check(schema["items"], item, f"{path}[{index}]")
    if keys := schema.get("x-kubernetes-list-map-keys"):
        members = schema["items"].get("properties", {})
        found = [
            tuple(item.get(key, members.get(key, {}).get("default")) for key in keys)
            for item in value
            if isinstance(item, dict)
        ]
        if len(set(found)) != len(found):
            yield f"{path}: two items with the same {keys}"
    if schema.get("x-kubernetes-list-type") == "set" and len(set(value)) != len(value):
        yield f"{path}: an item stands there twice"


def _check_text(schema: Schema, value: str, at: str) -> Iterator[str]:
    if "pattern" in schema and not re.search(schema["pattern"], value):
        yield f"{at}: {value!r} does not look like {schema['pattern']}"
    if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
        yield f"{at}: {value!r} has {len(value)} characters"


def _check_number(schema: Schema, value: float, at: str) -> Iterator[str]:
    limit = _RANGES.get(schema.get("format", "int64"))
    assert limit is not None, schema["format"]
    least = max(schema.get("minimum", -limit), -limit)
    most = min(schema.get("maximum", limit - 1), limit - 1)
    if not least <= value <= most:
        yield f"{at}: {value} is not in {least}..{most}"


def _object(*required: str, **members: Schema) -> Schema:
    return {"type": "object", "required": list(required), "properties": members}


def _list(items: Schema, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


_TEXT: Schema = {"type": "string"}
_BOOL: Schema = {"type": "boolean"}
_INT: Schema = {"type": "integer", "format": "int64"}
_MAP: Schema = {"type": "object", "additionalProperties": _TEXT}
_TEXTS: Schema = _list(_TEXT)
_QUANTITY: Schema = {
    "x-kubernetes-int-or-string": True,
    "pattern": r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?[0-9]+))?$",
}
_META = _object("name", "namespace", name=_TEXT, namespace=_TEXT, labels=_MAP, annotations=_MAP)


def _enum(*values: str) -> Schema:
    return {"type": "string", "enum": list(values)}


def _kind(*required: str, **members: Schema) -> Schema:
    return _object("apiVersion", "kind", "metadata", *required, apiVersion=_TEXT, kind=_TEXT, metadata=_META, **members)


_SELECTOR = _object(
    matchLabels=_MAP, matchExpressions=_list(_object("key", "operator", key=_TEXT, operator=_TEXT, values=_TEXTS))
)
_NAMED = _object("name", name=_TEXT)
_SECCOMP = _object("type", type=_enum("RuntimeDefault", "Unconfined", "Localhost"), localhostProfile=_TEXT)
_PORT = _object(
    protocol=_enum("TCP", "UDP", "SCTP"), port={"x-kubernetes-int-or-string": True}, endPort={**_INT, "format": "int32"}
)
_PEER = _object(
    podSelector=_SELECTOR,
    namespaceSelector=_SELECTOR,
    ipBlock=_object("cidr", **{"cidr": _TEXT, "except": _TEXTS}),
)
_ENDPOINT = _object(
    port=_TEXT, portNumber=_INT, path=_TEXT, interval=_TEXT, scrapeTimeout=_TEXT, scheme=_enum("http", "https")
)

_CORE: dict[tuple[str, str], Schema] = {
    ("v1", "ServiceAccount"): _kind(
        automountServiceAccountToken=_BOOL,
        secrets=_list(_NAMED, **{"x-kubernetes-list-map-keys": ["name"]}),
        imagePullSecrets=_list(_NAMED),
    ),
    ("v1", "ConfigMap"): _kind(data=_MAP, binaryData=_MAP, immutable=_BOOL),
    ("networking.k8s.io/v1", "NetworkPolicy"): _kind(
        "spec",
        spec=_object(
            "podSelector",
            podSelector=_SELECTOR,
            policyTypes=_list(_enum("Ingress", "Egress")),
            ingress=_list(_object(**{"from": _list(_PEER), "ports": _list(_PORT)})),
            egress=_list(_object(to=_list(_PEER), ports=_list(_PORT))),
        ),
    ),
    ("rbac.authorization.k8s.io/v1", "Role"): _kind(
        rules=_list(_object("verbs", apiGroups=_TEXTS, resources=_TEXTS, verbs=_TEXTS, resourceNames=_TEXTS))
    ),
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): _kind(
        "roleRef",
        subjects=_list(
            _object(
                "kind", "name", kind=_enum("User", "Group", "ServiceAccount"), name=_TEXT, apiGroup=_TEXT,
                namespace=_TEXT,
            )
        ),
        roleRef=_object("apiGroup", "kind", "name", apiGroup=_TEXT, kind=_enum("Role", "ClusterRole"), name=_TEXT),
    ),
    ("monitoring.coreos.com/v1", "PodMonitor"): _kind(
        "spec",
        spec=_object(
            "selector", "podMetricsEndpoints", selector=_SELECTOR, podMetricsEndpoints=_list(_ENDPOINT),
            podTargetLabels=_TEXTS, jobLabel=_TEXT, namespaceSelector=_object(any=_BOOL, matchNames=_TEXTS),
        ),
    ),
    ("kustomize.config.k8s.io/v1beta1", "Kustomization"): _object(
        "apiVersion", "kind", "resources", apiVersion=_TEXT, kind=_TEXT, namespace=_TEXT, resources=_TEXTS
    ),
}  # fmt: skip


def _close_knative_service(schema: Schema) -> None:
    """The README's table of open places, each by the Kubernetes type of that name; what is not written stays empty."""
    template = schema["properties"]["spec"]["properties"]["template"]["properties"]
    template["metadata"] = _object(labels=_MAP, annotations=_MAP, name=_TEXT)
    pod = template["spec"]["properties"]
    init = copy.deepcopy(pod["containers"]["items"])
    for probe in ("livenessProbe", "readinessProbe", "startupProbe"):
        del init["properties"][probe]
    pod["initContainers"] = _list(init, **{"x-kubernetes-list-map-keys": ["name"]})
    pod["containers"]["minItems"] = 1
    group = {**_INT, "minimum": 0, "maximum": (1 << 31) - 1}
    pod["securityContext"] = _object(
        runAsUser=group, runAsGroup=group, fsGroup=group, runAsNonRoot=_BOOL, supplementalGroups=_list(group),
        seccompProfile=_SECCOMP,
    )  # fmt: skip
    pod["tolerations"] = _list(
        _object(
            key=_TEXT,
            operator=_enum("Exists", "Equal"),
            value=_TEXT,
            effect=_enum("NoSchedule", "PreferNoSchedule", "NoExecute"),
            tolerationSeconds=_INT,
        )
    )
    for name in ("affinity", "dnsConfig"):
        pod[name] = _object()
    for name in ("hostAliases", "topologySpreadConstraints"):
        pod[name] = _list(_object())
    volume = pod["volumes"]["items"]["properties"]
    volume["emptyDir"] = _object(medium=_enum("", "Memory"), sizeLimit=_QUANTITY)
    volume["persistentVolumeClaim"] = _object("claimName", claimName=_TEXT, readOnly=_BOOL)
    volume["image"] = _object("reference", reference=_TEXT, pullPolicy=_enum("Always", "Never", "IfNotPresent"))
    for name in ("csi", "ephemeral", "hostPath"):
        volume[name] = _object()
    for container in (pod["containers"]["items"], init):
        source = container["properties"]["env"]["items"]["properties"]["valueFrom"]["properties"]
        source["fieldRef"] = source["resourceFieldRef"] = _object()


def _close_eventing(by_kind: Mapping[tuple[str, str], Schema]) -> None:
    """By the Go types of these fields (fact sheet, section f)."""
    broker, trigger, sequence = (
        by_kind[kind]["properties"]["spec"]
        for kind in (
            ("eventing.knative.dev/v1", "Broker"), ("eventing.knative.dev/v1", "Trigger"),
            ("flows.knative.dev/v1", "Sequence"),
        )
    )  # fmt: skip
    by_kind["eventing.knative.dev/v1", "Broker"]["required"] = ["apiVersion", "kind", "metadata"]
    trigger.pop("x-kubernetes-preserve-unknown-fields", None)
    trigger["properties"]["filter"]["properties"]["attributes"] = _MAP
    dialects = trigger["properties"]["filters"]["items"]["properties"]
    for name in ("exact", "prefix", "suffix"):
        dialects[name] = _MAP
    flat = _object(**{name: dialects[name] for name in ("exact", "prefix", "suffix", "cesql")})
    dialects |= {"not": flat, "all": _list(flat), "any": _list(flat)}
    sequence["properties"]["channelTemplate"]["properties"]["spec"] = _object()
    for owner in (broker, trigger, sequence["properties"]["steps"]["items"]):
        delivery = owner["properties"]["delivery"]
        delivery.pop("x-kubernetes-preserve-unknown-fields", None)
        delivery["properties"] |= {"timeout": _TEXT, "format": _enum("json", "binary")}


def open_places(schemas: Schemas) -> list[str]:
    """Paths below `spec` where an unknown member would still be let through; there should be none."""
    return [f"{kind}{path}" for (_, kind), schema in schemas._by_kind.items() for path in _open(schema, "") if path]


def _open(schema: Schema, path: str) -> Iterator[str]:
    if schema.get("x-kubernetes-preserve-unknown-fields") and not path.startswith(".status"):
        yield path
    for name, member in schema.get("properties", {}).items():
        yield from _open(member, f"{path}.{name}")
    if isinstance(schema.get("items"), dict):
        yield from _open(schema["items"], f"{path}[]")
