"""Which of the replicas in use are about to end, found out by asking them.

Knative tells nobody which pod it takes at scale-down, but a queue-proxy that drains fails its probes while it still
serves. After pkg/queue/sharedmain/main.go and knative.dev/pkg/network/handlers/drain.go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Literal

import aiohttp
import structlog

from orchestrator.while_needed import WhileNeeded

log = structlog.get_logger()

# both are needed: without that user agent the probe would be passed on to the stage
_PROBE = {"K-Network-Probe": "queue", "User-Agent": "Knative-Activator-Probe"}
_DRAINING = "shutting down"
_TIMEOUT_S = 2.0

State = Literal["serves", "drains", "gone"]


class ReplicaWatch(WhileNeeded):
    """`draining` holds the replicas in use (http://HOST:PORT/) that drain or are gone, `gone` the latter alone."""

    def __init__(self, session: aiohttp.ClientSession, every_s: float, in_use: Callable[[], set[str]]) -> None:
        super().__init__()
        self.draining: set[str] = set()
        self.gone: set[str] = set()
        self._session = session
        self._every_s = every_s
        self._in_use = in_use

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            urls = sorted(self._in_use())
            if not urls:
                self.draining, self.gone = set(), set()
                return
            answers = dict(zip(urls, await asyncio.gather(*(self._look(url) for url in urls)), strict=True))
            draining = {url for url, state in answers.items() if state != "serves"}
            for url in draining - self.draining:
                log.info("replica_draining", replica=url)
            self.draining, self.gone = draining, {url for url, state in answers.items() if state == "gone"}

    async def _look(self, url: str) -> State:
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        try:
            async with self._session.get(f"{url}healthz", headers=_PROBE, timeout=timeout) as response:
                drains = response.status == 503 and _DRAINING in await response.text()
                return "drains" if drains else "serves"
        except aiohttp.ClientConnectorError:
            return "gone"  # nobody listens there
        except (TimeoutError, aiohttp.ClientError, OSError, ValueError):
            return "serves"  # busy, or cut off: the next step finds out
