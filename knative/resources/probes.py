"""Probes of a container: defaulting as Knative does it for readiness and Kubernetes for the others; validation.

After pkg/apis/serving/k8s_validation.go (validateProbe, validateReadinessProbe) and v1/revision_defaults.go.
"""

from __future__ import annotations

import re
from typing import Literal

from knative.resources.field_errors import INT32_MAX, Problems
from knative.resources.objects import Probe, ProbeKind
from knative.resources.trees import Tree, child, children, text, texts, whole

_HANDLERS: dict[str, ProbeKind] = {"httpGet": "http", "tcpSocket": "tcp", "exec": "exec"}
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_LOCAL = ("", "localhost", "127.0.0.1")

ProbeRole = Literal["readinessProbe", "livenessProbe", "startupProbe"]


def default_readiness(container: Tree) -> None:
    """A TCP probe on the container's port unless the manifest has another; changes `container`."""
    probe = container["readinessProbe"] = dict(child(container, "readinessProbe"))
    if not any(name in probe for name in (*_HANDLERS, "grpc")):
        probe["tcpSocket"] = {}
    probe["successThreshold"] = probe.get("successThreshold") or 1
    if probe.get("periodSeconds"):
        probe["failureThreshold"] = probe.get("failureThreshold") or 3
        probe["timeoutSeconds"] = probe.get("timeoutSeconds") or 1


def read_probe(container: Tree, role: ProbeRole, path: str, problems: Problems, port: tuple[str, int]) -> Probe | None:
    """The probe of `container` in that role, None without one. `port` is name and number of the container's port."""
    if role not in container:
        return None
    probe, here = child(container, role), f"{path}.{role}"
    kind = _kind(probe, here, problems)
    if role == "readinessProbe":
        _check_readiness(probe, here, problems)
    else:
        _check_kubernetes(probe, here, problems)
    return _built(probe, kind, here, problems, port, period_s=0 if role == "readinessProbe" else 10)


def _kind(probe: Tree, path: str, problems: Problems) -> ProbeKind:
    given = [name for name in (*_HANDLERS, "grpc") if name in probe]
    if len(given) > 1:
        problems.add("expected exactly one, got both", *(f"{path}.{name}" for name in given))
    elif not given:
        problems.add("expected exactly one, got neither", *(f"{path}.{name}" for name in (*_HANDLERS, "grpc")))
    if "grpc" in probe:
        details = "on one machine probes are httpGet, tcpSocket or exec"
        problems.cannot("must not set the field(s)", f"{path}.grpc", details=details)
    return next((_HANDLERS[name] for name in given if name in _HANDLERS), "tcp")


def _check_readiness(probe: Tree, path: str, problems: Problems) -> None:
    problems.check_bounds(whole(probe, "periodSeconds"), f"{path}.periodSeconds", 0, INT32_MAX)
    problems.check_bounds(whole(probe, "initialDelaySeconds"), f"{path}.initialDelaySeconds", 0, INT32_MAX)
    problems.check_bounds(whole(probe, "successThreshold", 1), f"{path}.successThreshold", 1, INT32_MAX)
    for name, least in (("failureThreshold", 3), ("timeoutSeconds", 1)):
        value = whole(probe, name)
        if whole(probe, "periodSeconds"):
            problems.check_bounds(whole(probe, name, least), f"{path}.{name}", 1, INT32_MAX)
        elif value != 0:
            problems.add(f"{name} is disallowed when periodSeconds is zero", f"{path}.{name}")


def _check_kubernetes(probe: Tree, path: str, problems: Problems) -> None:
    """Liveness and startup probes: in Kubernetes a 0 means the default."""
    for name in ("periodSeconds", "initialDelaySeconds", "timeoutSeconds", "failureThreshold"):
        problems.check_bounds(whole(probe, name), f"{path}.{name}", 0, INT32_MAX)
    if whole(probe, "successThreshold") not in (0, 1):
        problems.invalid(probe["successThreshold"], f"{path}.successThreshold", "must be 1")


def _built(
    probe: Tree, kind: ProbeKind, path: str, problems: Problems, port: tuple[str, int], *, period_s: int
) -> Probe:
    """`period_s` is that of a probe without one."""
    handler = next(name for name, is_kind in _HANDLERS.items() if is_kind == kind)
    action, here = child(probe, handler), f"{path}.{handler}"
    if kind == "exec" and not texts(action, "command"):
        problems.missing(f"{here}.command")
    return Probe(
        kind=kind,
        path=_http_path(action, here, problems) if kind == "http" else "/",
        headers=_headers(action, here, problems) if kind == "http" else (),
        command=texts(action, "command") if kind == "exec" else (),
        port=_port(action, here, problems, port) if kind != "exec" else 0,
        initial_delay_s=whole(probe, "initialDelaySeconds"),
        period_s=whole(probe, "periodSeconds") or period_s,
        timeout_s=whole(probe, "timeoutSeconds") or 1,
        success_threshold=whole(probe, "successThreshold") or 1,
        failure_threshold=whole(probe, "failureThreshold") or 3,
    )


def _http_path(action: Tree, path: str, problems: Problems) -> str:
    scheme = text(action, "scheme")
    if scheme == "HTTPS":
        problems.cannot(f"invalid value: {scheme}", f"{path}.scheme", details="on one machine probes are plain HTTP")
    elif scheme not in ("", "HTTP"):
        problems.invalid(scheme, f"{path}.scheme", "HTTP or HTTPS")
    where = text(action, "path") or "/"
    if not where.isprintable() or " " in where:
        problems.invalid(where, f"{path}.path", "not the path of a URL")
    return where if where.startswith("/") else f"/{where}"


def _headers(action: Tree, path: str, problems: Problems) -> tuple[tuple[str, str], ...]:
    headers = []
    for i, header in enumerate(children(action, "httpHeaders")):
        name, value = text(header, "name"), text(header, "value")
        if not _TOKEN.fullmatch(name):
            problems.invalid(name, f"{path}.httpHeaders[{i}].name", "not the name of an HTTP header")
        if not value.isprintable():
            problems.invalid(value, f"{path}.httpHeaders[{i}].value", "not the value of an HTTP header")
        headers.append((name, value))
    return tuple(headers)


def _port(action: Tree, path: str, problems: Problems, container_port: tuple[str, int]) -> int:
    """0 for the container's own port, which is the one that a replica gets in PORT."""
    name, number = container_port
    if text(action, "host") not in _LOCAL:
        problems.warn("every probe goes to 127.0.0.1 on one machine", f"{path}.host")
    port = action.get("port", 0)
    if isinstance(port, str) and port.isdecimal() and len(port) <= 5:
        port = int(port)
    if isinstance(port, str):
        if port != name:
            problems.invalid(port, f"{path}.port", "Probe port must match container port")
        return 0
    if not isinstance(port, int) or not 0 <= port <= 65535:
        problems.bounds(port, f"{path}.port", 0, 65535)
        return 0
    if port in (0, number):
        return 0
    problems.warn(f"port {port} is not the container's port: all replicas share it on one machine", f"{path}.port")
    return port
