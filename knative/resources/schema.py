"""Which fields a manifest may have, and of which type.

SERVICE holds the field names of serving.knative.dev/v1 Service (config/core/300-resources/service.yaml of
knative/serving); the fields of Kubernetes that Knative's masks leave out (pkg/apis/serving/fieldmask.go) are known
too, as `refused`, so that they are told from slips of the finger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Literal

from knative.resources.field_errors import Problems

_INT64 = range(-(2**63), 2**63)

Kind = Literal["string", "integer", "boolean", "int-or-string", "quantity", "object", "array", "map", "open"]

_WORDS: Mapping[Kind, str] = {
    "string": "text", "integer": "a whole number", "boolean": "true or false", "int-or-string": "a number or text",
    "quantity": "a number or text", "object": "a mapping", "array": "a list", "map": "a mapping",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """The type of one field. `item` is that of the members of an array or map; "open" takes anything."""

    kind: Kind
    fields: Mapping[str, Shape] = field(default_factory=dict)
    item: Shape | None = None
    refused: frozenset[str] = frozenset()


STRING, INTEGER, BOOLEAN = Shape("string"), Shape("integer"), Shape("boolean")
INT_OR_STRING, QUANTITY, OPEN = Shape("int-or-string"), Shape("quantity"), Shape("open")


def record(fields: Mapping[str, Shape], refused: str = "") -> Shape:
    """A mapping with these fields; `refused` are the names, with blanks between, that Knative's masks leave out."""
    return Shape("object", fields, refused=frozenset(refused.split()))


def array(item: Shape) -> Shape:
    return Shape("array", item=item)


def mapping(item: Shape) -> Shape:
    return Shape("map", item=item)


OPEN_OBJECT, OPEN_ARRAY = mapping(OPEN), array(mapping(OPEN))  # checked by Kubernetes, never by Knative

METADATA = record(
    {
        "name": STRING, "generateName": STRING, "namespace": STRING,
        "labels": mapping(STRING), "annotations": mapping(STRING),
        "finalizers": array(STRING), "ownerReferences": OPEN_ARRAY, "managedFields": OPEN_ARRAY,
        "uid": STRING, "resourceVersion": STRING, "selfLink": STRING, "generation": INTEGER,
        "creationTimestamp": STRING, "deletionTimestamp": STRING, "deletionGracePeriodSeconds": INTEGER,
    }
)  # fmt: skip

_NAMED_OPTIONAL = {"name": STRING, "optional": BOOLEAN}
_KEY_REF = record({"key": STRING, **_NAMED_OPTIONAL})
_ITEMS = array(record({"key": STRING, "mode": INTEGER, "path": STRING}))

