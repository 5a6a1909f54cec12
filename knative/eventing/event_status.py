"""What `get broker`, `get trigger` and `status` show, in the words of Knative's conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from knative.eventing.addresses import broker_url, not_found
from knative.eventing.destination import Destination
from knative.eventing.dispatcher import Counts
from knative.eventing.sequence import part_name
from knative.resources.objects import Sequence, Trigger

_NO_SUBSCRIBER = "Unable to get the Subscriber's URI"
_NO_SINK = "Unable to get the dead letter sink's URI"


def broker_status(namespace: str, name: str, url: str) -> dict[str, Any]:
    """The block `status`; `url` is for clients on this machine."""
    address = {"name": "http", "url": url}
    inside = {"name": "cluster-local", "url": broker_url(namespace, name)}
    return {"address": address, "addresses": [address, inside], "conditions": [{"type": "Ready", "status": "True"}]}


def trigger_status(
    trigger: Trigger,
    *,
    has_broker: bool,
    dead_letter_sink: Destination | None,
    url_of: Callable[[Destination], str],
    waiting: int,
    dead_waiting: int,
) -> dict[str, Any]:
    """The block `status`; `deliveries` of it is our own."""
    subscriber, sink = trigger.subscriber, dead_letter_sink
    sink_url = url_of(sink) if sink else ""
    missing = f'Broker "{trigger.broker}" does not exist'
    parts = [
        _condition("BrokerReady", "" if has_broker else "BrokerDoesNotExist", missing),
        _condition("SubscriberResolved", "" if url_of(subscriber) else _NO_SUBSCRIBER, not_found(subscriber)),
        _condition(
            "DeadLetterSinkResolved", _NO_SINK if sink and not sink_url else "", not_found(sink) if sink else ""
        ),
    ]
    decisive = next((part for part in parts if part["status"] != "True"), parts[0])
    return {
        "subscriberUri": url_of(subscriber),
        **({"deadLetterSinkUri": sink_url} if sink else {}),
        "conditions": [*parts, {**decisive, "type": "Ready"}],
        "deliveries": {"waiting": waiting, "deadLettersWaiting": dead_waiting},
    }


def sequence_status(sequence: Sequence, parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The block `status` from those of the Triggers that it runs as; `deliveries` of it is our own."""
    every = list(parts)
    ready = [part["conditions"][-1] for part in every]
    decisive = next((one for one in ready if one["status"] != "True"), {"type": "Ready", "status": "True"})
    address = {"name": "http", "url": broker_url(sequence.namespace, part_name(sequence.name, 0))}
    return {
        "address": address,
        "conditions": [decisive],
        "deliveries": {"waiting": sum(part["deliveries"]["waiting"] for part in every)},
    }


def trigger_counts(trigger: Trigger | None, status: dict[str, Any], counts: Counts, dead: Counts) -> dict[str, Any]:
    """For `stagecraft status --json`; without a Trigger, of deliveries that wait for one to be applied."""
    ready = status["conditions"][-1]
    return {
        "broker": trigger.broker if trigger else "",
        "subscriber": status["subscriberUri"],
        "ready": ready["status"] == "True",
        "message": ready.get("message", ""),
        "waiting": status["deliveries"]["waiting"],
        "delivered": counts.delivered,
        "retried": counts.retried,
        "busy": counts.busy,
        "dead_lettered": counts.dead_lettered,
        "lost": counts.lost + dead.lost,
        "dead_letters_waiting": status["deliveries"]["deadLettersWaiting"],
    }


def not_applied(waiting: int, dead_waiting: int) -> dict[str, Any]:
    """In place of the status of a Trigger that an earlier platform had."""
    text = "apply the trigger to have its events delivered, or delete it to drop them"
    return {
        "subscriberUri": "",
        "conditions": [_condition("Ready", "NotApplied", text)],
        "deliveries": {"waiting": waiting, "deadLettersWaiting": dead_waiting},
    }


def _condition(kind: str, reason: str, message: str) -> dict[str, str]:
    """True without a reason."""
    if not reason:
        return {"type": kind, "status": "True"}
    return {"type": kind, "status": "False", "reason": reason, "message": message}
