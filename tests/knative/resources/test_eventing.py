"""Brokers and Triggers from manifests: what is taken, and what is refused in Knative's words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from knative.errors import ValidationError
from knative.eventing.delivery import DeliverySpec
from knative.eventing.destination import Destination
from knative.resources.eventing import check_trigger_update, read_broker, read_trigger
from knative.resources.objects import Trigger
from knative.resources.schema import BROKER, TRIGGER, Shape

TO_SERVICE = {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "s"}, "uri": "/in"}
ANNOTATION = "stagecraft.dev/max-in-flight"


def trigger(annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    metadata = {"name": "t", "annotations": annotations or {}}
    body = {"broker": "default", "subscriber": TO_SERVICE, **spec}
    return {"apiVersion": "eventing.knative.dev/v1", "kind": "Trigger", "metadata": metadata, "spec": body}


def broker(annotations: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    metadata = {"name": "b", "namespace": "n", "annotations": annotations or {}}
    return {"apiVersion": "eventing.knative.dev/v1", "kind": "Broker", "metadata": metadata, "spec": spec}


def taken(manifest: dict[str, Any]) -> Trigger:
    found, problems = read_trigger(manifest)
    assert found is not None, problems.errors
    return found


def refused(manifest: dict[str, Any]) -> list[str]:
    read = read_trigger if manifest["kind"] == "Trigger" else read_broker
    found, problems = read(manifest)
    assert found is None
    return [str(error) for error in problems.errors]


def test_a_trigger_with_everything() -> None:
    sink = {"ref": {"apiVersion": "eventing.knative.dev/v1", "kind": "Broker", "name": "dead", "namespace": "other"}}
    delivery = {
        "retry": 2,
        "backoffPolicy": "linear",
        "backoffDelay": "PT1S",
        "timeout": "PT5S",
        "deadLetterSink": sink,
    }
    found = taken(trigger({ANNOTATION: "3"}, filters=[{"exact": {"type": "a"}}], delivery=delivery))
    assert (found.namespace, found.name, found.broker, found.max_in_flight) == ("default", "t", "default", 3)
    assert found.subscriber == Destination("/in", "serving.knative.dev/v1", "Service", "s", "default")
    dead = Destination("", "eventing.knative.dev/v1", "Broker", "dead", "other")
    assert found.delivery == DeliverySpec(2, "linear", 1.0, 5.0, dead)
    assert found.filter.predicate is not None


def test_a_trigger_with_nothing_but_what_it_needs() -> None:
    found = taken(trigger(subscriber={"uri": "https://example.com/x"}))
    assert (found.subscriber, found.delivery, found.max_in_flight) == (Destination("https://example.com/x"), None, 16)
    assert found.filter.predicate is None
    assert found == taken(trigger(subscriber={"uri": "https://example.com/x"}))


def test_a_broker_has_the_delivery_it_says() -> None:
    found, _ = read_broker(broker())
    assert found is not None
    assert (found.namespace, found.name, found.delivery) == ("n", "b", None)
    found, _ = read_broker(broker(delivery={"retry": 0}))
    assert found is not None
    assert found.delivery == DeliverySpec(retry=0)


def test_what_has_no_effect_is_said() -> None:
    annotations = {"eventing.knative.dev/broker.class": "Kafka"}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "name": "kafka-broker-config"}
    _, problems = read_broker(broker(annotations, config=config))
    assert [warning.place for warning in problems.warnings] == [
        "spec.config",
        "metadata.annotations.eventing.knative.dev/broker.class",
    ]
    _, problems = read_trigger(trigger({"eventing.knative.dev/injection": "enabled"}))
    assert len(problems.warnings) == 1


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (trigger(broker=None), "missing field(s): spec.broker"),
        (trigger(subscriber=None), "expected at least one, got none: spec.subscriber.ref, spec.subscriber.uri"),
        (trigger(subscriber={"uri": "/only"}), "invalid value: /only: spec.subscriber.uri"),
        (trigger(brokerRef={"name": "x"}), "must not set the field(s): spec.brokerRef"),
        (trigger(filters=[{"exact": {"Type": "a"}}]), 'invalid key name "Type": spec.filters[0].exact[Type]'),
        (
            trigger(filters=[{"exact": {"a": "b"}, "prefix": {"a": "b"}}]),
            "multiple dialects found, filters can have only one dialect set: spec.filters[0]",
        ),
        (trigger(filters=[{"cesql": "type ="}]), "invalid value: type =: spec.filters[0].cesql"),
        (trigger(delivery={"retry": -1}), "invalid value: -1: spec.delivery.retry"),
        (trigger(delivery={"backoffPolicy": "cubic"}), "invalid value: cubic: spec.delivery.backoffPolicy"),
        (trigger(delivery={"backoffDelay": "1s"}), "invalid value: 1s: spec.delivery.backoffDelay"),
        (trigger(delivery={"timeout": "PT0S"}), "invalid value: PT0S: spec.delivery.timeout"),
        (trigger(delivery={"retryAfterMax": "PT1S"}), "must not set the field(s): spec.delivery.retryAfterMax"),
        (trigger({ANNOTATION: "0"}), f"invalid value: 0: metadata.annotations.{ANNOTATION}"),
        (trigger({ANNOTATION: "²"}), f"invalid value: ²: metadata.annotations.{ANNOTATION}"),
        (
            trigger(subscriber={"ref": {"apiVersion": "v1", "kind": "Service", "name": "s"}}),
            "one machine has no address of a Service (v1): spec.subscriber.ref",
        ),
        (broker(delivery={"deadLetterSink": {}}), "expected at least one, got none: spec.delivery.deadLetterSink.ref"),
        (broker(delivery={"retries": 1}), 'unknown field "spec.delivery.retries"'),
    ],
)
def test_what_knative_refuses(manifest: dict[str, Any], expected: str) -> None:
    (complaint,) = refused(manifest)
    assert complaint.startswith(expected)


@pytest.mark.parametrize("name", ["", "Upper", "a/b"])
def test_names_are_those_of_kubernetes(name: str) -> None:
    manifest = trigger()
    manifest["metadata"]["name"] = name
    (complaint,) = refused(manifest)
    assert "metadata.name" in complaint


def test_a_trigger_does_not_move_to_another_broker() -> None:
    check_trigger_update(taken(trigger()), taken(trigger(filters=[{"exact": {"type": "a"}}])))
    with pytest.raises(ValidationError) as caught:
        check_trigger_update(taken(trigger()), taken(trigger(broker="other")))
    assert caught.value.problems == ('Immutable fields changed (-old +new): spec, broker\n-: "default"\n+: "other"',)


@pytest.mark.parametrize(("shape", "name"), [(BROKER, "broker"), (TRIGGER, "trigger")])
def test_the_fields_of_the_spec_are_those_of_the_definition(shape: Shape, name: str, root: Path) -> None:
    path = root.parent / "shared" / "crds" / "knative-eventing" / f"{name}.yaml"
    if not path.exists():
        pytest.skip(f"{path} is absent: fields are not compared with Knative's definition")
    (version,) = yaml.safe_load(path.read_text())["spec"]["versions"]
    spec = shape.fields["spec"]
    assert {*spec.fields, *spec.refused} == set(
        version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]
    )