_ENV = record(
    {
        "name": STRING,
        "value": STRING,
        "valueFrom": record(
            {
                "configMapKeyRef": _KEY_REF,
                "secretKeyRef": _KEY_REF,
                "fieldRef": OPEN_OBJECT,
                "resourceFieldRef": OPEN_OBJECT,
            },
            refused="fileKeyRef",
        ),
    }
)
_ENV_FROM = record({"configMapRef": record(_NAMED_OPTIONAL), "prefix": STRING, "secretRef": record(_NAMED_OPTIONAL)})
_PROBE = record(
    {
        "exec": record({"command": array(STRING)}),
        "grpc": record({"port": INTEGER, "service": STRING}),
        "httpGet": record(
            {
                "host": STRING,
                "httpHeaders": array(record({"name": STRING, "value": STRING})),
                "path": STRING,
                "port": INT_OR_STRING,
                "scheme": STRING,
            }
        ),
        "tcpSocket": record({"host": STRING, "port": INT_OR_STRING}),
        "initialDelaySeconds": INTEGER,
        "periodSeconds": INTEGER,
        "timeoutSeconds": INTEGER,
        "successThreshold": INTEGER,
        "failureThreshold": INTEGER,
    },
    refused="terminationGracePeriodSeconds",
)
_SECURITY_CONTEXT = record(
    {
        "allowPrivilegeEscalation": BOOLEAN,
        "capabilities": record({"add": array(STRING), "drop": array(STRING)}),
        "privileged": BOOLEAN,
        "readOnlyRootFilesystem": BOOLEAN,
        "runAsGroup": INTEGER,
        "runAsNonRoot": BOOLEAN,
        "runAsUser": INTEGER,
        "seccompProfile": record({"localhostProfile": STRING, "type": STRING}),
    },
    refused="appArmorProfile procMount seLinuxOptions windowsOptions",
)
CONTAINER = record(
    {
        "name": STRING,
        "image": STRING,
        "imagePullPolicy": STRING,
        "command": array(STRING),
        "args": array(STRING),
        "workingDir": STRING,
        "env": array(_ENV),
        "envFrom": array(_ENV_FROM),
        "ports": array(
            record({"containerPort": INTEGER, "name": STRING, "protocol": STRING}, refused="hostIP hostPort")
        ),
        "resources": record({"limits": mapping(QUANTITY), "requests": mapping(QUANTITY)}, refused="claims"),
        "readinessProbe": _PROBE,
        "livenessProbe": _PROBE,
        "startupProbe": _PROBE,
        "securityContext": _SECURITY_CONTEXT,
        "terminationMessagePath": STRING,
        "terminationMessagePolicy": STRING,
        "volumeMounts": array(
            record(
                {
                    "mountPath": STRING,
                    "mountPropagation": STRING,
                    "name": STRING,
                    "readOnly": BOOLEAN,
                    "subPath": STRING,
                },
                refused="recursiveReadOnly subPathExpr",
            )
        ),
    },
    refused="lifecycle resizePolicy restartPolicy restartPolicyRules stdin stdinOnce tty volumeDevices",
)

_PROJECTION = record(
    {
        "configMap": record({"items": _ITEMS, **_NAMED_OPTIONAL}),
        "secret": record({"items": _ITEMS, **_NAMED_OPTIONAL}),
        "serviceAccountToken": record({"audience": STRING, "expirationSeconds": INTEGER, "path": STRING}),
        "downwardAPI": record(
            {
                "items": array(
                    record(
                        {
                            "fieldRef": record({"apiVersion": STRING, "fieldPath": STRING}),
                            "mode": INTEGER,
                            "path": STRING,
                            "resourceFieldRef": record(
                                {"containerName": STRING, "divisor": QUANTITY, "resource": STRING}
                            ),
                        }
                    )
                )
            }
        ),
    },
    refused="clusterTrustBundle podCertificate",
)
_VOLUME = record(
    {
        "name": STRING,
        "configMap": record({"defaultMode": INTEGER, "items": _ITEMS, **_NAMED_OPTIONAL}),
        "secret": record({"defaultMode": INTEGER, "items": _ITEMS, "optional": BOOLEAN, "secretName": STRING}),
        "projected": record({"defaultMode": INTEGER, "sources": array(_PROJECTION)}),
        "emptyDir": OPEN_OBJECT,
        "persistentVolumeClaim": OPEN_OBJECT,
        "hostPath": OPEN_OBJECT,
        "csi": OPEN_OBJECT,
        "ephemeral": OPEN_OBJECT,
        "image": OPEN_OBJECT,
    },
    refused=(
        "awsElasticBlockStore azureDisk azureFile cephfs cinder downwardAPI fc flexVolume flocker gcePersistentDisk "
        "gitRepo glusterfs iscsi nfs photonPersistentDisk portworxVolume quobyte rbd scaleIO storageos vsphereVolume"
    ),
)
POD_SPEC = record(
    {
        "affinity": OPEN_OBJECT,
        "automountServiceAccountToken": BOOLEAN,
        "containerConcurrency": INTEGER,
        "containers": array(CONTAINER),
        "dnsConfig": OPEN_OBJECT,
        "dnsPolicy": STRING,
        "enableServiceLinks": BOOLEAN,
        "hostAliases": OPEN_ARRAY,
        "hostIPC": BOOLEAN,
        "hostNetwork": BOOLEAN,
        "hostPID": BOOLEAN,
        "idleTimeoutSeconds": INTEGER,
        "imagePullSecrets": array(record({"name": STRING})),
        "initContainers": OPEN_ARRAY,
        "nodeSelector": mapping(STRING),
        "priorityClassName": STRING,
        "responseStartTimeoutSeconds": INTEGER,
        "runtimeClassName": STRING,
        "schedulerName": STRING,
        "securityContext": OPEN_OBJECT,
        "serviceAccountName": STRING,
        "shareProcessNamespace": BOOLEAN,
        "timeoutSeconds": INTEGER,
        "tolerations": OPEN_ARRAY,
        "topologySpreadConstraints": OPEN_ARRAY,
        "volumes": array(_VOLUME),
    },
    refused=(
        "activeDeadlineSeconds ephemeralContainers hostUsers hostname hostnameOverride nodeName os overhead "
        "preemptionPolicy priority readinessGates resourceClaims resources restartPolicy schedulingGates "
        "serviceAccount setHostnameAsFQDN subdomain terminationGracePeriodSeconds"
    ),
)
TRAFFIC = record(
    {
        "configurationName": STRING,
        "latestRevision": BOOLEAN,
        "percent": INTEGER,
        "revisionName": STRING,
        "tag": STRING,
        "url": STRING,
    }
)
SERVICE = record(
    {
        "apiVersion": STRING,
        "kind": STRING,
        "metadata": METADATA,
        "spec": record({"template": record({"metadata": METADATA, "spec": POD_SPEC}), "traffic": array(TRAFFIC)}),
        "status": OPEN,  # what `get -o yaml` of a cluster prints; nothing of it is used
    }
)
CONFIG_MAP = record(
    {
        "apiVersion": STRING,
        "kind": STRING,
        "metadata": METADATA,
        "data": mapping(STRING),
        "binaryData": mapping(STRING),
        "immutable": BOOLEAN,
    }
)

