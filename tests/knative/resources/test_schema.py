"""The table of fields, against Knative's own definition."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from knative.resources.schema import SERVICE, Shape

# metadata is a Kubernetes type, status is not read; what is open there is given a rough shape here
_OWN = ("metadata", "status", "spec.template.metadata")


def crd_fields(node: dict[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    for name, child in node.get("properties", {}).items():
        here = f"{path}.{name}".lstrip(".")
        if here in _OWN:
            continue
        yield here, "int-or-string" if child.get("x-kubernetes-int-or-string") else child["type"]
        yield from crd_fields(child, here)
        yield from crd_fields(child.get("items", {}), f"{here}[]")


def own_fields(shape: Shape, path: str = "") -> Iterator[tuple[str, str]]:
    names = {"map": "object", "open": "object", "quantity": "int-or-string"}
    for name, child in shape.fields.items():
        here = f"{path}.{name}".lstrip(".")
        if here in _OWN:
            continue
        yield here, names.get(child.kind, child.kind)
        yield from own_fields(child, here)
        if child.item is not None and child.kind == "array":
            yield from own_fields(child.item, f"{here}[]")


def test_the_fields_and_types_are_those_of_the_definition(root: Path) -> None:
    crd = root.parent / "shared" / "crds" / "knative-serving" / "service.yaml"
    if not crd.exists():
        pytest.skip(f"{crd} is absent: the fields of a Service are not compared with Knative's definition")
    version = yaml.safe_load(crd.read_text())["spec"]["versions"][0]
    expected = dict(crd_fields(version["schema"]["openAPIV3Schema"]))
    assert len(expected) > 150
    assert dict(own_fields(SERVICE)) == expected


def refused_fields(shape: Shape) -> Iterator[tuple[str, Shape]]:
    for name in shape.refused:
        yield name, shape
    for child in (*shape.fields.values(), *([shape.item] if shape.item else [])):
        yield from refused_fields(child)


def test_no_field_is_both_allowed_and_refused() -> None:
    found = list(refused_fields(SERVICE))
    assert len(found) > 40
    assert [name for name, shape in found if name in shape.fields] == []
