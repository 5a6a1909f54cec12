"""A Broker, Trigger or Sequence from a manifest: defaulting, then validation, as Knative's webhooks do them.

After pkg/apis/eventing/v1/{broker,trigger}_{defaults,validation}.go and pkg/apis/flows/v1/sequence_validation.go of
knative/eventing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar, cast

from knative.errors import ValidationError
from knative.eventing.delivery import DeliverySpec, read_delivery
from knative.eventing.destination import Destination, read_destination
from knative.eventing.filters import read_filter
from knative.resources import schema
from knative.resources.field_errors import Problems, shown
from knative.resources.identity import check_identity
from knative.resources.objects import Broker, Sequence, Step, Trigger
from knative.resources.service import follows
from knative.resources.trees import Tree, child, text, text_map

EVENTING_GROUP = "eventing.knative.dev"
EVENTING_API_VERSION = f"{EVENTING_GROUP}/v1"
FLOWS_GROUP = "flows.knative.dev"
FLOWS_API_VERSION = f"{FLOWS_GROUP}/v1"
MAX_IN_FLIGHT = "stagecraft.dev/max-in-flight"  # annotation of a Trigger
_IN_FLIGHT, _IN_FLIGHT_MAX = 16, 1000
_CLASS = f"{EVENTING_GROUP}/broker.class"
_CLASS_OF_A_CLUSTER = "MTChannelBasedBroker"
_INJECTION = f"{EVENTING_GROUP}/injection"
_DEPENDENCY = "knative.dev/dependency"
_RETRY_AFTER = "on a cluster this needs delivery-retryafter in config-features; this broker waits as long anyway"

T = TypeVar("T")

# API group and kind of what a reference may name here
ADDRESSABLE = {
    ("serving.knative.dev", "Service"): "service",
    ("serving.kserve.io", "InferenceService"): "inferenceservice",
    (EVENTING_GROUP, "Broker"): "broker",
    (FLOWS_GROUP, "Sequence"): "sequence",
}


def addressed_kind(destination: Destination) -> str:
    """service, inferenceservice, broker or sequence; "" for other kinds."""
    return ADDRESSABLE.get((destination.api_version.rpartition("/")[0], destination.kind), "")


def read_broker(manifest: Mapping[str, object]) -> tuple[Broker | None, Problems]:
    """The Broker, None if anything is wrong with the manifest; it never raises, whatever the manifest holds."""
    tree, misfits, problems = _sifted(manifest, schema.BROKER)
    metadata, spec = child(tree, "metadata"), child(tree, "spec")
    if "config" in spec:
        problems.warn("config has no effect on one machine, whose broker is a file", "spec.config")
    broker_class = text_map(metadata, "annotations").get(_CLASS, _CLASS_OF_A_CLUSTER)
    if broker_class != _CLASS_OF_A_CLUSTER:
        problems.warn(
            f"one machine has one class of broker, {broker_class} has no effect", f"metadata.annotations.{_CLASS}"
        )
    namespace = text(metadata, "namespace")
    broker = Broker(namespace, text(metadata, "name"), _delivery(spec, namespace, problems), tree)
    return _without_misfits(broker, misfits, problems)


def read_trigger(manifest: Mapping[str, object]) -> tuple[Trigger | None, Problems]:
    """The Trigger, None if anything is wrong with the manifest; it never raises, whatever the manifest holds."""
    tree, misfits, problems = _sifted(manifest, schema.TRIGGER)
    metadata, spec = child(tree, "metadata"), child(tree, "spec")
    namespace = text(metadata, "namespace")
    if not text(spec, "broker"):
        problems.missing("spec.broker")
    trigger = Trigger(
        namespace=namespace,
        name=text(metadata, "name"),
        broker=text(spec, "broker"),
        subscriber=_destination(spec.get("subscriber", {}), namespace, problems, "spec.subscriber"),
        filter=read_filter(spec, problems),
        delivery=_delivery(spec, namespace, problems),
        max_in_flight=_max_in_flight(text_map(metadata, "annotations"), problems),
        manifest=tree,
    )
    _warn_annotations(text_map(metadata, "annotations"), problems)
    return _without_misfits(trigger, misfits, problems)


def read_sequence(manifest: Mapping[str, object]) -> tuple[Sequence | None, Problems]:
    """The Sequence, None if anything is wrong with the manifest; it never raises, whatever the manifest holds."""
    tree, misfits, problems = _sifted(manifest, schema.SEQUENCE)
    metadata, spec = child(tree, "metadata"), child(tree, "spec")
    namespace = text(metadata, "namespace")
    if "channelTemplate" in spec:
        problems.warn("channelTemplate has no effect on one machine, whose channels are a file", "spec.channelTemplate")
    steps = spec.get("steps")
    if not isinstance(steps, list) or not steps:
        problems.missing("spec.steps")
        steps = []
    reply = spec.get("reply")
    sequence = Sequence(
        namespace=namespace,
        name=text(metadata, "name"),
        steps=tuple(_step(step, namespace, problems, f"spec.steps[{index}]") for index, step in enumerate(steps)),
        max_in_flight=_max_in_flight(text_map(metadata, "annotations"), problems),
        reply=None if reply is None else _destination(reply, namespace, problems, "spec.reply"),
        manifest=tree,
    )
    return _without_misfits(sequence, misfits, problems)


def _step(tree: object, namespace: str, problems: Problems, path: str) -> Step:
    """A Destination with a block `delivery` among its fields."""
    if not isinstance(tree, Mapping):
        return Step(_destination(tree, namespace, problems, path))
    rest = {name: value for name, value in tree.items() if name != "delivery"}
    delivery = _delivery(dict(tree), namespace, problems, f"{path}.delivery")
    return Step(_destination(rest, namespace, problems, path), delivery)


def check_trigger_update(old: Trigger, new: Trigger) -> None:
    """Raises ValidationError if the Trigger moves to another Broker (Trigger.CheckImmutableFields)."""
    if old.broker != new.broker:
        diff = f'-: "{old.broker}"\n+: "{new.broker}"'
        raise ValidationError([f"Immutable fields changed (-old +new): spec, broker\n{diff}"])


def _sifted(manifest: Mapping[str, object], shape: schema.Shape) -> tuple[Tree, Problems, Problems]:
    """The object with its namespace, complaints about types, and complaints about its metadata."""
    misfits, problems = Problems(), Problems()
    tree = cast(Tree, schema.sifted(dict(manifest), shape, misfits))
    tree.pop("status", None)
    metadata = child(tree, "metadata")
    name, namespace = text(metadata, "name"), text(metadata, "namespace") or "default"
    tree["metadata"] = {**metadata, "namespace": namespace}
    check_identity(name, namespace, problems)
    return tree, misfits, problems


def _without_misfits(found: T, misfits: Problems, problems: Problems) -> tuple[T | None, Problems]:
    problems.errors = misfits.errors + [e for e in problems.errors if not follows(e, misfits.errors)]
    return (None if problems.errors else found), problems


def _delivery(spec: Tree, namespace: str, problems: Problems, path: str = "spec.delivery") -> DeliverySpec | None:
    if spec.get("delivery") is None:
        return None
    delivery = read_delivery(spec["delivery"], problems, path)
    if delivery.retry_after_max_s is not None:
        problems.disallowed(f"{path}.retryAfterMax", details=_RETRY_AFTER)
    if delivery.dead_letter is None:
        return delivery
    sink = _local(delivery.dead_letter, namespace, problems, f"{path}.deadLetterSink")
    return replace(delivery, dead_letter=sink)


def _destination(tree: object, namespace: str, problems: Problems, path: str) -> Destination:
    return _local(read_destination(tree, problems, path), namespace, problems, path)


def _local(destination: Destination, namespace: str, problems: Problems, path: str) -> Destination:
    """With its namespace; one machine has fewer kinds of what has an address."""
    if not destination.kind or not destination.api_version:
        return destination
    if not addressed_kind(destination):
        here = ", ".join(f"{kind} ({group})" for group, kind in ADDRESSABLE)
        named = f"{destination.kind} ({destination.api_version})"
        problems.cannot(
            f"one machine has no address of a {named}", f"{path}.ref", details=f"expected {here}, or only a uri"
        )
    return replace(destination, namespace=destination.namespace or namespace)


def _max_in_flight(annotations: Mapping[str, str], problems: Problems) -> int:
    value = annotations.get(MAX_IN_FLIGHT, "")
    if not value:
        return _IN_FLIGHT
    if value.isascii() and value.isdigit() and 1 <= int(value[:9]) <= _IN_FLIGHT_MAX:
        return int(value)
    path, rule = f"metadata.annotations.{MAX_IN_FLIGHT}", f"expected a whole number from 1 to {_IN_FLIGHT_MAX}"
    problems.cannot(f"invalid value: {shown(value)}", path, details=rule)
    return 1


def _warn_annotations(annotations: Mapping[str, str], problems: Problems) -> None:
    for key in (_INJECTION, _DEPENDENCY):
        if key in annotations:
            problems.warn(f"the annotation {key} has no effect on one machine", f"metadata.annotations.{key}")
