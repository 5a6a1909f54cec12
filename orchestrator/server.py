"""The orchestrator's process: `python -m orchestrator.server`. Settings are ORCHESTRATOR_* variables or flags.

Exit codes: 0 after SIGTERM or SIGINT, 1 when the stages could not be started, 2 for bad settings, a bad checkpoint or a
file of events that cannot be used, 3 when a port is taken.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging
import os
import signal
import socket
import sys
import warnings
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import structlog
import uvloop

from functions.contract.checkpoint import CheckpointError
from functions.contract.http_limits import limited_protocol
from functions.contract.location import checkpoint_location, wait_for_checkpoint
from functions.contract.logs import configure_logs
from functions.contract.seals import Seals
from functions.contract.settings_error import SettingsError
from functions.contract.watched_file import FileError, WatchedFile
from knative.eventing.store_errors import StoreError
from orchestrator.api_keys import ApiKeyGuard, ApiKeys, parse_api_keys
from orchestrator.choices import Service
from orchestrator.generation import GenerationError
from orchestrator.metrics import watch_tasks
from orchestrator.settings import PREFIX, OrchestratorSettings, load_settings
from orchestrator.shared_generation import SharedSettings
from orchestrator.tokenizer import TokenizerError, load_tokenizer

if TYPE_CHECKING:
    from fastapi import FastAPI

    from orchestrator.chain import ChainSettings
    from orchestrator.events_api import EventsDoor

_log = structlog.get_logger("orchestrator")

_LAST_WORDS_S = 2.0  # before uvicorn cuts the connections that are left

Hook = Callable[[], Awaitable[None]]


class PortTaken(Exception):
    """Another process listens there; the message names the port and the setting."""


@dataclass(slots=True)
class Outcome:
    """What a hook left behind for the exit code."""

    failure: Exception | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """The whole life of the process; returns its exit code."""
    for number in (signal.SIGTERM, signal.SIGINT):
        # until the server takes them; process 1 of a container gets no signal that it has no handler for
        signal.signal(number, lambda *_: sys.exit(0))
    try:
        settings = load_settings(os.environ, **_flags(sys.argv[1:] if arguments is None else arguments))
        configure_logs(as_json=not sys.stderr.isatty() if settings.log_json is None else settings.log_json)
        location = checkpoint_location(settings.model)
        wait_for_checkpoint(location, settings.model_wait_s)
        tokenizer = load_tokenizer(location)
        seals = _open_seals(settings)
        # after the settings, so that a misspelt one is told at once
        from orchestrator.chain import Chain

        chain = Chain(settings.plan, settings.stage_urls, _chain_settings(settings), seals, settings.step_times)
        service = Service(
            chain,
            tokenizer,
            name=settings.model_name,
            requests_max=settings.requests_max,
            batch_requests_max=settings.batch_workers,
            choices_max=settings.choices_max,
            reader_timeout_s=settings.reader_timeout_s,
            shared=shared_settings(settings),
            ahead_s=chain.ahead_s,
        )
        return serve(service, settings, start=chain.start, stop=chain.stop, close=chain.close)
    except (SettingsError, TokenizerError, CheckpointError) as error:
        print(error, file=sys.stderr)
        return 2


def serve(
    service: Service,
    settings: OrchestratorSettings,
    *,
    start: Hook | None = None,
    stop: Callable[[], None] = lambda: None,
    close: Hook | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT; returns the exit code.

    `start` runs beside the server, which answers 503 until `service.generator.ready`. After the signal running requests
    have most of `grace_s`; then `stop` is to end those that are left with an error, for which there is the rest of it.
    `close` runs at the end."""
    events = _events_door(service, settings)
    keys = _open_api_keys(settings)
    try:
        check_ports(settings)
    except PortTaken as error:
        print(error, file=sys.stderr)
        return 3
    outcome = Outcome()
    with bare_argv():
        import kserve
        from kserve.model_server import app

        from orchestrator.grpc_server import bound_to
        from orchestrator.kserve_model import StagedModel
        from orchestrator.kserve_parts import FixedModels, StagedDataPlane

    kserve.model_server.GRPCServer = bound_to(settings.host, settings.body_bytes_max, settings.request_timeout_s, keys)
    open_paths = frozenset([events.route.path] if events and settings.events_without_key == "allow" else [])
    prepare_app(
        app,
        service,
        events,
        body_bytes_max=settings.body_bytes_max,
        json_depth_max=settings.json_depth_max,
        timeout_s=settings.request_timeout_s,
        keys=keys,
        open_paths=open_paths,
    )
    # the events' queue before the chain, whose start may take long; the other way round at the end
    starts = [hook for hook in (events and events.start, start) if hook]
    closes = [hook for hook in (events and events.close, service.close, close) if hook]
    app.router.lifespan_context = _lifespan(starts, closes, outcome)

    class Server(kserve.ModelServer):  # type: ignore[misc]  # kserve has no types
        async def _serve(self) -> None:
            # KServe has no arguments for the address and for limits
            self._rest_server.config.host = settings.host
            self._rest_server.config.http = limited_protocol(settings.http_limits)
            self._tell_of_exit(self._rest_server._server, asyncio.get_running_loop())
            await super()._serve()

        def _tell_of_exit(self, uvicorn: Any, loop: asyncio.AbstractEventLoop) -> None:
            exit_of_uvicorn = uvicorn.handle_exit

            def begin_to_stop() -> None:
                service.stop()
                loop.call_later(_grace_of_running_s(settings.grace_s), stop)

            def handle_exit(number: int, frame: Any) -> None:
                if not uvicorn.should_exit:
                    loop.call_soon_threadsafe(begin_to_stop)
                exit_of_uvicorn(number, frame)

            uvicorn.handle_exit = handle_exit

    server = Server(
        http_port=settings.http_port,
        grpc_port=settings.grpc_port,
        enable_grpc=settings.grpc_port != 0,
        workers=1,
        enable_latency_logging=False,
        grace_period=settings.grace_s,
    )
    server.dataplane = StagedDataPlane(server.registered_models, service)
    server.model_repository_extension = FixedModels(server.registered_models)
    quieten_kserve()
    server.register_model(StagedModel(service))
    _log.info("serving", model=service.name, http_port=settings.http_port, grpc_port=settings.grpc_port)
    # KServe's own choice of uvloop has no effect with one worker, and it asks for a loop before it runs one
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    asyncio.set_event_loop(asyncio.new_event_loop())
    # what was imported stays: looking through it for garbage takes 0.1 s, in which no token would leave
    gc.freeze()
    # an empty list: KServe would refuse to serve a model that is not ready yet
    server.start([])
    if isinstance(outcome.failure, StoreError):
        print(outcome.failure, file=sys.stderr)
        return 2
    if outcome.failure is not None:
        print(f"the stages could not be started: {outcome.failure}", file=sys.stderr)
        return 1
    return 0


