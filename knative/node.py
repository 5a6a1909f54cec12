"""What all revisions of a platform share, and what names one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import aiohttp

    from knative.images import Images
    from knative.kubelet.kubelet import Kubelet
    from knative.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Node:
    """The one machine."""

    kubelet: Kubelet
    session: aiohttp.ClientSession
    images: Images
    metrics: Metrics
    clock: Callable[[], float]  # Unix seconds that never go back
    drain_quiet_s: float
    ingress: str = ""  # HOST:PORT, given to replicas as their HTTP proxy: cluster-local names need no DNS
    grpc_service: str = ""  # NAMESPACE/NAME of the service whose replicas get a second port


@dataclass(frozen=True, slots=True)
class RevisionName:
    namespace: str
    service: str
    name: str
    generation: int
