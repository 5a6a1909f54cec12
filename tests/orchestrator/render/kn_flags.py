"""What kn makes of the flags of `kn service apply`, without kn: the Knative Service that it would send.

Not a test file: conftest.py loads it. After the facts about kn 1.23 and its reference docs/cmd/kn_service_apply.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import yaml

Tree = dict[str, Any]

_AUTOSCALING = "autoscaling.knative.dev"
_SCALE = {
    "--scale-min": "min-scale",
    "--scale-max": "max-scale",
    "--scale-init": "initial-scale",
    "--scale-window": "window",
    "--scale-metric": "metric",
    "--scale-target": "target",
}
_SWITCHES = ("--cluster-local",)


class KnError(Exception):
    """kn would end with an error."""


def service(arguments: Sequence[str], document: str) -> Tree:
    """The Knative Service of `kn ARGUMENTS < document`, without what kn adds for itself."""
    if list(arguments[:2]) != ["service", "apply"]:
        raise KnError(f"not a command for services: {arguments[:2]}")
    name, flags = arguments[2], _flags(arguments[3:])
    if name.startswith("-"):
        raise KnError(f"the name comes first, got {name}")
    if ("--filename", "/dev/stdin") not in flags:
        raise KnError("nothing reads the document")
    tree: Tree = next(iter(yaml.safe_load_all(document)))
    if tree["metadata"].get("name", name) != name:
        raise KnError(f"the document is about {tree['metadata']['name']}, the command about {name}")
    tree["metadata"]["name"] = name
    tree["metadata"]["namespace"] = "default"  # kn takes the flag's, never the document's
    for flag, value in flags:
        _apply(tree, flag, value)
    for volume in tree["spec"]["template"]["spec"].get("volumes", ()):
        _check_mounted(tree, volume["name"])
    return tree


def _flags(arguments: Sequence[str]) -> list[tuple[str, str]]:
    found, rest = [], list(arguments)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--"):
            raise KnError(f"{flag!r} is neither a flag nor a value")
        name, equals, value = flag.partition("=")
        if name in _SWITCHES:
            found.append((name, ""))
        elif equals:
            found.append((name, value))
        else:
            found.append((name, rest.pop(0)))
    return found


def _apply(tree: Tree, flag: str, value: str) -> None:
    template = tree["spec"].setdefault("template", {})
    notes = template.setdefault("metadata", {}).setdefault("annotations", {})
    pod = template.setdefault("spec", {})
    containers = pod.setdefault("containers", [{}])
    container = containers[0]
    if flag in _SCALE:
        if flag not in ("--scale-window", "--scale-metric"):
            value = str(int(value))
        notes[f"{_AUTOSCALING}/{_SCALE[flag]}"] = value
        return
    actions: dict[str, Callable[[], None]] = {
        "--filename": lambda: None,
        "--wait-timeout": lambda: _whole(value),
        "--namespace": lambda: tree["metadata"].update(namespace=value),
        "--cluster-local": lambda: _set(
            tree["metadata"].setdefault("labels", {}), "networking.knative.dev/visibility=cluster-local"
        ),
        "--label-service": lambda: _set(tree["metadata"].setdefault("labels", {}), value),
        "--label-revision": lambda: _set(template["metadata"].setdefault("labels", {}), value),
        "--annotation-service": lambda: _set(tree["metadata"].setdefault("annotations", {}), value),
        "--annotation-revision": lambda: _set(notes, value),
        "--concurrency-limit": lambda: pod.update(containerConcurrency=int(value)),
        "--timeout": lambda: pod.update(timeoutSeconds=int(value)),
        "--service-account": lambda: pod.update(serviceAccountName=value),
        "--pull-secret": lambda: pod.update(imagePullSecrets=[{"name": value}]),
        "--image": lambda: container.update(image=value),
        "--port": lambda: container.update(ports=[_port(value)]),
        "--env": lambda: _env(container, value),
        "--env-from": lambda: _env_from(container, value),
        "--request": lambda: _resources(container, "requests", value),
        "--limit": lambda: _resources(container, "limits", value),
        "--user": lambda: container.setdefault("securityContext", {}).update(runAsUser=int(value)),
        "--volume": lambda: _volume(pod, value),
        "--mount": lambda: _mount(pod, container, value),
    }
    if flag not in actions:
        raise KnError(f"kn has no flag {flag}")
    actions[flag]()


def _whole(text: str) -> None:
    if not text.isdecimal():
        raise KnError(f"{text!r} is no number of seconds")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise KnError(f"{text!r} is not NAME=VALUE")
    return name, value


def _set(values: dict[str, str], text: str) -> None:
    name, value = _pair(text)
    values[name] = value


def _port(text: str) -> Tree:
    name, _, number = text.rpartition(":")
    return {"name": name, "containerPort": int(number)}


def _env(container: Tree, text: str) -> None:
    name, value = _pair(text)
    variables = container.setdefault("env", [])
    variables[:] = [one for one in variables if one["name"] != name]
    variables.append({"name": name, "value": value})


def _env_from(container: Tree, text: str) -> None:
    kind, _, name = text.partition(":")
    if kind != "secret":
        raise KnError(f"--env-from {text}")
    container.setdefault("envFrom", []).append({"secretRef": {"name": name}})


def _resources(container: Tree, side: str, text: str) -> None:
    for part in text.split(","):
        _set(container.setdefault("resources", {}).setdefault(side, {}), part)


def _volume(pod: Tree, text: str) -> None:
    """NAME=ed:NAME:size=2Gi,type=Memory; of the facts, section g."""
    name, source = _pair(text)
    kind, _, rest = source.partition(":")
    again, _, options = rest.partition(":")
    if kind != "ed" or again != name:
        raise KnError(f"--volume {text}")
    empty: Tree = {}
    for option in filter(None, options.split(",")):
        key, value = _pair(option)
        empty[{"size": "sizeLimit", "type": "medium"}[key]] = value
    pod.setdefault("volumes", []).append({"name": name, "emptyDir": empty})


def _mount(pod: Tree, container: Tree, text: str) -> None:
    path, name = _pair(text)
    if name not in [volume["name"] for volume in pod.get("volumes", ())]:
        raise KnError(f"--mount {text}: no such volume")
    container.setdefault("volumeMounts", []).append({"name": name, "mountPath": path})


def _check_mounted(tree: Tree, name: str) -> None:
    pod = tree["spec"]["template"]["spec"]
    containers = [*pod["containers"], *pod.get("initContainers", ())]
    if not any(mount["name"] == name for one in containers for mount in one.get("volumeMounts", ())):
        raise KnError(f"kn takes out volume {name}, which nothing mounts")
