"""Imports all that `python -m orchestrator.server` needs before it can serve: for a fork server to preload.

Importing this takes as long as the start of the server otherwise would (above a second, most of it KServe). It starts
no thread, no event loop and nothing of gRPC's core, so that a process may fork afterwards; and it never imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_BLAS_THREADS = "OPENBLAS_NUM_THREADS"


@contextmanager
def _blas_without_threads() -> Iterator[None]:
    """OpenBLAS starts its threads as numpy is imported, and reads this variable only then. Nothing here multiplies
    matrices; a process that is forked for something else shall not find the variable."""
    given = os.environ.get(_BLAS_THREADS)
    os.environ[_BLAS_THREADS] = "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ[_BLAS_THREADS]
        else:
            os.environ[_BLAS_THREADS] = given


with _blas_without_threads():
    from orchestrator.server import bare_argv

    with bare_argv():
        import kserve
        import kserve.model_server

    import aiohttp
    import fastapi.exceptions
    import grpc.aio
    import httptools
    import numpy
    import pydantic.v1
    import tokenizers
    import uvicorn.lifespan.on
    import uvicorn.protocols.http.auto
    import uvicorn.protocols.http.httptools_impl
    import uvicorn.protocols.websockets.auto
    import uvloop

    import orchestrator.chain
    import orchestrator.events_api
    import orchestrator.generate_api
    import orchestrator.grpc_server
    import orchestrator.http_guard
    import orchestrator.kserve_model
    import orchestrator.kserve_parts
    import orchestrator.openai_api
    import orchestrator.openai_replies

# in memory for whoever forks this process
PRELOADED = (
    aiohttp, fastapi.exceptions, grpc.aio, httptools, kserve.model_server, numpy, pydantic.v1, tokenizers, uvloop,
    uvicorn.lifespan.on, uvicorn.protocols.http.auto, uvicorn.protocols.http.httptools_impl,
    uvicorn.protocols.websockets.auto, orchestrator.chain, orchestrator.events_api, orchestrator.generate_api,
    orchestrator.grpc_server, orchestrator.http_guard, orchestrator.kserve_model, orchestrator.kserve_parts,
    orchestrator.openai_api, orchestrator.openai_replies,
)  # fmt: skip
