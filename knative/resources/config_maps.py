"""Knative's settings for defaults and features, from the ConfigMaps config-defaults and config-features.

After pkg/apis/config/defaults.go and features.go of knative/serving. The settings of the autoscaler are in
knative/autoscaler/config.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from knative.errors import ValidationError
from knative.resources.field_errors import INT32_MAX, shown
from knative.resources.quantities import parse_quantity

_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_TEMPLATE_FIELD = re.compile(r"\{\{\s*\.(Name|Namespace)\s*\}\}")

_RESOURCES = ("cpu", "memory", "ephemeral-storage")
_QUANTITY_KEYS = tuple(f"revision-{name}-{side}" for name in _RESOURCES for side in ("request", "limit"))


@dataclass(frozen=True, slots=True)
class DefaultsConfig:
    """What a Service gets where it says nothing, and the largest values it may ask for.

    `requests` and `limits` map "cpu", "memory" and "ephemeral-storage" to quantities."""

    revision_timeout_s: int = 300
    max_revision_timeout_s: int = 600
    response_start_timeout_s: int = 300
    idle_timeout_s: int = 0
    container_concurrency: int = 0
    container_concurrency_max: int = 1000
    allow_container_concurrency_zero: bool = True
    container_name_template: str = "user-container"
    enable_service_links: bool | None = False
    requests: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_data(cls, data: Mapping[str, str]) -> DefaultsConfig:
        """The settings in the data of config-defaults. Raises ValidationError with every problem."""
        reader, default = _Reader(data), cls()
        timeout_s = reader.whole("revision-timeout-seconds", default.revision_timeout_s)
        config = cls(
            revision_timeout_s=timeout_s,
            max_revision_timeout_s=reader.whole("max-revision-timeout-seconds", default.max_revision_timeout_s),
            response_start_timeout_s=reader.whole("revision-response-start-timeout-seconds", timeout_s),
            idle_timeout_s=reader.whole("revision-idle-timeout-seconds", default.idle_timeout_s),
            container_concurrency=reader.whole("container-concurrency", default.container_concurrency),
            container_concurrency_max=reader.whole(
                "container-concurrency-max-limit", default.container_concurrency_max
            ),
            allow_container_concurrency_zero=reader.flag("allow-container-concurrency-zero", True),
            container_name_template=reader.template("container-name-template", default.container_name_template),
            enable_service_links=reader.tri_state("enable-service-links", False),
            requests=reader.quantities("request"),
            limits=reader.quantities("limit"),
        )
        reader.problems.extend(_bounds(config))
        if reader.problems:
            raise ValidationError(reader.problems)
        return config

    def container_name(self, name: str, namespace: str) -> str:
        """The name of a container without one; the template may hold {{.Name}} and {{.Namespace}} of the Service."""
        values = {"Name": name, "Namespace": namespace}
        return _TEMPLATE_FIELD.sub(lambda match: values[match[1]], self.container_name_template)


DEFAULTS_KEYS = frozenset(
    {
        "revision-timeout-seconds", "max-revision-timeout-seconds", "revision-response-start-timeout-seconds",
        "revision-idle-timeout-seconds", "container-name-template", "init-container-name-template",
        "container-concurrency", "container-concurrency-max-limit", "allow-container-concurrency-zero",
        "enable-service-links", *_QUANTITY_KEYS,
    }
)  # fmt: skip


def _bounds(config: DefaultsConfig) -> list[str]:
    problems = []

    def not_greater(key: str, value: int, other: str, most: int) -> None:
        if value > most:
            problems.append(f"{key} ({value}) cannot be greater than {other} ({most})")

    def not_negative(key: str, value: int) -> None:
        if value < 0:
            problems.append(f"expected 0 <= {value} <= {INT32_MAX}: {key}")

    timeout_s = config.revision_timeout_s
    not_greater("revision-timeout-seconds", timeout_s, "max-revision-timeout-seconds", config.max_revision_timeout_s)
    for key, value in (
        ("revision-response-start-timeout-seconds", config.response_start_timeout_s),
        ("revision-idle-timeout-seconds", config.idle_timeout_s),
    ):
        not_greater(key, value, "revision-timeout-seconds", timeout_s)
        not_negative(key, value)
    # Knative lets this pass and then times every request out; nobody can mean it
    not_negative("revision-timeout-seconds", timeout_s)
    most = config.container_concurrency_max
    if most < 1:
        problems.append(f"expected 1 <= {most} <= {INT32_MAX}: container-concurrency-max-limit")
    if not 0 <= config.container_concurrency <= most:
        problems.append(f"expected 0 <= {config.container_concurrency} <= {most}: container-concurrency")
    return problems


class _Reader:
    """Typed access to the data of a config map; what does not parse is noted and replaced by the default."""

    def __init__(self, data: Mapping[str, str]) -> None:
        self._data = data
        self.problems: list[str] = []

    def whole(self, key: str, default: int) -> int:
        text = self._data.get(key)
        if text is None:
            return default
        if not _WHOLE.fullmatch(text):
            self.problems.append(f"invalid value: {shown(text)}: {key}\nexpected a whole number")
            return default
        return int(text)

    def flag(self, key: str, default: bool) -> bool:
        text = self._data.get(key)
        return default if text is None else text.lower() == "true"

    def tri_state(self, key: str, default: bool | None) -> bool | None:
        text = self._data.get(key)
        return default if text is None else {"true": True, "false": False}.get(text.lower())

    def template(self, key: str, default: str) -> str:
        text = self._data.get(key, default)
        if "{{" in _TEMPLATE_FIELD.sub("", text):
            self.problems.append(
                f"invalid value: {shown(text)}: {key}\nonly {{{{.Name}}}} and {{{{.Namespace}}}} are known"
            )
            return default
        return text

    def quantities(self, side: str) -> dict[str, str]:
        """By resource name, what revision-<name>-<side> say."""
        found = {}
        for name in _RESOURCES:
            key = f"revision-{name}-{side}"
            text = self._data.get(key)
            if text is None:
                continue
            try:
                parse_quantity(text)
            except ValueError as error:
                self.problems.append(f"invalid value: {shown(text)}: {key}\n{error}")
            else:
                found[name] = text
        return found


_STATES = ("enabled", "allowed", "disabled")
_FEATURE_DEFAULTS: Mapping[str, str] = {
    "multi-container": "enabled",
    "multi-container-probing": "disabled",
    "kubernetes.podspec-affinity": "disabled",
    "kubernetes.podspec-topologyspreadconstraints": "disabled",
    "kubernetes.podspec-hostaliases": "disabled",
    "kubernetes.podspec-nodeselector": "disabled",
    "kubernetes.podspec-tolerations": "disabled",
    "kubernetes.podspec-fieldref": "disabled",
    "kubernetes.podspec-runtimeclassname": "disabled",
    "kubernetes.podspec-dnspolicy": "disabled",
    "kubernetes.podspec-dnsconfig": "disabled",
    "kubernetes.podspec-securitycontext": "disabled",
    "kubernetes.podspec-shareprocessnamespace": "disabled",
    "kubernetes.podspec-hostipc": "disabled",
    "kubernetes.podspec-hostpid": "disabled",
    "kubernetes.podspec-hostnetwork": "disabled",
    "kubernetes.podspec-priorityclassname": "disabled",
    "kubernetes.podspec-schedulername": "disabled",
    "kubernetes.containerspec-addcapabilities": "disabled",
    "tag-header-based-routing": "disabled",
    "autodetect-http2": "disabled",
    "kubernetes.podspec-volumes-emptydir": "enabled",
    "kubernetes.podspec-volumes-image": "disabled",
    "kubernetes.podspec-volumes-hostpath": "disabled",
    "kubernetes.podspec-volumes-ephemeral": "disabled",
    "kubernetes.podspec-volumes-csi": "disabled",
    "kubernetes.podspec-init-containers": "disabled",
    "kubernetes.podspec-persistent-volume-claim": "disabled",
    "kubernetes.podspec-persistent-volume-write": "disabled",
    "kubernetes.podspec-volumes-mount-propagation": "disabled",
    "queueproxy.mount-podinfo": "disabled",
    "queueproxy.resource-defaults": "disabled",
    "secure-pod-defaults": "disabled",
}
FEATURES_KEYS = frozenset(_FEATURE_DEFAULTS)


@dataclass(frozen=True, slots=True)
class FeaturesConfig:
    """The flags of config-features: "enabled", "allowed" or "disabled"; a value that is none of these counts not."""

    flags: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_data(cls, data: Mapping[str, str]) -> FeaturesConfig:
        states = {key: text.lower() for key, text in data.items() if key in FEATURES_KEYS}
        return cls({key: state for key, state in states.items() if state in _STATES})

    def state(self, flag: str) -> str:
        return self.flags.get(flag, _FEATURE_DEFAULTS[flag])

    def lets_pass(self, flag: str) -> bool:
        """What a field mask asks: anything but disabled."""
        return self.state(flag) != "disabled"

    def enabled(self, flag: str) -> bool:
        return self.state(flag) == "enabled"
