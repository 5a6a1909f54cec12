"""The OpenAI endpoints below /openai/v1: models, completions, chat/completions.

An application of its own, mounted into KServe's: so every error below the prefix has OpenAI's shape, unknown paths and
methods too. (KServe's own OpenAI routes need vLLM installed.)
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from orchestrator.choices import Piece, Service, as_generation_error, collect
from orchestrator.generation import GenerationError, Priority
from orchestrator.http_guard import SEND
from orchestrator.openai_replies import (
    DONE,
    ChatReplies,
    CompletionReplies,
    error_body,
    error_event,
    event,
    model_card,
    to_json,
)
from orchestrator.openai_requests import (
    ChatRequest,
    CompletionRequest,
    chat_work,
    completion_work,
    invalid,
    parse_json,
    parse_request,
)
from orchestrator.request_terms import NO_TERMS, Terms, current_terms, seeded

PREFIX = "/openai/v1"
SEED_HEADER = "x-stagecraft-seed"
REQUEST_ID_HEADER = "x-request-id"
REPEATED_HEADER = "idempotency-replayed"

_log = structlog.get_logger("orchestrator")

Replies = CompletionReplies | ChatReplies
Endpoint = Callable[[Request], Awaitable[Response]]


class EventStream(Response):
    """Server-sent events made from `pieces`, which are closed whatever becomes of the connection.

    Watches no connection: `HttpGuard` does, and cancels. But one that takes nothing for `reader_timeout_s` is cut."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        pieces: AsyncGenerator[Piece, None],
        headers: Mapping[str, str],
        reader_timeout_s: float,
    ) -> None:
        super().__init__(headers={**headers, "cache-control": "no-store"})
        del self.headers["content-length"]  # nobody knows it yet
        self._events = events
        self._pieces = pieces
        self._reader_timeout_s = reader_timeout_s
        self._sent = 0  # events
        self._sending = False  # waits for the client to take some
        self._look: asyncio.TimerHandle | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            # a task of its own: what waits here is woken through all frames around it, two dozen of Starlette's
            streaming = asyncio.create_task(self._stream(scope.get(SEND, send)))
            self._look = asyncio.get_running_loop().call_later(self._reader_timeout_s, self._look_after, streaming, -1)
            await streaming
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            if self._look is not None:
                self._look.cancel()
            await self._events.aclose()
            await self._pieces.aclose()

    async def _stream(self, send: Send) -> None:
        async for events in self._events:
            self._sending = True
            await send({"type": "http.response.body", "body": events, "more_body": True})
            self._sending = False
            self._sent += 1

    def _look_after(self, streaming: asyncio.Task[None], sent_then: int) -> None:
        """Once in a while, and not around each event, which would cost more than sending it."""
        if self._sending and self._sent == sent_then:
            _log.info("reader_stalled", seconds=self._reader_timeout_s, events=self._sent)
            streaming.cancel()
            return
        seen = self._sent if self._sending else -1
        loop = asyncio.get_running_loop()
        self._look = loop.call_later(self._reader_timeout_s, self._look_after, streaming, seen)


@dataclass(frozen=True, slots=True)
class Origin:
    """What the answer takes from the way that its request came. `tag` makes the answer's id; `repeated`: it was begun
    for an earlier request of the same key."""

    tag: str
    created_s: int
    priority: Priority = "interactive"
    terms: Terms = NO_TERMS
    repeated: bool = False


def completion_replies(service: Service, body: Mapping[str, Any], origin: Origin) -> CompletionReplies:
    """The checked request, ready to be generated. Raises GenerationError."""
    parsed = parse_request(CompletionRequest, seeded(body, origin.terms))
    check_model(service, parsed.model)
    work = completion_work(service, parsed, origin.priority, origin.terms)
    return CompletionReplies(parsed, work, service.tokenizer, f"cmpl-{origin.tag}", origin.created_s)


def chat_replies(service: Service, body: Mapping[str, Any], origin: Origin) -> ChatReplies:
    """As `completion_replies`."""
    parsed = parse_request(ChatRequest, seeded(body, origin.terms))
    check_model(service, parsed.model)
    work = chat_work(service, parsed, origin.priority, origin.terms)
    return ChatReplies(parsed, work, service.tokenizer, f"chatcmpl-{origin.tag}", origin.created_s)


def check_model(service: Service, name: str) -> None:
    """Raises GenerationError (404)."""
    if name != service.name:
        raise GenerationError(
            f"the model {name!r} does not exist here; this server serves {service.name!r}",
            status=404,
            code="model_not_found",
            param="model",
        )


