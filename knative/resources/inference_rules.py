"""What KServe refuses in an InferenceService, and what of one it does that a single machine cannot.

After pkg/apis/serving/v1beta1/{inference_service_validation,component,predictor}.go and pkg/validation/env_policy.go of
kserve/kserve. Some of it a cluster finds only while it reconciles, or never: names that break addresses, a container in
the wrong place, a `model` that turns into a multi-model server by accident.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator

from knative.autoscaler.annotations import GROUP as AUTOSCALING
from knative.resources.field_errors import Problems
from knative.resources.kserve_schema import FRAMEWORKS
from knative.resources.serving_runtime import KSERVE_CONTAINER
from knative.resources.trees import Tree, child, children, text, text_map, whole

PREDICTOR = "spec.predictor"
STORAGE_VARIABLE = "STORAGE_URI"
_GROUP = "serving.kserve.io"
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_NAME_MAX = 63  # of the Knative Service
_AUTOSCALERS = ("hpa", "external", "keda", "none")
_OTHER_MODES = ("Standard", "RawDeployment", "ModelMesh")
_METRICS = ("concurrency", "rps")
_HPA_METRICS = ("cpu", "memory")
_LOGGED = ("all", "request", "response")
_BLOCKED_VARIABLE = "PYTHONPATH"
_TRANSFORMER = "transformer-container"
_SCHEMES = (
    "gs", "s3", "pvc", "file", "https", "http", "hdfs", "webhdfs", "oci", "oci+native", "oci+fetch", "hf", "modelscope",
)  # fmt: skip
_HUB = re.compile(r"hf://[^/]+/[^/:]+(:[^/:]+)?")
_NOT_RUN = "is not run on one machine"
# fields of the predictor that pass and do nothing here
_IDLE_FIELDS = ("autoScaling", "batcher", "logger", "scaleMetricType")


def predictor_service_name(tree: Tree) -> str:
    """The name of the Knative Service of the predictor."""
    given = text(child(child(tree, "spec"), "predictor"), "name")
    return "-".join(part for part in (text(child(tree, "metadata"), "name"), given, "predictor") if part)


def check_inference_service(tree: Tree, problems: Problems) -> None:
    """`tree` has the types of kserve_schema.INFERENCE_SERVICE, and a namespace."""
    spec = child(tree, "spec")
    predictor = child(spec, "predictor")
    annotations = text_map(child(tree, "metadata"), "annotations")
    _check_name(tree, problems)
    _check_annotations(annotations, problems)
    for name in ("transformer", "explainer"):
        if name in spec:
            problems.cannot(f"the {name} {_NOT_RUN}", f"spec.{name}", details="make it a Service of its own")
    if "canary" in spec:
        problems.add("canary is only supported in deployment mode Standard", "spec.canary")
    if not predictor:
        problems.missing(PREDICTOR)
        return
    _check_scaling(predictor, annotations, problems)
    _check_rollout(predictor, problems)
    _check_implementation(predictor, problems)
    _check_variables(predictor, problems)
    _check_storage(predictor, problems)


def _check_name(tree: Tree, problems: Problems) -> None:
    metadata = child(tree, "metadata")
    name, namespace = text(metadata, "name"), text(metadata, "namespace")
    if not name and text(metadata, "generateName"):
        problems.cannot("give it a name: one machine makes none from generateName", "metadata.name")
    elif not name:
        problems.missing("metadata.name")
    elif not _NAME.fullmatch(name):
        problems.invalid(
            name,
            "metadata.name",
            'the name of an InferenceService consists of lower case letters, digits and "-", and starts with a letter',
        )
    elif len(made := predictor_service_name(tree)) > _NAME_MAX:
        short = _NAME_MAX - len(made) + len(name)
        details = f"its Knative Service is {made}: at most {_NAME_MAX} characters, so at most {short} for the name"
        problems.invalid(name, "metadata.name", details)
    for field, value in (("name", name), ("namespace", namespace)):
        for part in ("-predictor", "-default"):
            if part in value:
                details = f'KServe takes "{part}" out of the host name to make its address, which then leads nowhere'
                problems.invalid(value, f"metadata.{field}", details)


def _check_annotations(annotations: dict[str, str], problems: Problems) -> None:
    path = "metadata.annotations"
    key = f"{_GROUP}/autoscalerClass"
    if key in annotations and annotations[key] not in _AUTOSCALERS:
        problems.add(f"[{annotations[key]}] is not a supported autoscaler class type", f"{path}.{key}")
    elif key in annotations:
        problems.warn("has no effect in deployment mode Knative", f"{path}.{key}")
    key = f"{_GROUP}/deploymentMode"
    if annotations.get(key) in _OTHER_MODES:
        problems.cannot(
            f"one machine has no deployment mode {annotations[key]}",
            f"{path}.{key}",
            details="it runs InferenceServices in the mode Knative: leave the annotation out",
        )
    elif annotations.get(key, "Knative") not in ("Knative", "Serverless"):
        problems.invalid(annotations[key], f"{path}.{key}", f"Knative, {', '.join(_OTHER_MODES)} or Serverless")
    key = f"{_GROUP}/stop"
    if annotations.get(key) == "true":
        problems.cannot("one machine does not stop a service and keep it", f"{path}.{key}", details="delete it instead")


def _check_scaling(predictor: Tree, annotations: dict[str, str], problems: Problems) -> None:
    least, most = whole(predictor, "minReplicas", 1), whole(predictor, "maxReplicas")
    if least < 0:
        problems.add("'MinReplicas' cannot be less than 0", f"{PREDICTOR}.minReplicas")
    if most < 0:
        problems.add("'MaxReplicas' cannot be less than 0", f"{PREDICTOR}.maxReplicas")
    elif 0 < most < least:
        details = f"{least} is above {most}; minReplicas is 1 where it is not given"
        places = (f"{PREDICTOR}.minReplicas", f"{PREDICTOR}.maxReplicas")
        problems.add("'MinReplicas' cannot be greater than MaxReplicas", *places, details=details)
    if whole(predictor, "containerConcurrency") < 0:
        problems.add("parallelism cannot be less than 0", f"{PREDICTOR}.containerConcurrency")
    metric = text(predictor, "scaleMetric") or "concurrency"
    scaled_by_hpa = annotations.get(f"{AUTOSCALING}/class", "").startswith("hpa.")
    if metric not in (_HPA_METRICS if scaled_by_hpa else _METRICS) and "scaleMetric" in predictor:
        problems.add(f"[{metric}] is not a supported metric", f"{PREDICTOR}.scaleMetric")
    if metric == "rps" and whole(predictor, "scaleTarget", 1) < 1:
        problems.add("the target for rps should be greater than 1", f"{PREDICTOR}.scaleTarget")


def _check_rollout(predictor: Tree, problems: Problems) -> None:
    if "deploymentStrategy" in predictor:
        message = "customizing deploymentStrategy is only supported for raw deployment mode"
        problems.add(message, f"{PREDICTOR}.deploymentStrategy")
    if "workerSpec" in predictor:
        problems.add("workerSpec is only supported in deployment mode Standard", f"{PREDICTOR}.workerSpec")
    percent = whole(predictor, "canaryTrafficPercent", 100)
    problems.check_bounds(percent, f"{PREDICTOR}.canaryTrafficPercent", 0, 100)
    if 0 <= percent < 100:
        problems.cannot(f"a canary {_NOT_RUN}", f"{PREDICTOR}.canaryTrafficPercent")
    if "logger" in predictor and child(predictor, "logger").get("mode", "all") not in _LOGGED:
        problems.add("invalid logger type", f"{PREDICTOR}.logger.mode")
    for name in _IDLE_FIELDS:
        if name in predictor:
            problems.warn(f"{name} has no effect on one machine", f"{PREDICTOR}.{name}")


def _check_implementation(predictor: Tree, problems: Problems) -> None:
    containers = children(predictor, "containers")
    names = [text(container, "name") for container in containers]
    given = [name for name in ("model", *FRAMEWORKS) if name in predictor]
    custom = [f"{PREDICTOR}.containers"] if KSERVE_CONTAINER in names or (containers and not given) else []
    found = [*(f"{PREDICTOR}.{name}" for name in given), *custom]
    if not found:
        problems.add("exactly one of model, containers must be specified", PREDICTOR)
    elif len(found) > 1:
        problems.add("exactly one of these must be specified", *found)
    elif custom:
        _check_custom(containers, names, problems)
    elif given == ["model"]:
        _check_model(predictor, problems)
    else:
        details = f"write it as `model` with `modelFormat: {{name: {given[0]}}}` and a ServingRuntime for it"
        problems.cannot(f"{given[0]} {_NOT_RUN}", found[0], details=details)


def _check_custom(containers: list[Tree], names: list[str], problems: Problems) -> None:
    if len(containers) > 1 and names[0] not in ("", KSERVE_CONTAINER):
        message = f'"{KSERVE_CONTAINER}" must be the first of several containers'
        details = "KServe writes the container of that name in the place of the first, which is lost"
        problems.add(message, f"{PREDICTOR}.containers", details=details)
    for i, variable in enumerate(children(containers[0], "env")):
        name, value, here = text(variable, "name"), text(variable, "value"), f"{PREDICTOR}.containers[0].env[{i}]"
        if name == "PROTOCOL" and value not in ("v1", "v2"):
            problems.add(f"invalid protocol {value}. Must be one of [v1, v2]", f"{here}.value")
        if name == "MULTI_MODEL_SERVER" and value == "true":
            problems.add("it would be a multi-model server", here, details=_TRAP)


_TRAP = "KServe then adds an agent, and requests get to the container only for models that TrainedModels add"


def _check_model(predictor: Tree, problems: Problems) -> None:
    model, here = child(predictor, "model"), f"{PREDICTOR}.model"
    if text(model, "name"):
        problems.add("the 'name' field is not allowed in standard predictor", f"{here}.name")
    kind = text(child(model, "modelFormat"), "name")
    if not kind:
        problems.missing(f"{here}.modelFormat.name")
    stored = "storageUri" in model or "storage" in model or children(predictor, "storageUris")
    if kind and kind != "huggingface" and not stored and not children(predictor, "containers"):
        problems.add(
            "a model without storageUri or storage makes a multi-model server",
            here,
            details=f"{_TRAP}; give storageUri, or write `containers` instead of `model`",
        )


def _check_variables(predictor: Tree, problems: Problems) -> None:
    for container, path in _all_containers(predictor):
        variables = container.get("env")
        for i, variable in enumerate(variables if isinstance(variables, list) else []):  # init containers are open
            name = variable.get("name") if isinstance(variable, dict) else None
            if name == _BLOCKED_VARIABLE:
                problems.add(f"the variable {name} is not allowed", f"{path}.env[{i}].name")
            if name == STORAGE_VARIABLE and container.get("name") == _TRANSFORMER:
                message = "storage uri should not be specified in transformer container"
                problems.add(message, f"{path}.env[{i}].name")


def _all_containers(predictor: Tree) -> Iterator[tuple[Tree, str]]:
    for name in ("containers", "initContainers"):
        for i, container in enumerate(children(predictor, name)):
            yield container, f"{PREDICTOR}.{name}[{i}]"
    yield child(predictor, "model"), f"{PREDICTOR}.model"


def storage_uri(predictor: Tree) -> tuple[str, str]:
    """The one URI that the predictor's weights come from, and its place; empty without one."""
    model = child(predictor, "model")
    if "storageUri" in model:
        return text(model, "storageUri"), f"{PREDICTOR}.model.storageUri"
    first = children(predictor, "containers")[:1] if "model" not in predictor else []
    for i, variable in enumerate(children(first[0], "env") if first else []):
        if text(variable, "name") == STORAGE_VARIABLE:
            return text(variable, "value"), f"{PREDICTOR}.containers[0].env[{i}].value"
    return "", ""


