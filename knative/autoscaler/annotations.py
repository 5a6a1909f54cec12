"""Autoscaling annotations of a revision: their keys, and what may stand in them.

After knative/serving pkg/apis/autoscaling/register.go and annotation_validation.go; the complaints have the same
form, "what is wrong: which key".
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from knative.autoscaler.durations import format_duration, parse_duration_s
from knative.autoscaler.values import INT32_MAX, OutOfRange, format_number, parse_float, parse_int32

if TYPE_CHECKING:
    from knative.autoscaler.config import AutoscalerConfig

GROUP = "autoscaling.knative.dev"
KPA = f"kpa.{GROUP}"
HPA = f"hpa.{GROUP}"

METRICS = ("concurrency", "rps")
LINEAR = "linear"
WEIGHTED_EXPONENTIAL = ("weighted-exponential", "weightedExponential")

TARGET_MIN = 0.01
WINDOW_MIN_S = 6.0
WINDOW_MAX_S = 3600.0
PANIC_WINDOW_PERCENTAGE = (1.0, 100.0)
PANIC_THRESHOLD_PERCENTAGE = (110.0, 1000.0)

_WHOLE_SECONDS = "must be specified with at most second precision"

T = TypeVar("T")
Found = tuple[str, str]
"""The key as written, and its value."""


def find(annotations: Mapping[str, str], name: str, *, group: str = GROUP) -> Found | None:
    """The annotation `name`, kebab-case first ("min-scale"), else camelCase ("minScale")."""
    head, *rest = name.split("-")
    for spelling in (name, head + "".join(word.capitalize() for word in rest)):
        key = f"{group}/{spelling}"
        if key in annotations:
            return key, annotations[key]
    return None


def check_annotations(annotations: Mapping[str, str], config: AutoscalerConfig, *, path: str = "") -> list[str]:
    """Complaints about the autoscaling annotations, in the words of Knative's webhook; empty if there are none.

    `path` is put before each key, such as "spec.template.metadata.annotations.".
    """
    found = [problem for check in _CHECKS for problem in check(annotations, config)]
    return [f"{message}: {', '.join(path + key for key in keys)}" for message, *keys in found]


Problems = Iterator[tuple[str, ...]]
"""Each a message and the keys it is about."""


def _invalid(found: Found) -> tuple[str, str]:
    return f"invalid value: {found[1]}", found[0]


def _out_of_bounds(found: Found, low: str, high: str) -> tuple[str, str]:
    return f"expected {low} <= {found[1]} <= {high}", found[0]


def _read(
    annotations: Mapping[str, str], name: str, parse: Callable[[str], T]
) -> Generator[tuple[str, ...], None, tuple[Found, T] | None]:
    """What stands under `name`, with its value; None if nothing does, or if it cannot be read, which is told."""
    found = find(annotations, name)
    if found is None:
        return None
    try:
        return found, parse(found[1])
    except ValueError:
        yield _invalid(found)
        return None


def _check_class(annotations: Mapping[str, str], config: AutoscalerConfig) -> Problems:
    found = find(annotations, "class")
    if found and found[1].endswith(".knative.dev") and found[1] not in (KPA, HPA):
        yield _invalid(found)


def _count(annotations: Mapping[str, str], name: str) -> tuple[int, list[tuple[str, str]]]:
    """The number of pods under `name` (0 if absent or wrong), and the complaints about it."""
    found = find(annotations, name)
    if found is None:
        return 0, []
    try:
        value = parse_int32(found[1])
    except OutOfRange:
        value = -1
    except ValueError:
        return 0, [_invalid(found)]
    if value < 0:
        return 0, [_out_of_bounds(found, "0", str(INT32_MAX))]
    return value, []


def _check_bounds(annotations: Mapping[str, str], config: AutoscalerConfig) -> Problems:
    low, problems = _count(annotations, "min-scale")
    high, more = _count(annotations, "max-scale")
    yield from problems + more
    if high and high < low:
        yield f"max-scale={high} is less than min-scale={low}", f"{GROUP}/max-scale", f"{GROUP}/min-scale"
    found = find(annotations, "max-scale")
    if found and not more and config.max_scale_limit:
        yield from _check_limit(found[0], high, config.max_scale_limit)
    yield from _check_activation_scale(annotations, low, high)


def _check_limit(key: str, high: int, limit: int) -> Problems:
    if high > limit:
        yield _out_of_bounds((key, str(high)), "1", str(limit))
    elif high == 0:
        yield f"max-scale=0 (unlimited), must be less than {limit}", key


def _check_activation_scale(annotations: Mapping[str, str], low: int, high: int) -> Problems:
    read = yield from _read(annotations, "activation-scale", parse_int32)
    if read is None:
        return
    found, scale = read
    if low > scale:
        yield f"min-scale={low} is greater than activation-scale={scale}", found[0]
    elif high and high < scale:
        yield f"max-scale={high} is less than activation-scale={scale}", found[0]
    elif scale < 2:
        yield f"activation-scale={scale} must be greater than 1", found[0]


def _check_initial_scale(annotations: Mapping[str, str], config: AutoscalerConfig) -> Problems:
    read = yield from _read(annotations, "initial-scale", parse_int32)
    if read is None:
        return
    found, scale = read
    if scale < 0:
        yield f"invalid value: {scale}", f"{found[0]} must be greater than 0"
    elif scale == 0 and not config.allow_zero_initial_scale:
        yield f"invalid value: {scale}", f"{found[0]}=0 not allowed by cluster"


_FLOAT_RANGES = {
    "panic-window-percentage": PANIC_WINDOW_PERCENTAGE,
    "panic-threshold-percentage": PANIC_THRESHOLD_PERCENTAGE,
    "target-utilization-percentage": (1.0, 100.0),
}


def _check_numbers(annotations: Mapping[str, str], config: AutoscalerConfig) -> Problems:
    for name in (*_FLOAT_RANGES, "target", "target-burst-capacity"):
        read = yield from _read(annotations, name, parse_float)
        if read is None:
            continue
        found, value = read
        low, high = _FLOAT_RANGES.get(name, (value, value))
        if not low <= value <= high:
            yield _out_of_bounds(found, format_number(low), format_number(high))
        elif name == "target" and value < TARGET_MIN:
            yield f"target {found[1]} should be at least {TARGET_MIN}", found[0]
        elif name == "target-burst-capacity" and value < 0 and value != -1:
            yield _invalid(found)


_DURATION_RANGES_S = {  # and whether only whole seconds will do
    "window": (WINDOW_MIN_S, True),
    "scale-to-zero-pod-retention-period": (0.0, False),
    "scale-down-delay": (0.0, True),
}


def _check_durations(annotations: Mapping[str, str], config: AutoscalerConfig) -> Problems:
    for name, (low_s, whole) in _DURATION_RANGES_S.items():
        read = yield from _read(annotations, name, parse_duration_s)
        if read is None:
            continue
        found, value_s = read
        if not low_s <= value_s <= WINDOW_MAX_S:
            yield _out_of_bounds(found, format_duration(low_s), format_duration(WINDOW_MAX_S))
        elif whole and not value_s.is_integer():
            yield _WHOLE_SECONDS, found[0]


def _check_metric(annotations: Mapping[str, str], config: AutoscalerConfig) -> Problems:
    found = find(annotations, "metric")
    if found is None:
        return
    klass = find(annotations, "class") or ("", KPA)
    if (klass[1] == KPA and found[1] not in METRICS) or (klass[1] == HPA and not found[1]):
        yield _invalid(found)


def _check_algorithm(annotations: Mapping[str, str], config: AutoscalerConfig) -> Problems:
    """Only where the class is named; elsewhere upstream takes an unknown algorithm as linear without a word."""
    found = find(annotations, "metric-aggregation-algorithm")
    klass = find(annotations, "class")
    if found and found[1] and klass and klass[1] == KPA and found[1] not in (LINEAR, *WEIGHTED_EXPONENTIAL):
        yield _invalid(found)


_CHECKS = (
    _check_class,
    _check_bounds,
    _check_numbers,
    _check_durations,
    _check_metric,
    _check_algorithm,
    _check_initial_scale,
)
