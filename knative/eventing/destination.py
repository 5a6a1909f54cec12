"""Where events go: a Destination of a Trigger or a dead letter sink (knative.dev/pkg duck/v1, destination.go)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from knative.resources.field_errors import Problems

_FIELDS = frozenset(("ref", "uri", "CACerts", "audience"))
_REF_FIELDS = ("apiVersion", "kind", "name", "namespace", "address", "group")


@dataclass(frozen=True, slots=True)
class Destination:
    """An object by reference, an absolute address, or an object and an address relative to its own.

    `namespace` "" is the namespace of whoever names the destination.
    """

    uri: str = ""
    api_version: str = ""
    kind: str = ""
    name: str = ""
    namespace: str = ""


def read_destination(tree: object, problems: Problems, path: str) -> Destination:
    """The Destination at `path` of a manifest; what is wrong with it goes to `problems`."""
    if not isinstance(tree, Mapping):
        problems.invalid(tree, path, "expected a mapping with ref, uri or both")
        return Destination()
    for name in sorted(str(key) for key in tree if key not in _FIELDS):
        problems.unknown(f"{path}.{name}")
    uri = _uri(tree, problems, path)
    if tree.get("ref") is None:
        if not uri and tree.get("uri") is None:
            problems.add("expected at least one, got none", f"{path}.ref", f"{path}.uri")
        elif uri and not _is_absolute(uri):
            problems.invalid(uri, f"{path}.uri", "expected an absolute http or https address, as there is no ref")
        return Destination(uri)
    if uri and urlsplit(uri).scheme:
        problems.add("an absolute URI is not allowed beside a ref", f"{path}.ref", f"{path}.uri")
    return _referred(tree["ref"], uri, problems, f"{path}.ref")


def _uri(tree: Mapping[str, object], problems: Problems, path: str) -> str:
    uri = tree.get("uri") or ""
    try:
        if isinstance(uri, str) and uri.isprintable() and (urlsplit(uri).port or True):
            return uri
    except ValueError:
        pass  # a port that is none, an address without its closing bracket
    problems.invalid(uri, f"{path}.uri", "expected a URI")
    return ""


def _is_absolute(uri: str) -> bool:
    parts = urlsplit(uri)
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _referred(ref: object, uri: str, problems: Problems, path: str) -> Destination:
    if not isinstance(ref, Mapping):
        problems.invalid(ref, path, "expected a mapping with apiVersion, kind and name")
        return Destination(uri)
    texts = {}
    for name, value in ref.items():
        if name not in _REF_FIELDS:
            problems.unknown(f"{path}.{name}")
        elif value is not None and not isinstance(value, str):
            problems.invalid(value, f"{path}.{name}", "expected a string")
        else:
            texts[name] = value or ""
    missing = [name for name in ("apiVersion", "kind", "name") if not ref.get(name)]
    if missing:
        problems.missing(*(f"{path}.{name}" for name in missing))
    return Destination(
        uri, texts.get("apiVersion", ""), texts.get("kind", ""), texts.get("name", ""), texts.get("namespace", "")
    )
