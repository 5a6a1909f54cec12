"""The one container of a revision: defaulting, validation, and what a process of this machine takes from it.

After pkg/apis/serving/k8s_validation.go and v1/revision_defaults.go of knative/serving.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import TypeVar

from knative.resources.config_maps import DefaultsConfig, FeaturesConfig
from knative.resources.field_errors import INT32_MAX, Problems
from knative.resources.names import is_dns_1123_label
from knative.resources.objects import Container, Probe
from knative.resources.probes import default_readiness, read_probe
from knative.resources.quantities import parse_count, parse_cpus, parse_memory_bytes, parse_quantity
from knative.resources.trees import Tree, child, children, text, texts, whole
from knative.resources.volumes import check_mounts

DEFAULT_PORT = 8080
_RESERVED_NAMES = frozenset({"queue-proxy"})
_RESERVED_ENV = frozenset({"PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION"})
_RESERVED_PORTS = frozenset({8008, 8012, 8013, 8022, 9090, 9091})
_PORT_NAMES = ("", "http1", "h2c")
_ENV_NAME = re.compile(r"[ -<>-~]+")  # printable ASCII without "="
_IMAGE = re.compile(
    r"(?:[A-Za-z0-9.-]+(?::[0-9]+)?/)?[a-z0-9._-]+(?:/[a-z0-9._-]+)*"
    r"(?::[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(?:@[A-Za-z0-9+._-]+:[0-9a-fA-F]{32,})?"
)
_PULL_POLICIES = ("", "Always", "Never", "IfNotPresent")
_TERMINATION_POLICIES = ("", "File", "FallbackToLogsOnError")


def default_container(pod: Tree, container: Tree, name: str, defaults: DefaultsConfig) -> None:
    """Fills in what the manifest leaves out; `name` is for a container without one. Changes `container`."""
    container["name"] = text(container, "name") or name
    resources = dict(child(container, "resources"))
    for side, more in (("requests", defaults.requests), ("limits", defaults.limits)):
        merged = {**more, **child(resources, side)}
        if merged:
            resources[side] = merged
    container["resources"] = resources
    default_readiness(container)


def read_container(
    container: Tree, path: str, volumes: Mapping[str, Tree], features: FeaturesConfig, problems: Problems
) -> Container:
    """What is wrong is added to `problems`; the result counts only if that is nothing."""
    _check_names(container, path, problems)
    port, port_name = _port(container, f"{path}.ports", problems)
    probe_port = (port_name or "http", port)
    _check_security(container, f"{path}.securityContext", features, problems)
    check_mounts(container, path, volumes, features, problems)
    cpus, memory_bytes, gpus = _resources(container, f"{path}.resources", problems)
    _check_env_from(container, f"{path}.envFrom", problems)
    return Container(
        image=text(container, "image"),
        name=text(container, "name"),
        command=texts(container, "command"),
        args=texts(container, "args"),
        env=_env(container, f"{path}.env", features, problems),
        working_dir=text(container, "workingDir"),
        port=port,
        port_name=port_name,
        readiness=read_probe(container, "readinessProbe", path, problems, probe_port) or Probe(),
        liveness=read_probe(container, "livenessProbe", path, problems, probe_port),
        startup=read_probe(container, "startupProbe", path, problems, probe_port),
        cpus=cpus,
        memory_bytes=memory_bytes,
        gpus=gpus,
    )


def _check_names(container: Tree, path: str, problems: Problems) -> None:
    name, image = text(container, "name"), text(container, "image")
    if name in _RESERVED_NAMES:
        problems.add(f'"{name}" is a reserved container name', f"{path}.name")
    elif name and not is_dns_1123_label(name):
        problems.invalid(name, f"{path}.name", "not a DNS 1123 label: lower case letters, digits and '-', at most 63")
    if not image:
        problems.missing(f"{path}.image")
    elif not _IMAGE.fullmatch(image):
        details = f'image: "{image}", error: could not parse reference: {image}'
        problems.add("Failed to parse image reference", f"{path}.image", details=details)
    for field, allowed in (("imagePullPolicy", _PULL_POLICIES), ("terminationMessagePolicy", _TERMINATION_POLICIES)):
        if text(container, field) not in allowed:
            problems.invalid(text(container, field), f"{path}.{field}")


def check_port_count(containers: list[Tree], path: str, problems: Problems) -> None:
    """Over all containers of the pod spec at `path` there is one port."""
    if sum(len(children(container, "ports")) for container in containers) > 1:
        problems.add(
            "more than one container port is set",
            f"{path}.containers[*].ports",
            details="Only a single port is allowed across all containers",
        )


def _port(container: Tree, path: str, problems: Problems) -> tuple[int, str]:
    """Number and name of the port."""
    ports = children(container, "ports")
    if not ports:
        return DEFAULT_PORT, ""
    port = ports[0]
    number, name = whole(port, "containerPort"), text(port, "name")
    if number in _RESERVED_PORTS:
        details = f"{number} is a reserved port, please use a different value"
        problems.invalid(f"{number} is a reserved port", f"{path}.containerPort", details)
    problems.check_bounds(number, f"{path}.containerPort", 0, 65535)
    if text(port, "protocol") not in ("", "TCP"):
        problems.invalid(port["protocol"], f"{path}.protocol")
    if name not in _PORT_NAMES:
        problems.add(f"Port name {name} is not allowed", path, details="Name must be empty, or one of: 'h2c', 'http1'")
    elif name == "h2c":
        problems.warn("one machine relays HTTP/1.1 only: requests do not reach this port as HTTP/2", f"{path}[0].name")
    return number or DEFAULT_PORT, name


def _env(container: Tree, path: str, features: FeaturesConfig, problems: Problems) -> tuple[tuple[str, str], ...]:
    pairs: dict[str, str] = {}
    for i, variable in enumerate(children(container, "env")):
        here, name = f"{path}[{i}]", text(variable, "name")
        _check_env_name(name, pairs, f"{here}.name", problems)
        if "valueFrom" not in variable:
            pairs[name] = text(variable, "value")
            continue
        if text(variable, "value"):
            problems.invalid("", f"{here}.valueFrom", "may not be specified when `value` is not empty")
        _check_value_from(name, child(variable, "valueFrom"), f"{here}.valueFrom", features, problems)
    return tuple(pairs.items())


def _check_env_name(name: str, seen: Mapping[str, str], path: str, problems: Problems) -> None:
    if not name:
        problems.missing(path)
    elif name in _RESERVED_ENV:
        problems.add(f'"{name}" is a reserved environment variable', path)
    elif not _ENV_NAME.fullmatch(name):
        problems.invalid(name, path, "printable ASCII characters other than '='")
    elif name in seen:
        problems.add(f'Duplicate value: "{name}"', path)


def _check_value_from(name: str, source: Tree, path: str, features: FeaturesConfig, problems: Problems) -> None:
    """One machine has neither config maps nor secrets nor pods to take a value from."""
    if len(source) > 1:
        problems.invalid("", path, "may not have more than one field specified at a time")
    elif not source:
        problems.invalid("", path, "must specify one of: `configMapKeyRef`, `fieldRef`, `secretKeyRef`")
    for kind in source:
        here = f"{path}.{kind}"
        if kind in ("fieldRef", "resourceFieldRef") and not features.lets_pass("kubernetes.podspec-fieldref"):
            problems.disallowed(here, details="on a cluster this needs kubernetes.podspec-fieldref in config-features")
        elif child(source, kind).get("optional") is True:
            problems.warn(f"variable {name} stays unset: it has no source on one machine", here)
        else:
            problems.cannot(
                f"variable {name} has no source on one machine",
                here,
                details="give it a `value`, or mark the reference `optional: true`",
            )


def _check_env_from(container: Tree, path: str, problems: Problems) -> None:
    for i, entry in enumerate(children(container, "envFrom")):
        here = f"{path}[{i}]"
        sources = [kind for kind in ("configMapRef", "secretRef") if kind in entry]
        if len(sources) != 1:
            got = "both" if sources else "neither"
            problems.add(f"expected exactly one, got {got}", f"{here}.configMapRef", f"{here}.secretRef")
        elif child(entry, sources[0]).get("optional") is True:
            problems.warn("variables stay unset: they have no source on one machine", here)
        else:
            problems.cannot(
                f"variables of {sources[0]} {text(child(entry, sources[0]), 'name')} have no source on one machine",
                here,
                details="list them under `env`, or mark the reference `optional: true`",
            )


def _check_security(container: Tree, path: str, features: FeaturesConfig, problems: Problems) -> None:
    context = child(container, "securityContext")
    if context.get("privileged") is True:
        problems.disallowed(f"{path}.privileged")
    for name in ("runAsUser", "runAsGroup"):
        if name in context:
            problems.check_bounds(whole(context, name), f"{path}.{name}", 0, INT32_MAX)
    added = texts(child(context, "capabilities"), "add")
    if added and not features.lets_pass("kubernetes.containerspec-addcapabilities"):
        problems.disallowed(f"{path}.capabilities.add")
    if context:
        problems.warn("has no effect: a process runs as the user who started the platform", path)


_Number = TypeVar("_Number", float, int)


def _resources(container: Tree, path: str, problems: Problems) -> tuple[float, int, int]:
    """Cores, bytes of memory and GPUs: the limits, else the requests."""
    resources = child(container, "resources")
    limits, requests = child(resources, "limits"), child(resources, "requests")
    for side, entries in (("limits", limits), ("requests", requests)):
        for name, value in entries.items():
            parse = {"cpu": parse_cpus, "memory": parse_memory_bytes}.get(name, parse_quantity)
            problems.parsed(parse_count if name.endswith("/gpu") else parse, value, f"{path}.{side}.{name}")
    for name in requests.keys() & limits.keys():
        _check_request(name, requests[name], limits[name], f"{path}.requests.{name}", problems)

    def most(name: str, parse: Callable[[object], _Number]) -> _Number:
        try:
            return parse(limits.get(name, requests.get(name, 0)))
        except ValueError:
            return parse(0)  # complained of above

    gpus = sorted(name for name in limits.keys() | requests.keys() if name.endswith("/gpu"))
    return most("cpu", parse_cpus), most("memory", parse_memory_bytes), sum(most(name, parse_count) for name in gpus)


def _check_request(name: str, request: object, limit: object, path: str, problems: Problems) -> None:
    asked, allowed = _quantity(request), _quantity(limit)
    if asked is not None and allowed is not None and asked > allowed:
        problems.invalid(request, path, f"must be less than or equal to {name} limit of {limit}")


def _quantity(value: object) -> Decimal | None:
    try:
        return parse_quantity(value)
    except ValueError:
        return None
