"""The control API: what `stagecraft local`, `status` and `top` ask a running platform, over a socket of its user only.

    POST   /apply                     {"documents": [...], "dry_run": false} -> {"applied": [...]}
    GET    /objects/{kind}            ?namespace=  -> {"items": [...]}
    DELETE /objects/{kind}/{ns}/{name}             -> {} once its replicas are gone
    GET    /logs/{ns}/{name}          ?follow=1 &previous=1 &tail=N  -> text, a line at a time
    GET    /status, /metrics

An error is {"error": text, "problems": [...]} with the status of the KnativeError.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import structlog
from aiohttp import web

from knative import registry
from knative.errors import KnativeError, NotFound, ValidationError
from knative.log_lines import LogFile, log_lines
from knative.resources.documents import Document

KINDS = (
    "service", "revision", "pod", "configmap", "inferenceservice", "servingruntime", "clusterservingruntime", "broker",
    "trigger", "sequence",
)  # fmt: skip
APPLY_BYTES_MAX = 16 << 20
SHUTDOWN_S = 1.0  # for replies under way

log = structlog.get_logger()


class Applied(Protocol):
    """What became of one document. `action` is created, configured, unchanged or skipped."""

    @property
    def kind(self) -> str: ...
    @property
    def namespace(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def action(self) -> str: ...
    @property
    def note(self) -> str: ...


class Controlled(Protocol):
    """What the control API needs of a platform; all of it may raise KnativeError."""

    @property
    def url(self) -> str: ...
    async def apply(self, documents: Sequence[Document], *, dry_run: bool = False) -> Sequence[Applied]: ...
    async def delete(self, kind: str, namespace: str, name: str) -> None: ...
    def get(self, kind: str, namespace: str | None) -> list[dict[str, Any]]: ...
    def logs(self, namespace: str, name: str) -> Sequence[LogFile]: ...
    def status(self) -> dict[str, Any]: ...
    def metrics(self) -> bytes: ...


@asynccontextmanager
async def control_api(platform: Controlled, name: str, folder: Path) -> AsyncIterator[registry.Entry]:
    """As long as the block runs, the platform can be found under `name` and controlled.

    Raises RegistryError when another platform has the name or no socket can be made."""
    registry.check_free(name)
    path = registry.socket_path()
    runner = web.AppRunner(_Control(platform).application(), access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        await web.UnixSite(runner, path).start()
        path.chmod(0o600)
        started_at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        entry = registry.Entry(name, path, os.getpid(), platform.url, folder, started_at)
        with registry.published(entry):
            yield entry
    finally:
        await runner.cleanup()
        path.unlink(missing_ok=True)


class _Control:
    def __init__(self, platform: Controlled) -> None:
        self._platform = platform
        self._closing = False

    def application(self) -> web.Application:
        app = web.Application(middlewares=[_errors_as_json], client_max_size=APPLY_BYTES_MAX)
        app.add_routes(
            [
                web.post("/apply", self._apply),
                web.get("/objects/{kind}", self._get),
                web.delete("/objects/{kind}/{namespace}/{name}", self._delete),
                web.get("/logs/{namespace}/{name}", self._logs),
                web.get("/status", self._status),
                web.get("/metrics", self._metrics),
            ]
        )
        app.on_shutdown.append(self._close)
        return app

    async def _close(self, _app: web.Application) -> None:
        self._closing = True

    async def _apply(self, request: web.Request) -> web.Response:
        body = await request.read()
        try:
            data = json.loads(body)
            documents = [_document(document) for document in data["documents"]]
            dry_run = bool(data.get("dry_run", False))
        except (ValueError, TypeError, KeyError, AttributeError):
            raise ValidationError(["expected a JSON object with documents, each with file, line, value"]) from None
        applied = await self._platform.apply(documents, dry_run=dry_run)
        fields = ("kind", "namespace", "name", "action", "note")
        return web.json_response({"applied": [{field: getattr(one, field) for field in fields} for one in applied]})

    async def _get(self, request: web.Request) -> web.Response:
        items = self._platform.get(_kind(request), request.query.get("namespace"))
        return web.json_response({"items": items}, dumps=_dumps)

    async def _delete(self, request: web.Request) -> web.Response:
        where = request.match_info
        await self._platform.delete(_kind(request), where["namespace"], where["name"])
        return web.json_response({})

    async def _status(self, _request: web.Request) -> web.Response:
        return web.json_response(self._platform.status(), dumps=_dumps)

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._platform.metrics(), headers={"Content-Type": "text/plain; version=0.0.4"})

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        namespace, name = request.match_info["namespace"], request.match_info["name"]
        follow, previous = (request.query.get(option) == "1" for option in ("follow", "previous"))
        lines = log_lines(
            lambda: self._platform.logs(namespace, name), follow=follow, previous=previous, tail=_tail(request)
        )
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8"})
        async with aclosing(lines):
            # errors of the first step still get a status of their own
            data = await anext(lines, None)
            await response.prepare(request)
            while data is not None and not self._closing and _is_there(request):
                await response.write(data)
                data = await anext(lines, None)
        return response


def _document(data: Mapping[str, Any]) -> Document:
    if not isinstance(data["value"], dict):
        raise TypeError
    lines = {str(path): int(line) for path, line in data.get("lines", {}).items()}
    return Document(str(data["file"]), int(data["line"]), data["value"], lines)


def _kind(request: web.Request) -> str:
    kind = request.match_info["kind"]
    if kind not in KINDS:
        raise NotFound(f"there is no kind {kind!r} here; there are {', '.join(KINDS)}")
    return kind


def _tail(request: web.Request) -> int | None:
    text = request.query.get("tail")
    if text is not None and not text.isdecimal():
        raise ValidationError([f"tail must be a number of lines, not {text!r}"])
    return None if text is None else int(text)


def _is_there(request: web.Request) -> bool:
    return request.transport is not None and not request.transport.is_closing()


def _dumps(data: object) -> str:
    return json.dumps(data, default=str)  # YAML has dates, JSON has not


@web.middleware
async def _errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except KnativeError as error:
        problems = list(error.problems) if isinstance(error, ValidationError) else []
        return web.json_response({"error": str(error), "problems": problems}, status=error.status)
    except web.HTTPException as error:
        return web.json_response({"error": f"{error.reason}: {request.path}", "problems": []}, status=error.status)
    except (ConnectionError, asyncio.CancelledError):
        raise  # the client has gone
    except Exception as error:
        log.exception("control_request_failed", method=request.method, path=request.path)
        text = f"the platform failed at {request.method} {request.path}: {error!r}; its log says more"
        return web.json_response({"error": text, "problems": []}, status=500)
