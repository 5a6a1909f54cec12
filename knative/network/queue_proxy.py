"""What stands before one replica: limits, counts, times and relays the requests that it gets.

    probes? -> time-outs -> statistics -> breaker -> one exchange with the replica's process

Requests come in two ways, both counted and limited: from ingress and activator in this process (`handle`), and over
the queue-proxy's own port from clients that pin the replica ("POD_IP:8012" of a cluster).
After pkg/queue/sharedmain/handlers.go, pkg/queue/handler.go and knative.dev/pkg/network/handlers/drain.go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import aiohttp
from aiohttp import hdrs, web
from multidict import CIMultiDict, istr

from knative.autoscaler.stats import RequestStats, StatReport
from knative.network.breaker import Breaker, QueueFull
from knative.network.forward import forward, request_headers
from knative.network.listener import Listener
from knative.network.timeouts import REQUEST_TIMEOUT, Timeouts, Watch

QUEUE_FULL = "pending request queue full\n"

_QUEUE_FACTOR = 10  # places in the queue for each request that may run (sharedmain/main.go)
_CLIENT_GONE = 499  # only for `observe`: nobody gets it

_PROBE = istr("K-Network-Probe")
_PROBE_HASH = istr("K-Network-Hash")
_KUBELET_PROBE = istr("K-Kubelet-Probe")
_PROBE_AGENTS = ("kube-probe/", "Knative-Activator-Probe", "Knative-Autoscaling-Probe")
_ORIGINAL_HOST = istr("K-Original-Host")
_PROXY_REQUEST = istr("K-Proxy-Request")
_REVISION_HEADERS = (istr("Knative-Serving-Revision"), istr("Knative-Serving-Namespace"))


def _unobserved(code: int, latency_s: float) -> None:
    pass


class QueueProxy:
    """`target_port` is the port of the replica's process on 127.0.0.1, `ready` says whether that answers its probe,
    `observe` is told the status code and the seconds of each request (499: the client went away), and `clock` gives
    the Unix seconds of the statistics."""

    def __init__(
        self,
        *,
        revision: str,
        pod: str,
        target_port: int,
        container_concurrency: int,
        timeouts: Timeouts,
        session: aiohttp.ClientSession,
        ready: Callable[[], bool],
        clock: Callable[[], float] = time.time,
        observe: Callable[[int, float], None] = _unobserved,
    ) -> None:
        self.revision = revision
        self.pod = pod
        self._authority = f"127.0.0.1:{target_port}"
        self._breaker = (
            Breaker(container_concurrency, _QUEUE_FACTOR * container_concurrency) if container_concurrency else None
        )
        self._timeouts = timeouts
        self._session = session
        self._ready = ready
        self._clock = clock
        self._observe = observe
        self._stats = RequestStats(clock())
        self._listener = Listener(self._handle_direct)
        self._watches: set[Watch] = set()
        self._foreign = 0  # requests that another way leads to the replica
        self._idle = asyncio.Event()
        self._last_request_s = 0.0  # of the event loop's clock
        self._draining = False

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listens; port 0 takes a free one. Raises Unavailable if it cannot have the port."""
        await self._listener.start(host, port)

    @property
    def address(self) -> str:
        """HOST:PORT of its own port, "" before `start`."""
        return self._listener.address

    @property
    def in_flight(self) -> int:
        """Requests inside, those in the queue included."""
        return len(self._watches) + self._foreign

    @property
    def queued(self) -> int:
        """Requests that wait for the breaker."""
        return 0 if self._breaker is None else self._breaker.waiting

    @property
    def draining(self) -> bool:
        return self._draining

    def report(self, now_s: float) -> StatReport:
        """The averages since the last report, what a cluster's autoscaler scrapes from :9090."""
        return self._stats.report(now_s)

    async def handle(self, request: web.BaseRequest, *, proxied: bool) -> web.StreamResponse:
        """Answers a request; `proxied` ones came through an activator, which reports them itself."""
        probe = self._probe(request)
        if probe is not None:
            return probe
        loop = asyncio.get_running_loop()
        start_s = self._last_request_s = loop.time()
        code = _CLIENT_GONE
        watch = Watch(request, self._timeouts, REQUEST_TIMEOUT)
        self._watches.add(watch)
        try:
            response = await watch.run(lambda: self._count(request, proxied))
            code = response.status
            return response
        finally:
            self._watches.discard(watch)
            if not self.in_flight:
                self._idle.set()
            self._observe(code, loop.time() - start_s)

    def opened(self) -> Callable[[], None]:
        """Counts a request that another way leads to the replica (a tunnel); call the result once, at its end."""
        self._foreign += 1
        self._last_request_s = asyncio.get_running_loop().time()
        self._stats.request_in(self._clock(), False)

        def ended() -> None:
            self._foreign -= 1
            self._stats.request_out(self._clock(), False)
            if not self.in_flight:
                self._idle.set()

        return ended

    async def drain(self, quiet_s: float) -> None:
        """Fails probes from now on, and serves on. Returns when `quiet_s` have passed without a new request and
        nothing is in flight; every new request starts the wait anew."""
        loop = asyncio.get_running_loop()
        self._draining = True
        self._last_request_s = loop.time()
        while True:
            rest_s = self._last_request_s + quiet_s - loop.time()
            if rest_s > 0:
                await asyncio.sleep(rest_s)
            elif self.in_flight:
                self._idle.clear()
                await self._idle.wait()
            else:
                return

    async def close(self) -> None:
        """Stops listening, and ends what still runs: 503 where nothing was sent yet, else the connection is cut."""
        self._draining = True
        for watch in list(self._watches):
            watch.end(503, f"the replica {self.pod} has ended; try again\n")
        await self._listener.close()

    async def _handle_direct(self, request: web.BaseRequest) -> web.StreamResponse:
        return await self.handle(request, proxied=request.headers.get(_PROXY_REQUEST) == "activator")

    async def _count(self, request: web.BaseRequest, proxied: bool) -> web.StreamResponse:
        self._stats.request_in(self._clock(), proxied)
        try:
            return await self._limit(request, proxied)
        finally:
            self._stats.request_out(self._clock(), proxied)

    async def _limit(self, request: web.BaseRequest, proxied: bool) -> web.StreamResponse:
        if self._breaker is None:
            return await self._relay(request, proxied)
        try:
            await self._breaker.acquire()
        except QueueFull:
            return web.Response(status=503, text=QUEUE_FULL)
        try:
            return await self._relay(request, proxied)
        finally:
            self._breaker.release()

    async def _relay(self, request: web.BaseRequest, proxied: bool) -> web.StreamResponse:
        headers = request_headers(request)
        _rewrite(headers, proxied)
        return await forward(request, headers, authority=self._authority, session=self._session)

    def _probe(self, request: web.BaseRequest) -> web.Response | None:
        """The answer if this is a probe, which is neither counted nor passed on."""
        headers = request.headers
        value = headers.get(_PROBE, "")
        is_health = headers.get(hdrs.USER_AGENT, "").startswith(_PROBE_AGENTS) or bool(headers.get(_KUBELET_PROBE))
        if not is_health and value != "probe":
            return None
        if self._draining:
            return web.Response(status=503, text="shutting down\n")
        if not is_health:
            return network_probe(request)
        if value != "queue":
            return web.Response(status=400, text=f'unexpected probe header value: "{value}"\n')
        return web.Response(text="queue") if self._ready() else web.Response(status=503)


def network_probe(request: web.BaseRequest) -> web.Response:
    """The answer to `K-Network-Probe: probe`: its hash back."""
    mark = request.headers.get(_PROBE_HASH, "")
    if not mark:
        return web.Response(status=400, text=f'a probe request must contain a non-empty "{_PROBE_HASH}" header\n')
    return web.Response(headers={_PROBE_HASH: mark})


def _rewrite(headers: CIMultiDict[str], proxied: bool) -> None:
    """Headers between Knative's parts become what the replica's process is to see."""
    if proxied:
        headers[_PROXY_REQUEST] = "activator"
    if _ORIGINAL_HOST in headers:
        headers[hdrs.HOST] = headers.popall(_ORIGINAL_HOST)[0]
    for name in _REVISION_HEADERS:
        headers.popall(name, None)
