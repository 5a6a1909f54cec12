"""The answer to one request on its way to the client: what has been sent of it, and how it may still end.

Whoever limits or relays an exchange (time-outs, queue-proxy, activator) shares the one `Reply` of its request.
"""

from __future__ import annotations

from typing import Protocol

from aiohttp import ClientConnectionResetError, HttpVersion11, web


class Watcher(Protocol):
    """Told about every write to the client."""

    def wrote(self) -> None: ...


class Reply:
    """States: nothing sent -> started -> ended. Writes wait while the client does not read (back pressure)."""

    __slots__ = ("_request", "_response", "ended", "watchers")

    def __init__(self, request: web.BaseRequest) -> None:
        self._request = request
        self._response: web.StreamResponse | None = None
        self.ended = False  # all bytes are on their way
        self.watchers: list[Watcher] = []

    @staticmethod
    def of(request: web.BaseRequest) -> Reply:
        """The reply to `request`, always the same one."""
        reply = request.get(_REPLY)
        if reply is None:
            reply = request[_REPLY] = Reply(request)
        return reply

    @property
    def response(self) -> web.StreamResponse | None:
        """What was started, None before."""
        return self._response

    async def start(self, response: web.StreamResponse) -> None:
        """Sends status and headers at once."""
        self._response = response
        if self._request.version < HttpVersion11 and response.content_length is None:
            response.force_close()  # the end of such a body is the end of the connection
        await response.prepare(self._request)
        self._wrote()

    async def write(self, chunk: bytes) -> None:
        """Sends a piece of the body at once."""
        assert self._response is not None
        await self._response.write(chunk)
        self._wrote()

    async def end(self, last: bytes = b"") -> None:
        """Sends the regular end of the body."""
        assert self._response is not None
        self.ended = True
        await self._response.write_eof(last)

    async def send(self, response: web.Response) -> None:
        """Sends a whole response in one piece."""
        self._response = response
        self.ended = True
        await response.prepare(self._request)
        await response.write_eof()

    async def stop(self, text: str) -> None:
        """Ends a started body early: `text` is appended and the body ends regularly (as Knative does), or the
        connection is cut where the length was announced."""
        if self._response is None or self.ended or self._response.content_length is not None:
            self.cut()
            return
        try:
            await self.write(text.encode())
            await self.end()
        except ClientConnectionResetError:
            self.cut()  # nobody there to read it

    def cut(self) -> None:
        """Closes the client's connection, so that a partial body cannot be taken for a whole one."""
        self.ended = True
        if self._request.transport is not None:
            self._request.transport.close()

    def _wrote(self) -> None:
        for watcher in self.watchers:
            watcher.wrote()


_REPLY = web.RequestKey("reply", Reply)
