"""Brokers and Triggers for a platform, and events as bytes that are ready to be sent."""

from __future__ import annotations

from typing import Any

from benchmarks.http_load import Target
from benchmarks.platforms import NAMESPACE
from knative.eventing.event import CloudEvent
from knative.eventing.http_binding import BATCHED, to_binary

BROKER = "default"
PATH = f"/{NAMESPACE}/{BROKER}"
_EVENTING = "eventing.knative.dev/v1"


def broker() -> dict[str, Any]:
    return {"apiVersion": _EVENTING, "kind": "Broker", "metadata": {"name": BROKER, "namespace": NAMESPACE}}


def trigger(name: str, event_type: str, subscriber: dict[str, Any], in_flight: int | None = None) -> dict[str, Any]:
    """`in_flight` None: the platform's default."""
    annotations = {} if in_flight is None else {"stagecraft.dev/max-in-flight": str(in_flight)}
    return {
        "apiVersion": _EVENTING,
        "kind": "Trigger",
        "metadata": {"name": name, "namespace": NAMESPACE, "annotations": annotations},
        "spec": {"broker": BROKER, "filter": {"attributes": {"type": event_type}}, "subscriber": subscriber},
    }


def nobody() -> dict[str, Any]:
    """A subscriber that is not there: events for it wait on the disk."""
    return {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "nobody"}}


def single(address: str, event_type: str, size_bytes: int) -> Target:
    """One event with `size_bytes` of data, in binary mode."""
    headers, body = to_binary(_event(event_type, size_bytes, 0))
    return Target(address, PATH, body, dict(headers), 202)


def batched(address: str, event_type: str, size_bytes: int, count: int) -> Target:
    """So many events in one request."""
    events = [_event(event_type, size_bytes, number).to_json() for number in range(count)]
    return Target(address, PATH, b"[" + b",".join(events) + b"]", {"content-type": BATCHED}, 202)


def _event(event_type: str, size_bytes: int, number: int) -> CloudEvent:
    attributes = {
        "specversion": "1.0",
        "id": f"event-{number:08}",
        "source": "/benchmark",
        "type": event_type,
        "datacontenttype": "application/json",
    }
    return CloudEvent.build(attributes, b'"' + b"x" * (size_bytes - 2) + b'"')
