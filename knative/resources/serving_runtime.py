"""ServingRuntimes: reading them, and which one serves a model.

After pkg/apis/serving/v1beta1/predictor_model.go, pkg/apis/serving/v1alpha1/servingruntime_types.go and
pkg/webhook/admission/servingruntime of kserve/kserve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

from knative.resources import schema
from knative.resources.field_errors import Problems
from knative.resources.identity import check_identity
from knative.resources.kserve_schema import SERVING_RUNTIME
from knative.resources.objects import ServingRuntime
from knative.resources.trees import Tree, child, children, text, texts

RUNTIME_API_VERSION = "serving.kserve.io/v1alpha1"
KSERVE_CONTAINER = "kserve-container"
_PROTOCOLS = ("v1", "v2", "grpc-v1", "grpc-v2")  # the order in which they are preferred


def read_runtime(manifest: Mapping[str, object], *, cluster: bool) -> tuple[ServingRuntime | None, Problems]:
    """The runtime, None if anything is wrong with the manifest. `cluster`: it is a ClusterServingRuntime."""
    problems = Problems()
    tree = cast(Tree, schema.sifted(dict(manifest), SERVING_RUNTIME, problems))
    tree.pop("status", None)
    metadata = child(tree, "metadata")
    name, namespace = text(metadata, "name"), "" if cluster else text(metadata, "namespace") or "default"
    check_identity(name, namespace, problems)
    _check_spec(child(tree, "spec"), problems)
    own = {key: value for key, value in metadata.items() if key != "namespace"}
    tree["metadata"] = own if cluster else {**own, "namespace": namespace}
    return (None if problems.errors else ServingRuntime(namespace, name, tree)), problems


def _check_spec(spec: Tree, problems: Problems) -> None:
    if not children(spec, "containers"):
        problems.missing("spec.containers")
    for i, container in enumerate(children(spec, "containers")):
        if not text(container, "name"):
            problems.missing(f"spec.containers[{i}].name")
    for i, listed in enumerate(children(spec, "supportedModelFormats")):
        here = f"spec.supportedModelFormats[{i}]"
        if not text(listed, "name"):
            problems.missing(f"{here}.name")
        if "priority" in listed and cast(int, listed["priority"]) < 1:
            problems.invalid(listed["priority"], f"{here}.priority", "must be 1 or more")


def check_priorities(runtime: ServingRuntime, others: Sequence[ServingRuntime], problems: Problems) -> None:
    """Two runtimes may not be first choice for the same format at the same time."""
    spec = child(runtime.manifest, "spec")
    for other in others:
        rival = child(other.manifest, "spec")
        same_place = other.namespace == runtime.namespace and other.name != runtime.name
        if not same_place or rival.get("disabled") is True or _is_multi_model(rival) != _is_multi_model(spec):
            continue
        if not set(texts(spec, "protocolVersions")) & set(texts(rival, "protocolVersions")):
            continue
        claimed = {_claim(listed) for listed in children(rival, "supportedModelFormats")} - {None}
        for i, listed in enumerate(children(spec, "supportedModelFormats")):
            if _claim(listed) in claimed:
                message = f'"{other.name}" has the same priority for the model format "{text(listed, "name")}"'
                problems.add(message, f"spec.supportedModelFormats[{i}].priority")


def _claim(listed: Tree) -> tuple[object, ...] | None:
    """Format, version and priority of a format that the runtime is chosen for automatically."""
    if listed.get("autoSelect") is not True or "priority" not in listed:
        return None
    return listed.get("name"), listed.get("version"), listed["priority"]


def choose_runtime(
    model: Tree, namespace: str, runtimes: Sequence[ServingRuntime], path: str, problems: Problems
) -> ServingRuntime | None:
    """The runtime of the `model` at `path`: by its name, else the first choice for its format."""
    seen = [runtime for runtime in runtimes if runtime.namespace in ("", namespace)]
    seen.sort(key=lambda runtime: runtime.namespace == "")  # those of the namespace go before those of the cluster
    name = text(model, "runtime")
    if name:
        return _named(name, model, seen, path, problems)
    suited = [runtime for runtime in seen if _suits(model, child(runtime.manifest, "spec"))]
    if not suited:
        given = _shown_format(model)
        details = "apply a ServingRuntime with it that has autoSelect, or name one in `runtime`"
        problems.cannot(f"no runtime found to support {given}", f"{path}.modelFormat", details=details)
        return None
    return min(suited, key=lambda runtime: _rank(model, runtime))


def _named(
    name: str, model: Tree, seen: Sequence[ServingRuntime], path: str, problems: Problems
) -> ServingRuntime | None:
    runtime = next((runtime for runtime in seen if runtime.name == name), None)
    here = f"{path}.runtime"
    if runtime is None:  # a cluster may have it
        details = f"apply it before, or along with this; known are: {', '.join(one.name for one in seen) or 'none'}"
        problems.cannot(f'there is no ServingRuntime or ClusterServingRuntime "{name}"', here, details=details)
        return None
    spec = child(runtime.manifest, "spec")
    protocol = text(model, "protocolVersion")
    if spec.get("disabled") is True:
        problems.add(f'the runtime "{name}" is disabled', here)
    elif protocol and not _speaks(spec, protocol):
        problems.add(f'the runtime "{name}" does not support the protocol {protocol}', here, f"{path}.protocolVersion")
    elif not _lists(spec, model, auto=False):
        message = f'the runtime "{name}" does not support {_shown_format(model)}'
        problems.add(message, here, f"{path}.modelFormat", details="it must be one of its supportedModelFormats")
    else:
        return runtime
    return None


def _suits(model: Tree, spec: Tree) -> bool:
    usable = spec.get("disabled") is not True and not _is_multi_model(spec) and "workerSpec" not in spec
    return usable and _speaks(spec, text(model, "protocolVersion") or "v1") and _lists(spec, model, auto=True)


def _is_multi_model(spec: Tree) -> bool:
    return spec.get("multiModel") is True


def _speaks(spec: Tree, protocol: str) -> bool:
    return not spec.get("protocolVersions") or protocol in texts(spec, "protocolVersions")


def _lists(spec: Tree, model: Tree, *, auto: bool) -> bool:
    """Whether the format of the model is one of the runtime's; with `auto` of those it is chosen for by itself."""
    wanted = child(model, "modelFormat")
    return any(
        listed.get("name") == wanted.get("name")
        and wanted.get("version") in (None, listed.get("version"))
        and (not auto or listed.get("autoSelect") is True)
        for listed in children(spec, "supportedModelFormats")
    )


def _rank(model: Tree, runtime: ServingRuntime) -> tuple[bool, int, int, str]:
    """The least is chosen: namespace, then priority, then protocol, then name."""
    spec, wanted = child(runtime.manifest, "spec"), text(child(model, "modelFormat"), "name")
    listed = next((one for one in children(spec, "supportedModelFormats") if one.get("name") == wanted), {})
    spoken = [_PROTOCOLS.index(one) + 1 for one in texts(spec, "protocolVersions") if one in _PROTOCOLS]
    return runtime.namespace == "", -cast(int, listed.get("priority", 0)), min(spoken, default=0), runtime.name


def _shown_format(model: Tree) -> str:
    wanted = child(model, "modelFormat")
    version = text(wanted, "version")
    return f'the model format "{text(wanted, "name")}"' + (f" version {version}" if version else "")
