"""Settings of the cluster itself that a deployment needs, beyond Knative's defaults: never written, only told."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from orchestrator.render.deployment import Deployment
from orchestrator.render.pods import orchestrator_pod, results_pod, stage_pod

_TIMEOUT_MAX_S = 600  # max-revision-timeout-seconds


@dataclass(frozen=True, slots=True)
class ClusterSetting:
    """A key of a ConfigMap in namespace knative-serving."""

    config_map: str
    key: str
    value: str


def needed_settings(what: Deployment) -> tuple[ClusterSetting, ...]:
    """What an administrator has to set before these files are taken; nothing for a plain deployment."""
    features = {*stage_pod(what, 0).features, *orchestrator_pod(what).features}
    if what.batch is not None:
        features.update(results_pod(what, what.batch).features)
    found = [ClusterSetting("config-features", name, "enabled") for name in sorted(features)]
    if what.scaling.initial_scale == 0 and what.scaling.min_scale == 0:
        found.append(ClusterSetting("config-autoscaler", "allow-zero-initial-scale", "true"))
    if what.timeout_s > _TIMEOUT_MAX_S:
        found.append(ClusterSetting("config-defaults", "max-revision-timeout-seconds", str(what.timeout_s)))
    return tuple(found)


def patch_commands(settings: Iterable[ClusterSetting]) -> list[str]:
    """The kubectl commands that set them."""
    by_map: dict[str, dict[str, str]] = {}
    for one in settings:
        by_map.setdefault(one.config_map, {})[one.key] = one.value
    return [
        f"kubectl patch configmap/{name} -n knative-serving --type merge -p '{json.dumps({'data': data})}'"
        for name, data in by_map.items()
    ]
