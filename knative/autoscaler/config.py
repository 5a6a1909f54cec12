"""The autoscaler's settings: the config-autoscaler ConfigMap, and what it and a revision's annotations come to.

After knative/serving pkg/autoscaler/config/config.go and pkg/reconciler/autoscaling/kpa/resources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from knative.autoscaler import annotations as known
from knative.autoscaler.annotations import check_annotations
from knative.autoscaler.durations import format_duration, parse_duration_s
from knative.autoscaler.values import format_number, parse_bool, parse_float, parse_int32
from knative.errors import ValidationError

__all__ = ["AUTOSCALER_KEYS", "AutoscalerConfig", "ScalerSpec", "check_annotations", "scaler_spec"]

PROGRESS_DEADLINE_S = 600.0
"""config-deployment's default of progress-deadline."""

RPS_UTILIZATION = 0.7
"""Of the rps metric; container-concurrency-target-percentage has no part in it."""


@dataclass(frozen=True, slots=True)
class AutoscalerConfig:
    """config-autoscaler, with Knative's defaults. Durations are seconds."""

    container_concurrency_target_fraction: float = 0.7  # key container-concurrency-target-percentage
    container_concurrency_target_default: float = 100.0
    requests_per_second_target_default: float = 200.0
    target_burst_capacity: float = 211.0  # -1: unlimited, 0: off
    stable_window_s: float = 60.0
    panic_window_percentage: float = 10.0
    panic_threshold_percentage: float = 200.0
    max_scale_up_rate: float = 1000.0
    max_scale_down_rate: float = 2.0
    enable_scale_to_zero: bool = True
    scale_to_zero_grace_period_s: float = 30.0
    scale_to_zero_pod_retention_period_s: float = 0.0
    pod_autoscaler_class: str = known.KPA
    activator_capacity: float = 100.0
    initial_scale: int = 1
    allow_zero_initial_scale: bool = False
    min_scale: int = 0
    max_scale: int = 0  # 0: none
    scale_down_delay_s: float = 0.0
    max_scale_limit: int = 0  # 0: none

    @classmethod
    def from_data(cls, data: Mapping[str, str]) -> AutoscalerConfig:
        """The settings in a ConfigMap's `data`; keys that Knative does not know (and `_example`) are ignored.

        Raises ValidationError with every complaint about a value: key, value and allowed range.
        """
        values: dict[str, float | str] = {}
        problems: list[str] = []
        for key, (field, parse) in _KEYS.items():
            if key in data:
                try:
                    values[field] = parse(data[key])
                except ValueError as error:
                    problems.append(f'failed to parse "{key}": {error}')
        config = cls(**values)  # type: ignore[arg-type]  # the mapping of keys to typed fields is beyond mypy
        problems.extend(_complaints(config))
        if problems:
            raise ValidationError(problems)
        return config


def _fraction(text: str) -> float:
    """A percentage; values up to 1 are read as fractions, for old configurations."""
    value = parse_float(text)
    return value / 100 if value > 1 else value


_KEYS: dict[str, tuple[str, Callable[[str], float | str]]] = {
    "container-concurrency-target-percentage": ("container_concurrency_target_fraction", _fraction),
    "container-concurrency-target-default": ("container_concurrency_target_default", parse_float),
    "requests-per-second-target-default": ("requests_per_second_target_default", parse_float),
    "target-burst-capacity": ("target_burst_capacity", parse_float),
    "stable-window": ("stable_window_s", parse_duration_s),
    "panic-window-percentage": ("panic_window_percentage", parse_float),
    "panic-threshold-percentage": ("panic_threshold_percentage", parse_float),
    "max-scale-up-rate": ("max_scale_up_rate", parse_float),
    "max-scale-down-rate": ("max_scale_down_rate", parse_float),
    "enable-scale-to-zero": ("enable_scale_to_zero", parse_bool),
    "scale-to-zero-grace-period": ("scale_to_zero_grace_period_s", parse_duration_s),
    "scale-to-zero-pod-retention-period": ("scale_to_zero_pod_retention_period_s", parse_duration_s),
    "pod-autoscaler-class": ("pod_autoscaler_class", str),
    "activator-capacity": ("activator_capacity", parse_float),
    "initial-scale": ("initial_scale", parse_int32),
    "allow-zero-initial-scale": ("allow_zero_initial_scale", parse_bool),
    "min-scale": ("min_scale", parse_int32),
    "max-scale": ("max_scale", parse_int32),
    "scale-down-delay": ("scale_down_delay_s", parse_duration_s),
    "max-scale-limit": ("max_scale_limit", parse_int32),
}
AUTOSCALER_KEYS = frozenset(_KEYS)


def _complaints(config: AutoscalerConfig) -> Iterator[str]:
    yield from _duration_complaints(config)
    yield from _load_complaints(config)
    yield from _bound_complaints(config)


