"""A plan as Kubernetes objects: a Knative Service for each stage, one for the orchestrator, and Knative's settings.

The same objects go to a cluster and to the single-machine Knative (`knative/`), which is why the orchestrator finds
its stages by their cluster-local names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

if TYPE_CHECKING:
    from orchestrator.plan import Plan

STAGE_IMAGE = "stagecraft/stage"
ORCHESTRATOR_IMAGE = "stagecraft/orchestrator"
WAKES = "stagecraft.dev/wakes"  # annotation of the orchestrator's Service; see knative/platform.py

_SCALING = "autoscaling.knative.dev"
_NAME_MAX = 52  # a revision adds -00001 and a replica five letters more, of at most 63


@dataclass(frozen=True, slots=True)
class Scaling:
    """How every stage scales. Durations are seconds."""

    target: float = 2.0  # steps of lanes in a replica at once, before utilisation (70 %) is applied
    window_s: int = 60  # stable window
    min_scale: int = 0
    max_scale: int = 1
    grace_s: float = 30.0  # scale-to-zero-grace-period
    initial_scale: int = 0  # start with the first request


@dataclass(frozen=True, slots=True)
class Deployable:
    """What becomes of a plan: names, resources and settings that the plan itself does not have."""

    plan: Plan
    namespace: str = "default"
    scaling: Scaling = Scaling()
    device: str = "auto"
    threads_per_stage: int = 0  # 0: torch decides
    kv_bytes_max: int | None = None  # each stage decides by the memory that is free
    lane_width: int | None = None  # sequences; None: the orchestrator's default
    timeout_s: int = 600  # the most that Knative allows by default

    @property
    def name(self) -> str:
        """Of the orchestrator's Service."""
        return dns_label(self.plan.name)

    def stage_name(self, index: int) -> str:
        return f"{self.name}-stage-{index}"

    @property
    def stage_names(self) -> list[str]:
        return [self.stage_name(index) for index in range(len(self.plan.stages))]


def dns_label(name: str) -> str:
    """The model's name as Kubernetes allows it: lower-case letters, digits and '-', a letter first (RFC 1035)."""
    text = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[: _NAME_MAX - len("-stage-99")].strip("-")
    return text if text[:1].isalpha() else f"m-{text}".strip("-")


def manifests(what: Deployable) -> list[dict[str, Any]]:
    """The objects in the order in which they are best applied."""
    stages = [stage_service(what, index) for index in range(len(what.plan.stages))]
    return [autoscaler_settings(what), *stages, orchestrator_service(what)]


def write_manifests(what: Deployable, folder: Path) -> list[Path]:
    """One file for each object, numbered in the order in which they are best applied."""
    folder.mkdir(parents=True, exist_ok=True)
    yaml = YAML()
    yaml.width = 4096  # a long value stays on its line
    written = []
    for index, manifest in enumerate(manifests(what)):
        path = folder / f"{index:02d}-{manifest['metadata']['name']}.yaml"
        with path.open("w") as stream:
            yaml.dump(manifest, stream)
        written.append(path)
    return written