# parts that eventing reads and checks itself are open (knative/eventing/{delivery,destination,filters}.py)
BROKER = record(
    {
        "apiVersion": STRING,
        "kind": STRING,
        "metadata": METADATA,
        "spec": record({"config": OPEN_OBJECT, "delivery": OPEN}),
        "status": OPEN,
    }
)
TRIGGER = record(
    {
        "apiVersion": STRING,
        "kind": STRING,
        "metadata": METADATA,
        "spec": record(
            {"broker": STRING, "delivery": OPEN, "filter": OPEN, "filters": OPEN, "subscriber": OPEN},
            refused="brokerRef",
        ),
        "status": OPEN,
    }
)
SEQUENCE = record(
    {
        "apiVersion": STRING,
        "kind": STRING,
        "metadata": METADATA,
        "spec": record({"channelTemplate": OPEN, "reply": OPEN, "steps": OPEN}),
        "status": OPEN,
    }
)

# field of the pod spec -> flag of config-features that lets it pass (pkg/apis/serving/fieldmask.go PodSpecMask)
POD_FLAGS: Mapping[str, str] = {
    name: f"kubernetes.podspec-{name.lower()}"
    for name in (
        "affinity", "dnsConfig", "dnsPolicy", "hostAliases", "hostIPC", "hostNetwork", "hostPID", "nodeSelector",
        "priorityClassName", "runtimeClassName", "schedulerName", "securityContext", "shareProcessNamespace",
        "tolerations", "topologySpreadConstraints",
    )
} | {"initContainers": "kubernetes.podspec-init-containers"}  # fmt: skip


def sifted(value: object, shape: Shape, problems: Problems) -> object:
    """`value` with what has no place in `shape` taken out and complained of; a null is like nothing.

    What comes back has the types of `shape` throughout, so those who read it need not look again."""
    return _Sieve(problems).sift(value, shape, "")


