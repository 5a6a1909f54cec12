"""An InferenceService as the Knative Service that KServe makes of its predictor.

    runtime, read under Knative's rules  <-  Service NAME-predictor  <-  InferenceService NAME, ServingRuntime

After pkg/controller/v1beta1/inferenceservice/{components/predictor,reconcilers/knative/ksvc_reconciler,utils/utils}.go,
pkg/controller/v1alpha1/utils/utils.go and pkg/apis/serving/v1beta1/predictor_custom.go of kserve/kserve.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from knative.autoscaler.annotations import GROUP as AUTOSCALING
from knative.autoscaler.annotations import KPA
from knative.resources import schema
from knative.resources.field_errors import FieldError, Problems, below
from knative.resources.inference_rules import (
    PREDICTOR,
    check_inference_service,
    predictor_service_name,
    storage_uri,
)
from knative.resources.kserve_schema import INFERENCE_SERVICE, MERGED_POD_FIELDS, POD_FIELDS
from knative.resources.objects import InferenceService, Service, ServingRuntime
from knative.resources.service import API_VERSION as KNATIVE_API_VERSION
from knative.resources.service import Settings, follows, read_service
from knative.resources.serving_runtime import KSERVE_CONTAINER, choose_runtime
from knative.resources.strategic_merge import MERGE_KEYS, index_of, strategic_merge
from knative.resources.trees import Tree, child, children, text, text_map, texts, whole

INFERENCE_API_VERSION = "serving.kserve.io/v1beta1"
_GROUP = "serving.kserve.io"
_VISIBILITY = "networking.knative.dev/visibility"
_ROLLOUT = "serving.knative.dev/rollout-duration"
_INITIAL_SCALE = f"{AUTOSCALING}/initial-scale"
_STORAGE = f"internal.{_GROUP}/storage-initializer-sourceuri"
_NAME_VARIABLE = "INFERENCE_SERVICE_NAME"
_DEFAULT_RESOURCES = {"cpu": "1", "memory": "2Gi"}  # config map inferenceservice-config, key inferenceService
_DROPPED = frozenset(
    {
        f"{AUTOSCALING}/min-scale", f"{AUTOSCALING}/max-scale", _STORAGE, "modelFormat",
        "kubectl.kubernetes.io/last-applied-configuration",
    }
)  # fmt: skip
_TEMPLATE = "spec.template"
_POD = f"{_TEMPLATE}.spec"
_FIRST = f"{_POD}.containers[0]"
_ANNOTATIONS = f"{_TEMPLATE}.metadata.annotations"


@dataclass(frozen=True, slots=True)
class Translated:
    """The manifest of the Knative Service. `origins` maps paths in it to those of the InferenceService."""

    manifest: Tree
    origins: Mapping[str, str]

    def origin(self, path: str) -> str:
        """Where the field at `path` comes from: that of the nearest field around it that has an origin."""
        around = (start for start in self.origins if below(path, start) or path.startswith(f"{start}="))
        start = max(around, key=len, default="")
        return self.origins[start] + path[len(start) :] if start else path

    def moved(self, error: FieldError) -> FieldError:
        """A complaint about the Knative Service as one about the InferenceService."""
        head, mark, places = error.message.rpartition(": ") if error.at else ("", "", "")
        if mark and error.at in places.split(", "):  # the message has its paths in it
            places = ", ".join(self.origin(place) for place in places.split(", "))
            return replace(error, message=f"{head}: {places}", at=self.origin(error.at))
        return replace(error, paths=tuple(map(self.origin, error.paths)), at=self.origin(error.at) if error.at else "")


def read_inference_service(
    manifest: Mapping[str, object], settings: Settings, runtimes: Sequence[ServingRuntime]
) -> tuple[InferenceService | None, Problems]:
    """The InferenceService, None if KServe or Knative would refuse it or one machine cannot run it; it never raises.

    Complaints about the Knative Service that it becomes are placed at the fields of the InferenceService."""
    misfits, problems = Problems(), Problems()
    tree = cast(Tree, schema.sifted(dict(manifest), INFERENCE_SERVICE, misfits))
    tree.pop("status", None)
    metadata = child(tree, "metadata")
    tree["metadata"] = {**metadata, "namespace": text(metadata, "namespace") or "default"}
    translated, problems = as_knative_service(tree, settings, runtimes)
    service = _read(translated, settings, problems) if translated else None
    problems.errors = misfits.errors + [e for e in problems.errors if not follows(e, misfits.errors)]
    if service is None or problems.errors:
        return None, problems
    return InferenceService(service.namespace, text(metadata, "name"), service, tree), problems


def _read(translated: Translated, settings: Settings, problems: Problems) -> Service | None:
    """The Knative Service; of complaints about the same field KServe's stands."""
    service, found = read_service(translated.manifest, settings)
    known = {place for error in problems.errors for place in (error.place, *error.paths)}
    moved = [translated.moved(error) for error in found.errors]
    problems.errors += [error for error in moved if error.place not in known]
    problems.warnings += [translated.moved(warning) for warning in found.warnings]
    return service