def autoscaler_settings(what: Deployable) -> dict[str, Any]:
    """The keys of config-autoscaler that services which start at zero need."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "config-autoscaler", "namespace": "knative-serving"},
        "data": {
            "allow-zero-initial-scale": "true",
            "scale-to-zero-grace-period": f"{what.scaling.grace_s:g}s",
        },
    }


def stage_service(what: Deployable, index: int) -> dict[str, Any]:
    """One stage: reached only from inside the cluster, scaled by the steps that are in it at once."""
    annotations = {f"{_SCALING}/target": f"{what.scaling.target:g}", **_scale_annotations(what.scaling)}
    return _service(
        what,
        what.stage_name(index),
        annotations,
        {
            "image": STAGE_IMAGE,
            "env": _env(stage_environment(what, index)),
            "readinessProbe": {"httpGet": {"path": "/readyz"}},
        },
        {"networking.knative.dev/visibility": "cluster-local"},
    )


def orchestrator_service(what: Deployable) -> dict[str, Any]:
    """The way in. One replica at most: it counts the memory of the stages for itself."""
    scaling = Scaling(
        window_s=what.scaling.window_s, min_scale=min(1, what.scaling.min_scale), max_scale=1,
        initial_scale=what.scaling.initial_scale,
    )  # fmt: skip
    service = _service(
        what,
        what.name,
        _scale_annotations(scaling),
        {
            "image": ORCHESTRATOR_IMAGE,
            "env": _env(orchestrator_environment(what)),
            "readinessProbe": {"httpGet": {"path": "/v2/health/ready"}},
        },
        {},
    )
    service["metadata"]["annotations"] = {WAKES: ",".join(what.stage_names)}
    return service


def stage_environment(what: Deployable, index: int) -> dict[str, str]:
    """The variables that tell a stage which one it is."""
    plan = what.plan
    # all stages, and all replicas they may have, share what one machine has
    budget = {"STAGE_KV_SHARE": f"{1 / (len(plan.stages) * max(1, what.scaling.max_scale)):.6f}"}
    if what.kv_bytes_max is not None:
        budget = {"STAGE_KV_BYTES_MAX": str(what.kv_bytes_max)}
    return {
        "STAGE_MODEL": plan.model,
        "STAGE_MODEL_NAME": plan.name,
        "STAGE_BLOCKS": str(plan.stages[index].blocks),
        "STAGE_INDEX": str(index),
        "STAGE_COUNT": str(len(plan.stages)),
        "STAGE_PLAN": plan.digest,
        "STAGE_DTYPE": plan.dtype,
        "STAGE_DEVICE": what.device,
        "STAGE_THREADS": str(what.threads_per_stage),
        **budget,
    }


def orchestrator_environment(what: Deployable) -> dict[str, str]:
    """The variables that tell the orchestrator what it chains."""
    urls = [f"http://{name}.{what.namespace}.svc.cluster.local" for name in what.stage_names]
    width = {} if what.lane_width is None else {"ORCHESTRATOR_LANE_WIDTH": str(what.lane_width)}
    return {
        "ORCHESTRATOR_MODEL": what.plan.model,
        "ORCHESTRATOR_MODEL_NAME": what.plan.name,
        "ORCHESTRATOR_STAGE_URLS": ",".join(urls),
        "ORCHESTRATOR_PLAN": what.plan.digest,
        **width,
    }


def _scale_annotations(scaling: Scaling) -> dict[str, str]:
    return {
        f"{_SCALING}/class": "kpa.autoscaling.knative.dev",
        f"{_SCALING}/metric": "concurrency",
        f"{_SCALING}/window": f"{scaling.window_s}s",
        f"{_SCALING}/min-scale": str(scaling.min_scale),
        f"{_SCALING}/max-scale": str(scaling.max_scale),
        f"{_SCALING}/initial-scale": str(max(scaling.initial_scale, scaling.min_scale)),
    }


def _service(
    what: Deployable, name: str, annotations: Mapping[str, str], container: dict[str, Any], labels: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {
            "name": name,
            "namespace": what.namespace,
            "labels": {"app.kubernetes.io/part-of": "stagecraft", "stagecraft.dev/model": what.name, **labels},
        },
        "spec": {
            "template": {
                "metadata": {"annotations": dict(annotations)},
                "spec": {
                    "timeoutSeconds": what.timeout_s,
                    # a first token may take as long as the wake of all stages
                    "responseStartTimeoutSeconds": what.timeout_s,
                    "containers": [container],
                },
            }
        },
    }


def _env(variables: Mapping[str, str]) -> list[dict[str, str]]:
    # in quotes: to a YAML 1.1 reader, 0:30 without them is a number
    return [{"name": name, "value": DoubleQuotedScalarString(value)} for name, value in variables.items()]
