"""A Sequence as Brokers and Triggers: what its steps wait for lies in the same file, and outlives the platform.

    entry ──► Broker NAME-kn-sequence-0 ──Trigger──► step 0
                                                      │ reply
              Broker NAME-kn-sequence-1 ◄─────────────┘   ──Trigger──► step 1 ... ──► spec.reply

Knative makes a channel and a subscription of each step, under such names (pkg/apis/flows/v1/sequence_lifecycle.go).
A step that replies nothing ends the run of its event there; so does one that fails, after its retries and dead letter.
"""

from __future__ import annotations

from collections.abc import Iterator

from knative.eventing.delivery import DeliverySpec
from knative.eventing.destination import Destination
from knative.resources.objects import Broker, Sequence, Trigger

API_VERSION = "eventing.knative.dev/v1"
REPLY = "reply"


def part_name(sequence: str, part: int | str) -> str:
    """Of the Broker and the Trigger of a step, or of the reply."""
    return f"{sequence}-kn-sequence-{part}"


def parts_of(sequence: Sequence) -> Iterator[tuple[Broker, Trigger]]:
    """In order: one pair for each step, and one for the reply if there is one."""
    count = len(sequence.steps)
    for index, step in enumerate(sequence.steps):
        follower: int | str | None = index + 1 if index + 1 < count else REPLY if sequence.reply else None
        reply = "" if follower is None else part_name(sequence.name, follower)
        yield _part(sequence, index, step.destination, step.delivery, reply)
    if sequence.reply is not None:
        yield _part(sequence, REPLY, sequence.reply, sequence.steps[-1].delivery, "")


def _part(
    sequence: Sequence, part: int | str, destination: Destination, delivery: DeliverySpec | None, reply: str
) -> tuple[Broker, Trigger]:
    name = part_name(sequence.name, part)
    owner = {"apiVersion": "flows.knative.dev/v1", "kind": "Sequence", "name": sequence.name}
    metadata = {"name": name, "namespace": sequence.namespace, "ownerReferences": [owner]}
    broker = Broker(
        sequence.namespace, name, manifest={"apiVersion": API_VERSION, "kind": "Broker", "metadata": metadata}
    )
    trigger = Trigger(
        namespace=sequence.namespace,
        name=name,
        broker=name,
        subscriber=destination,
        max_in_flight=sequence.max_in_flight,
        delivery=delivery or DeliverySpec(),  # a channel's subscription without one does not retry
        reply=reply,
        manifest={"apiVersion": API_VERSION, "kind": "Trigger", "metadata": metadata, "spec": {"broker": name}},
    )
    return broker, trigger
