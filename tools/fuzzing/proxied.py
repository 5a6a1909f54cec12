"""What stands at both ends of the proxies' way: replicas that tell what they were sent, and revisions that tell what
the ingress has read. What a replica has read and the ingress has not was smuggled."""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections import Counter
from dataclasses import dataclass
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult

from knative.network.activator import Activator
from knative.network.forward import TARGET
from knative.network.queue_proxy import QueueProxy
from knative.network.timeouts import Timeouts

# what is changed, added or left out on the way by design
_OF_ONE_HOP = frozenset({b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
                         b"proxy-connection", b"transfer-encoding", b"upgrade"})  # fmt: skip
_CHANGED = frozenset({b"host", b"content-length", b"expect", b"x-forwarded-for", b"k-proxy-request", b"k-original-host",
                      b"knative-serving-revision", b"knative-serving-namespace"})  # fmt: skip

Headers = tuple[tuple[bytes, bytes], ...]


@dataclass(frozen=True, slots=True)
class Seen:
    """A request as one of the parsers read it. Header names are in lower case."""

    method: str
    target: bytes
    headers: Headers
    hosts: frozenset[bytes]  # that it is for; of these one is passed on


class Replica:
    """The process behind a queue-proxy: answers each request with what it got, PUT without a length."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: list[Seen] = []
        self.answered = 0
        self.running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        headers = tuple(scope["headers"])
        seen = Seen(scope["method"], target, headers, _valued(headers, b"host"))
        self.seen.append(seen)
        self.running += 1
        try:
            digest, more = hashlib.sha256(), True
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                digest.update(message.get("body", b""))
                more = message.get("more_body", False)
            self.answered += 1
            body = self._answer(seen, digest.hexdigest())
            length = [] if seen.method == "PUT" else [(b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 200, "headers": length})
            await send({"type": "http.response.body", "body": body})
        finally:
            self.running -= 1

    def forget(self) -> None:
        self.seen.clear()
        self.answered = 0

    def _answer(self, seen: Seen, digest: str) -> bytes:
        told = {
            "replica": self.name,
            "method": seen.method,
            "target": seen.target.decode("latin-1"),
            "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in seen.headers],
            "sha256": digest,
        }
        return json.dumps(told).encode()


class Revision:
    """A revision of one replica; tells of what the ingress has read."""

    def __init__(self, replica: Replica, port: int, session: aiohttp.ClientSession, concurrency: int) -> None:
        self.entered: list[Seen] = []
        self.answered = 0
        self.proxy = QueueProxy(
            revision=replica.name,
            pod=replica.name,
            target_port=port,
            container_concurrency=concurrency,
            timeouts=Timeouts(),
            session=session,
            ready=lambda: True,
            observe=self._count,
        )
        self.activator = Activator(
            revision=replica.name,
            container_concurrency=concurrency,
            timeouts=Timeouts(),
            on_stat=lambda concurrency: None,
        )
        self.activator.set_backends([self.proxy])

    def forget(self) -> None:
        self.entered.clear()
        self.answered = 0

    async def serve(self, request: web.BaseRequest) -> web.StreamResponse:
        target = request.get(TARGET) or request.raw_path
        headers = tuple((bytes(name).lower(), bytes(value)) for name, value in request.raw_headers)
        # as upstream, K-Original-Host stands for Host, also where it comes from outside
        hosts = _valued(headers, b"host") if request.raw_path[:1] in "/*" else frozenset([_authority(request.raw_path)])
        hosts |= _valued(headers, b"k-original-host")
        self.entered.append(Seen(request.method, target.encode(), headers, hosts))
        return await self.activator.handle(request)

    def _count(self, code: int, latency_s: float) -> None:
        self.answered += 1


def is_same(seen: Seen, entered: Seen) -> bool:
    """Whether a replica has read what the ingress has, apart from what the way changes."""
    same_target = _path(seen.target) == _path(entered.target)
    same_host = not entered.hosts or seen.hosts <= entered.hosts
    return seen.method == entered.method and same_target and same_host and _kept(seen) == _kept(entered)


def _path(target: bytes) -> bytes:
    """Without a fragment, which no client should send, and which httptools leaves out."""
    return target.partition(b"#")[0].removesuffix(b"?")


def _valued(headers: Headers, name: bytes) -> frozenset[bytes]:
    return frozenset(value.strip(b" \t") for key, value in headers if key == name)


def _authority(target: str) -> bytes:
    return re.split("[/?]", target.partition("://")[2])[0].encode()


def _kept(seen: Seen) -> Counter[tuple[bytes, bytes]]:
    named = {name.strip().lower() for key, value in seen.headers if key == b"connection" for name in value.split(b",")}
    gone = _OF_ONE_HOP | _CHANGED | named
    return Counter((name, value.strip(b" \t")) for name, value in seen.headers if name not in gone)


class OneName(AbstractResolver):
    """Finds one name, at a port of this machine; there are no others."""

    def __init__(self, name: str, port: int) -> None:
        self._name = name
        self._port = port

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        if host != self._name:
            raise OSError(f"there is no {host}")
        return [{"hostname": host, "host": "127.0.0.1", "port": self._port, "family": family, "proto": 0, "flags": 0}]

    async def close(self) -> None:
        """Nothing is open."""


def loopback_only(info: Any) -> socket.socket:
    """What aiohttp takes as `socket_factory`."""
    family, kind, protocol, _, address = info
    if address[0] != "127.0.0.1":
        raise OSError(f"{address[0]} is not of this machine")
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    return made
