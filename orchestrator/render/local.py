"""The files that `stagecraft up` applies to the Knative of this machine: services, and settings to start at zero."""

from __future__ import annotations

from pathlib import Path

from orchestrator.render.deployment import Deployment
from orchestrator.render.files import Object, event_objects, service_objects
from orchestrator.render.noted import Tree, plain, to_yaml


def local_objects(what: Deployment) -> list[Object]:
    """In the order in which they are best applied. Raises DeploymentError."""
    return [
        Object("config-autoscaler.yaml", _autoscaler_settings(what.scaling.grace_s)),
        *service_objects(what),
        *event_objects(what),
    ]


def local_manifests(what: Deployment) -> list[Tree]:
    """The objects alone, without comments."""
    return [plain(one.tree) for one in local_objects(what)]


def write_local(what: Deployment, folder: Path) -> list[Path]:
    """One file for each object, in the order in which they are best applied."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for one in local_objects(what):
        path = folder / one.file
        path.write_text(to_yaml(one.tree, one.heading), encoding="utf-8")
        written.append(path)
    return written


def _autoscaler_settings(grace_s: float) -> Tree:
    """The keys of config-autoscaler that services which start at zero need."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "config-autoscaler", "namespace": "knative-serving"},
        "data": {"allow-zero-initial-scale": "true", "scale-to-zero-grace-period": f"{grace_s:g}s"},
    }
