"""One replica of a revision: a process behind its queue-proxy. What a cluster calls a pod.

request --> QueueProxy 127.0.0.1:A (counted, limited) --> the process 127.0.0.1:B, B given to it as PORT
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Literal

import structlog

from knative.kubelet.pod import Pod
from knative.network.queue_proxy import QueueProxy

log = structlog.get_logger()

Stage = Literal["starting", "ready", "draining", "failed"]


class Replica:
    """Made by `Revision`, which hands in a process that starts and a queue-proxy that listens."""

    def __init__(self, pod: Pod, proxy: QueueProxy, created_s: float, grpc_port: int = 0) -> None:
        self.pod = pod
        self.proxy = proxy
        self.created_s = created_s
        self.grpc_port = grpc_port  # 0: none
        self.draining = False
        self._stopping: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.pod.name

    @property
    def ready(self) -> bool:
        """Takes new requests. A draining one still answers those that come, but is no longer sent any."""
        return self.pod.phase == "ready" and not self.draining

    @property
    def port(self) -> int:
        """For connections that are no HTTP/1.1 (`network/tunnel.py`)."""
        return self.grpc_port

    def opened(self) -> Callable[[], None]:
        """Counts a call on such a connection like a request; the result is to be called when it has ended."""
        return self.proxy.opened()

    @property
    def stage(self) -> Stage:
        if self.draining:
            return "draining"
        if self.pod.phase == "ready":
            return "ready"
        return "failed" if self.pod.phase == "backoff" else "starting"

    def stop(self, *, quiet_s: float, grace_s: float, gone: Callable[[Replica], None]) -> None:
        """Ends it in the background: no new requests, those running end, SIGTERM, SIGKILL when `grace_s` are over.
        `gone` is called when nothing is left of it. After `kubelet` and pkg/queue/sharedmain (drain)."""
        if self._stopping is None:
            serving = self.pod.phase == "ready"
            self.draining = True
            self._stopping = asyncio.create_task(self._stop(quiet_s if serving else 0.0, grace_s, gone))

    async def _stop(self, quiet_s: float, grace_s: float, gone: Callable[[Replica], None]) -> None:
        ends_s = time.monotonic() + grace_s
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self.proxy.drain(quiet_s)
            await self.pod.terminate(max(0.0, ends_s - time.monotonic()))
            await self.proxy.close()
        except Exception:  # a mistake of ours must not leave the replica in the list for ever
            log.exception("replica_stop_failed", pod=self.name)
        finally:
            gone(self)

    async def stopped(self) -> None:
        """Returns once what `stop` began has ended."""
        if self._stopping is not None:
            await asyncio.wait({self._stopping})

    async def close(self) -> None:
        """Ends it now."""
        if self._stopping is not None:
            self._stopping.cancel()
            await asyncio.gather(self._stopping, return_exceptions=True)
        self.draining = True
        await self.pod.terminate(0.0)
        await self.proxy.close()
