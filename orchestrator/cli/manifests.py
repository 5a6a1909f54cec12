"""Manifests that -f names: files, folders and standard input, as kubectl takes them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from orchestrator.cli.console import fail

if TYPE_CHECKING:
    from knative.resources.documents import Document

STDIN = "standard input"
KINDS = {
    ("serving.knative.dev", "Service"): "service",
    ("serving.kserve.io", "InferenceService"): "inferenceservice",
    ("serving.kserve.io", "ServingRuntime"): "servingruntime",
    ("serving.kserve.io", "ClusterServingRuntime"): "clusterservingruntime",
    ("eventing.knative.dev", "Broker"): "broker",
    ("eventing.knative.dev", "Trigger"): "trigger",
    ("flows.knative.dev", "Sequence"): "sequence",
    ("", "ConfigMap"): "configmap",
}


def read_manifests(paths: Sequence[str]) -> list[Document]:
    """The objects in all of them. Raises ValidationError with every file and line that cannot be read; a path that
    does not exist ends the command with 2."""
    from knative.errors import ValidationError
    from knative.resources.documents import parse_documents, read_documents

    for path in paths:
        if path != "-" and not Path(path).exists():
            fail(f"the path {path} does not exist; -f takes a file, a folder, or - for standard input", 2)
    found: list[Document] = []
    problems: list[str] = []
    for path in paths:
        try:
            found += parse_documents(_stdin(), STDIN) if path == "-" else read_documents(Path(path))
        except ValidationError as error:
            problems += error.problems
    if problems:
        raise ValidationError(problems)
    return found


def _stdin() -> str:
    from knative.errors import ValidationError

    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValidationError([f"{STDIN}: not UTF-8 text"]) from None


def identity(document: Document) -> tuple[str, str, str] | None:
    """Kind, namespace and name of an object that a platform may hold; None for other kinds."""
    value = cast(Mapping[str, Any], document.value)
    group = str(value.get("apiVersion", "")).rpartition("/")[0]
    kind = KINDS.get((group, str(value.get("kind"))))
    metadata = value.get("metadata")
    if kind is None or not isinstance(metadata, dict):
        return None
    return kind, str(metadata.get("namespace") or "default"), str(metadata.get("name", ""))
