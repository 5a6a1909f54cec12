"""The three limits on a request's time. After pkg/http/handler/timeout.go.

    total           until the whole answer is sent
    response start  until its first byte is sent
    idle            between two writes of it; from the beginning while nothing is written

Before the first byte the client gets 504. Later the status is out already: the text is appended to the body, which
then ends regularly. A streaming client sees a well-formed but short answer, so streams need an end mark of their own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from aiohttp import web

from knative.network.reply import Reply

REQUEST_TIMEOUT = "request timeout"
ACTIVATOR_TIMEOUT = "activator request timeout"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds; 0 is no limit. After spec.timeoutSeconds, responseStartTimeoutSeconds, idleTimeoutSeconds."""

    total_s: float = 300
    response_start_s: float = 0
    idle_s: float = 0

    def deadline_s(self, start_s: float, last_write_s: float | None) -> float | None:
        """When the next limit is reached, given when the request came and when something was last written (None:
        nothing yet). None: never."""
        limits = []
        if self.total_s:
            limits.append(start_s + self.total_s)
        if self.response_start_s and last_write_s is None:
            limits.append(start_s + self.response_start_s)
        if self.idle_s:
            limits.append((start_s if last_write_s is None else last_write_s) + self.idle_s)
        return min(limits, default=None)


class Watch:
    """Runs one request under `timeouts` and answers with `text` when one is over. For a single use."""

    def __init__(self, request: web.BaseRequest, timeouts: Timeouts, text: str) -> None:
        self._reply = Reply.of(request)
        self._timeouts = timeouts
        self._text = text
        self._status = 504
        self._loop = asyncio.get_running_loop()
        self._start_s = self._loop.time()
        self._started = False
        self._scope = asyncio.timeout_at(timeouts.deadline_s(self._start_s, None))

    async def run(self, serve: Callable[[], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        """The answer of `serve`, or the one that says that its time is over."""
        self._reply.watchers.append(self)
        try:
            async with self._scope:
                return await serve()
        except TimeoutError:
            if not self._scope.expired():
                raise
        finally:
            self._reply.watchers.remove(self)
        return await self._answer()

    def wrote(self) -> None:
        """Something was written: after the first byte, and with an idle limit after each, the deadline is another."""
        if self._scope.expired() or (self._started and not self._timeouts.idle_s):
            return
        self._started = True
        self._scope.reschedule(self._timeouts.deadline_s(self._start_s, self._loop.time()))

    def end(self, status: int, text: str) -> None:
        """Ends the request now, with this answer instead of the time-out's; a started answer is cut off."""
        self._status, self._text = status, text
        if self._scope.expired():
            self._reply.cut()  # it is at its last words already, to a client that does not read them
            return
        self._scope.reschedule(self._loop.time())

    async def _answer(self) -> web.StreamResponse:
        response = self._reply.response
        if response is None:
            return web.Response(status=self._status, text=self._text)
        if self._status == 504:
            await self._reply.stop(self._text)
        else:
            self._reply.cut()
        return response