def openai_app(service: Service) -> Starlette:
    """The application to mount at PREFIX."""
    endpoints = _Endpoints(service)
    return Starlette(
        routes=[
            Route("/models", _told(endpoints.models)),
            Route("/models/{model:path}", _told(endpoints.model)),
            Route("/completions", _told(endpoints.completions), methods=["POST"]),
            Route("/chat/completions", _told(endpoints.chat), methods=["POST"]),
        ],
        exception_handlers={HTTPException: _on_http_error},
    )


def error_response(error: GenerationError) -> JSONResponse:
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    return JSONResponse(error_body(error), error.status, headers)


class _Endpoints:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._created_s = int(time.time())

    async def models(self, request: Request) -> Response:
        card = model_card(self._service.name, self._created_s)
        return JSONResponse({"object": "list", "data": [card.model_dump(exclude_unset=True)]})

    async def model(self, request: Request) -> Response:
        check_model(self._service, request.path_params["model"])
        return Response(to_json(model_card(self._service.name, self._created_s)), media_type="application/json")

    async def completions(self, request: Request) -> Response:
        origin = _origin(self._service)
        body = await self._body(request)
        return await self._answer(request, completion_replies(self._service, body, origin), origin, "completions")

    async def chat(self, request: Request) -> Response:
        origin = _origin(self._service)
        body = await self._body(request)
        return await self._answer(request, chat_replies(self._service, body, origin), origin, "chat")

    async def _body(self, request: Request) -> dict[str, Any]:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise GenerationError(
                f"the body must be application/json, got {kind!r}", status=415, code="unsupported_media_type"
            )
        return parse_json(await request.body())

    async def _answer(self, request: Request, replies: Replies, origin: Origin, endpoint: str) -> Response:
        work, parsed = replies.work, replies.request
        request_id = request.headers.get(REQUEST_ID_HEADER) or replies.id
        headers = {SEED_HEADER: str(work.seed), REQUEST_ID_HEADER: request_id}
        if origin.repeated:
            headers[REPEATED_HEADER] = "true"
        pieces = self._service.generate(
            work.choices,
            endpoint=endpoint,
            request_id=request_id,
            prompt_tokens=work.prompt_tokens,
            terms=origin.terms,
        )
        if not parsed.stream:
            answers = await collect(pieces, len(work.choices))
            return Response(to_json(replies.whole(answers)), headers=headers, media_type="application/json")
        # errors before the first token still get their own status
        first = await anext(pieces)
        events = _events(first, pieces, replies, parsed.include_usage)
        return EventStream(events, pieces, headers, self._service.reader_timeout_s)


def _origin(service: Service) -> Origin:
    """Of a request over HTTP. With a key, all that it is told apart by comes out of that. To be made before the body is
    looked at: where there is no place for the request, refusing it should cost little. Raises GenerationError."""
    terms = current_terms()
    service.check_open("interactive", terms)
    begun_s = service.begun_s(terms)
    tag = uuid.uuid4().hex if terms.key is None else terms.key.tag
    return Origin(tag, begun_s or int(time.time()), terms=terms, repeated=begun_s is not None)


async def _events(
    first: Piece, pieces: AsyncGenerator[Piece, None], replies: Replies, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    """Server-sent events. An error midway is an event, and the stream ends without [DONE]."""
    count = 1
    async with aclosing(pieces):
        try:
            if events := replies.events(first):
                yield events
            async for piece in pieces:
                count += 1
                if events := replies.events(piece):
                    yield events
        except Exception as error:
            yield error_event(as_generation_error(error))
            return
        if include_usage:
            yield event(replies.usage(count))
        yield DONE


def _told(endpoint: Endpoint) -> Endpoint:
    """Whatever an endpoint raises becomes an error reply."""

    async def call(request: Request) -> Response:
        try:
            return await endpoint(request)
        except Exception as error:
            return error_response(as_generation_error(error))

    return call


async def _on_http_error(request: Request, error: Exception) -> Response:
    status = cast(HTTPException, error).status_code
    path = f"{request.method} {request.url.path}"
    if status == 404:
        known = f"{PREFIX}/models, {PREFIX}/completions, {PREFIX}/chat/completions"
        return error_response(GenerationError(f"unknown path: {path}; known are {known}", status=404, code="not_found"))
    if status == 405:
        return error_response(
            GenerationError(f"{path}: the method is not allowed here", status=405, code="method_not_allowed")
        )
    return error_response(invalid(cast(HTTPException, error).detail))
