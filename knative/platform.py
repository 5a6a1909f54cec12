"""Knative on one machine, in one process: what `stagecraft local start` and `stagecraft up` run.

    InferenceService -> Service          as KServe translates it (knative/resources)
    manifests -> ServiceController -> Revision -> Replica        a process behind its queue-proxy
    requests  -> Ingress -> Revision (activator or direct) -> Replica
    events    -> Ingress -> Eventing (a durable queue) -> Ingress -> Revision, as above
    clock     -> Platform._turn -> Revision.tick                 the autoscaler

Replicas are children of this process and end with it, whatever ends it (`knative/kubelet`).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

import structlog
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST

from knative.autoscaler.config import AutoscalerConfig
from knative.errors import NotFound, Unavailable, ValidationError
from knative.eventing.addresses import broker_url
from knative.eventing.broker import HOST as BROKER_HOST
from knative.eventing.broker import BrokerIngress
from knative.eventing.eventing import Eventing
from knative.images import Command, Images
from knative.inference import inference_status
from knative.kubelet.kubelet import Kubelet
from knative.kubelet.pod import Pod
from knative.metrics import Metrics
from knative.network.forward import relay_session
from knative.network.ingress import Ingress, Route
from knative.network.listener import Listener
from knative.network.tunnel import Target, Tunnel
from knative.node import Node
from knative.resources.config_maps import DefaultsConfig, FeaturesConfig
from knative.resources.documents import SYSTEM_NAMESPACE, Document, parse
from knative.resources.eventing import check_trigger_update
from knative.resources.objects import (
    Broker,
    ConfigMap,
    InferenceService,
    Resource,
    Service,
    ServingRuntime,
    Trigger,
)
from knative.resources.objects import (
    Sequence as Flow,
)
from knative.resources.service import Settings
from knative.revision import LogFile, Revision
from knative.service import ServiceController

log = structlog.get_logger()

_VISIBILITY = "networking.knative.dev/visibility"
GRACE_S = 5.0  # for running answers, when the platform ends
_LOOK_EVERY_S = 0.05
_LATE_S = 0.002
WAKES = "stagecraft.dev/wakes"  # annotation: services that a request to this one, at zero, wakes along
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


@dataclass(frozen=True, slots=True)
class PlatformSettings:
    """Where a platform listens and keeps its files. Port 0 takes any free one."""

    folder: Path  # logs
    name: str
    host: str = "127.0.0.1"
    port: int = 8080
    metrics_port: int = 0  # of the platform's own metrics
    default_service: str = ""  # NAMESPACE/NAME, gets the requests that name no service
    grpc_port: int | None = None  # passes HTTP/2 connections on to the default service; None: not
    images: Mapping[str, Command] = field(default_factory=dict)  # further rows of the image table
    fork: bool = True  # start replicas from pre-imported interpreters
    data_folder: Path | None = None  # of events, which outlive the platform; None: `data` in `folder`
    drain_quiet_s: float = 2.0  # Knative: 30 s, for routers that learn late that a replica goes
    gpus: tuple[str, ...] | None = None  # None: those that are found


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one object."""

    kind: str  # as kubectl prints it: service.serving.knative.dev, configmap
    namespace: str
    name: str
    action: Literal["created", "configured", "unchanged", "skipped"]
    note: str = ""


