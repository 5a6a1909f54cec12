"""Manifests from files, and the resources in them.

documents = read_documents(Path("knative/"))
parsed = parse(documents, autoscaler=AutoscalerConfig(), defaults=DefaultsConfig())
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from knative.autoscaler.annotations import KPA
from knative.autoscaler.config import AUTOSCALER_KEYS, AutoscalerConfig
from knative.errors import ValidationError
from knative.resources import schema
from knative.resources.config_maps import DEFAULTS_KEYS, FEATURES_KEYS, DefaultsConfig, FeaturesConfig
from knative.resources.eventing import EVENTING_API_VERSION, FLOWS_API_VERSION, read_broker, read_sequence, read_trigger
from knative.resources.field_errors import FieldError, Problems, shown
from knative.resources.identity import check_identity
from knative.resources.inference_service import INFERENCE_API_VERSION, read_inference_service
from knative.resources.kinds import reason_to_skip, unknown_kind
from knative.resources.objects import Broker, ConfigMap, InferenceService, Resource, ServingRuntime, Trigger
from knative.resources.objects import Sequence as Flow
from knative.resources.service import API_VERSION, ONLY_KPA, Settings, read_service
from knative.resources.serving_runtime import RUNTIME_API_VERSION, check_priorities, read_runtime
from knative.resources.trees import Tree, child, text, text_map
from knative.resources.yaml_text import Text, lines_below, read_json, read_yaml

FILE_BYTES_MAX = 4 << 20
_SUFFIXES = (".yaml", ".yml", ".json")
_NO_MANIFEST = "not a manifest: expected a mapping with apiVersion and kind"
SYSTEM_NAMESPACE = "knative-serving"  # where config maps are Knative's settings
_SETTINGS = ("config-autoscaler", "config-defaults", "config-features")


@dataclass(frozen=True, slots=True)
class Document:
    """One object of a manifest, as written. `line` is where it starts, `lines` where each of its fields does."""

    file: str
    line: int
    value: Mapping[str, object]
    lines: Mapping[str, int] = field(default_factory=dict)

    def line_of(self, path: str) -> int:
        """The line of the field at `path`, or of the nearest one around it that is written."""
        while path and path not in self.lines:
            path = path[: max(path.rfind("."), path.rfind("["), 0)]
        return self.lines[path] if path else self.line

    def place(self, path: str = "") -> str:
        """`line_of` with the file: "file.yaml:12"."""
        return f"{self.file}:{self.line_of(path)}"


@dataclass(frozen=True, slots=True)
class Skipped:
    """An object that a cluster needs and one machine does not."""

    kind: str
    name: str
    reason: str

    def __str__(self) -> str:
        return f"skipped {self.kind} {self.name}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Parsed:
    """What an apply comes to. `warnings` say what of it has no effect here; `settings` are those now in force."""

    resources: tuple[Resource, ...]
    skipped: tuple[Skipped, ...]
    warnings: tuple[str, ...]
    settings: Settings


def read_documents(path: Path) -> list[Document]:
    """The documents of a file, or of all .yaml, .yml and .json files under a folder, in the order of their names.

    Raises ValidationError with every file and line that cannot be read."""
    documents: list[Document] = []
    problems: list[str] = []
    for file in _files(path):
        try:
            documents.extend(parse_documents(read_text(file), str(file)))
        except ValidationError as error:
            problems.extend(error.problems)
    if problems:
        raise ValidationError(problems)
    return documents


def parse_documents(content: str, source: str) -> list[Document]:
    """The documents of a text; `source` is its file name, for errors and for telling JSON from YAML."""
    texts = read_json(content, source) if source.endswith(".json") else read_yaml(content, source)
    documents: list[Document] = []
    for found in texts:
        if not isinstance(found.value, dict):
            raise ValidationError([f"{source}:{found.line}: {_NO_MANIFEST}"])
        documents.extend(_unfolded(found, source))
    return documents


def parse(
    documents: Sequence[Document],
    *,
    autoscaler: AutoscalerConfig,
    defaults: DefaultsConfig,
    features: FeaturesConfig | None = None,
    runtimes: Sequence[ServingRuntime] = (),
    inference_services: Sequence[InferenceService] = (),
) -> Parsed:
    """The resources in `documents`: config maps, then runtimes, which are in force for the services beside them.

    `runtimes` and `inference_services` are those there are already; of the latter those come along that a runtime in
    `documents` changes. Raises ValidationError with all problems of all documents, each with its file and line."""
    parser = Parser(Settings(autoscaler, defaults, features or FeaturesConfig()), runtimes)
    parser.read(documents)
    parser.follow_runtimes(inference_services)
    if parser.problems:
        raise ValidationError([problem.text for problem in parser.problems])
    return parser.parsed()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    files = [file for file in files if file.suffix in _SUFFIXES]
    if not files:
        raise ValidationError([f"{path}: no manifests here; expected files named *.yaml, *.yml or *.json"])
    return files


def read_text(file: Path) -> str:
    """The text of a file. Raises ValidationError that says why it cannot be read."""
    try:
        with file.open("rb") as stream:
            data = stream.read(FILE_BYTES_MAX + 1)
    except FileNotFoundError:
        raise ValidationError([f"{file}: no such file or folder"]) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValidationError([f"{file} cannot be read: {reason}"]) from None
    if len(data) > FILE_BYTES_MAX:
        raise ValidationError([f"{file} is larger than {FILE_BYTES_MAX >> 20} MiB; that is no manifest"])
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValidationError([f"{file}:{line}: not UTF-8 text"]) from None


def _unfolded(found: Text, source: str) -> Iterator[Document]:
    """The members of a List, or the one object itself."""
    value = cast(Mapping[str, object], found.value)
    items = value.get("items")
    if value.get("kind") != "List" or not isinstance(items, list):
        yield Document(source, found.line, value, found.lines)
        return
    for i, item in enumerate(items):
        path = f"items[{i}]"
        line = found.lines.get(path, found.line)
        if not isinstance(item, dict):
            raise ValidationError([f"{source}:{line}: {_NO_MANIFEST}"])
        yield Document(source, line, item, dict(lines_below(found.lines, path)))


_SETTINGS_KINDS = frozenset({("v1", "ConfigMap")})
_RUNTIME_KINDS = frozenset({(RUNTIME_API_VERSION, kind) for kind in ("ServingRuntime", "ClusterServingRuntime")})

EventObject = tuple[Broker | Trigger | Flow | None, Problems]
_Object = tuple[Document, str, str]
"""A document, its apiVersion and its kind."""


def _rank(found: _Object) -> int:
    """What others depend on comes first."""
    _, api_version, kind = found
    return 0 if (api_version, kind) in _SETTINGS_KINDS else 1 if (api_version, kind) in _RUNTIME_KINDS else 2


@dataclass(frozen=True, slots=True)
class Problem:
    """A complaint with its file and line; `local` ones a cluster would not make."""

    text: str
    local: bool


class Parser:
    """Collects the resources of documents, and `problems`; nothing of it is good for running if there is one."""

    def __init__(self, settings: Settings, runtimes: Sequence[ServingRuntime] = ()) -> None:
        self._settings = settings
        self._runtimes = {(runtime.namespace, runtime.name): runtime for runtime in runtimes}
        self._resources: list[Resource] = []
        self._skipped: list[Skipped] = []
        self._warnings: list[str] = []
        self._seen: dict[tuple[str, str, str], Document] = {}
        self.problems: list[Problem] = []

    def read(self, documents: Iterable[Document]) -> None:
        """Settings first, then runtimes: they are in force for the services beside them."""
        objects = [found for document in documents if (found := self._identified(document))]
        for document, api_version, kind in sorted(objects, key=_rank):
            self._take(document, api_version, kind)

    def follow_runtimes(self, services: Sequence[InferenceService]) -> None:
        """Those of `services` that the runtimes read now change; KServe reconciles them at once."""
        if not any(isinstance(resource, ServingRuntime) for resource in self._resources):
            return
        for service in services:
            given = ("InferenceService", service.namespace, service.name) in self._seen
            if given or "model" not in child(child(service.manifest, "spec"), "predictor"):
                continue
            again, problems = read_inference_service(service.manifest, self._settings, tuple(self._runtimes.values()))
            name = f"InferenceService {service.namespace}/{service.name}"
            self._warnings += [f"{name} stays as it was: {error}" for error in problems.errors]
            if again is not None and again != service:
                self._resources.append(again)

    def parsed(self) -> Parsed:
        return Parsed(tuple(self._resources), tuple(self._skipped), tuple(self._warnings), self._settings)

    def _take(self, document: Document, api_version: str, kind: str) -> None:
        if (api_version, kind) in _SETTINGS_KINDS:
            self._config_map(document)
        elif (api_version, kind) in _RUNTIME_KINDS:
            self._runtime(document, kind)
        elif (api_version, kind) == (INFERENCE_API_VERSION, "InferenceService"):
            self._inference_service(document)
        elif (api_version, kind) == (API_VERSION, "Service"):
            self._service(document)
        elif (api_version, kind) == (EVENTING_API_VERSION, "Broker"):
            self._event_object(document, read_broker)
        elif (api_version, kind) == (EVENTING_API_VERSION, "Trigger"):
            self._event_object(document, read_trigger)
        elif (api_version, kind) == (FLOWS_API_VERSION, "Sequence"):
            self._event_object(document, read_sequence)
        else:
            self._other(document, api_version, kind)

    def _identified(self, document: Document) -> _Object | None:
        if Path(document.file).stem.lower() == "kustomization" and "kind" not in document.value:
            self._skipped.append(Skipped("Kustomization", document.file, "it lists files for a cluster's tools"))
            return None
        names = {name: document.value.get(name) for name in ("apiVersion", "kind")}
        missing = [name for name, value in names.items() if value in (None, "")]
        if missing:
            self._problem(document, FieldError("missing field(s)", tuple(missing)))
        wrong = [name for name, value in names.items() if name not in missing and not isinstance(value, str)]
        for name in wrong:
            self._problem(document, FieldError(f"invalid value: {shown(names[name])}", (name,), "expected text"))
        return None if missing or wrong else (document, str(names["apiVersion"]), str(names["kind"]))

    def _service(self, document: Document) -> None:
        service, problems = read_service(document.value, self._settings)
        self._note(document, problems)
        if service is not None and self._first(document, "Service", service.namespace, service.name):
            self._resources.append(service)

    def _event_object(self, document: Document, read: Callable[[Mapping[str, object]], EventObject]) -> None:
        found, problems = read(document.value)
        self._note(document, problems)
        if found is not None and self._first(document, type(found).__name__, found.namespace, found.name):
            self._resources.append(found)

    def _inference_service(self, document: Document) -> None:
        runtimes = tuple(self._runtimes.values())
        service, problems = read_inference_service(document.value, self._settings, runtimes)
        self._note(document, problems)
        if service is None or not self._first(document, "InferenceService", service.namespace, service.name):
            return
        if self._first(document, "Service", service.namespace, service.service.name):
            self._resources.append(service)

    def _runtime(self, document: Document, kind: str) -> None:
        runtime, problems = read_runtime(document.value, cluster=kind == "ClusterServingRuntime")
        if runtime is not None:
            check_priorities(runtime, tuple(self._runtimes.values()), problems)
        self._note(document, problems)
        if runtime is not None and self._first(document, kind, runtime.namespace, runtime.name):
            self._runtimes[runtime.namespace, runtime.name] = runtime
            self._resources.append(runtime)

    def _config_map(self, document: Document) -> None:
        problems = Problems()
        tree = cast(Tree, schema.sifted(dict(document.value), schema.CONFIG_MAP, problems))
        metadata = child(tree, "metadata")
        name, namespace = text(metadata, "name"), text(metadata, "namespace") or "default"
        check_identity(name, namespace, problems)
        data = text_map(tree, "data")
        if not problems.errors and namespace == SYSTEM_NAMESPACE:
            self._settle(name, data, problems)
            if name not in _SETTINGS:
                problems.warn(f"{name} has no effect: one machine reads {', '.join(_SETTINGS)}", "metadata.name")
        elif name in _SETTINGS and namespace != "knative-eventing":  # which has a config-features of its own
            problems.warn(
                f"{name} has no effect in namespace {namespace}: Knative reads it in {SYSTEM_NAMESPACE}", "metadata"
            )
        self._note(document, problems)
        if not problems.errors and self._first(document, "ConfigMap", namespace, name):
            manifest = {**tree, "metadata": {**metadata, "namespace": namespace}}
            self._resources.append(ConfigMap(namespace, name, data, manifest))

    def _settle(self, name: str, data: Mapping[str, str], problems: Problems) -> None:
        """Puts Knative's settings in force."""
        try:
            match name:
                case "config-autoscaler":
                    self._settings = replace(self._settings, autoscaler=AutoscalerConfig.from_data(data))
                    _warn_keys(data, AUTOSCALER_KEYS, problems)
                    if self._settings.autoscaler.pod_autoscaler_class != KPA:
                        problems.warn(f"{ONLY_KPA}: it scales all revisions", "data.pod-autoscaler-class")
                case "config-defaults":
                    self._settings = replace(self._settings, defaults=DefaultsConfig.from_data(data))
                    _warn_keys(data, DEFAULTS_KEYS, problems)
                case "config-features":
                    self._settings = replace(self._settings, features=FeaturesConfig.from_data(data))
                    _warn_keys(data, FEATURES_KEYS, problems)
        except ValidationError as error:
            for problem in error.problems:
                problems.errors.append(FieldError(problem, (), at=_key_in(problem, data)))

    def _other(self, document: Document, api_version: str, kind: str) -> None:
        reason = reason_to_skip(api_version, kind)
        if reason:
            metadata = document.value.get("metadata")
            name = metadata.get("name") if isinstance(metadata, dict) else None
            self._skipped.append(Skipped(kind, str(name or document.place()), reason))
            return
        self._problem(document, FieldError(unknown_kind(api_version, kind), (), at="kind", local=True))

    def _first(self, document: Document, kind: str, namespace: str, name: str) -> bool:
        before = self._seen.setdefault((kind, namespace, name), document)
        if before is not document:
            where = f" in namespace {namespace}" if namespace else ""
            message = f'{kind} "{name}" is given twice{where}, first at {before.place()}'
            self._problem(document, FieldError(message, (), at="metadata.name"))
        return before is document

    def _note(self, document: Document, problems: Problems) -> None:
        for error in sorted(problems.errors, key=lambda error: document.line_of(error.place)):
            self._problem(document, error)
        self._warnings.extend(f"{document.place(warning.place)}: {warning}" for warning in problems.warnings)

    def _problem(self, document: Document, error: FieldError) -> None:
        self.problems.append(Problem(f"{document.place(error.place)}: {error}", error.local))


def _warn_keys(data: Mapping[str, str], known: frozenset[str], problems: Problems) -> None:
    for key in data:
        if key not in known and key != "_example":
            problems.warn(f'Knative knows no setting "{key}": it has no effect', f"data.{key}")


def _key_in(problem: str, data: Mapping[str, str]) -> str:
    """Where in the config map a complaint that names its key belongs."""
    found = sorted((key for key in data if key in problem), key=len)
    return f"data.{found[-1]}" if found else "data"
