"""KServe's gRPC service on the address that was asked for, with what calls say about themselves.

KServe 0.21 listens on all addresses and has a message limit of its own (kserve/protocol/grpc/server.py); somebody who
serves on 127.0.0.1 means both doors.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from concurrent import futures
from typing import Any

import grpc
from grpc import aio
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer

from functions.contract.watched_file import WatchedFile
from orchestrator.api_keys import ApiKeys, is_open_call, refusal
from orchestrator.idempotency import HEADER as KEY_HEADER
from orchestrator.request_terms import Given, under

CALLS_MAX = 1024  # at once
_METADATA_BYTES_MAX = 64 << 10


class ApiKeyInterceptor(aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Calls without a key end with UNAUTHENTICATED, their message unread."""

    def __init__(self, keys: WatchedFile[ApiKeys]) -> None:
        self._keys = keys

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        if is_open_call(handler_call_details.method):
            return await continuation(handler_call_details)
        given = [value for name, value in handler_call_details.invocation_metadata if name == "authorization"]
        error = refusal(self._keys, given)
        if error is None:
            return await continuation(handler_call_details)

        async def refuse(message: bytes, context: Any) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))

        return grpc.unary_unary_rpc_method_handler(refuse)


class TermedServicer(InferenceServicer):  # type: ignore[misc]  # kserve has no types
    """Metadata may name an idempotency key, and gRPC's own deadline counts."""

    def __init__(self, *parts: Any, timeout_s: float) -> None:
        super().__init__(*parts)
        self._timeout_s = timeout_s

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        with under(self._given(request, context)):
            return await super().ModelInfer(request, context)

    def _given(self, request: Any, context: Any) -> Given:
        headers: dict[str, list[str]] = {}
        for name, value in context.invocation_metadata() or ():
            headers.setdefault(name, []).append(value if isinstance(value, str) else value.hex())
        body = request.SerializeToString(deterministic=True) if KEY_HEADER in headers else b""
        lefts_s = [left_s for left_s in (context.time_remaining(), self._timeout_s) if left_s]
        return Given("ModelInfer", headers, body, time.monotonic(), min(lefts_s, default=None))


def bound_to(
    host: str, body_bytes_max: int, timeout_s: float, keys: WatchedFile[ApiKeys] | None = None
) -> type[GRPCServer]:
    """The class that KServe's ModelServer is to use in place of its own; with `keys`, it asks for one."""
    address = f"[{host}]" if ":" in host else host
    guards = () if keys is None else (ApiKeyInterceptor(keys),)

    class BoundServer(GRPCServer):  # type: ignore[misc]  # kserve has no types
        async def start(self, max_workers: int) -> None:
            self._server = aio.server(
                futures.ThreadPoolExecutor(max_workers=max_workers),
                interceptors=(*guards, ExceptionToStatusInterceptor()),
                options=[
                    ("grpc.max_receive_message_length", body_bytes_max),
                    ("grpc.absolute_max_metadata_size", _METADATA_BYTES_MAX),
                ],
                maximum_concurrent_rpcs=CALLS_MAX,
            )
            servicer = TermedServicer(self._data_plane, self._model_repository_extension, timeout_s=timeout_s)
            grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
            self._server.add_insecure_port(f"{address}:{self._port}")
            await self._server.start()
            await self._server.wait_for_termination()

    return BoundServer
