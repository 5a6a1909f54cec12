"""Stands in the request path of a revision at zero, or with little spare capacity: holds requests, wakes, spreads.

    statistics -> time-outs (waiting for a cold start counts) -> throttler -> queue-proxy of a replica

After cmd/activator/main.go and pkg/activator/handler.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from aiohttp import hdrs, web
from multidict import istr

from knative.autoscaler.stats import ActivatorStats, StatReport
from knative.errors import Unavailable
from knative.network.breaker import QueueFull
from knative.network.queue_proxy import QUEUE_FULL, QueueProxy, network_probe
from knative.network.throttler import QUEUE_DEPTH, Throttler
from knative.network.timeouts import ACTIVATOR_TIMEOUT, Timeouts, Watch

_PROBE = istr("K-Network-Probe")
_RETRY_AFTER_S = "10"  # the first crash back-off


class Activator:
    """The activator of one revision. `on_stat` is called with a concurrency that the autoscaler must know at once:
    the first request after a pause. `clock` gives the Unix seconds of the statistics."""

    def __init__(
        self,
        *,
        revision: str,
        container_concurrency: int,
        timeouts: Timeouts,
        on_stat: Callable[[float], None],
        on_waiting: Callable[[], None] = lambda: None,
        queue_depth: int = QUEUE_DEPTH,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.revision = revision
        self._timeouts = timeouts
        self._on_stat = on_stat
        self._clock = clock
        self._stats = ActivatorStats()
        self._refusal = ""
        self._throttler = Throttler[QueueProxy](
            revision, container_concurrency, queue_depth=queue_depth, on_waiting=on_waiting
        )

    @property
    def waiting(self) -> int:
        """Requests held because no replica has room."""
        return self._throttler.waiting

    def set_backends(self, backends: Sequence[QueueProxy]) -> None:
        """The replicas that are ready now; held requests go to them."""
        self._throttler.set_backends(backends)

    def report(self, now_s: float) -> StatReport | None:
        """The averages since the last report, None after a pause."""
        return self._stats.report(now_s)

    def refuse(self, reason: str) -> None:
        """Answers 503 with `reason` to all that wait, and to whoever comes, until it is called with ""."""
        self._refusal = reason
        if reason:
            self._throttler.refuse(lambda: Unavailable(reason))

    def poke(self) -> None:
        """Counts a request that came and went, for one that will come: the revision wakes ahead of it."""
        at_once = self._stats.request_in(self._clock())
        self._stats.request_out(self._clock())
        if at_once is not None:
            self._on_stat(at_once)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers a request by a replica, as soon as one has room."""
        probe = _probe(request)
        if probe is not None:
            return probe
        at_once = self._stats.request_in(self._clock())
        try:
            if at_once is not None:
                self._on_stat(at_once)
            return await Watch(request, self._timeouts, ACTIVATOR_TIMEOUT).run(lambda: self._balance(request))
        finally:
            self._stats.request_out(self._clock())

    async def _balance(self, request: web.BaseRequest) -> web.StreamResponse:
        try:
            if self._refusal:
                raise Unavailable(self._refusal)
            async with self._throttler.reserve() as backend:
                return await backend.handle(request, proxied=True)
        except QueueFull:
            return web.Response(status=503, text=QUEUE_FULL)
        except Unavailable as error:
            return web.Response(status=503, text=f"{error}\n", headers={hdrs.RETRY_AFTER: _RETRY_AFTER_S})


def _probe(request: web.BaseRequest) -> web.Response | None:
    value = request.headers.get(_PROBE)
    if value is None:
        return None
    if value == "activator":
        return web.Response(text="activator")
    if value == "probe":
        return network_probe(request)
    return web.Response(status=400, text=f'unexpected probe header value: "{value}"\n')