def as_knative_service(
    tree: Tree, settings: Settings, runtimes: Sequence[ServingRuntime]
) -> tuple[Translated | None, Problems]:
    """The Knative Service of an InferenceService, and KServe's complaints. None without containers, or without a
    runtime for a model. `tree` has the types of kserve_schema.INFERENCE_SERVICE, and a namespace."""
    problems = Problems()
    check_inference_service(tree, problems)
    translation = _Translation(tree, settings, problems)
    made = translation.made(runtimes)
    return (Translated(made, translation.origins) if made else None), problems


@dataclass(slots=True)
class _Translation:
    tree: Tree
    settings: Settings
    problems: Problems
    origins: dict[str, str] = field(default_factory=lambda: {_POD: PREDICTOR, _ANNOTATIONS: "metadata.annotations"})

    @property
    def metadata(self) -> Tree:
        return child(self.tree, "metadata")

    @property
    def predictor(self) -> Tree:
        return child(child(self.tree, "spec"), "predictor")

    def made(self, runtimes: Sequence[ServingRuntime]) -> Tree | None:
        """The Knative Service."""
        predictor, runtime = self.predictor, None
        if "model" in predictor:
            namespace, here = text(self.metadata, "namespace"), f"{PREDICTOR}.model"
            runtime = choose_runtime(child(predictor, "model"), namespace, runtimes, here, self.problems)
            pod = self._model_pod(runtime) if runtime else None
        else:
            pod = self._custom_pod()
        if pod is None:
            return None
        for container in children(pod, "containers"):
            _set_variable(container, _NAME_VARIABLE, text(self.metadata, "name"))
        spec = child(runtime.manifest, "spec") if runtime else {}
        return self._service(pod, spec, _place(runtime) if runtime else "")

    # -- the pod

    def _custom_pod(self) -> Tree | None:
        pod = self._own_pod()
        containers = copy.deepcopy(children(self.predictor, "containers"))
        if not containers:
            return None
        first = containers[0]
        if len(containers) == 1 or not text(first, "name"):
            first["name"] = KSERVE_CONTAINER
        first["resources"] = _with_defaults(child(first, "resources"))
        return {**pod, "containers": containers}

    def _own_pod(self) -> Tree:
        return {name: value for name, value in self.predictor.items() if name in POD_FIELDS and name != "containers"}

    def _model_pod(self, runtime: ServingRuntime) -> Tree | None:
        """Model over runtime; arguments of both, those of the runtime first."""
        spec, place = child(runtime.manifest, "spec"), f"{_place(runtime)}.spec"
        containers = children(spec, "containers")
        at = index_of(containers, "name", KSERVE_CONTAINER)
        if at is None:
            message = f'the runtime "{runtime.name}" has no container "{KSERVE_CONTAINER}"'
            self.problems.add(message, f"{PREDICTOR}.model")
            return None
        model = child(self.predictor, "model")
        own = {name: value for name, value in model.items() if name in schema.CONTAINER.fields and name != "name"}
        merged = strategic_merge(containers[at], own)
        if arguments := [*texts(containers[at], "args"), *texts(own, "args")]:
            merged["args"] = arguments
        self._trace(_FIRST, merged, (own, f"{PREDICTOR}.model"), (containers[at], f"{place}.containers[{at}]"))
        merged = cast(Tree, self._filled(merged, f"{PREDICTOR}.model"))
        merged["image"] = _image(text(merged, "image"), merged, text(model, "runtimeVersion"), runtime)
        base = {name: spec[name] for name in MERGED_POD_FIELDS if name in spec}
        pod = strategic_merge(base, self._own_pod())
        self._trace(_POD, pod, (self._own_pod(), PREDICTOR), (base, place))
        return {**pod, "containers": [merged, *self._sidecars(containers, at, place)]}

    def _sidecars(self, containers: list[Tree], at: int, place: str) -> list[Tree]:
        """The other containers of the runtime, then those of the predictor."""
        found = [(one, f"{place}.containers[{i}]") for i, one in enumerate(containers) if i != at]
        own = children(self.predictor, "containers")
        found += [(one, f"{PREDICTOR}.containers[{i}]") for i, one in enumerate(own)]
        for i, (_, origin) in enumerate(found, start=1):
            self.origins[f"{_POD}.containers[{i}]"] = origin
        return [copy.deepcopy(container) for container, _ in found]

    def _trace(self, here: str, merged: Tree, own: tuple[Tree, str], base: tuple[Tree, str]) -> None:
        """Notes of each field of `merged` at `here` whether it was written in `own` or in `base`."""
        if here == _FIRST:
            self.origins[here] = own[1]
        for name in merged:
            _, place = own if name in own[0] else base
            self.origins[f"{here}.{name}"] = f"{place}.{name}"
            if name in MERGE_KEYS and name in own[0] and name in base[0]:
                self._trace_members(f"{here}.{name}", merged, name, (own, base))

    def _trace_members(
        self, here: str, merged: Tree, name: str, sources: tuple[tuple[Tree, str], tuple[Tree, str]]
    ) -> None:
        key = MERGE_KEYS[name]
        for i, member in enumerate(children(merged, name)):
            for tree, place in sources:
                at = index_of(children(tree, name), key, member.get(key))
                if at is not None:
                    self.origins[f"{here}[{i}]"] = f"{place}.{name}[{at}]"
                    break

    def _filled(self, value: object, place: str) -> object:
        """With the metadata of the InferenceService in place of {{.Name}} and the like."""
        if isinstance(value, dict):
            return {key: self._filled(member, place) for key, member in value.items()}
        if isinstance(value, list):
            return [self._filled(member, place) for member in value]
        if not isinstance(value, str) or "{{" not in value:
            return value
        filled = _TEMPLATE_FIELD.sub(self._metadata_value, value)
        if "{{" in filled:
            details = "known are {{.Name}}, {{.Namespace}}, {{.Labels.KEY}} and {{.Annotations.KEY}}"
            self.problems.add(f"cannot fill in the template {value}", place, details=details)
        return filled

    def _metadata_value(self, match: re.Match[str]) -> str:
        name, group, key = match.groups()
        return text(self.metadata, name.lower()) if name else text_map(self.metadata, group.lower()).get(key, "")

    # -- around it

    def _service(self, pod: Tree, spec: Tree, place: str) -> Tree:
        """`spec` is that of the runtime at `place`, if there is one."""
        predictor = self.predictor
        if "containerConcurrency" in predictor:
            pod["containerConcurrency"] = predictor["containerConcurrency"]
        if "timeout" in predictor:
            for name in ("timeoutSeconds", "responseStartTimeoutSeconds"):
                pod[name] = predictor["timeout"]
                self.origins[f"{_POD}.{name}"] = f"{PREDICTOR}.timeout"
        annotations = self._annotations(text_map(spec, "annotations"), f"{place}.spec.annotations")
        labels = self._labels(text_map(spec, "labels"))
        moved = {_ROLLOUT: annotations.pop(_ROLLOUT)} if _ROLLOUT in annotations else {}
        if moved:
            self.origins[f"metadata.annotations.{_ROLLOUT}"] = self.origins[f"{_ANNOTATIONS}.{_ROLLOUT}"]
        tagged = text_map(self.metadata, "annotations").get(f"{_GROUP}/enable-tag-routing") == "true"
        on_template = {key: value for key, value in labels.items() if key != _VISIBILITY}
        return {
            "apiVersion": KNATIVE_API_VERSION,
            "kind": "Service",
            "metadata": {
                "name": predictor_service_name(self.tree),
                "namespace": self.metadata["namespace"],
                "labels": labels,
                **({"annotations": moved} if moved else {}),
            },
            "spec": {
                "template": {"metadata": {"labels": on_template, "annotations": annotations}, "spec": pod},
                "traffic": [{"latestRevision": True, "percent": 100, **({"tag": "latest"} if tagged else {})}],
            },
        }

    def _labels(self, of_runtime: Mapping[str, str]) -> dict[str, str]:
        own = {f"{_GROUP}/inferenceservice": text(self.metadata, "name"), "component": "predictor"}
        predictor = text_map(self.predictor, "labels")
        self.origins |= {f"metadata.labels.{key}": f"{PREDICTOR}.labels.{key}" for key in predictor}
        return {**of_runtime, **text_map(self.metadata, "labels"), **predictor, **own}

    def _annotations(self, of_runtime: Mapping[str, str], place: str) -> dict[str, str]:
        """Of the revision template: what the three say, then what KServe's own fields say."""
        uri, uri_place = storage_uri(self.predictor)
        found: dict[str, str] = {}
        for given, here in (
            (of_runtime, place),
            (self._initial_scale_checked(text_map(self.metadata, "annotations")), "metadata.annotations"),
            ({_STORAGE: uri} if uri_place else {}, ""),
            (text_map(self.predictor, "annotations"), f"{PREDICTOR}.annotations"),
        ):
            for key, value in given.items():
                if key in _DROPPED and here:
                    self._warn_dropped(key, f"{here}.{key}")
                    continue
                found[key] = value
                self.origins[f"{_ANNOTATIONS}.{key}"] = f"{here}.{key}" if here else uri_place
        return found | self._scaling(found)

    def _scaling(self, annotations: Mapping[str, str]) -> dict[str, str]:
        predictor = self.predictor
        found = {"min-scale": ("minReplicas", str(whole(predictor, "minReplicas", 1)))}
        if whole(predictor, "maxReplicas"):
            found["max-scale"] = ("maxReplicas", str(predictor["maxReplicas"]))
        if "scaleTarget" in predictor:
            found["target"] = ("scaleTarget", str(predictor["scaleTarget"]))
        if "scaleMetric" in predictor:
            found["metric"] = ("scaleMetric", text(predictor, "scaleMetric"))
        for name, (source, _) in found.items():
            self.origins[f"{_ANNOTATIONS}.{AUTOSCALING}/{name}"] = f"{PREDICTOR}.{source}"
        values = {f"{AUTOSCALING}/{name}": value for name, (_, value) in found.items()}
        return {f"{AUTOSCALING}/class": annotations.get(f"{AUTOSCALING}/class", KPA), **values}

    def _initial_scale_checked(self, annotations: Mapping[str, str]) -> dict[str, str]:
        """KServe takes an initial scale that Knative would refuse out without a word."""
        value = annotations.get(_INITIAL_SCALE)
        whole_number = value is not None and re.fullmatch(r"[+-]?[0-9]{1,18}", value)
        zero_allowed = self.settings.autoscaler.allow_zero_initial_scale
        if value is None or (whole_number and (zero_allowed or int(value) != 0)):
            return dict(annotations)
        reason = "0 needs allow-zero-initial-scale in config-autoscaler" if whole_number else "it is no whole number"
        self.problems.warn(f"KServe takes {_INITIAL_SCALE} out: {reason}", f"metadata.annotations.{_INITIAL_SCALE}")
        return {key: value for key, value in annotations.items() if key != _INITIAL_SCALE}

    def _warn_dropped(self, key: str, place: str) -> None:
        name = {f"{AUTOSCALING}/min-scale": "minReplicas", f"{AUTOSCALING}/max-scale": "maxReplicas"}.get(key)
        if name:
            self.problems.warn(f"KServe takes {key} out: give {PREDICTOR}.{name}", place)