def _check_storage(predictor: Tree, problems: Problems) -> None:
    uri, place = storage_uri(predictor)
    several = children(predictor, "storageUris")
    given = [(uri, place)] if place else []
    given += [(text(one, "uri"), f"{PREDICTOR}.storageUris[{i}].uri") for i, one in enumerate(several)]
    for one, here in given:
        _check_uri(one, here, problems)
    if place and several:
        problems.add("setting both storageUri and storageUris is not supported", place, f"{PREDICTOR}.storageUris")
    _check_mounts(several, problems)
    if "storage" in child(predictor, "model"):
        here = f"{PREDICTOR}.model.storage"
        if place:
            problems.add("must provide only one of storageUri and storage.path", here, place)
        given.append(("the model", here))
    for one, here in given[:1]:
        problems.cannot(
            "one machine does not download models",
            here,
            details=f"KServe would put {one} into /mnt/models before the container starts; "
            "name the model to the container itself, such as in a variable",
        )


def _check_uri(uri: str, place: str, problems: Problems) -> None:
    scheme, mark, _ = uri.partition("://")
    if not uri:
        problems.missing(place)
    elif mark and scheme not in _SCHEMES:
        known = ", ".join(f"{one}://" for one in _SCHEMES)
        problems.invalid(uri, place, f"a storage URI begins with one of {known}, or is a path")
    elif scheme == "hf" and not _HUB.fullmatch(uri):
        problems.invalid(uri, place, "expected hf://OWNER/MODEL or hf://OWNER/MODEL:REVISION; folders cannot be named")


def _check_mounts(uris: list[Tree], problems: Problems) -> None:
    """Where several downloads go: absolute paths, and those that are no claims below one folder."""
    downloaded: list[str] = []
    claims: list[str] = []
    for i, one in enumerate(uris):
        path, here = text(one, "mountPath") or "/mnt/models", f"{PREDICTOR}.storageUris[{i}].mountPath"
        if not path.startswith("/") or path == "/" or ".." in path:
            problems.invalid(path, here, 'an absolute path without "..", other than "/"')
            continue
        seen = claims if text(one, "uri").startswith("pvc://") else downloaded
        if seen is claims and path in seen:
            problems.add("PVC storage paths must be unique", here)
        seen.append(path)
    if len(downloaded) > 1 and posixpath.commonpath(downloaded) == "/":
        problems.add("storage paths must have a common parent directory", f"{PREDICTOR}.storageUris")
