"""A Knative Service from a manifest: defaulting, then validation, as Knative's webhooks do them.

After pkg/apis/serving/v1/{service,revision,route}_{defaults,validation}.go, metadata_validation.go and fieldmask.go of
knative/serving.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from knative.autoscaler.annotations import GROUP as AUTOSCALING
from knative.autoscaler.annotations import KPA, check_annotations, find
from knative.autoscaler.config import AutoscalerConfig
from knative.autoscaler.durations import parse_duration_s
from knative.errors import ValidationError
from knative.resources import schema
from knative.resources.config_maps import DefaultsConfig, FeaturesConfig
from knative.resources.container import check_port_count, default_container, read_container
from knative.resources.field_errors import FieldError, Problems, below
from knative.resources.names import dns_1035_problem, is_dns_1123_label, is_dns_1123_subdomain, is_qualified_name
from knative.resources.objects import Container, RevisionTemplate, Service, TrafficTarget
from knative.resources.trees import Tree, child, children, text, text_map, whole
from knative.resources.volumes import check_volumes, default_mounts

GROUP = "serving.knative.dev"
API_VERSION = f"{GROUP}/v1"
_VISIBILITY = "networking.knative.dev/visibility"
_TEMPLATE = "spec.template"
_POD = "spec.template.spec"
ONLY_KPA = "one machine has only the KPA"
_QUEUE_SHARE = f"queue.sidecar.{GROUP}/resourcePercentage"

_SERVING_NAMES = (
    "creator", "lastModifier", "forceUpgrade", "lastPinned", "no-gc", "routes", "routingStateModified",
    "rollout-duration", "progress-deadline",
)  # fmt: skip
_AUTOSCALING_NAMES = (
    "activation-scale", "class", "initial-scale", "max-scale", "metric", "metric-aggregation-algorithm", "min-scale",
    "panic-threshold-percentage", "panic-window-percentage", "scale-down-delay", "scale-to-zero-pod-retention-period",
    "target", "target-burst-capacity", "target-utilization-percentage", "window",
)  # fmt: skip


def _spellings(group: str, name: str) -> tuple[str, str]:
    """The key in kebab-case and in camelCase."""
    head, *rest = name.split("-")
    return f"{group}/{name}", f"{group}/{head}{''.join(word.capitalize() for word in rest)}"


_KNOWN_ANNOTATIONS = frozenset(
    key
    for group, names in ((GROUP, _SERVING_NAMES), (AUTOSCALING, _AUTOSCALING_NAMES))
    for name in names
    for key in _spellings(group, name)
)


@dataclass(frozen=True, slots=True)
class Settings:
    """The cluster-wide settings that a Service is read under."""

    autoscaler: AutoscalerConfig = field(default_factory=AutoscalerConfig)
    defaults: DefaultsConfig = field(default_factory=DefaultsConfig)
    features: FeaturesConfig = field(default_factory=FeaturesConfig)


def read_service(manifest: Mapping[str, object], settings: Settings) -> tuple[Service | None, Problems]:
    """The Service, None if anything is wrong with the manifest; it never raises, whatever the manifest holds."""
    misfits, problems = Problems(), Problems()
    tree = cast(Tree, schema.sifted(dict(manifest), schema.SERVICE, misfits))
    tree = copy.deepcopy({key: value for key, value in tree.items() if key != "status"})
    _default_service(tree, settings.defaults)
    service = _service(tree, settings, problems)
    problems.errors = misfits.errors + [e for e in problems.errors if not follows(e, misfits.errors)]
    return (None if problems.errors else service), problems


def check_update(old: Service, new: Service) -> None:
    """Raises ValidationError if a template that names its revision changed and kept the name.

    After RevisionTemplateSpec.VerifyNameChange: a revision never changes under its name."""
    name = new.template.name
    if name and name == old.template.name and new.template != old.template:
        before, after = (_flat(service.manifest.get("spec"), "spec") for service in (old, new))
        changed = [path for path in sorted(before | after) if before.get(path) != after.get(path)]
        diff = [f"-{path}: {before.get(path, '')}\n+{path}: {after.get(path, '')}" for path in changed]
        message = f"Saw the following changes without a name change (-old +new): {_TEMPLATE}.metadata.name"
        raise ValidationError(["\n".join([message, *(text for text in diff if _TEMPLATE in text)])])


def _flat(value: object, path: str) -> dict[str, object]:
    """The scalars of a tree by their paths."""
    if isinstance(value, Mapping):
        members = [(f"{path}.{key}", member) for key, member in value.items()]
    elif isinstance(value, list):
        members = [(f"{path}[{i}]", member) for i, member in enumerate(value)]
    else:
        return {path: value}
    return {place: scalar for here, member in members for place, scalar in _flat(member, here).items()}


def follows(error: FieldError, misfits: list[FieldError]) -> bool:
    """Whether a complaint only comes from a value of the wrong type, which was taken out."""
    return any(below(path, misfit.place) for path in error.paths for misfit in misfits if misfit.place)


def _default_service(tree: Tree, defaults: DefaultsConfig) -> None:
    metadata = tree["metadata"] = dict(child(tree, "metadata"))
    metadata["namespace"] = text(metadata, "namespace") or "default"
    spec = tree["spec"] = dict(child(tree, "spec"))
    template = spec["template"] = dict(child(spec, "template"))
    pod = template["spec"] = dict(child(template, "spec"))
    _default_pod(pod, defaults)
    containers = children(pod, "containers")
    for i, container in enumerate(containers):
        name = defaults.container_name(text(metadata, "name"), text(metadata, "namespace"))
        if len(containers) == 1 or children(container, "ports"):
            default_container(pod, container, name if len(containers) == 1 else f"{name}-{i}", defaults)
        default_mounts(pod, container)
    spec["traffic"] = [dict(target) for target in children(spec, "traffic")] or [{"percent": 100}]
    for target in children(spec, "traffic"):
        target.setdefault("latestRevision", not text(target, "revisionName"))


def _default_pod(pod: Tree, defaults: DefaultsConfig) -> None:
    timeout_s = pod["timeoutSeconds"] = whole(pod, "timeoutSeconds") or defaults.revision_timeout_s
    for name, default_s in (
        ("responseStartTimeoutSeconds", defaults.response_start_timeout_s),
        ("idleTimeoutSeconds", defaults.idle_timeout_s),
    ):
        # a default as long as the timeout, or longer, is left out
        if name not in pod and 0 < default_s < timeout_s:
            pod[name] = default_s
    pod.setdefault("containerConcurrency", defaults.container_concurrency)
    if defaults.enable_service_links is not None:
        pod.setdefault("enableServiceLinks", defaults.enable_service_links)


def _service(tree: Tree, settings: Settings, problems: Problems) -> Service:
    metadata = child(tree, "metadata")
    _check_metadata(metadata, problems)
    spec = child(tree, "spec")
    template = child(spec, "template")
    return Service(
        namespace=text(metadata, "namespace"),
        name=text(metadata, "name"),
        template=_template(template, text(metadata, "name"), settings, problems),
        traffic=_traffic(children(spec, "traffic"), "spec.traffic", problems),
        annotations=text_map(metadata, "annotations"),
        labels=text_map(metadata, "labels"),
        manifest=tree,
    )


def _check_metadata(metadata: Tree, problems: Problems) -> None:
    name, namespace = text(metadata, "name"), text(metadata, "namespace")
    if not name:
        details = "give it a name: one machine makes none from generateName"
        complain = problems.cannot if text(metadata, "generateName") else problems.add
        complain("name or generateName is required", "metadata.name", details=details)
    elif problem := dns_1035_problem(name):
        problems.add(problem, "metadata.name")
    if not is_dns_1123_label(namespace):
        problems.invalid(namespace, "metadata.namespace", "not a DNS 1123 label")
    for key, value in text_map(metadata, "labels").items():
        if key == _VISIBILITY and value != "cluster-local":
            problems.invalid(value, f"metadata.labels.{key}")
        elif key.startswith(f"{GROUP}/"):
            problems.invalid_key(key, "metadata.labels")
    annotations = text_map(metadata, "annotations")
    for key in annotations:
        if key.startswith(AUTOSCALING):
            details = 'autoscaling annotations must be put under "spec.template.metadata.annotations" to work'
            problems.invalid_key(key, "metadata.annotations", details)
    _check_seconds(annotations, "rollout-duration", "metadata.annotations", problems)
    _warn_strangers(annotations, "metadata.annotations", problems)


def _check_seconds(annotations: Mapping[str, str], name: str, path: str, problems: Problems) -> None:
    """An annotation of serving.knative.dev that is a duration of whole seconds."""
    found = find(annotations, name, group=GROUP)
    if found is None or (name == "rollout-duration" and not found[1]):
        return
    key, value = found
    try:
        duration_s = parse_duration_s(value)
    except ValueError:
        problems.invalid(value, f"{path}.{key}")
        return
    if not duration_s.is_integer():
        problems.add(f"{name}={value} is not at second precision", f"{path}.{key}")
    if duration_s < 0 or (duration_s == 0 and name == "progress-deadline"):
        problems.add(f"{name}={value} must be positive", f"{path}.{key}")


def _warn_strangers(annotations: Mapping[str, str], path: str, problems: Problems) -> None:
    """Knative lets unknown annotations of its groups pass, and ignores them: mostly slips of the finger."""
    for key in annotations:
        if key.startswith((f"{GROUP}/", f"{AUTOSCALING}/")) and key not in _KNOWN_ANNOTATIONS:
            problems.warn(f'Knative knows no annotation "{key}": it has no effect', f"{path}.{key}")


def _template(template: Tree, service: str, settings: Settings, problems: Problems) -> RevisionTemplate:
    metadata, pod = child(template, "metadata"), child(template, "spec")
    annotations = text_map(metadata, "annotations")
    _check_revision_name(text(metadata, "name"), service, problems)
    _check_template_annotations(annotations, settings.autoscaler, problems)
    timeout_s, start_s, idle_s = _timeouts(pod, settings.defaults, problems)
    concurrency, most = whole(pod, "containerConcurrency"), settings.defaults.container_concurrency_max
    least = 0 if settings.defaults.allow_container_concurrency_zero else 1
    problems.check_bounds(concurrency, f"{_POD}.containerConcurrency", least, most)
    _check_pod(pod, settings.features, problems)
    return RevisionTemplate(
        container=_container(pod, settings.features, problems),
        container_concurrency=concurrency,
        timeout_s=timeout_s,
        response_start_timeout_s=start_s or timeout_s,
        idle_timeout_s=idle_s,
        annotations=annotations,
        labels=text_map(metadata, "labels"),
        name=text(metadata, "name"),
    )


def _check_revision_name(name: str, service: str, problems: Problems) -> None:
    if not name:
        return
    if problem := dns_1035_problem(name):
        problems.invalid(problem, f"{_TEMPLATE}.metadata.name")
    elif not name.startswith(f"{service}-"):
        problems.invalid(f'"{name}" must have prefix "{service}-"', f"{_TEMPLATE}.metadata.name")


def _check_template_annotations(
    annotations: Mapping[str, str], autoscaler: AutoscalerConfig, problems: Problems
) -> None:
    path = f"{_TEMPLATE}.metadata.annotations"
    for complaint in check_annotations(annotations, autoscaler, path=f"{path}."):
        _, _, places = complaint.rpartition(": ")
        problems.errors.append(FieldError(complaint, (), at=places.split(", ")[0]))
    if (found := find(annotations, "class")) and found[1] != KPA:
        problems.warn(f"{ONLY_KPA}: it scales this revision", f"{path}.{found[0]}")
    _check_seconds(annotations, "progress-deadline", path, problems)
    _check_queue_share(annotations, path, problems)
    _warn_strangers(annotations, path, problems)


def _check_queue_share(annotations: Mapping[str, str], path: str, problems: Problems) -> None:
    if _QUEUE_SHARE not in annotations:
        return
    value = annotations[_QUEUE_SHARE]
    try:
        within = 0.1 <= float(value) <= 100
    except ValueError:
        problems.invalid(value, f"{path}.[{_QUEUE_SHARE}]")
        return
    if not within:
        problems.bounds(value, f"{path}.[{_QUEUE_SHARE}]", 0.1, 100)


def _timeouts(pod: Tree, defaults: DefaultsConfig, problems: Problems) -> tuple[int, int, int]:
    """Total, until the response starts, and idle, in seconds; 0 for none."""
    timeout_s = whole(pod, "timeoutSeconds")
    problems.check_bounds(timeout_s, f"{_POD}.timeoutSeconds", 0, defaults.max_revision_timeout_s)
    for name in ("responseStartTimeoutSeconds", "idleTimeoutSeconds"):
        if whole(pod, name):
            problems.check_bounds(whole(pod, name), f"{_POD}.{name}", 0, timeout_s)
    return timeout_s, whole(pod, "responseStartTimeoutSeconds"), whole(pod, "idleTimeoutSeconds")


# fields of the pod spec that pass and do nothing here
_IDLE_FIELDS = ("imagePullSecrets", "serviceAccountName", *schema.POD_FLAGS)


def _check_pod(pod: Tree, features: FeaturesConfig, problems: Problems) -> None:
    for name, flag in schema.POD_FLAGS.items():
        if pod.get(name) and not features.lets_pass(flag):
            problems.disallowed(f"{_POD}.{name}", details=f"on a cluster this needs {flag} in config-features")
    if pod.get("automountServiceAccountToken") is True:
        problems.disallowed(f"{_POD}.automountServiceAccountToken")
    account = text(pod, "serviceAccountName")
    if account and not is_dns_1123_subdomain(account):
        problems.invalid(account, f"{_POD}.serviceAccountName", "not a DNS 1123 subdomain")
    for name in _IDLE_FIELDS:
        if pod.get(name):
            problems.warn(f"{name} has no effect on one machine", f"{_POD}.{name}")


def _container(pod: Tree, features: FeaturesConfig, problems: Problems) -> Container:
    volumes = check_volumes(pod, _POD, features, problems)
    containers = children(pod, "containers")
    check_port_count(containers, _POD, problems)
    if not containers:
        problems.missing(f"{_POD}.containers")
        return Container(image="")
    if len(containers) > 1:
        _check_several(containers, features, problems)
    read = [
        read_container(container, f"{_POD}.containers[{i}]", volumes, features, problems)
        for i, container in enumerate(containers)
    ]
    return read[0]


def _check_several(containers: list[Tree], features: FeaturesConfig, problems: Problems) -> None:
    """One container serves, and has the port; the others are its sidecars."""
    if not features.enabled("multi-container"):
        problems.add(f"multi-container is off, but found {len(containers)} containers", f"{_POD}.containers")
    if not any(children(container, "ports") for container in containers):
        problems.missing(f"{_POD}.containers.ports")
    for i, container in enumerate(containers):
        if not children(container, "ports") and not features.enabled("multi-container-probing"):
            for name in container.keys() & {"livenessProbe", "readinessProbe", "startupProbe"}:
                problems.disallowed(f"{_POD}.containers[{i}].{name}")
    problems.cannot(
        f"one machine runs one container per replica, but found {len(containers)} containers",
        f"{_POD}.containers",
        details="keep the one that serves; what a sidecar does has to be part of it, or a Service of its own",
    )


def _traffic(targets: list[Tree], path: str, problems: Problems) -> tuple[TrafficTarget, ...]:
    tags: dict[str, int] = {}
    for i, target in enumerate(targets):
        _check_target(target, f"{path}[{i}]", problems)
        tag = text(target, "tag")
        if tag and (problem := dns_1035_problem(tag)):
            problems.invalid(problem, f"{path}[{i}].tag")
        if tag in tags:
            problems.add(f'Multiple definitions for "{tag}"', f"{path}[{i}].tag", f"{path}[{tags[tag]}].tag")
        elif tag:
            tags[tag] = i
    percents = [whole(target, "percent") for target in targets]
    if sum(percents) != 100:
        problems.add(f"Traffic targets sum to {sum(percents)}, want 100", path)
    return tuple(
        TrafficTarget(text(target, "revisionName"), percent, text(target, "tag"))
        for target, percent in zip(targets, percents, strict=True)
    )


def _check_target(target: Tree, path: str, problems: Problems) -> None:
    revision, latest = text(target, "revisionName"), target["latestRevision"]
    if bool(revision) == latest:
        message = f'may not set revisionName "{revision}" when latestRevision is {str(latest).lower()}'
        problems.add(message, f"{path}.latestRevision")
    if text(target, "configurationName"):
        problems.disallowed(f"{path}.configurationName")
    elif revision and not is_qualified_name(revision):
        problems.invalid_key(revision, f"{path}.revisionName")
    problems.check_bounds(whole(target, "percent"), f"{path}.percent", 0, 100)
    if text(target, "url"):
        problems.disallowed(f"{path}.url")
