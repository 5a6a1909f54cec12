"""Addresses of what a Destination refers to, under the names of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from urllib.parse import urljoin

from knative.eventing.broker import HOST
from knative.eventing.destination import Destination
from knative.eventing.sequence import part_name
from knative.resources.eventing import addressed_kind


def broker_url(namespace: str, name: str) -> str:
    """As on a cluster."""
    return f"http://{HOST}.svc.cluster.local/{namespace}/{name}"


def url_of(destination: Destination, exists: Callable[[str, str, str], bool]) -> str:
    """The URL; "" as long as what the reference names is not there. `exists` gets a kind (service, inferenceservice,
    broker, sequence), a namespace and a name."""
    if not destination.kind:
        return destination.uri
    kind, namespace, name = addressed_kind(destination), destination.namespace, destination.name
    if not exists(kind, namespace, name):
        return ""
    if kind == "sequence":
        return urljoin(broker_url(namespace, part_name(name, 0)), destination.uri)
    base = broker_url(namespace, name) if kind == "broker" else f"http://{name}.{namespace}.svc.cluster.local"
    return urljoin(base, destination.uri)


def not_found(destination: Destination) -> str:
    """Why there is no URL."""
    resource = f"{destination.kind.lower()}s.{destination.api_version.rpartition('/')[0]}"
    return f'{resource} "{destination.name}" not found in namespace {destination.namespace}'
