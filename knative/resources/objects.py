"""The objects this platform runs, after defaulting and validation: what the rest of `knative/` works with.

Names and meanings are those of serving.knative.dev/v1, eventing.knative.dev/v1, serving.kserve.io and core/v1;
durations are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from knative.eventing.delivery import DeliverySpec
from knative.eventing.destination import Destination
from knative.eventing.filters import Filter

ProbeKind = Literal["http", "tcp", "exec"]


@dataclass(frozen=True, slots=True)
class Probe:
    """core/v1 Probe. `period_s` 0 is Knative's aggressive readiness: every 50 ms, 100 ms timeout."""

    kind: ProbeKind = "tcp"
    path: str = "/"
    headers: tuple[tuple[str, str], ...] = ()
    command: tuple[str, ...] = ()
    port: int = 0  # 0: the container's own
    initial_delay_s: int = 0
    period_s: int = 0
    timeout_s: int = 1
    success_threshold: int = 1
    failure_threshold: int = 3


@dataclass(frozen=True, slots=True)
class Container:
    """core/v1 Container, as far as a process of this machine can honour it."""

    image: str
    name: str = "user-container"
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    working_dir: str = ""
    port: int = 8080  # what the manifest says; a replica gets a free one of this machine in PORT
    port_name: str = ""  # "", http1 or h2c
    readiness: Probe = Probe()
    liveness: Probe | None = None
    startup: Probe | None = None
    cpus: float = 0.0  # limit, else request; 0: not said
    memory_bytes: int = 0  # limit, else request; 0: not said
    gpus: int = 0  # any resource named */gpu


@dataclass(frozen=True, slots=True)
class RevisionTemplate:
    """spec.template of a Service; a Revision is one of these under a name of its own."""

    container: Container
    container_concurrency: int = 0  # requests; 0: no limit
    timeout_s: int = 300
    response_start_timeout_s: int = 300
    idle_timeout_s: int = 0  # 0: none
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    name: str = ""  # given by the user, else made from the generation


@dataclass(frozen=True, slots=True)
class TrafficTarget:
    """One entry of spec.traffic. `revision` "" is the latest ready one."""

    revision: str = ""
    percent: int = 100
    tag: str = ""


@dataclass(frozen=True, slots=True)
class Service:
    """serving.knative.dev/v1 Service. `manifest` is the object as applied, with defaults filled in."""

    namespace: str
    name: str
    template: RevisionTemplate
    traffic: tuple[TrafficTarget, ...] = (TrafficTarget(),)
    annotations: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    manifest: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConfigMap:
    """core/v1 ConfigMap. Those named config-* are Knative's settings, in whatever namespace."""

    namespace: str
    name: str
    data: Mapping[str, str]
    manifest: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ServingRuntime:
    """serving.kserve.io/v1alpha1 ServingRuntime; a ClusterServingRuntime has the namespace ""."""

    namespace: str
    name: str
    manifest: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class InferenceService:
    """serving.kserve.io/v1beta1 InferenceService. `service` is what it comes to, `manifest` the object as applied."""

    namespace: str
    name: str
    service: Service
    manifest: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Broker:
    """eventing.knative.dev/v1 Broker. `delivery` None: Knative's default."""

    namespace: str
    name: str
    delivery: DeliverySpec | None = None
    manifest: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Trigger:
    """eventing.knative.dev/v1 Trigger. `subscriber` names its namespace; `delivery` None: as the Broker has it."""

    namespace: str
    name: str
    broker: str
    subscriber: Destination
    max_in_flight: int  # deliveries at once; annotation stagecraft.dev/max-in-flight
    filter: Filter = field(default_factory=Filter, compare=False)  # made from the manifest, which is compared
    delivery: DeliverySpec | None = None
    manifest: Mapping[str, object] = field(default_factory=dict)
    reply: str | None = None  # Broker that gets what the subscriber replies; None: the Trigger's own, "": nobody


@dataclass(frozen=True, slots=True)
class Step:
    """Of a Sequence. `delivery` None: one attempt."""

    destination: Destination
    delivery: DeliverySpec | None = None


@dataclass(frozen=True, slots=True)
class Sequence:
    """flows.knative.dev/v1 Sequence: each step gets what the one before it replied. `max_in_flight` is each step's."""

    namespace: str
    name: str
    steps: tuple[Step, ...]
    max_in_flight: int
    reply: Destination | None = None
    manifest: Mapping[str, object] = field(default_factory=dict)


Resource = Service | ConfigMap | ServingRuntime | InferenceService | Broker | Trigger | Sequence
