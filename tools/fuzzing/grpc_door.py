"""KServe's gRPC service of the orchestrator, over a chain of two real stages: calls by a socket of this machine.

Importing this module imports kserve, which parses sys.argv while it is imported: see `server.bare_argv`.
"""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from typing import Any

import kserve
from grpc import StatusCode, aio

from functions.contract.watched_file import WatchedFile
from orchestrator.api_keys import parse_api_keys
from orchestrator.grpc_server import bound_to
from orchestrator.kserve_model import StagedModel
from orchestrator.kserve_parts import FixedModels, StagedDataPlane
from orchestrator.server import quieten_kserve
from tools.fuzzing.door import Verdict, Violation, expect_no_trace
from tools.fuzzing.grpc_calls import KEY, TIMEOUT, control_call, good_calls, hostile_call, text_of
from tools.fuzzing.http_text import Request
from tools.fuzzing.served_chain import ServedChain

_MESSAGE_BYTES_MAX = 256 << 10
_REFUSED = frozenset(
    {
        StatusCode.INVALID_ARGUMENT, StatusCode.NOT_FOUND, StatusCode.UNIMPLEMENTED, StatusCode.UNAUTHENTICATED,
        StatusCode.RESOURCE_EXHAUSTED, StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED,
        StatusCode.FAILED_PRECONDITION, StatusCode.OUT_OF_RANGE, StatusCode.ALREADY_EXISTS,
    }
)  # fmt: skip
# as the header is written: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md
_TIMEOUT = re.compile(r"([0-9]{1,8})([HMSmun])")
_UNIT_S = {"H": 3600.0, "M": 60.0, "S": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}


class GrpcDoor:
    """All methods of the service, behind an API key."""

    name = "grpc"

    def __init__(self, checkpoint: Path, keys: Path) -> None:
        keys.write_text(KEY)
        self._chain = ServedChain(checkpoint)
        self._chain.run(self._open(WatchedFile(keys, parse_api_keys)))
        self._good = good_calls()
        self._right = self._chain.run(self._text())

    def make(self, random: Random) -> bytes:
        return hostile_call(random, self._good).to_bytes()

    def take(self, data: bytes) -> Verdict:
        return self._chain.run(self._take(Request.from_bytes(data)))

    def check(self) -> None:
        self._chain.check(self._text(), self._right)

    def close(self) -> None:
        self._chain.run(self._close())
        self._chain.close()

    async def _open(self, keys: Any) -> None:
        models = kserve.ModelRepository()
        models.update(StagedModel(self._chain.service))
        quieten_kserve()
        self._server = bound_to("127.0.0.1", _MESSAGE_BYTES_MAX, 0.0, keys)(
            0, StagedDataPlane(models, self._chain.service), FixedModels(models), {}
        )
        self._channel = aio.insecure_channel(f"127.0.0.1:{await self._server.listen(max_workers=1)}")

    async def _close(self) -> None:
        await self._channel.close()
        await self._server.stop()

    async def _text(self) -> str:
        try:
            return text_of(await self._call(control_call()))
        except aio.AioRpcError as error:
            raise Violation("harm", f"the control was answered {error.code()}: {error.details()}") from None

    async def _take(self, request: Request) -> Verdict:
        try:
            reply = await self._call(request)
        except aio.AioRpcError as error:
            return refused(error)
        except aio.BaseError:  # metadata that the client's library does not send
            return "refused"
        expect_no_trace(reply)
        return "accepted"

    async def _call(self, request: Request) -> bytes:
        """Raises AioRpcError."""
        timeout_s, metadata = None, []
        for name, value in request.headers:
            if (found := _TIMEOUT.fullmatch(value)) and name == TIMEOUT:
                timeout_s = int(found[1]) * _UNIT_S[found[2]]
            elif name != "content-length":  # of the text form
                metadata.append((name, value.encode("latin-1") if name.endswith("-bin") else value))
        method = self._channel.unary_unary(request.target)
        reply: bytes = await method(request.body, metadata=metadata, timeout=timeout_s)
        return reply


def refused(error: aio.AioRpcError) -> Verdict:
    """Raises Violation for a status that no call may end with, and for details that show a trace.

    A server may be unavailable if it tells when to come back."""
    code, details = error.code(), error.details() or ""
    expect_no_trace(details.encode(errors="replace"))
    told_when = code is StatusCode.UNAVAILABLE and "retry-after" in dict(error.trailing_metadata())
    if code in _REFUSED or told_when:
        return "refused"
    raise Violation("5xx", f"answered {code.name}: {details[:300]!r}")
