"""The objects in rendered files, in the order in which they are applied."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from knative.errors import ValidationError
from knative.resources.documents import Document, parse_documents, read_documents, read_text

Tree = dict[str, Any]

_KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")  # as kustomize looks for them
_KN_SCRIPT = "deploy.sh"  # of `stagecraft render --format kn`
_RENDERED = b"# Rendered by stagecraft"
_KUSTOMIZE_GROUP = "kustomize.config.k8s.io"
_KNOWN_KEYS = ("apiVersion", "kind", "metadata", "namespace", "resources")


@dataclass(frozen=True, slots=True)
class Object:
    """An object as written. `namespace` is "" where the files name none."""

    tree: Tree
    place: str  # file:line
    api_version: str
    kind: str
    name: str
    namespace: str

    @property
    def group(self) -> str:
        """Of the API; "" is Kubernetes' core."""
        return self.api_version.rpartition("/")[0]

    def __str__(self) -> str:
        """As kubectl names it: service.serving.knative.dev/stage-0."""
        return f"{'.'.join(part for part in (self.kind.lower(), self.group) if part)}/{self.name}"


def read_objects(paths: Sequence[Path]) -> list[Object]:
    """The objects of files and folders. A folder's kustomization says which files and in what order; else it is all
    files, by name.

    Raises ValidationError with file and line of everything that is wrong."""
    problems: list[str] = []
    found: list[Object] = []
    for path in paths:
        try:
            found += _read(path)
        except ValidationError as error:
            problems += error.problems
    problems += _given_twice(found)
    if not problems and not found:
        problems.append(f"there are no objects in {', '.join(map(str, paths))}")
    if problems:
        raise ValidationError(problems)
    return found


def _read(path: Path) -> list[Object]:
    _check_not_for_kn(path)
    lists = [path / name for name in _KUSTOMIZATIONS if (path / name).is_file()] if path.is_dir() else []
    if lists:
        return _kustomized(lists[0])
    problems: list[str] = []
    found = []
    for document in read_documents(path):
        if _is_kustomization(document):
            continue
        try:
            found.append(_object(document))
        except ValidationError as error:
            problems += error.problems
    if problems:
        raise ValidationError(problems)
    return found


def _check_not_for_kn(folder: Path) -> None:
    """Without the services, deploying would start nothing, and undeploying leave them without their accounts."""
    script = folder / _KN_SCRIPT
    if script.is_file() and _RENDERED in script.read_bytes()[:4096]:
        raise ValidationError(
            [
                f"{folder} is rendered for kn: its services are in {script}, whose first lines say how to apply and "
                "how to remove them; or render it again without --format kn"
            ]
        )


def _kustomized(file: Path) -> list[Object]:
    """What a kustomization lists. One that changes objects is refused: kubectl can do that, this does not."""
    documents = parse_documents(read_text(file), str(file))
    if len(documents) != 1:
        raise ValidationError([f"{file}: expected one kustomization, found {len(documents)}"])
    (document,) = documents
    unknown = [key for key in document.value if key not in _KNOWN_KEYS]
    if unknown:
        raise ValidationError(
            [
                f"{document.place(unknown[0])}: {unknown[0]} changes objects, and stagecraft applies them as written; "
                f"use kubectl apply -k {file.parent}, or render it: kubectl kustomize {file.parent} > objects.yaml"
            ]
        )
    entries = document.value.get("resources") or []
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValidationError([f"{document.place('resources')}: expected a list of file names"])
    return _listed(file, document, cast(list[str], entries))


def _listed(file: Path, document: Document, entries: Sequence[str]) -> list[Object]:
    problems: list[str] = []
    found: list[Object] = []
    namespace = str(document.value.get("namespace") or "")
    for i, entry in enumerate(entries):
        path = file.parent / entry
        if not path.exists() or path.resolve() == file.parent.resolve():
            problems.append(f"{document.place(f'resources[{i}]')}: there is no file {path}")
            continue
        try:
            found += [_in_namespace(one, namespace) for one in _read(path)]
        except ValidationError as error:
            problems += error.problems
    if problems:
        raise ValidationError(problems)
    return found


def _in_namespace(one: Object, namespace: str) -> Object:
    """Kustomize moves objects into its namespace; here they must be written for it."""
    if namespace and one.namespace and one.namespace != namespace:
        raise ValidationError(
            [
                f"{one.place}: {one} is in namespace {one.namespace}, the kustomization says {namespace}; render it "
                f"again with --namespace {namespace}"
            ]
        )
    if one.namespace or not namespace:
        return one
    return replace(one, namespace=namespace)


def _is_kustomization(document: Document) -> bool:
    group = str(document.value.get("apiVersion", "")).rpartition("/")[0]
    return document.value.get("kind") == "Kustomization" and group in ("", _KUSTOMIZE_GROUP)


def _object(document: Document) -> Object:
    tree = cast(Tree, document.value)
    metadata = tree.get("metadata")
    metadata = metadata if isinstance(metadata, Mapping) else {}
    values = {
        "apiVersion": tree.get("apiVersion"),
        "kind": tree.get("kind"),
        "metadata.name": metadata.get("name"),
    }
    wrong = [path for path, value in values.items() if not isinstance(value, str) or not value]
    if wrong:
        raise ValidationError([f"{document.place(path)}: missing field: {path}" for path in wrong])
    api_version, kind, name = (str(value) for value in values.values())
    return Object(tree, document.place(), api_version, kind, name, str(metadata.get("namespace") or ""))


def _given_twice(objects: Sequence[Object]) -> Iterator[str]:
    seen: dict[tuple[str, ...], Object] = {}
    for one in objects:
        key = (one.group, one.kind, one.namespace, one.name)
        first = seen.setdefault(key, one)
        if first is not one:
            yield f"{one.place}: {one} is given twice, first at {first.place}"
