"""Whatever a manifest holds, what comes is resources or a ValidationError."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from knative.autoscaler.config import AutoscalerConfig
from knative.errors import ValidationError
from knative.resources.config_maps import DEFAULTS_KEYS, FEATURES_KEYS, DefaultsConfig
from knative.resources.documents import Document, parse
from knative.resources.kserve_schema import INFERENCE_SERVICE, SERVING_RUNTIME
from knative.resources.objects import Service
from knative.resources.schema import BROKER, SERVICE, TRIGGER, Shape

ODD = ["", "\0", "-1", "0", "1e9", "99999999999999999999", "a" * 300, "$(X)", "null", "::", "é", "\n", "1s", "9Ei"]
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.sampled_from(ODD)
)
KEYS = ["name", "image", "items", "metadata", "spec", "kind", "percent", "annotations", "limits", "httpGet", "env"]
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=6), inner, max_size=4)
    ),
    max_leaves=12,
)
slow = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def apply(value: dict[str, Any]) -> list[object]:
    """The resources; [] if the manifest is refused with complaints that say something."""
    document = Document("f.yaml", 1, value)
    try:
        return list(parse([document], autoscaler=AutoscalerConfig(), defaults=DefaultsConfig()).resources)
    except ValidationError as error:
        problems = error.problems
    assert problems
    assert all(problem.startswith("f.yaml:1: ") for problem in problems)
    return []


def shaped(shape: Shape) -> st.SearchStrategy[Any]:
    """Values that have the fields of `shape` and, mostly, their types."""
    match shape.kind:
        case "object":
            fields = {name: shaped(field) for name, field in shape.fields.items()}
            return st.fixed_dictionaries({}, optional=fields) | scalars
        case "array":
            return st.lists(shaped(shape.item or SERVICE), max_size=2)
        case "map":
            return st.dictionaries(st.text(max_size=5), shaped(shape.item) if shape.item else trees, max_size=2)
        case "string":
            return st.sampled_from([*ODD, "web", "web-1", "default"]) | scalars
        case "integer" | "int-or-string" | "quantity":
            return st.integers(-2, 9000) | st.sampled_from(ODD) | scalars
        case "boolean":
            return st.booleans() | scalars
        case _:
            return trees


def places(tree: object) -> list[tuple[Any, Any]]:
    """Every container of the tree with each of its keys."""
    if isinstance(tree, dict):
        members = list(tree.items())
    elif isinstance(tree, list):
        members = list(enumerate(tree))
    else:
        return []
    return [(tree, key) for key, _ in members] + [place for _, member in members for place in places(member)]


@slow
@given(trees)
def test_any_tree(tree: object) -> None:
    apply(tree if isinstance(tree, dict) else {"spec": tree})


@slow
@given(trees, trees)
def test_any_tree_as_a_service(metadata: object, spec: object) -> None:
    apply({"apiVersion": "serving.knative.dev/v1", "kind": "Service", "metadata": metadata, "spec": spec})


@slow
@given(shaped(SERVICE))
def test_anything_with_the_fields_of_a_service(tree: object) -> None:
    head = {"apiVersion": "serving.knative.dev/v1", "kind": "Service"}
    apply({**tree, **head} if isinstance(tree, dict) else head)


@settings(slow, max_examples=100)
@given(shaped(INFERENCE_SERVICE), shaped(SERVING_RUNTIME))
def test_anything_with_the_fields_of_kserves_kinds(service: object, runtime: object) -> None:
    for value, version, kind in ((service, "v1beta1", "InferenceService"), (runtime, "v1alpha1", "ServingRuntime")):
        head = {"apiVersion": f"serving.kserve.io/{version}", "kind": kind}
        apply({**value, **head} if isinstance(value, dict) else head)


@settings(slow, max_examples=100)
@given(shaped(BROKER), shaped(TRIGGER))
def test_anything_with_the_fields_of_eventings_kinds(broker: object, trigger: object) -> None:
    for value, kind in ((broker, "Broker"), (trigger, "Trigger")):
        head = {"apiVersion": "eventing.knative.dev/v1", "kind": kind}
        apply({**value, **head} if isinstance(value, dict) else head)


@settings(slow, max_examples=400)
@given(st.data())
def test_a_good_manifest_with_changes(manifest: dict[str, Any], data: st.DataObject) -> None:
    tree = copy.deepcopy(manifest)
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = data.draw(st.sampled_from(places(tree)))
        if data.draw(st.booleans()) and isinstance(holder, dict):
            del holder[key]
        else:
            holder[key] = data.draw(trees)
        if not tree:
            break
    before = copy.deepcopy(tree)
    for resource in apply(tree):
        if isinstance(resource, Service):
            again = apply(json.loads(json.dumps(resource.manifest)))
            assert again == [resource]  # defaulting has nothing left to do
    assert tree == before


@slow
@given(
    st.sampled_from(["config-autoscaler", "config-defaults", "config-features"]),
    st.dictionaries(st.sampled_from(sorted(DEFAULTS_KEYS | FEATURES_KEYS)) | st.text(max_size=5), trees, max_size=4),
)
def test_any_settings(name: str, data: dict[str, Any]) -> None:
    apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data})
