"""KServe's gRPC service on the address that was asked for, with what calls say about themselves.

KServe 0.21 listens on all addresses and has a message limit of its own (kserve/protocol/grpc/server.py); somebody who
serves on 127.0.0.1 means both doors.
"""

from __future__ import annotations

import time
from concurrent import futures
from typing import Any

from grpc import aio
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer

from orchestrator.idempotency import HEADER as KEY_HEADER
from orchestrator.request_terms import Given, under


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


def bound_to(host: str, body_bytes_max: int, timeout_s: float) -> type[GRPCServer]:
    """The class that KServe's ModelServer is to use in place of its own."""
    address = f"[{host}]" if ":" in host else host

    class BoundServer(GRPCServer):  # type: ignore[misc]  # kserve has no types
        async def start(self, max_workers: int) -> None:
            self._server = aio.server(
                futures.ThreadPoolExecutor(max_workers=max_workers),
                interceptors=(ExceptionToStatusInterceptor(),),
                options=[("grpc.max_receive_message_length", body_bytes_max)],
            )
            servicer = TermedServicer(self._data_plane, self._model_repository_extension, timeout_s=timeout_s)
            grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
            self._server.add_insecure_port(f"{address}:{self._port}")
            await self._server.start()
            await self._server.wait_for_termination()

    return BoundServer
