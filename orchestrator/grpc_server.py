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
from google.protobuf.message import DecodeError
from grpc import aio
from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer

from functions.contract.watched_file import WatchedFile
from orchestrator.api_keys import ApiKeys, is_open_call, refusal
from orchestrator.choices import as_generation_error
from orchestrator.idempotency import HEADER as KEY_HEADER
from orchestrator.request_terms import Given, under

CALLS_MAX = 1024  # at once
# clients refuse trailing metadata of over 8 KiB and see RESOURCE_EXHAUSTED; a character may take 12 bytes there
DETAILS_CHARACTERS_MAX = 600
_METADATA_BYTES_MAX = 64 << 10
_CODES = {
    DecodeError: grpc.StatusCode.INVALID_ARGUMENT,
    InvalidInput: grpc.StatusCode.INVALID_ARGUMENT,
    ModelNotFound: grpc.StatusCode.NOT_FOUND,
    ModelNotReady: grpc.StatusCode.UNAVAILABLE,
    NotImplementedError: grpc.StatusCode.UNIMPLEMENTED,
}
_CODES_OF_HTTP = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    404: grpc.StatusCode.NOT_FOUND,
    422: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

Metadata = tuple[tuple[str, str], ...]


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


class StatusInterceptor(aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Each call that is not answered ends with a status that says what is wrong. KServe's own interceptor knows fewer
    errors and never cuts details; and a message that cannot be read would be a fault of the server to grpc (UNKNOWN, a
    trace in the log). All methods of the service take one message and answer with one."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method
            return None

        async def answer(message: bytes, context: Any) -> Any:
            try:
                return await handler.unary_unary(handler.request_deserializer(message), context)
            except Exception as error:
                await context.abort(*_status(error))

        return grpc.unary_unary_rpc_method_handler(answer, response_serializer=handler.response_serializer)


def _status(error: Exception) -> tuple[grpc.StatusCode, str, Metadata]:
    """Code, details and metadata."""
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
    if code is not None:
        return code, _cut(str(error)), ()
    told = as_generation_error(error)
    metadata = () if told.retry_after_s is None else (("retry-after", str(told.retry_after_s)),)
    return _CODES_OF_HTTP.get(told.status, grpc.StatusCode.INTERNAL), _cut(str(told)), metadata


def _cut(details: str) -> str:
    return details if len(details) <= DETAILS_CHARACTERS_MAX else f"{details[: DETAILS_CHARACTERS_MAX - 3]}..."


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
        lefts_s = [left_s for left_s in (context.time_remaining(), self._timeout_s or None) if left_s is not None]
        return Given("ModelInfer", headers, body, time.monotonic(), min(lefts_s, default=None))


def bound_to(
    host: str, body_bytes_max: int, timeout_s: float, keys: WatchedFile[ApiKeys] | None = None
) -> type[GRPCServer]:
    """The class that KServe's ModelServer is to use in place of its own; with `keys`, it asks for one."""
    address = f"[{host}]" if ":" in host else host
    guards = () if keys is None else (ApiKeyInterceptor(keys),)

    class BoundServer(GRPCServer):  # type: ignore[misc]  # kserve has no types
        async def start(self, max_workers: int) -> None:
            await self.listen(max_workers)
            await self._server.wait_for_termination()

        async def listen(self, max_workers: int) -> int:
            """The port, which the system has chosen where 0 was asked for."""
            self._server = aio.server(
                futures.ThreadPoolExecutor(max_workers=max_workers),
                interceptors=(*guards, StatusInterceptor()),
                options=[
                    ("grpc.max_receive_message_length", body_bytes_max),
                    ("grpc.absolute_max_metadata_size", _METADATA_BYTES_MAX),
                ],
                maximum_concurrent_rpcs=CALLS_MAX,
            )
            servicer = TermedServicer(self._data_plane, self._model_repository_extension, timeout_s=timeout_s)
            grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
            port: int = self._server.add_insecure_port(f"{address}:{self._port}")
            await self._server.start()
            return port

    return BoundServer
