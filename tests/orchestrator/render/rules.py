"""What clusters refuse beside their schemas, and what the parts of a deployment must have in common.

Not a test file: conftest.py loads it. The rules are those of the fact sheets of Knative (sections a, b, d, e) and of
KServe (a to d), written down without a look at the code that renders. Every rule yields complaints; none means all is
well.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

Tree = Mapping[str, Any]

KSERVE_CONTAINER = "kserve-container"
VISIBILITY = "networking.knative.dev/visibility"
_AUTOSCALING = "autoscaling.knative.dev/"
_DEADLINE = "serving.knative.dev/progress-deadline"
_OURS = "stagecraft.dev/"

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
_SUBDOMAIN = re.compile(rf"{_LABEL.pattern}(\.{_LABEL.pattern})*")
_DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_QUALIFIED = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]")
_ENV_NAME = re.compile(r"[-._A-Za-z][-._A-Za-z0-9]*")
# distribution/reference: domain[:port]/path components[:tag][@digest]
_IMAGE_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_IMAGE = re.compile(
    rf"(?:[A-Za-z0-9]+(?:[.-][A-Za-z0-9]+)*(?::[0-9]+)?/)?{_IMAGE_PART}(?:/{_IMAGE_PART})*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@sha256:[0-9a-f]{64})?"
)
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]+)?")
_UNITS = {"": 0, "n": -9, "u": -6, "m": -3, "k": 3, "M": 6, "G": 9, "T": 12, "P": 15, "E": 18}

_RESERVED_PORTS = (8012, 8013, 8022, 9090, 9091, 8008)
_RESERVED_ENV = ("PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION")
_RESERVED_PATHS = ("/", "/dev", "/dev/log")
_INT32_MAX = (1 << 31) - 1
_ALWAYS_ALLOWED = (
    "containers", "volumes", "containerConcurrency", "timeoutSeconds", "responseStartTimeoutSeconds",
    "serviceAccountName", "imagePullSecrets",
)  # fmt: skip
_FLAGGED = {
    "initContainers": "kubernetes.podspec-init-containers",
    "nodeSelector": "kubernetes.podspec-nodeselector",
    "tolerations": "kubernetes.podspec-tolerations",
    "affinity": "kubernetes.podspec-affinity",
    "topologySpreadConstraints": "kubernetes.podspec-topologyspreadconstraints",
    "runtimeClassName": "kubernetes.podspec-runtimeclassname",
    "schedulerName": "kubernetes.podspec-schedulername",
    "priorityClassName": "kubernetes.podspec-priorityclassname",
    "securityContext": "kubernetes.podspec-securitycontext",
    "hostIPC": "kubernetes.podspec-hostipc",
    "shareProcessNamespace": "kubernetes.podspec-shareprocessnamespace",
}
_FLAGGED_VOLUMES = {
    "image": "kubernetes.podspec-volumes-image",
    "persistentVolumeClaim": "kubernetes.podspec-persistent-volume-claim",
    "hostPath": "kubernetes.podspec-volumes-hostpath",
    "csi": "kubernetes.podspec-volumes-csi",
    "ephemeral": "kubernetes.podspec-volumes-ephemeral",
}
_STORAGE = ("s3", "gs", "pvc", "file", "http", "https", "hdfs", "webhdfs", "hf", "oci", "oci+native", "oci+fetch")
_MODELS = "/mnt/models"


class Cluster:
    """The defaults of a cluster's config maps, and the settings that a deployment asks its administrator for."""

    def __init__(self, config: Path, settings: Iterable[tuple[str, str, str]] = ()) -> None:
        self._defaults = _defaults(config)
        self.settings = list(settings)

    def with_settings(self, settings: Iterable[tuple[str, str, str]]) -> Cluster:
        other = object.__new__(Cluster)
        other._defaults, other.settings = self._defaults, list(settings)
        return other

    def value(self, config_map: str, key: str) -> str:
        told = {(name, member): value for name, member, value in self.settings}
        return told.get((config_map, key), self._defaults[config_map, key])

    def needless(self, needed: set[tuple[str, str]]) -> Iterator[str]:
        """Complaints about settings that nothing needs, that no cluster knows, or that stand there twice."""
        keys = [(name, key) for name, key, _ in self.settings]
        if len(set(keys)) != len(keys):
            yield f"a setting is told twice: {keys}"
        for name, key, value in self.settings:
            if (name, key) not in self._defaults:
                yield f"{name} has no key {key}"
            elif (name, key) not in needed:
                yield f"{name} {key}={value} is told, but nothing needs it"


def _defaults(config: Path) -> dict[tuple[str, str], str]:
    maps = yaml.load(config.read_bytes(), Loader=yaml.CSafeLoader)["configmaps"]
    serving = [one for one in maps if one["component"] == "serving"]
    return {(one["name"], entry["key"]): entry["default"] for one in serving for entry in one["entries"]}


