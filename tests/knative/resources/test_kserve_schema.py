"""The tables of fields, against KServe's own definitions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from knative.resources.kserve_schema import INFERENCE_SERVICE, SERVING_RUNTIME
from knative.resources.schema import Shape

# metadata is a Kubernetes type, status is not read
_OWN = ("metadata", "status")


def definition(root: Path, name: str) -> dict[str, Any]:
    """The fields of a kind."""
    path = root.parent / "shared" / "crds" / "kserve" / f"{name}.yaml"
    if not path.exists():
        pytest.skip(f"{path} is absent: fields are not compared with KServe's definition")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # two megabytes
    (version,) = yaml.load(path.read_text(), loader)["spec"]["versions"]
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return schema


def strangers(shape: Shape, node: dict[str, Any], path: str = "") -> Iterator[str]:
    """Fields of `shape` that `node` does not have."""
    known = node.get("properties", {})
    for name in sorted({*shape.fields, *shape.refused}):
        here = f"{path}.{name}".lstrip(".")
        if here in _OWN:
            continue
        if name not in known:
            yield here
        elif name in shape.fields:
            child = shape.fields[name]
            array = child.kind == "array"
            yield from strangers(
                child.item if array and child.item else child, known[name].get("items", known[name]), here
            )


def forgotten(shape: Shape, node: dict[str, Any]) -> set[str]:
    return node["properties"].keys() - shape.fields.keys() - shape.refused


def test_the_fields_of_an_inference_service_are_those_of_the_definition(root: Path) -> None:
    crd = definition(root, "inferenceservices")
    spec, of_spec = INFERENCE_SERVICE.fields["spec"], crd["properties"]["spec"]
    predictor, of_predictor = spec.fields["predictor"], of_spec["properties"]["predictor"]
    assert list(strangers(INFERENCE_SERVICE, crd)) == []
    assert forgotten(spec, of_spec) == set()
    assert forgotten(predictor, of_predictor) == set()
    assert forgotten(predictor.fields["model"], of_predictor["properties"]["model"]) == set()


def test_the_fields_of_a_runtime_are_those_of_the_definition(root: Path) -> None:
    crd = definition(root, "servingruntimes")
    spec, of_spec = SERVING_RUNTIME.fields["spec"], crd["properties"]["spec"]
    assert list(strangers(SERVING_RUNTIME, crd)) == []
    assert forgotten(spec, of_spec) == set()
    containers = spec.fields["containers"].item
    assert containers is not None
    assert forgotten(containers, of_spec["properties"]["containers"]["items"]) == set()
