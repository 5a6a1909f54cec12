"""The function that Functions Framework serves.

    functions-framework --asgi --source functions/main.py --target stage

Loading starts with the first request (of any kind, a probe will do) and goes on in the background; `python -m
functions` starts it at once.
"""

from __future__ import annotations

import functions_framework.aio
from starlette.requests import Request
from starlette.responses import Response

from functions.handler import Answer, Handler
from functions.service import StageService
from functions.settings import read_settings

settings = read_settings()
seals = settings.open_seals()
service = StageService(settings, seals)
handler = Handler(service, seals)


@functions_framework.aio.http  # type: ignore[untyped-decorator]  # the framework has no types
async def stage(request: Request) -> Response | Answer:
    """One stage of the chain. Events by POST; GET /healthz, /readyz, /metrics."""
    return await handler(request)
