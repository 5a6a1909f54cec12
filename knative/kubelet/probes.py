"""One try of a probe, over the network or by a command. After pkg/probe (kubelet) and pkg/queue/health/probe.go."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable

import aiohttp
import yarl

from knative.kubelet.agents import AgentGone, Process
from knative.resources.objects import Probe

AGGRESSIVE_PERIOD_S = 0.05  # readiness with periodSeconds 0: pkg/queue/readiness/probe.go
AGGRESSIVE_TIMEOUT_S = 0.1
DEFAULT_PERIOD_S = 10.0  # core/v1, for all else that says 0
EXEC_PERIOD_S = 1.0  # a command is too dear to be run 20 times a second
HOST = "127.0.0.1"

_USER_AGENT = "kube-probe/1.0"
_REDIRECTS_MAX = 10
_BODY_BYTES = 200  # of a failure, for people

# starts the probe's command in the pod's environment; the text is what it printed last
RunCommand = Callable[[tuple[str, ...]], Awaitable[tuple[Process, Callable[[], str]]]]


class Prober:
    """Tries probes against a pod at `port`."""

    def __init__(self, session: aiohttp.ClientSession, port: int, run_command: RunCommand) -> None:
        self._session = session
        self._port = port
        self._run_command = run_command

    async def attempt(self, probe: Probe, timeout_s: float) -> str:
        """Why the probe failed, for people; "" if it succeeded."""
        port = probe.port or self._port
        try:
            async with asyncio.timeout(timeout_s):
                if probe.kind == "http":
                    return await self._http(probe, port)
                if probe.kind == "tcp":
                    return await _tcp(port)
                return await self._exec(probe)
        except TimeoutError:
            return f"{describe(probe, port)}: no answer within {timeout_s:g} s"
        except (OSError, aiohttp.ClientError, AgentGone) as error:
            return f"{describe(probe, port)}: {_reason(error)}"

    async def _http(self, probe: Probe, port: int) -> str:
        """200 to 399 is success. Redirects are followed on this address; one to elsewhere counts as success."""
        url = yarl.URL(f"http://{HOST}:{port}").join(yarl.URL(probe.path or "/", encoded=True))
        headers = {"User-Agent": _USER_AGENT, "Connection": "close", **dict(probe.headers)}
        for _ in range(_REDIRECTS_MAX):
            async with self._session.get(url, headers=headers, allow_redirects=False) as reply:
                if not 200 <= reply.status < 400:
                    body = (await reply.content.read(_BODY_BYTES)).decode(errors="replace").strip()
                    return f"{describe(probe, port)}: HTTP {reply.status}{f' ({body})' if body else ''}"
                target = reply.headers.get("Location", "") if reply.status >= 300 else ""
            onward = url.join(yarl.URL(target))
            if not target or onward.origin() != url.origin():
                return ""
            url = onward
        return f"{describe(probe, port)}: more than {_REDIRECTS_MAX} redirects"

    async def _exec(self, probe: Probe) -> str:
        process, last_printed = await self._run_command(probe.command)
        try:
            code = await asyncio.shield(process.ended)
        except asyncio.CancelledError:
            process.send(signal.SIGKILL)
            raise
        return f"{describe(probe, 0)}: exit code {code}, {last_printed()}" if code else ""


async def _tcp(port: int) -> str:
    _, writer = await asyncio.open_connection(HOST, port)
    writer.transport.abort()  # nothing was sent: no need to wait for the other side's goodbye
    return ""


def describe(probe: Probe, port: int) -> str:
    """'GET http://127.0.0.1:8080/healthz', 'connection to 127.0.0.1:8080', 'command test -f /tmp/ok'."""
    if probe.kind == "http":
        return f"GET http://{HOST}:{port}{probe.path or '/'}"
    return f"connection to {HOST}:{port}" if probe.kind == "tcp" else f"command {' '.join(probe.command)}"


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return _reason(error.os_error)
    if isinstance(error, ConnectionRefusedError):
        return "connection refused"
    return str(error) or type(error).__name__