def _duration_complaints(config: AutoscalerConfig) -> Iterator[str]:
    window, delay = format_duration(config.stable_window_s), format_duration(config.scale_down_delay_s)
    if config.scale_to_zero_grace_period_s <= 0:
        was = format_duration(config.scale_to_zero_grace_period_s)
        yield f"scale-to-zero-grace-period must be positive, was: {was}"
    if config.scale_to_zero_pod_retention_period_s < 0:
        was = format_duration(config.scale_to_zero_pod_retention_period_s)
        yield f"scale-to-zero-pod-retention-period cannot be negative, was: {was}"
    if config.scale_down_delay_s < 0:
        yield f"scale-down-delay cannot be negative, was: {delay}"
    elif not config.scale_down_delay_s.is_integer():
        yield f"scale-down-delay = {delay}, must be specified with at most second precision"
    if not known.WINDOW_MIN_S <= config.stable_window_s <= known.WINDOW_MAX_S:
        low, high = format_duration(known.WINDOW_MIN_S), format_duration(known.WINDOW_MAX_S)
        yield f"stable-window = {window}, must be in [{low}; {high}] range"
    elif not config.stable_window_s.is_integer():
        yield f"stable-window = {window}, must be specified with at most second precision"


def _load_complaints(config: AutoscalerConfig) -> Iterator[str]:
    fraction, default = config.container_concurrency_target_fraction, config.container_concurrency_target_default
    if config.target_burst_capacity < 0 and config.target_burst_capacity != -1:
        was = format_number(config.target_burst_capacity)
        yield f"target-burst-capacity must be either non-negative or -1 (for unlimited), was: {was}"
    if not 0 < fraction <= 1:
        was = format_number(fraction * 100)
        yield f"container-concurrency-target-percentage = {was} is outside of valid range of (0, 100]"
    elif fraction * default < known.TARGET_MIN:
        yield (
            "container-concurrency-target-percentage and container-concurrency-target-default yield target "
            f"concurrency of {format_number(fraction * default)}, can't be less than {known.TARGET_MIN}"
        )
    if config.requests_per_second_target_default < known.TARGET_MIN:
        was = format_number(config.requests_per_second_target_default)
        yield f"requests-per-second-target-default must be at least {known.TARGET_MIN}, was: {was}"
    if config.activator_capacity < 1:
        yield f"activator-capacity = {format_number(config.activator_capacity)}, must be at least 1"
    for key, rate in (
        ("max-scale-up-rate", config.max_scale_up_rate),
        ("max-scale-down-rate", config.max_scale_down_rate),
    ):
        if rate <= 1:
            yield f"{key} = {format_number(rate)}, must be greater than 1.0"
    low, high = known.PANIC_WINDOW_PERCENTAGE
    if not low <= config.panic_window_percentage <= high:
        was = format_number(config.panic_window_percentage)
        yield f"panic-window-percentage = {was}, must be in [{format_number(low)}, {format_number(high)}] interval"


def _bound_complaints(config: AutoscalerConfig) -> Iterator[str]:
    if config.initial_scale < (0 if config.allow_zero_initial_scale else 1):
        yield (
            f"initial-scale = {config.initial_scale}, must be at least 0 "
            "(or at least 1 when allow-zero-initial-scale is false)"
        )
    if config.min_scale < 0 or (config.max_scale and config.min_scale > config.max_scale):
        yield f"min-scale = {config.min_scale}, must be in [0, max-scale({config.max_scale})] range"
    limit = config.max_scale_limit
    if limit < 0:
        yield f"max-scale-limit = {limit}, must be at least 0"
    elif limit and not 1 <= config.max_scale <= limit:
        yield f"max-scale = {config.max_scale}, must be in [1, max-scale-limit({limit})] range"
    elif config.max_scale < 0:
        yield f"max-scale = {config.max_scale}, must be at least 0"


@dataclass(frozen=True, slots=True)
class ScalerSpec:
    """All that the autoscaler of one revision goes by: config-autoscaler under the revision's annotations.

    The join of upstream's DeciderSpec and MetricSpec with the bounds and waiting times of the reconciler.
    """

    scaling_metric: Literal["concurrency", "rps"] = "concurrency"
    aggregation: Literal["linear", "weighted-exponential"] = "linear"
    target_value: float = 70.0  # per pod, aimed at
    total_value: float = 100.0  # per pod, its full capacity
    target_burst_capacity: float = 211.0  # -1: unlimited, 0: off
    activator_capacity: float = 100.0  # requests at a time that one activator counts for
    panic_threshold: float = 2.0  # pods wanted over pods ready
    stable_window_s: int = 60
    panic_window_s: int = 6
    max_scale_up_rate: float = 1000.0
    max_scale_down_rate: float = 2.0
    activation_scale: int = 0  # 0: none
    scale_down_delay_s: int = 0
    reachable: bool = True  # some route refers to the revision
    min_scale: int = 0  # 0 for an unreachable revision
    max_scale: int = 0  # 0: none
    initial_scale: int = 1
    scraping: bool = True  # pods are asked for statistics; not so if the activator is always in the path
    enable_scale_to_zero: bool = True
    scale_to_zero_grace_s: float = 30.0
    pod_retention_s: float = 0.0  # least time the last pod stays; 0 for an unreachable revision
    progress_deadline_s: float = PROGRESS_DEADLINE_S


