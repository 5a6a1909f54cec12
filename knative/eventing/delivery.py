"""How events are delivered: retries, backoff, TTL and dead letters.

After knative/eventing pkg/apis/duck/v1/delivery_types.go, pkg/kncloudevents/retries.go, pkg/broker/ttl.go and
pkg/channel/attributes; the defaults are those of the ConfigMap config-br-defaults.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Literal, cast

from knative.errors import ValidationError
from knative.eventing.cesql.values import cast as cast_value
from knative.eventing.destination import Destination, read_destination
from knative.eventing.durations import parse_iso_duration_s
from knative.eventing.event import CloudEvent
from knative.resources.field_errors import INT32_MAX, Problems

BackoffPolicy = Literal["linear", "exponential"]
Format = Literal["json", "binary"]

TTL_ATTRIBUTE = "knativebrokerttl"
TTL_MAX = 255
ERROR_DATA_CHARS_MAX = 1024  # of base64
_DOUBLINGS_MAX = 40  # keeps waits finite; with 0.2 s that many are 7,000 years
_RETRIED = frozenset((404, 408, 409, 429))
_RETRY_AFTER_STATUSES = frozenset((429, 503))


@dataclass(frozen=True, slots=True)
class DeliverySpec:
    """A block `delivery` of a Broker or Trigger. None: not said; without policy or delay retries follow at once."""

    retry: int = 0  # after the first attempt
    backoff_policy: BackoffPolicy | None = None
    backoff_delay_s: float | None = None
    timeout_s: float | None = None  # of one attempt; None: no limit
    dead_letter: Destination | None = None
    retry_after_max_s: float | None = None  # None or 0: Retry-After is not looked at
    format: Format | None = None  # None: as the event came


DEFAULT = DeliverySpec(retry=10, backoff_policy="exponential", backoff_delay_s=0.2)


def parse_delivery(tree: object, path: str = "spec.delivery") -> DeliverySpec:
    """The block at `path` of a manifest. Raises ValidationError with every problem."""
    problems = Problems()
    spec = read_delivery(tree, problems, path)
    if problems.errors:
        raise ValidationError([str(error) for error in problems.errors])
    return spec


def read_delivery(tree: object, problems: Problems, path: str = "spec.delivery") -> DeliverySpec:
    """As parse_delivery; what is wrong goes to `problems`. `retryAfterMax` is taken, which
    a cluster refuses unless its alpha feature delivery-retryafter is on."""
    if not isinstance(tree, Mapping):
        problems.invalid(tree, path, f"expected a mapping with any of {', '.join(_FIELDS)}")
        return DeliverySpec()
    for name in sorted(str(key) for key in tree if key not in _FIELDS):
        problems.unknown(f"{path}.{name}", f"known are {', '.join(_FIELDS)}")
    sink = tree.get("deadLetterSink")
    return DeliverySpec(
        retry=_retry(tree.get("retry"), problems, f"{path}.retry"),
        backoff_policy=cast(
            BackoffPolicy | None, _choice(tree, "backoffPolicy", ("linear", "exponential"), problems, path)
        ),
        backoff_delay_s=_duration_s(tree, "backoffDelay", problems, path),
        timeout_s=_duration_s(tree, "timeout", problems, path, above_zero=True),
        dead_letter=None if sink is None else read_destination(sink, problems, f"{path}.deadLetterSink"),
        retry_after_max_s=_duration_s(tree, "retryAfterMax", problems, path),
        format=cast(Format | None, _choice(tree, "format", ("json", "binary"), problems, path)),
    )


def effective(trigger: DeliverySpec | None, broker: DeliverySpec | None) -> DeliverySpec:
    """What holds for a Trigger. A block of its own replaces the Broker's as a whole, but for the dead letter sink,
    which falls back to the Broker's. A Broker without a block has the default."""
    base = DEFAULT if broker is None else broker
    if trigger is None:
        return base
    return trigger if trigger.dead_letter else replace(trigger, dead_letter=base.dead_letter)


