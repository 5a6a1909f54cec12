"""uvicorn with limits on what comes before an application sees anything: connections, headers, and the time they take.

uvicorn has none of these for httptools (0.54): headers grow as long as somebody sends them, and a connection that says
nothing, or a byte a minute, stays for ever. A refusal is a whole HTTP answer, after which the connection is closed; it
is closed without one where the answer to an earlier request is still due, for which a refusal would be taken.
"""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from http import HTTPStatus

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

_LINGER_S = 1.0


@dataclass(frozen=True)
class HttpLimits:
    """The defaults are those of the settings."""

    connections_max: int = 4096  # open at once; further ones are answered 503
    header_bytes_max: int = 64 << 10  # of the request line and all headers, also of trailers; more are answered 431
    headers_max: int = 128  # the same
    receive_timeout_s: float = 120.0  # for a request to come, headers and body; then 408


def limited_protocol(limits: HttpLimits) -> type[HttpToolsProtocol]:
    """What uvicorn.Config takes as `http`."""

    class LimitedProtocol(HttpToolsProtocol):
        _head_bytes = 0
        _in_head = False
        _in_body = False  # some of the body was in the newest data
        _refused = False
        _running: RequestResponseCycle | None = None  # the newest that an application has; `cycle` may wait behind it
        _receiving: asyncio.TimerHandle | None = None  # while a request is not whole

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn narrows it too
            super().connection_made(transport)
            if len(self.connections) > limits.connections_max:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections are open; try again later")
                return
            self._in_head = True
            self._start_clock()  # a connection that says nothing waits no longer than one that says it slowly

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_clock()
            super().connection_lost(exc)
            if self._running is not None:
                _end(self._running)  # uvicorn tells only the newest request of a connection

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            self._in_body = False
            super().data_received(data)
            if self._in_head or (self._is_partial and not self._in_body):  # all of it were headers, or trailers
                self._head_bytes += len(data)
                if self._head_bytes > limits.header_bytes_max:
                    self._refuse_headers(f"more than {limits.header_bytes_max} bytes")
            if self._receiving is None and self._is_partial:
                self._start_clock()

        @property
        def _is_partial(self) -> bool:
            return (self._in_head and self._head_bytes > 0) or (
                self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete
            )

        def on_message_begin(self) -> None:
            self._in_head, self._head_bytes = True, 0
            super().on_message_begin()

        def on_header(self, name: bytes, value: bytes) -> None:
            if not self._in_head:
                return  # a trailer, which no application here asks for: it is none of the headers
            if len(self.headers) < limits.headers_max:
                super().on_header(name, value)
            else:
                self._refuse_headers(f"more than {limits.headers_max}")

        def on_headers_complete(self) -> None:
            if self.parser.should_upgrade() and self._has_body:  # which httptools leaves out
                wanted = "a request with a body cannot ask for another protocol; send it without Upgrade"
                self._refuse(HTTPStatus.NOT_IMPLEMENTED, wanted)
            self._in_head, self._head_bytes = False, 0
            if not self._refused:
                super().on_headers_complete()

        def on_body(self, body: bytes) -> None:
            self._in_body, self._head_bytes = True, 0
            if not self._refused:
                super().on_body(body)

        def on_message_complete(self) -> None:
            if not self._refused:
                self._stop_clock()
                super().on_message_complete()

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
            self._running = cycle
            super()._start_asgi_task(cycle, app)

        def send_400_response(self, msg: str) -> None:
            self._refuse(HTTPStatus.BAD_REQUEST, msg)

        def _should_upgrade(self) -> bool:
            return False  # no application here speaks WebSocket

        def _unsupported_upgrade_warning(self) -> None:
            """The request is answered as any other. What follows on the connection is not read any more, so it ends."""
            if not self._refused:
                self.cycle.keep_alive = False

        @property
        def _has_body(self) -> bool:
            return any(
                name == b"transfer-encoding" or (name == b"content-length" and value != b"0")
                for name, value in self.headers
            )

        @property
        def _owes_more(self) -> bool:
            """Whether some other answer than a refusal has begun, or has to come before it."""
            if self.pipeline or self.cycle is None:
                return bool(self.pipeline)
            return not self.cycle.response_complete if self._in_head else self.cycle.response_started

        def _start_clock(self) -> None:
            self._receiving = self.loop.call_later(limits.receive_timeout_s, self._on_late)

        def _stop_clock(self) -> None:
            if self._receiving is not None:
                self._receiving.cancel()
                self._receiving = None

        def _on_late(self) -> None:
            self._receiving = None
            wanted = f"the request did not come within {limits.receive_timeout_s:g} s"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, wanted)

        def _refuse_headers(self, complaint: str) -> None:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"the request has {complaint} of headers")

        def _refuse(self, status: HTTPStatus, message: str) -> None:
            """Says so and closes, a moment later: who still sends when a connection is closed loses what it was told
            (RFC 9112, 9.6). An application that waits for the rest of the request learns of it at once."""
            if self._refused or self.transport.is_closing():
                return
            self._refused = True
            self._stop_clock()
            if self._owes_more:
                self.transport.close()
                return
            if self.cycle is not None:
                _end(self.cycle)
            body = json.dumps({"error": message}).encode()
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            if status is HTTPStatus.SERVICE_UNAVAILABLE or not self.transport.can_write_eof():
                self.transport.close()
            else:
                self.transport.write_eof()
                self._receiving = self.loop.call_later(_LINGER_S, self.transport.close)

    return LimitedProtocol


def _end(cycle: RequestResponseCycle) -> None:
    """Its application learns that nobody is there for the answer."""
    if not cycle.response_complete:
        cycle.disconnected, cycle.waiting_for_100_continue = True, False
        cycle.message_event.set()