def scaler_spec(
    config: AutoscalerConfig, annotations: Mapping[str, str], container_concurrency: int, *, reachable: bool = True
) -> ScalerSpec:
    """What applies to a revision with these annotations and this containerConcurrency (0: unlimited).

    Annotations are taken as checked by `check_annotations`; raises ValidationError for one that cannot be read.
    """
    read = _Reader(annotations)
    rps = read.text("metric") == "rps"
    target_value, total_value = _target(config, read, container_concurrency, rps)
    window_s = read.get("window", parse_duration_s, config.stable_window_s)
    panic_percentage = read.get("panic-window-percentage", parse_float, config.panic_window_percentage)
    panic_threshold = read.get("panic-threshold-percentage", parse_float, config.panic_threshold_percentage)
    burst = read.get("target-burst-capacity", parse_float, config.target_burst_capacity)
    retention_s = read.get(
        "scale-to-zero-pod-retention-period", parse_duration_s, config.scale_to_zero_pod_retention_period_s
    )
    deadline_s = read.get("progress-deadline", parse_duration_s, PROGRESS_DEADLINE_S, group="serving.knative.dev")
    weighted = read.text("metric-aggregation-algorithm") in known.WEIGHTED_EXPONENTIAL
    return ScalerSpec(
        scaling_metric="rps" if rps else "concurrency",
        aggregation="weighted-exponential" if weighted else "linear",
        target_value=target_value,
        total_value=total_value,
        target_burst_capacity=burst,
        activator_capacity=config.activator_capacity,
        panic_threshold=panic_threshold / 100,
        stable_window_s=int(window_s),
        panic_window_s=max(1, math.floor(window_s * panic_percentage / 100 + 0.5)),
        max_scale_up_rate=config.max_scale_up_rate,
        max_scale_down_rate=config.max_scale_down_rate,
        activation_scale=read.get("activation-scale", parse_int32, 0),
        scale_down_delay_s=int(read.get("scale-down-delay", parse_duration_s, config.scale_down_delay_s)),
        reachable=reachable,
        min_scale=read.get("min-scale", parse_int32, config.min_scale) if reachable else 0,
        max_scale=read.get("max-scale", parse_int32, config.max_scale),
        initial_scale=_initial_scale(config, read),
        scraping=burst != -1,
        enable_scale_to_zero=config.enable_scale_to_zero,
        scale_to_zero_grace_s=config.scale_to_zero_grace_period_s,
        pod_retention_s=retention_s if reachable else 0.0,
        progress_deadline_s=deadline_s,
    )


_T = TypeVar("_T")


class _Reader:
    """Values of annotations, under either spelling of their keys."""

    def __init__(self, annotations: Mapping[str, str]) -> None:
        self._annotations = annotations

    def text(self, name: str) -> str:
        return self.get(name, str, "")

    def get(self, name: str, parse: Callable[[str], _T], default: _T, *, group: str = known.GROUP) -> _T:
        found = known.find(self._annotations, name, group=group)
        if found is None:
            return default
        try:
            return parse(found[1])
        except ValueError:
            raise ValidationError([f"invalid value: {found[1]}: {found[0]}"]) from None


def _target(config: AutoscalerConfig, read: _Reader, container_concurrency: int, rps: bool) -> tuple[float, float]:
    """Value per pod that is aimed at, and that counts as full. After pkg/reconciler/autoscaling/resources/target.go."""
    if rps:
        total, utilization = config.requests_per_second_target_default, RPS_UTILIZATION
    else:
        total = float(container_concurrency) or config.container_concurrency_target_default
        utilization = config.container_concurrency_target_fraction
    target = read.get("target", parse_float, 0.0)
    if target:
        total = min(target, container_concurrency) if container_concurrency and not rps else target
    percentage = read.get("target-utilization-percentage", parse_float, 0.0)
    if percentage:
        utilization = percentage / 100
    return max(known.TARGET_MIN, total * utilization), float(total)


def _initial_scale(config: AutoscalerConfig, read: _Reader) -> int:
    """0 by annotation counts only where the cluster allows it."""
    wanted = read.get("initial-scale", parse_int32, config.initial_scale)
    return wanted if wanted or config.allow_zero_initial_scale else config.initial_scale