class _Sieve:
    def __init__(self, problems: Problems) -> None:
        self._problems = problems

    def sift(self, value: object, shape: Shape, path: str) -> object:
        """None where the value does not fit."""
        if value is None:
            return None
        if shape.kind == "open":
            return self._open(value, path)
        if isinstance(value, dict) and shape.kind in ("object", "map"):
            members = self._fields(value, shape, path) if shape.kind == "object" else self._entries(value, shape, path)
            return {key: member for key, member in members if member is not None}
        if isinstance(value, list) and shape.kind == "array":
            return [self._member(item, shape, f"{path}[{i}]") for i, item in enumerate(value)]
        if _fits(value, shape.kind):
            return self._text_checked(value, path)
        self._problems.invalid(
            value if not isinstance(value, dict | list) else _named(value),
            path,
            f"expected {_WORDS[shape.kind]}, got {_named(value)}{_quoting(value, shape.kind)}",
        )
        return None

    def _fields(self, value: dict[str, object], shape: Shape, path: str) -> Iterator[tuple[str, object]]:
        for name, member in value.items():
            here = f"{path}.{name}" if path else name
            if name in shape.fields:
                yield name, self.sift(member, shape.fields[name], here)
            elif member is not None:
                self._stranger(name, shape, here)

    def _stranger(self, name: str, shape: Shape, path: str) -> None:
        if name in shape.refused:
            self._problems.disallowed(path, details=_ADVICE.get(name, ""))
            return
        near = _near(name, shape.fields)
        self._problems.unknown(path, f'did you mean "{near}"?' if near else "")

    def _entries(self, value: dict[str, object], shape: Shape, path: str) -> Iterator[tuple[str, object]]:
        for key, member in value.items():
            yield key, self._member(member, shape, f"{path}.{key}")

    def _member(self, value: object, shape: Shape, path: str) -> object:
        """An item that does not fit stays as an empty one, so that the others keep their places."""
        item = shape.item or OPEN
        kept = self.sift(value, item, path)
        if kept is None and item.kind in ("object", "map"):
            return {}
        if kept is None and shape.kind == "array":
            if value is None:
                self._problems.invalid("null", path, f"expected {_WORDS.get(item.kind, 'a value')}")
            return 0 if item.kind == "integer" else ""
        return kept

    def _open(self, value: object, path: str) -> object:
        """Anything that JSON can hold."""
        if isinstance(value, dict):
            return {key: self._open(member, f"{path}.{key}") for key, member in value.items()}
        if isinstance(value, list):
            return [self._open(member, f"{path}[{i}]") for i, member in enumerate(value)]
        return self._text_checked(value, path)

    def _text_checked(self, value: object, path: str) -> object:
        """A NUL ends a text for the operating system."""
        if isinstance(value, str) and "\0" in value:
            self._problems.invalid(value, path, "text may not contain NUL")
            return None
        if isinstance(value, str) and not _encodes(value):
            self._problems.invalid(ascii(value), path, "not valid Unicode")
            return None
        return value


_ADVICE = {
    "terminationGracePeriodSeconds": "Knative takes timeoutSeconds as the grace period",
    "hostPort": "every replica gets a port of its own",
    "brokerRef": "on a cluster this needs cross-namespace-event-links in config-features",
}


def _fits(value: object, kind: Kind) -> bool:
    number = isinstance(value, int) and not isinstance(value, bool) and value in _INT64
    match kind:
        case "string":
            return isinstance(value, str)
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return number
        case "int-or-string":
            return number or isinstance(value, str)
        case "quantity":
            return number or isinstance(value, str | float)
        case _:
            return False


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _named(value: object) -> str:
    match value:
        case bool():
            return "true or false"
        case str():
            return "text"
        case int():
            return "a number"
        case float():
            return "a number with a fraction"
        case list():
            return "a list"
        case dict():
            return "a mapping"
        case _:
            return type(value).__name__


def _quoting(value: object, expected: Kind) -> str:
    return " (quote it)" if expected == "string" and isinstance(value, bool | int | float) else ""


def _near(name: str, known: Mapping[str, Shape]) -> str:
    """The field that a slip of the finger was meant for; "" if none looks like it."""
    folded = {candidate.lower(): candidate for candidate in known}
    found = get_close_matches(name.replace("_", "").replace("-", "").lower(), folded, n=1, cutoff=0.8)
    return folded[found[0]] if found else ""
