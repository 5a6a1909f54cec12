"""The one address of the platform: sends each request to a service, by host name or by path.

    Host: NAME.NAMESPACE[.localhost | .svc | .svc.cluster.local]     also TAG-NAME.NAMESPACE...
    GET http://NAME.NAMESPACE.svc.cluster.local/path HTTP/1.1        the same, from a client with this as its proxy
    /NAMESPACE/NAME/path                                             without names; the prefix is taken off
    /NAMESPACE/BROKER                                                where no service is called so
    GET http://other.host/path HTTP/1.1                              passed on, for processes of this machine only
    anything else                                                    the default service, if there is one

After pkg/reconciler/route/resources/ingress.go.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import aiohttp
from aiohttp import hdrs, web
from multidict import istr

from knative.network.forward import TARGET, forward, is_absolute, request_headers, split_target
from knative.network.listener import Listener

_TAG = istr("Knative-Serving-Tag")
_DOMAINS = (".svc.cluster.local", ".svc", ".localhost")


class RevisionEntry(Protocol):
    """Where a revision takes requests: its activator or one of its replicas."""

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse: ...


@dataclass(frozen=True, slots=True)
class Route:
    """Revisions with their weights, in percent of the requests."""

    targets: tuple[tuple[int, RevisionEntry], ...]
    local: bool = False  # visibility cluster-local: for processes of this machine only

    def choose(self, rng: random.Random) -> RevisionEntry | None:
        """One of the revisions, by weight; None if no weight is above 0."""
        targets = [(weight, entry) for weight, entry in self.targets if weight > 0]
        if len(targets) <= 1:
            return targets[0][1] if targets else None
        return rng.choices(targets, [weight for weight, _ in targets])[0][1]


@dataclass(frozen=True, slots=True)
class _Routes:
    by_host: Mapping[str, Route] = field(default_factory=dict)
    default: Route | None = None
    by_path: Mapping[str, Route] = field(default_factory=dict)


class Ingress:
    """Serves what `set_routes` says, from one request to the next. With a `session` it is a proxy for its replicas'
    other plain-HTTP requests too: they have it as http_proxy, and their weights may lie on any server."""

    def __init__(self, rng: random.Random | None = None, session: aiohttp.ClientSession | None = None) -> None:
        self._rng = rng or random.Random()
        self._session = session
        self._routes = _Routes()
        self._listener = Listener(self._handle)

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listens; port 0 takes a free one. Raises Unavailable if it cannot have the port."""
        await self._listener.start(host, port)

    @property
    def address(self) -> str:
        """HOST:PORT, "" before `start`."""
        return self._listener.address

    async def close(self) -> None:
        """Stops listening and cancels what still runs."""
        await self._listener.close()

    def set_routes(
        self, routes: Mapping[str, Route], default: Route | None = None, by_path: Mapping[str, Route] | None = None
    ) -> None:
        """Replaces all routes. Keys are NAME.NAMESPACE, TAG-NAME.NAMESPACE, or any other host name as an alias; those
        of `by_path` are whole paths, which stay as they are and come after the services."""
        self._routes = _Routes({host.lower(): route for host, route in routes.items()}, default, by_path or {})

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        route = self._route(request)
        if route is None:
            outside = self._outside(request)
            if outside and self._session is not None:
                return await forward(request, request_headers(request), authority=outside, session=self._session)
            return web.Response(status=404, text=self._unknown(request))
        if route.local and not _is_loopback(request.remote):
            return web.Response(status=404, text=self._unknown(request))
        revision = route.choose(self._rng)
        if revision is None:
            return web.Response(
                status=503, text=f"the service of {_shown(request)} has no revision in its traffic yet\n"
            )
        return await revision.serve(request)

    def _route(self, request: web.BaseRequest) -> Route | None:
        """The route of a request; sets the target that its replica gets."""
        target = request.raw_path
        host = request.headers.get(hdrs.HOST, "")
        absolute = is_absolute(target)
        if absolute:
            host, target = split_target(target)
            request[TARGET] = target
        name = _name(host)
        route = self._tagged(name, request)
        if route is not None or _is_service_name(name) or (absolute and not self._is_own(host)):
            return route  # a service that does not exist is not the default service
        return self._by_path(target, request) or self._routes.default

    def _outside(self, request: web.BaseRequest) -> str:
        """HOST:PORT of a request from this machine to some server that is no service; "" for all others."""
        target = request.raw_path
        if not target.lower().startswith("http://") or not _is_loopback(request.remote):
            return ""
        host, _ = split_target(target)
        return "" if self._is_own(host) or _is_service_name(_name(host)) else host

    def _is_own(self, host: str) -> bool:
        """Whether the authority of an absolute target is this listener, by whatever address of this machine."""
        _, _, port = host.rpartition(":")
        _, _, own = self.address.rpartition(":")
        return port == own and _is_address(_name(host))

    def _tagged(self, name: str, request: web.BaseRequest) -> Route | None:
        service = _service(name)
        tag = request.headers.get(_TAG)
        by_host = self._routes.by_host
        tagged = by_host.get(f"{tag}-{service}".lower()) if tag else None
        return tagged or by_host.get(name) or by_host.get(service)

    def _by_path(self, target: str, request: web.BaseRequest) -> Route | None:
        path, mark, query = target.partition("?")
        parts = path.split("/", 3)  # "", NAMESPACE, NAME, rest
        if len(parts) < 3:
            return None
        route = self._tagged(f"{parts[2]}.{parts[1]}", request)
        if route is not None:
            request[TARGET] = "/" + (parts[3] if len(parts) == 4 else "") + mark + query
        return route or self._routes.by_path.get(path.removesuffix("/"))

    def _unknown(self, request: web.BaseRequest) -> str:
        hosts = sorted(self._routes.by_host)
        asked = _shown(request)
        if not hosts:
            return f"no service for {asked}: none is applied yet; apply one with `stagecraft local apply`\n"
        return (
            f"no service for {asked}; expected a Host header NAME.NAMESPACE.localhost or a path /NAMESPACE/NAME/..., "
            f"with NAME.NAMESPACE one of: {', '.join(hosts)}\n"
        )


def _is_loopback(remote: str | None) -> bool:
    return remote is not None and ipaddress.ip_address(remote).is_loopback


def _shown(request: web.BaseRequest) -> str:
    if request.raw_path.startswith("/"):
        return request.headers.get(hdrs.HOST, "") + request.raw_path
    return request.raw_path


def _name(host: str) -> str:
    """The host's name in lower case, without its port."""
    name = host.partition("]")[0].lstrip("[") if host.startswith("[") else host.partition(":")[0]
    return name.lower().rstrip(".")


def _is_address(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _service(name: str) -> str:
    """NAME.NAMESPACE of a host name."""
    for domain in _DOMAINS:
        if name.endswith(domain):
            return name.removesuffix(domain)
    return name


def _is_service_name(name: str) -> bool:
    return _service(name) != name
