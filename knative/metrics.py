"""Prometheus metrics of the platform, under the names that Knative's own components export.

Knative names them with dots (OpenTelemetry: `kn.revision.pods.desired`); Prometheus writes these with underscores.
Source: pkg/autoscaler/scaling/metrics.go, pkg/reconciler/autoscaling/kpa/metrics.go, pkg/activator/handler, pkg/queue.
Where Knative has no name, ours begin with `stagecraft_`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from knative.eventing.event_metrics import EventMetrics

if TYPE_CHECKING:
    from knative.node import RevisionName
    from knative.revision import Revision

_LABELS = ("k8s_namespace_name", "kn_service_name", "kn_configuration_name", "kn_revision_name")
_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)

# metric, help, value in `Revision.status()`
_GAUGES = (
    ("kn_revision_pods_desired", "Number of pods the autoscaler wants to allocate", "recommended"),
    ("kn_revision_pods_requested", "Number of pods asked for, after all bounds", "desired"),
    ("kn_revision_pods_count", "Number of pods that are ready", "ready"),
    ("kn_revision_pods_not_ready_count", "Number of pods that are not ready", "not_ready"),
    ("kn_revision_pods_pending_count", "Number of pods that are starting", "starting"),
    ("kn_revision_pods_terminating_count", "Number of pods that are draining or ending", "draining"),
    ("kn_revision_capacity_excess", "Excess burst capacity", "excess_burst_capacity"),
    ("kn_revision_panic_mode", "1 while the autoscaler is in panic mode", "panic_mode"),
    ("kn_revision_request_concurrency", "Requests at the activator", "at_activator"),
    ("kn_serving_queue_depth", "Requests in the queue-proxies of the revision", "in_flight"),
)


class Metrics:
    """One registry for a platform. `revisions` gives what exists when somebody scrapes."""

    def __init__(self, revisions: Callable[[], Iterable[Revision]]) -> None:
        self._registry = CollectorRegistry()
        self.events = EventMetrics(self._registry)
        self._duration = Histogram(
            "kn_serving_invocation_duration_seconds",
            "Time from a request's arrival at the queue-proxy to the end of its response",
            (*_LABELS, "http_response_status_code"),
            buckets=_BUCKETS_S,
            registry=self._registry,
        )
        self._cold_starts = Counter("stagecraft_cold_starts_total", "Wakes from zero", _LABELS, registry=self._registry)
        self._registry.register(_Gauges(revisions))

    def observer(self, revision: RevisionName) -> Callable[[int, float], None]:
        """What a queue-proxy calls for each request: status code and seconds."""
        labels = _labels(revision)

        def observe(code: int, latency_s: float) -> None:
            # looked up each time: a service that was deleted and applied again has new series of the same name
            self._duration.labels(*labels, str(code)).observe(latency_s)

        return observe

    def count_cold_start(self, revision: RevisionName) -> None:
        self._cold_starts.labels(*_labels(revision)).inc()

    def forget(self, revision: RevisionName) -> None:
        """A deleted revision leaves no series behind."""
        for family in (self._duration, self._cold_starts):
            family.remove_by_labels({"kn_revision_name": revision.name, "k8s_namespace_name": revision.namespace})

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Gauges:
    def __init__(self, revisions: Callable[[], Iterable[Revision]]) -> None:
        self._revisions = revisions

    def collect(self) -> Iterator[Metric]:
        seen = [(_labels(revision.id), revision.status()) for revision in self._revisions()]
        for name, text, key in _GAUGES:
            family = GaugeMetricFamily(name, text, labels=_LABELS)
            for labels, status in seen:
                if status[key] is not None:
                    family.add_metric(labels, float(status[key]))
            yield family
        yield from self._windows(seen)

    def _windows(self, seen: list[tuple[list[str], dict[str, object]]]) -> Iterator[Metric]:
        """Named by what the revision scales on, as in Knative."""
        for metric in ("concurrency", "rps"):
            for key in ("stable", "panic", "target"):
                family = GaugeMetricFamily(
                    f"kn_revision_{metric}_{key}", f"{key} value of the autoscaler, {metric}", labels=_LABELS
                )
                for labels, status in seen:
                    value = status[key]
                    if status["metric"] == metric and isinstance(value, float | int):
                        family.add_metric(labels, float(value))
                yield family

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering does not collect: there is nothing yet


def _labels(revision: RevisionName) -> list[str]:
    return [revision.namespace, revision.service, revision.service, revision.name]