def prepare_app(
    app: FastAPI,
    service: Service,
    events: EventsDoor | None,
    *,
    body_bytes_max: int,
    json_depth_max: int,
    timeout_s: float,
    keys: WatchedFile[ApiKeys] | None = None,
    open_paths: frozenset[str] = frozenset(),
) -> None:
    """Adds our routes, errors and limits to KServe's application, which adds its own routes after them. With `keys`,
    all but `open_paths`, health and metrics need one."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.responses import JSONResponse

    from orchestrator.generate_api import generate_routes
    from orchestrator.http_guard import HttpGuard
    from orchestrator.openai_api import PREFIX as OPENAI_PREFIX
    from orchestrator.openai_api import openai_app
    from orchestrator.openai_replies import error_body
    from orchestrator.request_terms import TermsReader

    async def on_generation_error(request: Any, error: Any) -> JSONResponse:
        headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
        return JSONResponse({"error": str(error)}, error.status, headers)

    async def on_http_error(request: Any, error: Any) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, error.headers)

    async def on_invalid_body(request: Any, error: Any) -> JSONResponse:
        return JSONResponse({"error": _first_complaint(error)}, 400)

    def body_for(path: str, error: GenerationError) -> dict[str, Any]:
        return error_body(error) if path.startswith(OPENAI_PREFIX) else {"error": str(error)}

    app.mount(OPENAI_PREFIX, openai_app(service))
    app.router.routes.extend(generate_routes(service))
    if events is not None:
        app.router.routes.append(events.route)
    app.add_exception_handler(GenerationError, on_generation_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid_body)
    app.add_middleware(TermsReader, timeout_s=timeout_s)
    app.add_middleware(HttpGuard, body_bytes_max=body_bytes_max, json_depth_max=json_depth_max, error_body=body_for)
    if keys is not None:  # the last one added is the first that a request meets
        app.add_middleware(ApiKeyGuard, keys=keys, error_body=body_for, open_paths=open_paths)


def shared_settings(settings: OrchestratorSettings) -> SharedSettings:
    return SharedSettings(
        settings.idempotency_keep_s,
        settings.idempotency_count_max,
        settings.idempotency_bytes_max,
        settings.idempotency_linger_s,
    )


def _grace_of_running_s(grace_s: float) -> float:
    """What running requests get of it; the rest is for telling clients that theirs has not ended."""
    return max(grace_s - _LAST_WORDS_S, grace_s / 2)


def check_ports(settings: OrchestratorSettings) -> None:
    """Raises PortTaken. KServe itself would end with a trace, or serve REST without gRPC."""
    for name, host, port in (
        ("http_port", settings.host, settings.http_port),
        ("grpc_port", settings.host, settings.grpc_port),
    ):
        if port and not _free(host, port):
            raise PortTaken(
                f"port {port} is taken by another process or not allowed; choose another with "
                f"{PREFIX}{name.upper()} or --{name.replace('_', '-')}"
            )


@contextmanager
def bare_argv() -> Iterator[None]:
    """KServe parses sys.argv while it is imported and would take, or refuse, flags that are not its own."""
    given, sys.argv = sys.argv, sys.argv[:1]
    try:
        yield
    finally:
        sys.argv = given


def quieten_kserve() -> None:
    """One line a request is enough (ours). KServe writes four, and a trace for each mistake of a client."""
    for name in ("kserve", "kserve.trace", "uvicorn", "uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("kserve").addFilter(_is_our_fault)
    warnings.filterwarnings("ignore", message="ORJSONResponse is deprecated")


def _is_our_fault(record: logging.LogRecord) -> bool:
    from kserve.errors import InvalidInput, ModelNotFound, ModelNotReady, ServerNotReady

    expected = (GenerationError, InvalidInput, ModelNotFound, ModelNotReady, ServerNotReady, NotImplementedError)
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, expected)


def _events_door(service: Service, settings: OrchestratorSettings) -> EventsDoor | None:
    if settings.events == "off":
        return None
    from orchestrator.events_api import EventsDoor

    file, sink = settings.events_file, settings.events_sink
    if settings.events == "reply" or file is None or sink is None:  # none of them is None in mode `later`
        return EventsDoor(service)
    from orchestrator.batch_queue import BatchQueue

    workers, requests_max = settings.batch_workers, settings.events_queue_max
    return EventsDoor(
        service, lambda runner: BatchQueue.open(file, sink, runner, workers=workers, requests_max=requests_max)
    )


def _lifespan(starts: Sequence[Hook], closes: Sequence[Hook], outcome: Outcome) -> Any:
    async def started() -> None:
        try:
            for start in starts:
                await start()
        except Exception as error:
            # the process is of no use without its stages; SIGTERM is the ordinary way out
            outcome.failure = error
            os.kill(os.getpid(), signal.SIGTERM)

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[None]:
        watch_tasks(asyncio.get_running_loop())
        starting = asyncio.create_task(started())
        try:
            yield
        finally:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            for close in closes:
                await close()

    return lifespan


def _free(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # as the servers do: a port in TIME_WAIT is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError:
        return False
    return True


def _flags(arguments: Sequence[str]) -> dict[str, Any]:
    """Every setting as a flag; only those given are returned."""
    parser = argparse.ArgumentParser(
        prog="python -m orchestrator.server", description=__doc__, argument_default=argparse.SUPPRESS
    )
    for name, field in OrchestratorSettings.model_fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", help=f"{field.description} ({PREFIX}{name.upper()})")
    return vars(parser.parse_args(arguments))


def _chain_settings(settings: OrchestratorSettings) -> ChainSettings:
    from orchestrator.chain import ChainSettings

    return ChainSettings(**{field.name: getattr(settings, field.name) for field in fields(ChainSettings)})


def _open_seals(settings: OrchestratorSettings) -> Seals:
    """Raises SettingsError for a file that holds no keys."""
    try:
        return Seals.open(settings.stage_signing_key_file)
    except FileError as error:
        raise SettingsError(f"{PREFIX}STAGE_SIGNING_KEY_FILE: {error}") from None


def _open_api_keys(settings: OrchestratorSettings) -> WatchedFile[ApiKeys] | None:
    """Raises SettingsError for a file that holds no keys."""
    try:
        return None if settings.api_keys_file is None else WatchedFile(settings.api_keys_file, parse_api_keys)
    except FileError as error:
        raise SettingsError(f"{PREFIX}API_KEYS_FILE: {error}") from None


def _first_complaint(error: Any) -> str:
    """FastAPI lists every branch of a union; the first of them names what is wrong."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "InferenceRequest"))
    return f"{where}: {first['msg']}" if where else str(first["msg"])


if __name__ == "__main__":
    sys.exit(main())