_TEMPLATE_FIELD = re.compile(r"\{\{\s*\.(?:(Name|Namespace)|(Labels|Annotations)\.(\w+))\s*\}\}")
_TAG = re.compile(r":[\w.-]*$")


def _place(runtime: ServingRuntime) -> str:
    """How complaints name a field of the runtime; their line is that of `runtime` in the InferenceService."""
    return f"{PREDICTOR}.model.runtime[{runtime.name}]"


def _set_variable(container: Tree, name: str, value: str) -> None:
    variables = [dict(variable) for variable in children(container, "env")]
    at = index_of(variables, "name", name)
    if at is None:
        variables.append({"name": name, "value": value})
    else:
        variables[at]["value"] = value
    container["env"] = variables


def _with_defaults(resources: Tree) -> Tree:
    """Each of the two amounts that is not given, as request and as limit."""
    sides = {side: {**_DEFAULT_RESOURCES, **child(resources, side)} for side in ("requests", "limits")}
    return {**resources, **sides}


def _image(image: str, container: Tree, version: str, runtime: ServingRuntime) -> str:
    """With the tag that `runtimeVersion` names, or that of the build for the hardware."""
    tag = _TAG.search(image)
    if "@sha256:" in image:
        return image
    if version:
        return f"{image[: tag.start()] if tag else image}:{version}"
    kind = text_map(child(runtime.manifest, "metadata"), "annotations").get(f"{_GROUP}/server-type", "")
    on_gpu = any(name.endswith("/gpu") for name in _resource_names(container))
    if tag and on_gpu and kind in ("tensorflow-serving", "torchserve", "huggingfaceserver"):
        return image if image.endswith("-gpu") else f"{image}-gpu"
    if tag and not on_gpu and kind == "vllmserver" and not image[: tag.start()].endswith("-cpu"):
        return f"{image[: tag.start()]}-cpu{tag[0]}"
    return image


def _resource_names(container: Tree) -> set[str]:
    resources = child(container, "resources")
    return {name for side in ("requests", "limits") for name in child(resources, side)}