@dataclass
class Rendered:
    """All objects of a deployment, and the cluster that is to take them."""

    objects: Sequence[Tree]
    cluster: Cluster
    needed: set[tuple[str, str]] = field(default_factory=set)

    def of_kind(self, kind: str) -> list[Tree]:
        return [one for one in self.objects if one["kind"] == kind]

    def names(self, kind: str) -> set[str]:
        return {one["metadata"]["name"] for one in self.of_kind(kind)}

    def needs(self, config_map: str, key: str, taken: bool, what: str) -> Iterator[str]:
        """`what` is only taken by a cluster with that setting; `taken`: it has it."""
        self.needed.add((config_map, key))
        if not taken:
            yield f"{what} needs {key} in {config_map}, which is not told"

    def needs_feature(self, flag: str, what: str) -> Iterator[str]:
        enabled = self.cluster.value("config-features", flag).lower() == "enabled"
        if enabled and ("config-features", flag, "enabled") not in self.cluster.settings:
            return  # by default
        yield from self.needs("config-features", flag, enabled, what)


_BATCH_TYPES = "dev.stagecraft.batch."
_BATCH_ROUTES = {
    ("request", "orchestrator", "/events"),
    ("cancel", "orchestrator", "/events"),
    ("result", "keeper", "/"),
    ("cancel", "keeper", "/"),
}


def violations(objects: Sequence[Tree], cluster: Cluster) -> list[str]:
    """All that is wrong with a deployment on this cluster."""
    rendered = Rendered(objects, cluster)
    services = [(one, False) for one in rendered.of_kind("Service")]
    found = [*_metadata(rendered)]
    for one in rendered.of_kind("InferenceService"):
        found += _named(one, _inference_service(one, rendered))
        services.append((as_knative(one, rendered), True))
    for runtime in rendered.of_kind("ServingRuntime"):
        found += _named(runtime, _serving_runtime(runtime))
    for service, from_kserve in services:
        found += _named(service, _service(service, rendered, from_kserve))
    for one in (*rendered.of_kind("Trigger"), *rendered.of_kind("Sequence")):
        found += _named(one, _eventing(one, rendered, [service["metadata"]["name"] for service, _ in services]))
    found += _together(rendered, [service for service, _ in services])
    found += cluster.needless(rendered.needed)
    return found


