"""Relays one HTTP/1.1 exchange to a process of this machine, bytes as they are, nothing held longer than needed.

After Go's net/http/httputil.ReverseProxy, which Knative's queue-proxy and activator use.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import aiohttp
import structlog
from aiohttp import HttpVersion11, hdrs, web
from multidict import CIMultiDict, CIMultiDictProxy, istr
from yarl import URL

from knative.network.listener import HEADER_BYTES_MAX, HEADERS_MAX
from knative.network.reply import Reply

log = structlog.get_logger()

TARGET = web.RequestKey("target", str)
"""The request target to send on, raw, where it is not the one that came (a path prefix taken off)."""

_ONE_PIECE_BYTES_MAX = 256 * 1024  # a body of known length up to this is sent on in one piece: fewer writes
_CONNECT_S = 5.0  # on loopback only a full backlog takes any time
# Below the keep-alive of common servers (gunicorn 2 s, uvicorn 5 s), so that the server is never first to close a
# connection that is just being used again. A new connection costs 0.1 ms.
_KEEPALIVE_S = 1.5

_HOP_BY_HOP = tuple(
    istr(name)
    for name in (
        "Connection",
        "Keep-Alive",
        "Proxy-Authenticate",
        "Proxy-Authorization",
        "Proxy-Connection",
        "TE",
        "Trailer",
        "Transfer-Encoding",
        "Upgrade",
    )
)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_FORWARDED_FOR = istr("X-Forwarded-For")


def relay_session(connector: aiohttp.BaseConnector | None = None) -> aiohttp.ClientSession:
    """A client session that changes nothing of what it relays. Whoever makes it closes it."""
    return aiohttp.ClientSession(
        connector=connector or aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        skip_auto_headers=(hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE, hdrs.USER_AGENT),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
        max_line_size=HEADER_BYTES_MAX,
        max_field_size=HEADER_BYTES_MAX,
        max_headers=HEADERS_MAX,
    )


def end_to_end(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """A copy without what is meant for one hop only (RFC 9110, 7.6.1). Repeated headers stay repeated."""
    kept = CIMultiDict(headers)
    if hdrs.CONNECTION in kept:
        for named in ",".join(kept.getall(hdrs.CONNECTION)).split(","):
            if named.strip().lower() != "host":  # no request is whole without it
                kept.popall(named.strip(), None)
    for name in _HOP_BY_HOP:
        kept.popall(name, None)
    return kept


def request_headers(request: web.BaseRequest) -> CIMultiDict[str]:
    """What the replica gets to see: the end-to-end headers, and the client's address in X-Forwarded-For. The host of
    an absolute target takes the place of the Host header (RFC 9112, 3.2.2)."""
    headers = _spelt_alike(end_to_end(request.headers))
    if is_absolute(request.raw_path):
        headers[hdrs.HOST] = split_target(request.raw_path)[0]
    headers.popall(hdrs.EXPECT, None)  # answered here
    if request.remote:
        headers[_FORWARDED_FOR] = ", ".join((*headers.getall(_FORWARDED_FOR, ()), request.remote))
    return headers


def _spelt_alike(headers: CIMultiDict[str]) -> CIMultiDict[str]:
    """Repeated names as the first of them is written: of X-A and X-a aiohttp's client sends only the last."""
    spelling: dict[str, str] = {}
    return CIMultiDict((spelling.setdefault(name.lower(), name), value) for name, value in headers.items())


async def forward(
    request: web.BaseRequest, headers: CIMultiDict[str], *, authority: str, session: aiohttp.ClientSession
) -> web.StreamResponse:
    """Sends the request with `headers` to `authority` (HOST:PORT) and the response to the client as it comes.

    502 if the process breaks off before its response; the client's connection is cut if it does so later.
    Cancelling it cancels the exchange: the process sees its connection closed.
    """
    reply = Reply.of(request)
    # the target goes in as a path, whole: neither parsed nor quoted, so its bytes stay what they are
    url = URL.build(scheme="http", authority=authority, path=_target(request), encoded=True)
    try:
        body = await _request_body(request, headers)
        upstream = await session.request(request.method, url, headers=headers, data=body, allow_redirects=False)
    except (aiohttp.ClientError, web.RequestPayloadError, OSError) as error:
        return _broken(request, authority, error)
    try:
        return await _relay_response(upstream, request.method, reply)
    except aiohttp.ClientConnectionResetError:
        reply.cut()  # the client has gone
        assert reply.response is not None
        return reply.response
    except (aiohttp.ClientError, OSError) as error:
        return _broken(request, authority, error)
    finally:
        upstream.close()  # nothing to do after a whole response


def is_absolute(target: str) -> bool:
    """Whether a target names a server, too: what clients send to a proxy."""
    return not target.startswith(("/", "*"))


def split_target(target: str) -> tuple[str, str]:
    """Authority and path of an absolute target, as raw as they came."""
    authority, slash, path = target.partition("://")[2].partition("/")
    if slash:
        return authority, slash + path
    authority, mark, query = authority.partition("?")
    return authority, "/" + mark + query


def _target(request: web.BaseRequest) -> str:
    target = request.get(TARGET) or request.raw_path
    return split_target(target)[1] if is_absolute(target) else target


async def _request_body(request: web.BaseRequest, headers: CIMultiDict[str]) -> bytes | AsyncIterator[bytes] | None:
    if not request.can_read_body:
        return None
    if request.headers.get(hdrs.EXPECT, "") and request.version >= HttpVersion11:
        await request.writer.write(_CONTINUE)
    length = headers.get(hdrs.CONTENT_LENGTH)
    if length is not None and int(length) <= _ONE_PIECE_BYTES_MAX:
        return await request.content.read()
    return _pieces(request.content)


async def _pieces(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    while piece := await content.readany():
        yield piece


async def _relay_response(upstream: aiohttp.ClientResponse, method: str, reply: Reply) -> web.StreamResponse:
    headers = end_to_end(upstream.headers)
    length = upstream.content_length
    if method == hdrs.METH_HEAD or upstream.status in (204, 304):
        response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
        await reply.start(response)
        await reply.end()
        return response
    if length is not None and length <= _ONE_PIECE_BYTES_MAX:
        body = await upstream.content.read()
        whole = web.Response(status=upstream.status, reason=upstream.reason, headers=headers, body=body)
        await reply.send(whole)
        return whole
    response = web.StreamResponse(status=upstream.status, reason=upstream.reason, headers=headers)
    await reply.start(response)
    async for piece in _pieces(upstream.content):
        await reply.write(piece)
    await reply.end()
    return response


def _broken(request: web.BaseRequest, authority: str, error: Exception) -> web.StreamResponse:
    """The answer when the replica's process has broken off."""
    reply = Reply.of(request)
    if (fault := request.content.exception()) is not None:
        reply.cut()  # what follows on this connection cannot be told apart from the body
        return reply.response or web.Response(status=400, text=f"the request's body broke off: {fault}\n")
    log.warning("relay_broken", target=authority, error=str(error) or type(error).__name__)
    if reply.response is not None:
        reply.cut()
        return reply.response
    return web.Response(status=502, text=f"no answer from {authority}: {_first_line(error)}\n")


def _first_line(error: Exception) -> str:
    """aiohttp says twice where it could not connect to, and quotes what it could not parse, over several lines."""
    if isinstance(error, aiohttp.ClientConnectorError):
        return (error.strerror or str(error.os_error)).lower()
    return next(iter(str(error).splitlines()), "") or type(error).__name__
