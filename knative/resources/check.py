"""Whether a cluster would take manifests: the rules of Knative's and KServe's webhooks without running anything."""

from __future__ import annotations

from collections.abc import Sequence

from knative.autoscaler.config import AutoscalerConfig
from knative.resources.config_maps import DefaultsConfig, FeaturesConfig
from knative.resources.documents import Document, Parser
from knative.resources.service import Settings


def check_documents(
    documents: Sequence[Document],
    *,
    autoscaler: AutoscalerConfig,
    defaults: DefaultsConfig,
    features: FeaturesConfig | None = None,
) -> list[str]:
    """What a cluster with Knative and KServe would refuse in `documents`, or run otherwise than meant; each with its
    file and line. What only one machine cannot do is left out, and kinds that nothing here knows pass."""
    parser = Parser(Settings(autoscaler, defaults, features or FeaturesConfig()))
    parser.read(documents)
    return [problem.text for problem in parser.problems if not problem.local]