def _named(tree: Tree, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        yield f"{tree['kind']} {tree['metadata']['name']}: {text}"


# --- every object ---------------------------------------------------------------------------------------------------


def _metadata(rendered: Rendered) -> Iterator[str]:
    seen = set()
    namespaces = {one["metadata"].get("namespace") for one in rendered.objects}
    if len(namespaces) != 1:
        yield f"objects in several namespaces: {namespaces}"
    for one in rendered.objects:
        metadata = one["metadata"]
        key = (one["apiVersion"], one["kind"], metadata["name"])
        if key in seen:
            yield f"two objects {key}"
        seen.add(key)
        if not is_label(metadata["namespace"]):
            yield f"{key}: bad namespace {metadata['namespace']!r}"
        if not is_subdomain(metadata["name"]):
            yield f"{key}: bad name {metadata['name']!r}"
        for selector in _label_maps(one):
            yield from (f"{key}: {text}" for text in label_problems(selector))
        annotations = metadata.get("annotations", {})
        yield from (f"{key}: bad annotation {name!r}" for name in annotations if not is_qualified(name))


def _label_maps(tree: Any) -> Iterator[Mapping[str, str]]:
    """Labels and what selects by labels, wherever it stands."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            if key in ("labels", "matchLabels", "nodeSelector"):
                yield value
            else:
                yield from _label_maps(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _label_maps(value)


def label_problems(labels: Mapping[str, str]) -> Iterator[str]:
    for name, value in labels.items():
        if not is_qualified(name):
            yield f"bad label {name!r}"
        if not (value == "" or (len(value) <= 63 and _QUALIFIED.fullmatch(value))):
            yield f"bad value of label {name}: {value!r}"


def is_label(text: str) -> bool:
    return len(text) <= 63 and _LABEL.fullmatch(text) is not None


def is_subdomain(text: str) -> bool:
    return len(text) <= 253 and _SUBDOMAIN.fullmatch(text) is not None


def is_qualified(text: str) -> bool:
    prefix, slash, name = text.rpartition("/")
    return len(name) <= 63 and _QUALIFIED.fullmatch(name) is not None and (not slash or is_subdomain(prefix))


# --- Triggers and Sequences (facts, section f) ----------------------------------------------------------------------

_ATTRIBUTE = re.compile(r"[a-z][a-z0-9]*")
_ISO_DURATION = re.compile(r"P(?=.)(\d+D)?(T(?=.)(\d+H)?(\d+M)?(\d+(\.\d+)?S)?)?")


def _eventing(tree: Tree, rendered: Rendered, services: Sequence[str]) -> Iterator[str]:
    spec = tree["spec"]
    if tree["kind"] == "Trigger":
        if not spec.get("broker"):
            yield "names no broker"
        for name in spec.get("filter", {}).get("attributes", {}):
            if not _ATTRIBUTE.fullmatch(name):
                yield f"filters by {name!r}, which is no attribute"
        destinations, deliveries = [spec["subscriber"]], [spec.get("delivery", {})]
    else:
        destinations = [*spec["steps"], *([spec["reply"]] if "reply" in spec else [])]
        deliveries = [step.get("delivery", {}) for step in spec["steps"]]
        if not spec["steps"]:
            yield "a Sequence without steps"
    for delivery in deliveries:
        yield from _delivered(delivery)
        destinations += [delivery["deadLetterSink"]] if "deadLetterSink" in delivery else []
    for destination in destinations:
        yield from _destination(destination, rendered, services)


def _delivered(delivery: Tree) -> Iterator[str]:
    if delivery.get("retry", 0) < 0:
        yield f"retry {delivery['retry']}"
    if delivery.get("backoffPolicy", "linear") not in ("linear", "exponential"):
        yield f"backoffPolicy {delivery['backoffPolicy']!r}"
    for name in ("backoffDelay", "timeout"):
        if name in delivery and not _ISO_DURATION.fullmatch(delivery[name]):
            yield f"{name} {delivery[name]!r} is no ISO 8601 duration"


def _destination(destination: Tree, rendered: Rendered, services: Sequence[str]) -> Iterator[str]:
    ref, uri = destination.get("ref"), destination.get("uri", "")
    if ref is None:
        if not re.match(r"https?://[^/]+", uri):
            yield f"the address {uri!r} is not absolute, and there is no ref"
        return
    if "://" in uri:
        yield f"an absolute address {uri!r} beside a ref"
    known = {"Service": services, "Sequence": rendered.names("Sequence"), "Broker": None}.get(ref["kind"], ())
    if known is not None and ref["name"] not in known:
        yield f"there is no {ref['kind']} {ref['name']!r} in the files"


# --- Knative Services -----------------------------------------------------------------------------------------------


def _service(service: Tree, rendered: Rendered, from_kserve: bool) -> Iterator[str]:
    metadata, template = service["metadata"], service["spec"]["template"]
    if len(metadata["name"]) > 63 or not _DNS_1035.fullmatch(metadata["name"]):
        yield f"the name is no DNS-1035 label of at most 63: {metadata['name']!r}"
    stage = "STAGE_INDEX" in environment(service)
    yield from _visibility(metadata, template["metadata"], stage)
    allowed = ("serving.knative.dev/rollout-duration",)
    for name in metadata.get("annotations", {}):
        if not name.startswith(_OURS) and name not in allowed:
            yield f"the annotation {name} has no effect on the service: it belongs to the template"
    yield from _annotations(template["metadata"]["annotations"], template["spec"], rendered, stage, from_kserve)
    yield from _pod(template["spec"], rendered, from_kserve)


def _visibility(metadata: Tree, template: Tree, stage: bool) -> Iterator[str]:
    private = metadata["labels"].get(VISIBILITY)
    if private != ("cluster-local" if stage else None):
        yield f"visibility {private!r} of a {'stage' if stage else 'service that clients reach'}"
    for name in template["labels"]:
        if name == VISIBILITY or name.startswith("serving.knative.dev/"):
            yield f"the label {name} has no place on a template"


_REQUIRED_OF_STAGES = (
    "class", "metric", "target", "window", "min-scale", "max-scale", "initial-scale", "scale-down-delay",
    "target-burst-capacity",
)  # fmt: skip


def _annotations(
    annotations: Mapping[str, str], spec: Tree, rendered: Rendered, stage: bool, from_kserve: bool
) -> Iterator[str]:
    scaling = {
        name.removeprefix(_AUTOSCALING): value for name, value in annotations.items() if name.startswith(_AUTOSCALING)
    }
    for name in annotations:
        known = name.startswith((_AUTOSCALING, _OURS)) or name == _DEADLINE
        if not known and not (from_kserve and name.startswith("serving.kserve.io/")):
            yield f"unknown annotation {name}"
    for name in (*(_REQUIRED_OF_STAGES if stage else ()),):
        if name not in scaling:
            yield f"no annotation {_AUTOSCALING}{name}"
    if stage and _DEADLINE not in annotations:
        yield f"no annotation {_DEADLINE}"
    if _DEADLINE in annotations and not 1 <= _whole_s(annotations[_DEADLINE]) <= _INT32_MAX:
        yield f"{_DEADLINE} {annotations[_DEADLINE]!r} is not a number of whole seconds"
    for name, value in scaling.items():
        if name not in _BOUNDS:
            yield f"unknown annotation {_AUTOSCALING}{name}"
        elif not _BOUNDS[name](value):
            yield f"{_AUTOSCALING}{name} is out of bounds: {value!r}"
    yield from _scales(scaling, spec, rendered)


def _scales(scaling: Mapping[str, str], spec: Tree, rendered: Rendered) -> Iterator[str]:
    least, most = int(scaling.get("min-scale", "0")), int(scaling.get("max-scale", "0"))
    if most and most < least:
        yield f"max-scale {most} is below min-scale {least}"
    initial = int(scaling.get("initial-scale", "1"))
    if initial == 0:
        allowed = rendered.cluster.value("config-autoscaler", "allow-zero-initial-scale") == "true"
        yield from rendered.needs("config-autoscaler", "allow-zero-initial-scale", allowed, "initial-scale 0")
    limit = spec.get("containerConcurrency", 0)
    if limit and float(scaling.get("target", "0")) > limit:
        yield f"target {scaling['target']} is above containerConcurrency {limit}"


def _count(value: str) -> bool:
    return re.fullmatch(r"[0-9]+", value) is not None and int(value) <= _INT32_MAX


def _number_from(least: float) -> Any:
    return lambda value: re.fullmatch(r"[0-9.]+(e[+-]?[0-9]+)?", value) and least <= float(value) < math.inf


def _seconds(least: float, most: float) -> Any:
    return lambda value: least <= _whole_s(value) <= most


_BOUNDS: dict[str, Any] = {
    "class": lambda value: value == "kpa.autoscaling.knative.dev",
    "metric": lambda value: value == "concurrency",
    "min-scale": _count,
    "max-scale": _count,
    "initial-scale": _count,
    "target": _number_from(0.01),
    "window": _seconds(6, 3600),
    "scale-down-delay": _seconds(0, 3600),
    # -1 is allowed by Knative, but leaves pods that are addressed directly without a scrape (facts, section d)
    "target-burst-capacity": _number_from(0),
}


def _whole_s(duration: str) -> float:
    """Seconds of a Go duration; not a number unless they are whole."""
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)(h|ms|m|s)", duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        return math.nan
    seconds = sum(
        Decimal(number) * Decimal({"h": "3600", "m": "60", "s": "1", "ms": "0.001"}[unit]) for number, unit in parts
    )
    return float(seconds) if seconds == int(seconds) else math.nan


def _pod(spec: Tree, rendered: Rendered, from_kserve: bool) -> Iterator[str]:
    for name in spec:
        if name in _FLAGGED:
            yield from rendered.needs_feature(_FLAGGED[name], name)
        elif name not in _ALWAYS_ALLOWED:
            yield f"{name} is not taken in a revision's pod"
    if not 0 <= spec.get("containerConcurrency", 0) <= 1000:
        yield f"containerConcurrency {spec['containerConcurrency']} is not in 0..1000"
    yield from _timeouts(spec, rendered)
    account = spec.get("serviceAccountName")
    if account not in rendered.names("ServiceAccount"):
        yield f"there is no ServiceAccount {account!r} in the files"
    if len(spec["containers"]) != 1:
        yield f"{len(spec['containers'])} containers"
    yield from _placement(spec)
    yield from _volumes(spec, rendered)
    for container in spec["containers"]:
        yield from _container(container)
    for container in spec.get("initContainers", ()):
        yield from _init_container(container)


def _timeouts(spec: Tree, rendered: Rendered) -> Iterator[str]:
    timeout = spec.get("timeoutSeconds")
    if not isinstance(timeout, int) or timeout < 1:
        yield f"timeoutSeconds is {timeout!r}"
        return
    if spec.get("responseStartTimeoutSeconds") != timeout:
        yield f"responseStartTimeoutSeconds {spec.get('responseStartTimeoutSeconds')} differs from timeoutSeconds"
    most = int(rendered.cluster.value("config-defaults", "max-revision-timeout-seconds"))
    if timeout > 600:
        what = f"timeoutSeconds {timeout}"
        yield from rendered.needs("config-defaults", "max-revision-timeout-seconds", timeout <= most, what)


def _placement(spec: Tree) -> Iterator[str]:
    for name in ("runtimeClassName", "priorityClassName", "schedulerName"):
        if name in spec and not is_subdomain(spec[name]):
            yield f"{name} {spec[name]!r} is no name"
    for one in spec.get("imagePullSecrets", ()):
        if not is_subdomain(one["name"]):
            yield f"imagePullSecret {one['name']!r} is no name"
    for one in spec.get("tolerations", ()):
        if one.get("operator") == "Exists" and one.get("value"):
            yield f"a toleration that Exists has the value {one['value']!r}"
        if "key" in one:
            yield from label_problems({one["key"]: one.get("value", "")})
        elif one.get("operator") != "Exists":
            yield "a toleration without a key"


def _volumes(spec: Tree, rendered: Rendered) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in spec.get("volumes", ())}
    containers = [*spec["containers"], *spec.get("initContainers", ())]
    mounts = [mount for container in containers for mount in container.get("volumeMounts", ())]
    if len(volumes) != len(spec.get("volumes", ())):
        yield "two volumes with one name"
    for name in {mount["name"] for mount in mounts} ^ set(volumes):
        yield f"volume {name!r} is mounted but not there, or there but not mounted"
    for name, volume in volumes.items():
        yield from (f"volume {name}: {text}" for text in _volume(volume, rendered))
    for container in containers:
        paths = [mount["mountPath"] for mount in container.get("volumeMounts", ())]
        if len(set(paths)) != len(paths):
            yield f"a path is mounted twice: {paths}"
    for mount in mounts:
        yield from _mount(mount, volumes.get(mount["name"], {}))


def _volume(volume: Tree, rendered: Rendered) -> Iterator[str]:
    (source,) = set(volume) - {"name"}
    if not is_label(volume["name"]):
        yield "bad name"
    if source in _FLAGGED_VOLUMES:
        yield from rendered.needs_feature(_FLAGGED_VOLUMES[source], f"a volume of {source}")
    if source == "persistentVolumeClaim":
        if not is_subdomain(volume[source]["claimName"]):
            yield f"bad claim {volume[source]['claimName']!r}"
        if not volume[source].get("readOnly"):
            yield from rendered.needs_feature("kubernetes.podspec-persistent-volume-write", "a writable claim")
    if source == "image" and not _IMAGE.fullmatch(volume[source]["reference"]):
        yield f"bad image {volume[source]['reference']!r}"
    if source == "emptyDir" and "sizeLimit" in volume[source] and quantity(volume[source]["sizeLimit"]) is None:
        yield f"bad sizeLimit {volume[source]['sizeLimit']!r}"


def _mount(mount: Tree, volume: Tree) -> Iterator[str]:
    path, inside = mount["mountPath"], mount.get("subPath", "")
    if not path.startswith("/") or path.rstrip("/") in ("", *_RESERVED_PATHS) or ":" in path:
        yield f"{path!r} cannot be mounted at"
    if inside.startswith("/") or ".." in inside.split("/"):
        yield f"subPath {inside!r} leads out of the volume"
    claim = volume.get("persistentVolumeClaim", {"readOnly": True})
    writable = "emptyDir" in volume or not claim.get("readOnly")
    if not writable and not mount.get("readOnly"):
        yield f"{path} of volume {mount['name']} must be readOnly"


# --- containers -----------------------------------------------------------------------------------------------------


def _container(container: Tree) -> Iterator[str]:
    if container.get("name", "") == "queue-proxy" or not is_label(container.get("name", "x")):
        yield f"a container may not be called {container['name']!r}"
    yield from _any_container(container)
    ports = container.get("ports", [])
    if len(ports) != 1:
        yield f"{len(ports)} ports"
    for port in ports:
        if port.get("name", "") not in ("", "http1", "h2c"):
            yield f"a port called {port['name']!r}"
        if port["containerPort"] in _RESERVED_PORTS:
            yield f"port {port['containerPort']} is reserved"
        if port.get("protocol", "TCP") != "TCP":
            yield "a port that is not TCP"
        for name in ("readinessProbe", "livenessProbe"):
            yield from (f"{name}: {text}" for text in _probe(container.get(name, {}), port["containerPort"]))
    yield from _resources(container.get("resources", {}))


def _init_container(container: Tree) -> Iterator[str]:
    if not is_label(container["name"]):
        yield f"an init container may not be called {container['name']!r}"
    yield from (f"init container {container['name']}: {text}" for text in _any_container(container))


def _any_container(container: Tree) -> Iterator[str]:
    if not _IMAGE.fullmatch(container.get("image", "")):
        yield f"bad image {container.get('image')!r}"
    names = [one["name"] for one in container.get("env", ())]
    if len(set(names)) != len(names):
        yield f"a variable is given twice: {names}"
    for name in names:
        if not _ENV_NAME.fullmatch(name) or name in (".", "..") or name.startswith(".."):
            yield f"{name!r} is no name of a variable"
        if name in _RESERVED_ENV:
            yield f"the variable {name} is reserved"
    for one in container.get("envFrom", ()):
        if not is_subdomain(one["secretRef"]["name"]):
            yield f"bad secret {one['secretRef']['name']!r}"
    yield from _security(container.get("securityContext", {}))


_HARDENED: dict[str, Any] = {
    "runAsNonRoot": True,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}


def _security(context: Tree) -> Iterator[str]:
    for name, wanted in _HARDENED.items():
        if context.get(name) != wanted:
            yield f"securityContext.{name} is {context.get(name)!r}, not {wanted!r}"
    for name in set(context) - set(_HARDENED) - {"runAsUser", "runAsGroup"}:
        yield f"securityContext.{name}"
    if context.get("runAsUser", 1) == 0:
        yield "runs as root"


def _probe(probe: Tree, port: int) -> Iterator[str]:
    if not probe:
        yield "is missing"
        return
    if set(probe) & {"tcpSocket", "exec", "grpc"} or not probe["httpGet"].get("path", "").startswith("/"):
        yield "asks no path that tells the truth"
    if probe.get("httpGet", {}).get("port", port) != port:
        yield f"asks port {probe['httpGet']['port']}, which needs multi-container-probing"
    if not probe.get("periodSeconds"):
        # Knative's own 50 ms rhythm goes with nothing else
        extra = {name for name in ("timeoutSeconds", "failureThreshold") if probe.get(name)}
        if extra or probe.get("successThreshold", 1) != 1:
            yield f"without periodSeconds there may be no {extra or 'successThreshold'}"


def _resources(resources: Tree) -> Iterator[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for side, given in (("requests", requests), ("limits", limits)):
        for name in ("cpu", "memory"):
            if name not in given:
                yield f"no {side} of {name}"
        for name, text in given.items():
            yield from (f"{side} of {name}: {problem}" for problem in _amount(name, text))
    for name in set(requests) | set(limits):
        least, most = quantity(requests.get(name, "0")), quantity(limits.get(name, ""))
        if name not in ("cpu", "memory") and least != most:
            yield f"requests and limits of {name} differ: {requests.get(name)}, {limits.get(name)}"
        if least is not None and most is not None and least > most:
            yield f"more {name} is requested than the limit"


def _amount(name: str, text: str) -> Iterator[str]:
    amount = quantity(text)
    if amount is None or amount <= 0 or amount > 1 << 63:
        yield f"{text!r} is no amount"
    elif name == "cpu" and amount * 1000 != int(amount * 1000):
        yield f"{text} is finer than 1m"
    elif name != "cpu" and amount != int(amount):
        yield f"{text} is not whole"
    if name in ("cpu", "memory"):
        return
    prefix, slash, rest = name.partition("/")
    if not slash or "kubernetes.io/" in name or name.startswith("requests."):
        yield "is no extended resource"
    elif not is_qualified(f"requests.{prefix}/{rest}"):
        yield "is no name of a resource"


def quantity(text: str | int) -> Decimal | None:
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        return None
    number, unit = Decimal(match[1]), match[2] or ""
    if unit.endswith("i"):
        return number * 1024 ** ("KMGTPE".index(unit[0]) + 1)
    return number.scaleb(_UNITS[unit] if unit in _UNITS else int(unit[1:]))


def environment(service: Tree) -> dict[str, str]:
    container = service["spec"]["template"]["spec"]["containers"][0]
    return {one["name"]: one.get("value", "") for one in container.get("env", ())}


# --- KServe ---------------------------------------------------------------------------------------------------------


def _serving_runtime(runtime: Tree) -> Iterator[str]:
    names = [container["name"] for container in runtime["spec"]["containers"]]
    if names != [KSERVE_CONTAINER]:
        yield f"containers {names}: the first must be {KSERVE_CONTAINER}"
    if any(one.get("autoSelect") for one in runtime["spec"]["supportedModelFormats"]):
        yield "would be chosen for models of others"


def _inference_service(one: Tree, rendered: Rendered) -> Iterator[str]:
    metadata, predictor = one["metadata"], one["spec"]["predictor"]
    name, annotations = metadata["name"], metadata.get("annotations", {})
    if len(name) > 53 or not _DNS_1035.fullmatch(name):
        yield "with -predictor behind it, the name must fit 63 characters"
    for text in (name, metadata["namespace"]):
        if "-predictor" in text or "-default" in text:
            yield f"KServe cuts {text!r} up"
    if annotations.get("serving.kserve.io/deploymentMode") != "Knative":
        yield "is not in Knative mode on every cluster"
    dropped = {"serving.kserve.io/autoscalerClass", f"{_AUTOSCALING}min-scale", f"{_AUTOSCALING}max-scale"}
    yield from (f"the annotation {key} is refused or dropped" for key in dropped & set(annotations))
    if set(one["spec"]) != {"predictor"}:
        yield f"spec has {set(one['spec'])}"
    yield from _predictor(predictor, rendered)


def _predictor(predictor: Tree, rendered: Rendered) -> Iterator[str]:
    if "minReplicas" not in predictor:
        yield "minReplicas is missing: KServe's default is 1"
    if 0 < predictor.get("maxReplicas", 0) < predictor.get("minReplicas", 1):
        yield "maxReplicas is below minReplicas"
    if predictor.get("scaleMetric") != "concurrency" or "scaleTarget" in predictor:
        yield "the metric is not concurrency, or a target stands in a field that takes no fractions"
    if "timeout" not in predictor:
        yield "timeout is missing: requests would be cut after 300 s"
    if ("model" in predictor) == ("containers" in predictor):
        yield "exactly one of model and containers is wanted"
        return
    refused = {"deploymentStrategy", "terminationGracePeriodSeconds", "canaryTrafficPercent", "logger", "batcher"}
    yield from (f"{name} has no place here" for name in refused & set(predictor))
    if "model" in predictor:
        yield from _model(predictor["model"], rendered)
    elif predictor["containers"][0].get("name") != KSERVE_CONTAINER:
        yield f"the first container must be {KSERVE_CONTAINER}"
    yield from _kserve_env(predictor)
    yield from _storage(predictor, rendered)


def _model(model: Tree, rendered: Rendered) -> Iterator[str]:
    wanted = model["modelFormat"]["name"]
    if "storageUri" not in model and wanted != "huggingface":
        yield "without storageUri KServe takes it for a multi-model server"
    runtimes = [one for one in rendered.of_kind("ServingRuntime") if one["metadata"]["name"] == model.get("runtime")]
    if not runtimes:
        yield f"there is no ServingRuntime {model.get('runtime')!r} in the files"
    for runtime in runtimes:
        if wanted not in [one["name"] for one in runtime["spec"]["supportedModelFormats"]]:
            yield f"its runtime does not list {wanted}"


def _kserve_env(predictor: Tree) -> Iterator[str]:
    for container in (
        *predictor.get("containers", ()),
        predictor.get("model", {}),
        *predictor.get("initContainers", ()),
    ):
        values = {one["name"]: one.get("value", "") for one in container.get("env", ())}
        for name in {"PYTHONPATH", "INFERENCE_SERVICE_NAME"} & set(values):
            yield f"the variable {name} is refused or overwritten by KServe"
        if values.get("PROTOCOL", "v1") not in ("v1", "v2"):
            yield f"PROTOCOL {values['PROTOCOL']!r}"
        if values.get("MULTI_MODEL_SERVER", "").lower() == "true":
            yield "MULTI_MODEL_SERVER makes it a multi-model server"


def _storage(predictor: Tree, rendered: Rendered) -> Iterator[str]:
    uri = _storage_uri(predictor)
    if uri is None:
        return
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme not in _STORAGE or not rest.strip("/"):
        yield f"KServe does not know the storage {uri!r}"
    if scheme == "hf" and not re.fullmatch(r"[^/:]+/[^/:]+(:[^/]+)?", rest):
        yield f"{uri!r} is not hf://OWNER/NAME[:REVISION]"
    container = predictor.get("model") or predictor["containers"][0]
    if scheme in ("pvc", "oci"):
        return
    accounts = [
        one for one in rendered.of_kind("ServiceAccount") if one["metadata"]["name"] == predictor["serviceAccountName"]
    ]
    known = {secret["name"] for one in accounts for secret in one.get("secrets", ())}
    for one in container.get("envFrom", ()):
        if one["secretRef"]["name"] not in known:
            yield f"the download gets no credentials: its ServiceAccount does not list {one['secretRef']['name']}"


def _storage_uri(predictor: Tree) -> str | None:
    if "model" in predictor:
        return predictor["model"].get("storageUri")
    values = {one["name"]: one.get("value", "") for one in predictor["containers"][0].get("env", ())}
    return values.get("STORAGE_URI")


def as_knative(one: Tree, rendered: Rendered) -> Tree:
    """The Knative Service that KServe's controller makes of an InferenceService (facts, section a)."""
    metadata, predictor = one["metadata"], one["spec"]["predictor"]
    pod = {
        name: value
        for name, value in predictor.items()
        if name not in ("minReplicas", "maxReplicas", "scaleMetric", "timeout", "model")
    }
    if "timeout" in predictor:
        pod |= dict.fromkeys(("timeoutSeconds", "responseStartTimeoutSeconds"), predictor["timeout"])
    if "model" in predictor:
        runtime = next(
            (r["spec"] for r in rendered.of_kind("ServingRuntime")
             if r["metadata"]["name"] == predictor["model"].get("runtime")), {"containers": [{}]}
        )  # fmt: skip
        given = {
            name: value
            for name, value in predictor["model"].items()
            if name not in ("modelFormat", "runtime", "storageUri")
        }
        pod["containers"] = [_merged(runtime["containers"][0], given), *pod.get("containers", ())]
        pod["volumes"] = [*runtime.get("volumes", ()), *pod.get("volumes", ())]
    labels = {
        **metadata["labels"],
        "serving.kserve.io/inferenceservice": metadata["name"],
        "component": "predictor",
    }
    annotations = {
        f"{_AUTOSCALING}class": "kpa.autoscaling.knative.dev",
        f"{_AUTOSCALING}min-scale": str(predictor.get("minReplicas", 1)),
        f"{_AUTOSCALING}max-scale": str(predictor.get("maxReplicas", 0)),
        f"{_AUTOSCALING}metric": predictor.get("scaleMetric", "concurrency"),
        **metadata.get("annotations", {}),
    }
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": f"{metadata['name']}-predictor", "namespace": metadata["namespace"], "labels": labels},
        "spec": {
            "template": {
                "metadata": {
                    "labels": {name: value for name, value in labels.items() if name != VISIBILITY},
                    "annotations": annotations,
                },
                "spec": pod,
            }
        },
    }