class Platform:
    """Use it as an async context manager; on the way out every replica has ended."""

    def __init__(self, settings: PlatformSettings) -> None:
        self.settings = settings
        self.started = datetime.now(UTC)
        self._services: dict[tuple[str, str], ServiceController] = {}
        self._leaving: set[ServiceController] = set()
        self._inference_services: dict[tuple[str, str], InferenceService] = {}  # their Services are in _services
        self._runtimes: dict[tuple[str, str], ServingRuntime] = {}
        self._config_maps: dict[tuple[str, str], ConfigMap] = {}
        self._settings_in_force = Settings()
        self._metrics = Metrics(self._revisions)
        self._images = Images(settings.images)
        self._kubelet = Kubelet(settings.folder, fork=settings.fork, gpus=settings.gpus, on_change=self._pod_changed)
        self._clock = _unix_clock()
        self._tunnel = Tunnel(self._connect_default)
        self._metrics_page = Listener(self._metrics_text)
        self._turning: asyncio.Task[None] | None = None

    # -- life

    async def __aenter__(self) -> Self:
        self._session = relay_session()
        self._ingress = Ingress(session=self._session)
        self._eventing = self._make_eventing()
        try:
            await self._eventing.resume()
            await self._listen()
            await self._kubelet.start()
        except OSError as error:
            await self._close()
            raise Unavailable(f"cannot use the folder {self.settings.folder}: {error.strerror or error}") from None
        except BaseException:
            await self._close()
            raise
        self._node = Node(
            kubelet=self._kubelet,
            session=self._session,
            images=self._images,
            metrics=self._metrics,
            clock=self._clock,
            drain_quiet_s=self.settings.drain_quiet_s,
            ingress=_reachable(self._ingress.address),
            grpc_service=self.settings.default_service if self.settings.grpc_port is not None else "",
        )
        self._turning = asyncio.create_task(self._turn())
        return self

    def _make_eventing(self) -> Eventing:
        eventing = Eventing(
            self.data_folder,
            session=self._session,
            ingress=lambda: _reachable(self._ingress.address),
            exists=self._exists,
            changed=self._route,
            metrics=self._metrics.events,
        )
        self._broker_ingress = Route(((100, BrokerIngress(eventing)),))
        return eventing

    async def _listen(self) -> None:
        settings = self.settings
        await self._ingress.start(settings.host, settings.port)
        await self._metrics_page.start(settings.host, settings.metrics_port)
        if settings.grpc_port is not None:
            await self._tunnel.start(settings.host, settings.grpc_port)

    async def __aexit__(self, *_: object) -> None:
        await self._close()

    async def _close(self) -> None:
        self._eventing.pause()
        try:
            await self._running_answers()
        finally:  # when cancelled once more, without grace, but whole
            ending = asyncio.create_task(self._end_all())
            while not ending.done():
                try:
                    await asyncio.shield(ending)
                except asyncio.CancelledError:  # once more
                    self._kubelet.kill()
            ending.result()

    async def _running_answers(self) -> None:
        """Lets answers end that are on their way, for a while."""
        for _ in range(int(GRACE_S / _LOOK_EVERY_S)):
            if not self.in_flight and not self._eventing.sending:
                return
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _end_all(self) -> None:
        if self._turning is not None:
            self._turning.cancel()
            await asyncio.gather(self._turning, return_exceptions=True)
        await self._eventing.close()
        await asyncio.gather(self._ingress.close(), self._tunnel.close(), self._metrics_page.close())
        await asyncio.gather(*(controller.close() for controller in (*self._services.values(), *self._leaving)))
        self._inference_services.clear()
        self._services.clear()
        await self._kubelet.close(now=True)
        await self._session.close()

    async def _turn(self) -> None:
        """Ticks all revisions on each whole second."""
        while True:
            # timers may fire a little early, and two samples in one second would add up
            await asyncio.sleep(1.0 - self._clock() % 1.0 + _LATE_S)
            for revision in list(self._revisions()):
                try:
                    revision.tick()
                except Exception:  # a mistake in one revision must not stop the clock of the others
                    log.exception("tick_failed", revision=revision.id.name)

    # -- objects

    @property
    def url(self) -> str:
        """Of the ingress, for clients on this machine."""
        return f"http://{_reachable(self._ingress.address)}"

    @property
    def data_folder(self) -> Path:
        """Where events are kept, once there is a Broker."""
        return self.settings.data_folder or self.settings.folder / "data"

    @property
    def grpc(self) -> str:
        """HOST:PORT for gRPC clients on this machine, "" when there is none."""
        return _reachable(self._tunnel.address)

    @property
    def in_flight(self) -> int:
        """Requests that are held, or in a replica."""
        return sum(revision.activator.waiting + revision.in_flight for revision in self._revisions())

    @property
    def metrics_url(self) -> str:
        return f"http://{_reachable(self._metrics_page.address)}/metrics"

    async def apply(self, documents: Sequence[Document], *, dry_run: bool = False) -> list[Applied]:
        """Takes over manifests. Raises ValidationError, and then nothing has been applied."""
        known = self._settings_in_force
        parsed = parse(
            documents,
            autoscaler=known.autoscaler,
            defaults=known.defaults,
            features=known.features,
            runtimes=tuple(self._runtimes.values()),
            inference_services=tuple(self._inference_services.values()),
        )
        for resource in parsed.resources:
            self._check(resource)
        if not dry_run and any(isinstance(resource, Broker | Flow) for resource in parsed.resources):
            await self._eventing.open()
        applied = []
        for resource in parsed.resources:  # config maps come first, so that services start by them
            action = self._action(resource)
            if not dry_run and action != "unchanged":
                await self._take(resource)
            applied.append(Applied(_kind(resource), resource.namespace, resource.name, action))
        if applied and parsed.warnings:
            applied[-1] = replace(applied[-1], note="\n".join(parsed.warnings))
        for skipped in parsed.skipped:
            applied.append(Applied(skipped.kind.lower(), "", skipped.name, "skipped", skipped.reason))
        return applied

    async def delete(self, kind: str, namespace: str, name: str) -> None:
        """Returns once nothing of the object is left. Raises NotFound, and ValidationError for a Service that belongs
        to an InferenceService."""
        key = (namespace, name)
        if kind == "service" and key in self._services:
            if owner := self._owner(key):
                raise ValidationError([f"service {name!r} belongs to inferenceservice {owner.name!r}: delete that"])
            await self._remove(key)
        elif kind == "inferenceservice" and key in self._inference_services:
            service = self._inference_services.pop(key).service
            await self._remove((service.namespace, service.name))
        elif kind == "servingruntime" and key in self._runtimes:
            del self._runtimes[key]
        elif kind == "clusterservingruntime" and ("", name) in self._runtimes:
            del self._runtimes["", name]
        elif kind == "configmap" and key in self._config_maps:
            del self._config_maps[key]
            self._reconfigure()
        elif kind == "broker" and key in self._eventing.brokers:
            await self._eventing.remove_broker(key)
        elif kind == "trigger":
            await self._eventing.remove_trigger(key)
        elif kind == "sequence" and key in self._eventing.sequences:
            await self._eventing.remove_sequence(key)
        else:
            raise NotFound(f"{kind} {name!r} not found in namespace {namespace!r}")

    async def _remove(self, key: tuple[str, str]) -> None:
        """Ends a Service."""
        controller = self._services.pop(key)
        self._leaving.add(controller)
        self._route()
        await controller.close(gently=True)
        self._leaving.discard(controller)

    def wake(self, services: Sequence[str], namespace: str) -> None:
        """Starts what is at zero, as a request would. Unknown names are overlooked: they may come later."""
        for service in services:
            controller = self._controller(namespace, service)
            for _, revision in controller.targets() if controller else ():
                revision.wake()

    def _controller(self, namespace: str, name: str) -> ServiceController | None:
        """Of a Service, or of the one that an InferenceService of that name owns."""
        owner = self._inference_services.get((namespace, name))
        owned = self._services.get((namespace, owner.service.name)) if owner else None
        return self._services.get((namespace, name)) or owned

    def _exists(self, kind: str, namespace: str, name: str) -> bool:
        """Whether there is a service or inferenceservice of that name."""
        return (namespace, name) in (self._services if kind == "service" else self._inference_services)

    def _owner(self, key: tuple[str, str]) -> InferenceService | None:
        """The InferenceService that the Service of that name belongs to."""
        owners = self._inference_services.values()
        return next((owner for owner in owners if (owner.namespace, owner.service.name) == key), None)

    def _check(self, resource: Resource) -> None:
        """Raises ValidationError for what cannot be beside what there is."""
        if isinstance(resource, Service) and (owner := self._owner((resource.namespace, resource.name))):
            raise ValidationError(
                [f'Service "{resource.name}" belongs to InferenceService "{owner.name}": change that instead']
            )
        if isinstance(resource, Trigger):
            trigger = self._eventing.triggers.get((resource.namespace, resource.name))
            check_trigger_update(trigger or resource, resource)
        service: Resource = resource
        if isinstance(resource, InferenceService):
            service, before = resource.service, self._inference_services.get((resource.namespace, resource.name))
            if before is not None and before.service.name != service.name:
                runs_as = f'InferenceService "{resource.name}" runs as {before.service.name}'
                raise ValidationError([f"{runs_as}: spec.predictor.name cannot change"])
        if isinstance(service, Service) and (service.namespace, service.name) in self._services:
            self._services[service.namespace, service.name].check(service)

    def _action(self, resource: Resource) -> Literal["created", "configured", "unchanged"]:
        key = (resource.namespace, resource.name)
        before: Resource | None
        match resource:
            case ConfigMap():
                before = self._config_maps.get(key)
            case ServingRuntime():
                before = self._runtimes.get(key)
            case InferenceService():
                before = self._inference_services.get(key)
            case Service():
                before = self._services[key].service if key in self._services else None
            case Broker():
                before = self._eventing.brokers.get(key)
            case Trigger():
                before = self._eventing.triggers.get(key)
            case Flow():
                before = self._eventing.sequences.get(key)
        if before is None:
            return "created"
        return "unchanged" if before == resource else "configured"

    async def _take(self, resource: Resource) -> None:
        key = (resource.namespace, resource.name)
        match resource:
            case ConfigMap():
                self._config_maps[key] = resource
                self._reconfigure()
            case ServingRuntime():
                self._runtimes[key] = resource
            case InferenceService():
                self._run(resource.service)
                self._inference_services[key] = resource
            case Service():
                self._run(resource)
            case Broker():
                self._eventing.take_broker(resource)
            case Trigger():
                self._eventing.take_trigger(resource)
            case Flow():
                await self._eventing.take_sequence(resource)
        self._route()

    def _run(self, service: Service) -> None:
        key = (service.namespace, service.name)
        if key in self._services:
            self._services[key].update(service)
            return
        self._services[key] = ServiceController(
            service,
            self._node,
            self._settings_in_force.autoscaler,
            changed=self._route,
            wakes=self._wake_along,
            refuses=self._refuse_along,
        )

    def _reconfigure(self) -> None:
        data = {
            name: config_map.data
            for (namespace, name), config_map in self._config_maps.items()
            if namespace == SYSTEM_NAMESPACE
        }
        self._settings_in_force = Settings(
            AutoscalerConfig.from_data(data.get("config-autoscaler", {})),
            DefaultsConfig.from_data(data.get("config-defaults", {})),
            FeaturesConfig.from_data(data.get("config-features", {})),
        )
        for controller in self._services.values():
            controller.configure(self._settings_in_force.autoscaler)

    def _route(self) -> None:
        routes: dict[str, Route] = {}
        for (namespace, name), controller in self._services.items():
            targets = controller.targets()
            local = controller.service.labels.get(_VISIBILITY) == "cluster-local"
            percents = tuple((target.percent, revision) for target, revision in targets)
            routes[f"{name}.{namespace}"] = Route(percents, local)
            tagged = {target.tag: revision for target, revision in targets if target.tag}
            routes |= {f"{tag}-{name}.{namespace}": Route(((100, one),), local) for tag, one in tagged.items()}
        for (namespace, name), owner in self._inference_services.items():  # their status.address
            if (route := routes.get(f"{owner.service.name}.{namespace}")) is not None:
                routes.setdefault(f"{name}.{namespace}", route)
        namespace, _, name = self.settings.default_service.partition("/")
        default = routes.get(f"{name}.{namespace}")
        brokers = {f"/{namespace}/{name}": self._broker_ingress for namespace, name in self._eventing.brokers}
        if brokers:
            routes[BROKER_HOST] = self._broker_ingress
        self._ingress.set_routes(routes, default, brokers)
        self._eventing.wake()

    def _connect_default(self) -> AbstractAsyncContextManager[Target]:
        """Raises Unavailable when the default service has not been applied."""
        namespace, _, name = self.settings.default_service.partition("/")
        controller = self._controller(namespace, name)
        if controller is None:
            raise Unavailable(f"the default service {self.settings.default_service} has not been applied")
        targets = [revision for target, revision in controller.targets() if target.percent]
        if not targets:
            raise Unavailable(f"the service {self.settings.default_service} has no revision in its traffic yet")
        return targets[0].connect()

    async def _metrics_text(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.path != "/metrics":
            return web.Response(status=404, text="there is /metrics\n")
        return web.Response(body=self.metrics(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    def _wake_along(self, controller: ServiceController) -> None:
        self.wake(_wakes(controller.service), controller.service.namespace)

    def _refuse_along(self, controller: ServiceController, reason: str) -> None:
        """Who waits for a service that waits for this one waits in vain as well."""
        owner = self._owner(controller.key)
        names = {controller.service.name, owner.name if owner else controller.service.name}
        for other in self._services.values():
            same = other.service.namespace == controller.service.namespace
            if same and names.intersection(_wakes(other.service)):
                for revision in other.revisions:
                    revision.refuse_along(reason)

    def _pod_changed(self, pod: Pod) -> None:
        for revision in self._revisions():
            if any(replica.pod is pod for replica in revision.replicas):
                revision.pod_changed(pod)

    def _revisions(self) -> Iterator[Revision]:
        for controller in self._services.values():
            yield from controller.revisions

    # -- what is shown

    def get(self, kind: str, namespace: str | None) -> list[dict[str, Any]]:
        """Objects as `kubectl get -o json` shows them; `namespace` None: of all."""
        kinds: Mapping[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "service": self._get_services,
            "revision": self._get_revisions,
            "pod": self._get_pods,
            "configmap": self._get_config_maps,
            "inferenceservice": self._get_inference_services,
            "servingruntime": lambda: self._get_runtimes(of_cluster=False),
            "clusterservingruntime": lambda: self._get_runtimes(of_cluster=True),
            "broker": lambda: self._with_status(self._eventing.get_brokers(self._broker_url)),
            "trigger": lambda: self._with_status(self._eventing.get_triggers()),
            "sequence": lambda: self._with_status(self._eventing.get_sequences()),
        }
        return [one for one in kinds[kind]() if namespace in (None, one["metadata"].get("namespace", namespace))]

    def _get_services(self) -> Iterator[dict[str, Any]]:
        for (namespace, name), controller in sorted(self._services.items()):
            manifest = dict(controller.service.manifest)
            metadata = {
                **_mapping(manifest.get("metadata")),
                "generation": controller.generation,
                "creationTimestamp": _rfc3339(controller.created),
            }
            status = controller.status(self.service_url(namespace, name))
            yield {**manifest, "metadata": metadata, "status": status}

    def _get_inference_services(self) -> Iterator[dict[str, Any]]:
        for (namespace, name), owner in sorted(self._inference_services.items()):
            controller = self._services[namespace, owner.service.name]
            metadata = {
                **_mapping(owner.manifest.get("metadata")),
                "generation": controller.generation,
                "creationTimestamp": _rfc3339(controller.created),
            }
            url = self.service_url(namespace, name)
            predictor = controller.status(self.service_url(namespace, owner.service.name))
            status = inference_status(predictor, url, f"http://{name}.{namespace}.svc.cluster.local")
            yield {**owner.manifest, "metadata": metadata, "status": status}

    def _get_runtimes(self, *, of_cluster: bool) -> Iterator[dict[str, Any]]:
        for (namespace, _), runtime in sorted(self._runtimes.items()):
            if (namespace == "") == of_cluster:
                yield self._without_status(runtime.manifest)

    def _get_revisions(self) -> Iterator[dict[str, Any]]:
        for revision in self._revisions():
            status = revision.status()
            yield {
                "apiVersion": "serving.knative.dev/v1",
                "kind": "Revision",
                "metadata": {
                    "name": revision.id.name,
                    "namespace": revision.id.namespace,
                    "generation": revision.id.generation,
                    "labels": {"serving.knative.dev/service": revision.id.service},
                    "annotations": dict(revision.template.annotations),
                    "creationTimestamp": _rfc3339(revision.created),
                },
                "status": {
                    "actualReplicas": status["ready"],
                    "desiredReplicas": status["desired"],
                    "conditions": revision.conditions(),
                },
            }

    def _get_pods(self) -> Iterator[dict[str, Any]]:
        for revision in self._revisions():
            for pod in revision.status()["pods"]:
                yield {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "metadata": {
                        "name": pod["name"],
                        "namespace": revision.id.namespace,
                        "labels": {
                            "serving.knative.dev/service": revision.id.service,
                            "serving.knative.dev/revision": revision.id.name,
                        },
                    },
                    "status": pod,
                }

    def _get_config_maps(self) -> Iterator[dict[str, Any]]:
        for _, config_map in sorted(self._config_maps.items()):
            yield self._without_status(config_map.manifest)

    def _with_status(
        self, found: Iterator[tuple[Broker | Trigger | Flow, datetime, dict[str, Any]]]
    ) -> Iterator[dict[str, Any]]:
        for one, made, status in found:
            metadata = {**_mapping(one.manifest.get("metadata")), "creationTimestamp": _rfc3339(made)}
            yield {**one.manifest, "metadata": metadata, "status": status}

    def _without_status(self, manifest: Mapping[str, object]) -> dict[str, Any]:
        metadata = {**_mapping(manifest.get("metadata")), "creationTimestamp": _rfc3339(self.started)}
        return {**manifest, "metadata": metadata}

    def service_url(self, namespace: str, name: str) -> str:
        """By path, which works without DNS."""
        return f"{self.url}/{namespace}/{name}"

    def _broker_url(self, namespace: str, name: str) -> str:
        """By path, unless a service has that name."""
        known = any(self._exists(kind, namespace, name) for kind in ("service", "inferenceservice"))
        return broker_url(namespace, name) if known else self.service_url(namespace, name)

    def logs(self, namespace: str, name: str) -> list[LogFile]:
        """Of an inference service, a service, a revision or a pod, the oldest first. Raises NotFound."""
        found = False
        files = []
        owner = self._inference_services.get((namespace, name))
        name = owner.service.name if owner and (namespace, name) not in self._services else name
        for revision in self._revisions():
            if revision.id.namespace == namespace:
                whole = name in (revision.id.service, revision.id.name)
                files += [file for file in revision.log_files() if whole or file.pod == name]
                found = found or whole
        if not files and not found:
            raise NotFound(f"no service, revision or pod {name!r} in namespace {namespace!r}")
        return files

    def status(self) -> dict[str, Any]:
        """For `stagecraft status`."""
        return {
            "platform": {
                "name": self.settings.name,
                "pid": os.getpid(),
                "url": self.url,
                "metrics_url": self.metrics_url,
                "folder": str(self.settings.folder),
                "data_folder": str(self.data_folder),
                "started_at": _rfc3339(self.started),
            },
            "revisions": [revision.status() for revision in self._revisions()],
            **self._eventing.status(self._broker_url),
        }

    def metrics(self) -> bytes:
        return self._metrics.text()


def _unix_clock() -> Callable[[], float]:
    """Unix seconds that never jump: a corrected wall clock must not look like a day without requests."""
    offset_s = time.time() - time.monotonic()
    return lambda: offset_s + time.monotonic()


def _reachable(address: str) -> str:
    """A wildcard address is for servers; a client on this machine uses loopback."""
    host, _, port = address.rpartition(":")
    return f"{_LOOPBACK.get(host, host)}:{port}" if port else ""


def _wakes(service: Service) -> list[str]:
    """The annotation may be the Service's; one of an InferenceService comes to the revision template."""
    given = service.annotations.get(WAKES) or service.template.annotations.get(WAKES, "")
    return [name.strip() for name in given.split(",") if name.strip()]


def _kind(resource: Resource) -> str:
    match resource:
        case ConfigMap():
            return "configmap"
        case Service():
            return "service.serving.knative.dev"
        case InferenceService():
            return "inferenceservice.serving.kserve.io"
        case Broker() | Trigger():
            return f"{type(resource).__name__.lower()}.eventing.knative.dev"
        case Flow():
            return "sequence.flows.knative.dev"
        case ServingRuntime():
            return f"{'' if resource.namespace else 'cluster'}servingruntime.serving.kserve.io"


def _rfc3339(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
