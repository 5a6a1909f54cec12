"""Whether a cluster with Knative's and KServe's defaults, and the settings that were told, takes the objects."""

from __future__ import annotations

from knative.autoscaler.config import AutoscalerConfig
from knative.resources.check import check_documents
from knative.resources.config_maps import DefaultsConfig, FeaturesConfig
from knative.resources.documents import Document, parse_documents
from orchestrator.render.deployment import Deployment, DeploymentError
from orchestrator.render.files import objects
from orchestrator.render.noted import plain, to_yaml
from orchestrator.render.settings import needed_settings


def check(what: Deployment) -> None:
    """Raises DeploymentError with every complaint of the webhooks."""
    data: dict[str, dict[str, str]] = {}
    for one in needed_settings(what):
        data.setdefault(one.config_map, {})[one.key] = one.value
    problems = check_documents(
        _documents(what),
        autoscaler=AutoscalerConfig.from_data(data.get("config-autoscaler", {})),
        defaults=DefaultsConfig.from_data(data.get("config-defaults", {})),
        features=FeaturesConfig.from_data(data.get("config-features", {})),
    )
    if problems:
        raise DeploymentError("\n".join(["a cluster would refuse this:", *problems]))


def _documents(what: Deployment) -> list[Document]:
    return [document for one in objects(what) for document in parse_documents(to_yaml(plain(one.tree)), one.file)]