_MERGE_KEYS = {"env": "name", "volumeMounts": "mountPath", "ports": "containerPort"}


def _merged(base: Tree, over: Tree) -> dict[str, Any]:
    """A strategic merge of containers: lists by their keys, all else replaced."""
    found = {**base, **over}
    for field_name, key in _MERGE_KEYS.items():
        items = {item[key]: item for item in (*base.get(field_name, ()), *over.get(field_name, ()))}
        if items:
            found[field_name] = list(items.values())
    return found


# --- all together ---------------------------------------------------------------------------------------------------


def _together(rendered: Rendered, services: Sequence[Tree]) -> Iterator[str]:
    stages = [one for one in services if "STAGE_INDEX" in environment(one)]
    keepers = [one for one in services if "RESULTS_FILE" in environment(one)]
    fronts = [one for one in services if one not in stages and one not in keepers]
    if len(fronts) != 1:
        yield f"{len(fronts)} orchestrators"
        return
    if keepers:
        yield from _batch(rendered, fronts[0], keepers)
    stages.sort(key=lambda one: int(environment(one)["STAGE_INDEX"]))
    told = environment(fronts[0])
    urls = [f"http://{one['metadata']['name']}.{one['metadata']['namespace']}.svc.cluster.local" for one in stages]
    if told.get("ORCHESTRATOR_STAGE_URLS", "").split(",") != urls:
        yield f"the orchestrator calls {told.get('ORCHESTRATOR_STAGE_URLS')}, the stages are {urls}"
    deadline_s, limit_s = told.get("ORCHESTRATOR_REQUEST_TIMEOUT_S", "0"), _timeout_s(fronts[0])
    if not 0 < int(deadline_s) <= limit_s:
        yield f"the orchestrator gives requests {deadline_s} s (0: any time), Knative {limit_s} s"
    yield from _stages_fit(stages, told)
    yield from _models_are_there(rendered, services)
    for policy in rendered.of_kind("NetworkPolicy"):
        yield from _network_policy(policy, stages, fronts)
    for monitor in rendered.of_kind("PodMonitor"):
        selector = monitor["spec"]["selector"]["matchLabels"]
        if not all(_selects(selector, one) for one in services):
            yield "the PodMonitor does not select every pod"
        for name in monitor["spec"]["podTargetLabels"]:
            if not any(name in _pod_labels(one) for one in services):
                yield f"no pod has the label {name} that the PodMonitor asks for"
    for role in rendered.of_kind("Role"):
        yield from _covers(role, rendered)


