"""KServe's gRPC service on the address that was asked for.

KServe 0.21 listens on all addresses and has a message limit of its own (kserve/protocol/grpc/server.py); somebody who
serves on 127.0.0.1 means both doors.
"""

from __future__ import annotations

from concurrent import futures

from grpc import aio
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.grpc.servicer import InferenceServicer


def bound_to(host: str, body_bytes_max: int) -> type[GRPCServer]:
    """The class that KServe's ModelServer is to use in place of its own."""
    address = f"[{host}]" if ":" in host else host

    class BoundServer(GRPCServer):  # type: ignore[misc]  # kserve has no types
        async def start(self, max_workers: int) -> None:
            self._server = aio.server(
                futures.ThreadPoolExecutor(max_workers=max_workers),
                interceptors=(ExceptionToStatusInterceptor(),),
                options=[("grpc.max_receive_message_length", body_bytes_max)],
            )
            servicer = InferenceServicer(self._data_plane, self._model_repository_extension)
            grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, self._server)
            self._server.add_insecure_port(f"{address}:{self._port}")
            await self._server.start()
            await self._server.wait_for_termination()

    return BoundServer
