"""One replica of a revision: a process behind its queue-proxy. What a cluster calls a pod.

request --> QueueProxy 127.0.0.1:A (counted, limited) --> the process 127.0.0.1:B, B given to it as PORT
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import secrets
import string
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Literal

import structlog

from knative.images import Command, expand, expand_env
from knative.kubelet.pod import Pod, PodSpec
from knative.network.queue_proxy import QueueProxy
from knative.network.timeouts import Timeouts
from knative.node import Node, RevisionName
from knative.resources.objects import RevisionTemplate

log = structlog.get_logger()

_NAME_LETTERS = string.ascii_lowercase + string.digits
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
Stage = Literal["starting", "ready", "draining", "failed"]


class Replica:
    """Made by `start_replica`: a process that starts, and a queue-proxy that listens."""

    def __init__(self, pod: Pod, proxy: QueueProxy, created_s: float, grpc_port: int = 0) -> None:
        self.pod = pod
        self.proxy = proxy
        self.created_s = created_s
        self.port = grpc_port  # for connections that are no HTTP/1.1 (`network/tunnel.py`); 0: none
        self.draining = False
        self._stopping: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.pod.name

    @property
    def ready(self) -> bool:
        """Takes new requests. A draining one still answers those that come, but is no longer sent any."""
        return self.pod.phase == "ready" and not self.draining

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
            await self.proxy.close()  # clients that are tied to it learn at once that it is gone
            await self.pod.terminate(max(0.0, ends_s - time.monotonic()))
        except Exception:  # a mistake of ours must not leave the replica in the list for ever
            log.exception("replica_stop_failed", pod=self.name)
        finally:
            gone(self)

    async def stopped(self) -> None:
        """Returns once what `stop` began has ended."""
        if self._stopping is not None:
            await asyncio.wait({self._stopping})

    async def close(self, grace_s: float = 0.0) -> None:
        """Ends it: SIGTERM, and SIGKILL after `grace_s`, whatever it still has to do."""
        if self._stopping is not None:
            self._stopping.cancel()
            await asyncio.gather(self._stopping, return_exceptions=True)
        self.draining = True
        await self.proxy.close()
        await self.pod.terminate(grace_s)


async def start_replica(node: Node, revision: RevisionName, template: RevisionTemplate, command: Command) -> Replica:
    """Starts one more replica of a revision. Raises OSError, ValueError and KnativeError, and leaves nothing
    behind."""
    name = f"{revision.name}-{''.join(secrets.choice(_NAME_LETTERS) for _ in range(5))}"
    async with AsyncExitStack() as undo:
        port = _take_port(node, undo)
        grpc = f"{revision.namespace}/{revision.service}" == node.grpc_service
        grpc_port = _take_port(node, undo) if grpc else 0
        proxy = QueueProxy(
            revision=revision.name,
            pod=name,
            target_port=port,
            container_concurrency=template.container_concurrency,
            timeouts=timeouts_of(template),
            session=node.session,
            ready=lambda: pod.phase == "ready",
            clock=node.clock,
            observe=node.metrics.observer(revision),
        )
        undo.push_async_callback(proxy.close)
        await proxy.start()
        env = _environment(node, revision, template, command, name, proxy.address, port, grpc_port)
        pod = node.kubelet.run(_pod_spec(name, template, command, env), port)
        undo.pop_all()
    return Replica(pod, proxy, node.clock(), grpc_port)


def timeouts_of(template: RevisionTemplate) -> Timeouts:
    return Timeouts(template.timeout_s, template.response_start_timeout_s, template.idle_timeout_s)


def _take_port(node: Node, undo: AsyncExitStack) -> int:
    port = node.kubelet.port()
    undo.callback(node.kubelet.give_back, port)
    return port


def _pod_spec(name: str, template: RevisionTemplate, command: Command, env: Mapping[str, str]) -> PodSpec:
    container = template.container
    return PodSpec(
        name=name,
        command=_expanded(command, env),
        env=env,
        working_dir=container.working_dir,
        readiness=container.readiness,
        liveness=container.liveness,
        startup=container.startup,
        grace_s=template.timeout_s,
        gpus=container.gpus,
        cpus=container.cpus,
    )


def _environment(
    node: Node,
    revision: RevisionName,
    template: RevisionTemplate,
    command: Command,
    name: str,
    address: str,
    port: int,
    grpc_port: int,
) -> dict[str, str]:
    """Knative's variables, what the image table adds, and the manifest's own, which may refer to the former."""
    env = {
        "PORT": str(port),
        "K_SERVICE": revision.service,
        "K_CONFIGURATION": revision.service,
        "K_REVISION": revision.name,
        "HOSTNAME": name,
        "POD_ADDRESS": address,  # ours: what POD_IP:8012 is on a cluster
        "GRPC_PORT": str(grpc_port),  # ours: 0 where gRPC has no way in
    }
    if node.ingress:
        # by name (cluster DNS) through the ingress, by address directly
        env |= {"http_proxy": f"http://{node.ingress}", "no_proxy": _no_proxy()}
    return expand_env(itertools.chain(command.env.items(), template.container.env), env)


def _no_proxy() -> str:
    """Loopback, and what the platform's own environment says, which also holds for https."""
    own = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    names = (name.strip() for name in own.split(","))
    return ",".join([*_LOOPBACK_NAMES, *(name for name in names if name and name not in (*_LOOPBACK_NAMES, "*"))])


def _expanded(command: Command, env: Mapping[str, str]) -> Command:
    """With $(VAR) in its arguments replaced. Its own variables are in `env` already."""
    argv, args = ([expand(text, env) for text in part] for part in (command.argv, command.args))
    return replace(command, argv=tuple(argv), args=tuple(args), env={})