def _batch(rendered: Rendered, front: Tree, keepers: Sequence[Tree]) -> Iterator[str]:
    """One keeper of results with one replica; requests of the model reach the orchestrator, and results the keeper."""
    if len(keepers) != 1:
        yield f"{len(keepers)} services keep results"
        return
    names = {front["metadata"]["name"]: "orchestrator", keepers[0]["metadata"]["name"]: "keeper"}
    scaling = keepers[0]["spec"]["template"]["metadata"]["annotations"]
    if scaling.get("autoscaling.knative.dev/max-scale") != "1":
        yield "several replicas would write to one file of results"
    kept = any("persistentVolumeClaim" in one for one in keepers[0]["spec"]["template"]["spec"]["volumes"])
    if not kept and scaling.get("autoscaling.knative.dev/min-scale") != "1":
        yield "results end with their replica, which may go to zero"
    routes = set()
    for one in rendered.of_kind("Trigger"):
        kind = one["spec"]["filter"]["attributes"].get("type", "")
        if kind.startswith(_BATCH_TYPES):
            if one["spec"]["broker"] not in rendered.names("Broker"):
                yield f"there is no Broker {one['spec']['broker']!r} in the files"
            subscriber = one["spec"]["subscriber"]
            routes.add((kind.split(".")[-2], names.get(subscriber["ref"]["name"]), subscriber["uri"]))
    if routes != _BATCH_ROUTES:
        yield f"events of batches go elsewhere: {routes ^ _BATCH_ROUTES}"


