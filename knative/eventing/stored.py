"""CloudEvents as the store keeps them, and back."""

from __future__ import annotations

from collections.abc import Sequence

from knative.eventing.delivery import TTL_MAX, ttl
from knative.eventing.event import CloudEvent
from knative.eventing.store import Event, NewEvent

_TYPED = " typed"  # beside the attributes, none of which can be called so: names of those with a JSON type


def to_store(event: CloudEvent, broker: str, targets: Sequence[str]) -> NewEvent:
    """An event that has its TTL, for `targets` of the Broker NAMESPACE/NAME."""
    attributes = dict(event.attributes)
    if event.typed:
        attributes[_TYPED] = " ".join(sorted(event.typed))
    return NewEvent(
        broker=broker,
        key=f"{event.source} {event.id}",
        attributes=attributes,
        data=event.data,
        ttl=ttl(event) or TTL_MAX,
        targets=targets,
    )


def from_store(event: Event) -> CloudEvent:
    """Raises InvalidEvent for a row that no Broker has written."""
    attributes = {name: text for name, text in event.attributes.items() if name != _TYPED}
    return CloudEvent(attributes, event.data, frozenset(event.attributes.get(_TYPED, "").split()))
