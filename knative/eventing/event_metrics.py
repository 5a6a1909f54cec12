"""Prometheus metrics of Brokers and Triggers.

`kn_eventing_dispatch_duration_seconds` is Knative's (kn.eventing.dispatch.duration); ours begin with `stagecraft_`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from knative.eventing.dispatcher import Counts

_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)


class EventMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._accepted = Counter(
            "stagecraft_broker_events",
            "Events that producers sent and subscribers replied, by what they were answered",
            ("k8s_namespace_name", "kn_broker_name", "http_response_status_code"),
            registry=registry,
        )
        self._duration = Histogram(
            "kn_eventing_dispatch_duration_seconds",
            "Time from an event's acceptance to the end of an attempt to deliver it",
            ("k8s_namespace_name", "kn_trigger_name", "http_response_status_code"),
            buckets=_BUCKETS_S,
            registry=registry,
        )

    def watch(self, counts: Callable[[], Mapping[str, Counts]], depths: Callable[[], Mapping[str, int]]) -> None:
        """By target, as it is when somebody scrapes."""
        self._registry.register(_Targets(counts, depths))

    def count_accepted(self, namespace: str, broker: str, status: int, events: int) -> None:
        self._accepted.labels(namespace, broker, str(status)).inc(events)

    def observe(self, namespace: str, trigger: str, status: int, latency_s: float) -> None:
        self._duration.labels(namespace, trigger, str(status)).observe(latency_s)

    def forget_broker(self, namespace: str, broker: str) -> None:
        """A deleted Broker leaves no series behind."""
        self._accepted.remove_by_labels({"k8s_namespace_name": namespace, "kn_broker_name": broker})

    def forget_trigger(self, namespace: str, trigger: str) -> None:
        self._duration.remove_by_labels({"k8s_namespace_name": namespace, "kn_trigger_name": trigger})


class _Targets:
    def __init__(self, counts: Callable[[], Mapping[str, Counts]], depths: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts
        self._depths = depths

    def collect(self) -> Iterator[Metric]:
        labels = ("k8s_namespace_name", "kn_trigger_name", "queue")
        waiting = GaugeMetricFamily(
            "stagecraft_trigger_waiting", "Deliveries that wait or are under way", labels=labels
        )
        for target, depth in self._depths().items():
            waiting.add_metric(_split(target), depth)
        yield waiting
        results = CounterMetricFamily(
            "stagecraft_trigger_deliveries", "What became of attempts to deliver", labels=(*labels, "result")
        )
        for target, counts in self._counts().items():
            for result, count in asdict(counts).items():
                results.add_metric([*_split(target), result], count)
        yield results

    def describe(self) -> Iterable[Metric]:
        return []  # so that registering does not collect: there is nothing yet


def _split(target: str) -> list[str]:
    """Namespace, Trigger, and which of its two queues."""
    namespace, name, *rest = target.split("/")
    return [namespace, name, rest[0] if rest else "events"]