def _timeout_s(service: Tree) -> int:
    return int(service["spec"]["template"]["spec"].get("timeoutSeconds", 300))


def _stages_fit(stages: Sequence[Tree], told: Mapping[str, str]) -> Iterator[str]:
    border = 0
    digests = {told.get("ORCHESTRATOR_PLAN")}
    for index, one in enumerate(stages):
        env = environment(one)
        first, _, last = env["STAGE_BLOCKS"].partition(":")
        if (env["STAGE_INDEX"], env["STAGE_COUNT"], int(first)) != (str(index), str(len(stages)), border):
            yield f"stage {index} is {env['STAGE_INDEX']} of {env['STAGE_COUNT']} with blocks {env['STAGE_BLOCKS']}"
        border = int(last)
        digests.add(env["STAGE_PLAN"])
    if len(digests) != 1:
        yield f"several plans: {digests}"


def _models_are_there(rendered: Rendered, services: Sequence[Tree]) -> Iterator[str]:
    stored = {
        f"{one['metadata']['name']}-predictor": _storage_uri(one["spec"]["predictor"])
        for one in rendered.of_kind("InferenceService")
    }
    for one in services:
        env, name = environment(one), one["metadata"]["name"]
        if "RESULTS_FILE" in env:
            continue
        model = env.get("STAGE_MODEL") or env.get("ORCHESTRATOR_MODEL", "")
        mounts = one["spec"]["template"]["spec"]["containers"][0].get("volumeMounts", ())
        at_models = [mount for mount in mounts if mount["mountPath"].startswith(_MODELS)]
        if stored.get(name) and at_models:
            yield f"{name} mounts {_MODELS}, where KServe puts the model"
        if model.startswith(_MODELS) != bool(at_models or stored.get(name)):
            yield f"{name} reads {model}, which is not mounted, or mounts what it does not read"
        scheme, separator, rest = model.partition("://")
        if not model.strip() or (separator and (not rest.split("/")[0] or not scheme)) or re.search(r"\s", model):
            yield f"{name} cannot read {model!r}"


