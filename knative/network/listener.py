"""A listening HTTP/1.1 server, without routes or middleware. Both ingress and queue-proxies are one."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import socket
from collections.abc import Awaitable, Callable

from aiohttp import HttpVersion10, HttpVersion11, StreamReader, hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import HttpProcessingError, RawRequestMessage
from yarl import URL

from knative.errors import Unavailable

HEADER_BYTES_MAX = 64 * 1024  # of one header line, and of the request line
HEADERS_MAX = 1000
_BACKLOG = 1024  # connections; a burst at zero comes all at once
_REASON_CHARACTERS_MAX = 300
_CLOSE_S = 0.5  # for running exchanges to send the end of their answer

# an absolute target has a host, and no user in front of it (RFC 9110, 4.2.4)
_TARGET = re.compile(r"/|\*$|https?://[^/?#@\\]+([/?]|$)", re.IGNORECASE)
_NO_UTF8 = re.compile("[\ud800-\udfff]")  # surrogates stand for such bytes; aiohttp's client leaves them out

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


def _worth_telling(record: logging.LogRecord) -> bool:
    """aiohttp tells of every malformed request with a trace; whoever sent it has had its 400."""
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


_LOG = logging.getLogger(__name__)
_LOG.addFilter(_worth_telling)


class _Protocol(web.RequestHandler):
    """aiohttp's refusals quote the line that they refuse, however long it is."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        return super().handle_error(request, status, exc, message and message[:_REASON_CHARACTERS_MAX])


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


class Listener:
    """Hands every request that can be relayed to `handler`. A client that goes away cancels its handler."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._runner: web.ServerRunner | None = None
        self.address = ""  # HOST:PORT, once started

    async def start(self, host: str, port: int) -> str:
        """Listens; port 0 takes a free one. Returns HOST:PORT. Raises Unavailable if it cannot have the port."""
        listening = _bind(host, port)
        server = _Server(
            self._handle,
            handler_cancellation=True,
            access_log=None,
            logger=_LOG,
            request_factory=_request,
            auto_decompress=False,
            max_line_size=HEADER_BYTES_MAX,
            max_field_size=HEADER_BYTES_MAX,
            max_headers=HEADERS_MAX,
        )
        self._runner = web.ServerRunner(server, shutdown_timeout=_CLOSE_S)
        try:
            await self._runner.setup()
            await web.SockSite(self._runner, listening, backlog=_BACKLOG).start()
        except BaseException:  # cancelled, most likely
            listening.close()
            await self.close()
            raise
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{listening.getsockname()[1]}"
        return self.address

    async def close(self) -> None:
        """Stops listening, closes idle connections, and cancels what still runs after half a second."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        refused = _refusal(request)
        return await self._handler(request) if refused is None else refused


def _request(
    message: RawRequestMessage,
    payload: StreamReader,
    protocol: web.RequestHandler,
    writer: AbstractStreamWriter,
    task: asyncio.Task[None],
) -> web.BaseRequest:
    """aiohttp's own, also for hosts that are no IDNA (http://xn--a/): with no target, which is then refused."""
    loop = asyncio.get_running_loop()
    try:
        return web.BaseRequest(message, payload, protocol, writer, task, loop)
    except ValueError:  # which aiohttp would not catch: the connection would be left without an answer, and open
        message = message._replace(path="", url=URL())
        return web.BaseRequest(message, payload, protocol, writer, task, loop)


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise Unavailable(
            f"cannot listen on {host}:{port}: {os.strerror(error.errno) if error.errno else error}; "
            "choose another address or port, or port 0 for a free one"
        ) from error


def _refusal(request: web.BaseRequest) -> web.Response | None:
    """The answer to requests that one HTTP/1.1 exchange cannot carry, or that a server behind may read in another way
    than this one; None for all others."""
    headers = request.headers
    if request.version not in (HttpVersion10, HttpVersion11):
        return web.Response(status=505, text="only HTTP/1.0 and HTTP/1.1 are spoken here\n")
    complaint = _complaint(request)
    if complaint:
        return web.Response(status=400, text=f"{complaint}\n")
    codings = ", ".join(headers.getall(hdrs.TRANSFER_ENCODING, ()))
    if codings and codings.lower() != "chunked":
        return web.Response(status=501, text=f"Transfer-Encoding: {codings} is not supported; chunked is\n")
    if hdrs.UPGRADE in headers and headers[hdrs.UPGRADE].lower() in ("websocket", "tcp"):
        return web.Response(
            status=501,
            text=f"Upgrade: {headers[hdrs.UPGRADE]} is not supported: only plain HTTP/1.1 exchanges are relayed; "
            "use server-sent events for streams\n",
        )
    if request.method == hdrs.METH_CONNECT:
        return web.Response(
            status=405,
            headers={hdrs.ALLOW: "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS, TRACE"},
            text="CONNECT is not supported: this is no tunnel; send plain HTTP requests for cluster-local names\n",
        )
    if hdrs.EXPECT in headers and headers[hdrs.EXPECT].lower() != "100-continue":
        return web.Response(status=417, text=f"Expect: {headers[hdrs.EXPECT]} is unknown; 100-continue is known\n")
    return None


def _complaint(request: web.BaseRequest) -> str:
    """What is wrong with a request that aiohttp lets through and cannot pass on as it is; "" if nothing."""
    headers = request.headers
    if request.method != hdrs.METH_CONNECT and not _TARGET.match(request.raw_path):
        return "the request target must be a path, * or http://HOST/PATH"
    for name, value in headers.items():
        if _NO_UTF8.search(value):
            return f"the header {name} has bytes that are no UTF-8"
    if hdrs.TRANSFER_ENCODING in headers and request.version < HttpVersion11:
        return "HTTP/1.0 has no Transfer-Encoding"
    return ""