def wait_s(spec: DeliverySpec, attempt: int, retry_after_s: float | None = None) -> float:
    """Seconds to wait before a retry. `attempt` is how many retries there were already: 0 before the first.

    Exponential: delay * 2**attempt; linear: delay * attempt, so the first linear retry comes at once. No jitter.
    `retry_after_s` is what the answer asked for (see `parse_retry_after_s`); the longer wait counts.
    """
    backoff_s = 0.0
    if spec.backoff_policy is not None and spec.backoff_delay_s is not None:
        factor = 2.0 ** min(attempt, _DOUBLINGS_MAX) if spec.backoff_policy == "exponential" else float(attempt)
        backoff_s = spec.backoff_delay_s * factor
    if retry_after_s is None or not spec.retry_after_max_s:
        return backoff_s
    return max(backoff_s, min(retry_after_s, spec.retry_after_max_s))


def parse_retry_after_s(status: int | None, value: str | None, now_s: float) -> float | None:
    """Seconds that a Retry-After header asks for, a number or an HTTP date; only answers 429 and 503 are heard."""
    if status not in _RETRY_AFTER_STATUSES or value is None:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now_s)
    except (ValueError, OverflowError, OSError):
        return None


def is_success(status: int | None) -> bool:
    return status is not None and 200 <= status < 300


def is_retryable(status: int | None) -> bool:
    """Whether a failed attempt is repeated. None: no answer (refused, broken, timed out)."""
    return status is None or status >= 500 or status in _RETRIED


def ttl(event: CloudEvent) -> int | None:
    """How many passes through a Broker are left; None where the event does not say, or says no whole number."""
    left = cast_value(event.attributes.get(TTL_ATTRIBUTE, ""), "Integer")
    return None if left.errors else int(left.value)


def with_ttl(event: CloudEvent, left: int) -> CloudEvent:
    return event.changed({TTL_ATTRIBUTE: left})


def without_ttl(event: CloudEvent) -> CloudEvent:
    """As subscribers get it; put the TTL back (`with_ttl`) on what they reply."""
    return event.changed({TTL_ATTRIBUTE: None}) if TTL_ATTRIBUTE in event.attributes else event


def entering(event: CloudEvent) -> CloudEvent | None:
    """The event as a Broker takes it in: one pass less, 255 at first; None when its passes are used up."""
    left = ttl(event)
    left = TTL_MAX if left is None else left - 1
    return with_ttl(event, left) if left > 0 else None


def dead_letter(event: CloudEvent, destination: str, code: int, body: bytes) -> CloudEvent:
    """`event` for the dead letter sink: where it could not be delivered (URL), the last answer's status and body.

    The body stays as it is; Knative takes control characters out of it first.
    """
    encoded = base64.b64encode(body[:ERROR_DATA_CHARS_MAX]).decode()
    return event.changed(
        {
            "knativeerrordest": destination,
            "knativeerrorcode": code,
            "knativeerrordata": encoded[:ERROR_DATA_CHARS_MAX],
        }
    )


_FIELDS = ("deadLetterSink", "retry", "backoffPolicy", "backoffDelay", "timeout", "retryAfterMax", "format")


def _retry(value: object, problems: Problems, path: str) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= INT32_MAX:
        problems.invalid(value, path, "expected a whole number of retries, 0 or more")
        return 0
    return value


def _choice(
    tree: Mapping[str, object], name: str, allowed: tuple[str, ...], problems: Problems, path: str
) -> str | None:
    value = tree.get(name)
    if value is None or value in allowed:
        return value
    problems.invalid(value, f"{path}.{name}", f"expected {' or '.join(allowed)}")
    return None


def _duration_s(
    tree: Mapping[str, object], name: str, problems: Problems, path: str, *, above_zero: bool = False
) -> float | None:
    """Negative durations are refused, though Knative takes some."""
    value = tree.get(name)
    if value is None:
        return None
    try:
        seconds = parse_iso_duration_s(value if isinstance(value, str) else "")
    except ValueError as error:
        problems.invalid(value, f"{path}.{name}", str(error))
        return None
    if seconds < 0 or (above_zero and seconds == 0):
        problems.invalid(value, f"{path}.{name}", "expected a duration above zero" if above_zero else "negative")
        return None
    return seconds