def _pod_labels(service: Tree) -> Mapping[str, str]:
    labels: Mapping[str, str] = service["spec"]["template"]["metadata"]["labels"]
    return labels


def _selects(selector: Mapping[str, str], service: Tree) -> bool:
    return selector.items() <= _pod_labels(service).items()


def _network_policy(policy: Tree, stages: Sequence[Tree], fronts: Sequence[Tree]) -> Iterator[str]:
    spec = policy["spec"]
    selector = spec["podSelector"]["matchLabels"]
    if not all(_selects(selector, one) for one in stages):
        yield "the NetworkPolicy leaves stages open"
    if any(_selects(selector, one) for one in fronts):
        yield "the NetworkPolicy closes the orchestrator"
    if spec["policyTypes"] != ["Ingress"]:
        yield "the NetworkPolicy is about more than who may reach stages"
    peers = [(peer, rule) for rule in spec["ingress"] for peer in rule.get("from", ())]
    if not all(rule.get("from") and rule.get("ports") for rule in spec["ingress"]):
        yield "a rule of the NetworkPolicy lets everybody in, or to every port"
    direct = [
        {port["port"] for port in rule["ports"]}
        for peer, rule in peers
        if "podSelector" in peer and all(_selects(peer["podSelector"]["matchLabels"], one) for one in fronts)
    ]
    if not any(8012 in ports for ports in direct):
        yield "the NetworkPolicy keeps the orchestrator from the pods' 8012"
    serving = [
        {port["port"] for port in rule["ports"]}
        for peer, rule in peers
        if peer.get("namespaceSelector", {}).get("matchLabels") == {"kubernetes.io/metadata.name": "knative-serving"}
    ]
    if not any({8012, 9090} <= ports for ports in serving):
        yield "the NetworkPolicy keeps the activator or the autoscaler out"
    if any({8022} & {port["port"] for port in rule["ports"]} for rule in spec["ingress"]):
        yield "the NetworkPolicy opens queue-proxy's admin port"


def _covers(role: Tree, rendered: Rendered) -> Iterator[str]:
    rights = {
        (group, name): set(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for name in rule["resources"]
    }
    if any("*" in verbs or "*" in key for key, verbs in rights.items()):
        yield "the Role allows everything"
    for one in rendered.objects:
        if one["kind"] in ("Role", "RoleBinding"):
            continue
        group = one["apiVersion"].rpartition("/")[0]
        plural = {"NetworkPolicy": "networkpolicies"}.get(one["kind"], one["kind"].lower() + "s")
        if not {"get", "create", "patch", "delete"} <= rights.get((group, plural), set()):
            yield f"the Role does not let its holder deploy {plural}.{group}"
