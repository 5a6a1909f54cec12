"""The text-generation extension of the Open Inference Protocol: /v2/models/{model}/generate and generate_stream.

Shapes follow its generate_rest.yaml; statuses are the project's own (400, not 422, for bad input).
"""

from __future__ import annotations

import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orchestrator.choices import Answer, Piece, Service, as_generation_error, collect
from orchestrator.generation import GenerationError, Token
from orchestrator.openai_api import REPEATED_HEADER, EventStream
from orchestrator.openai_requests import CompletionRequest, Work, completion_work, invalid, parse_json, parse_request
from orchestrator.request_terms import Terms, current_terms, seeded

TOKENS_DEFAULT = 20
PARAMETERS = frozenset(CompletionRequest.model_fields) - {
    *("model", "prompt", "n", "best_of", "stream", "stream_options", "echo", "logprobs", "return_token_ids")
}


def generate_routes(service: Service) -> list[Route]:
    endpoints = _Endpoints(service)
    path = "/v2/models/{model}/"
    return [
        Route(path + "generate", endpoints.generate, methods=["POST"]),
        Route(path + "generate_stream", endpoints.generate_stream, methods=["POST"]),
    ]


class _Endpoints:
    def __init__(self, service: Service) -> None:
        self._service = service

    async def generate(self, request: Request) -> Response:
        try:
            terms = current_terms()
            headers = self._headers(terms)
            work, details = await self._work(request, terms)
            (answer,) = await collect(self._pieces(request, work, terms), 1)
            return JSONResponse(self._whole(answer, details), headers=headers)
        except Exception as error:
            return _error_response(as_generation_error(error))

    async def generate_stream(self, request: Request) -> Response:
        try:
            terms = current_terms()
            headers = self._headers(terms)
            work, details = await self._work(request, terms)
            pieces = self._pieces(request, work, terms)
            first = await anext(pieces)
            events = self._events(first, pieces, details)
            return EventStream(events, pieces, headers, self._service.reader_timeout_s)
        except Exception as error:
            return _error_response(as_generation_error(error))

    def _headers(self, terms: Terms) -> dict[str, str]:
        return {} if self._service.begun_s(terms) is None else {REPEATED_HEADER: "true"}

    async def _work(self, request: Request, terms: Terms) -> tuple[Work, bool]:
        name = request.path_params["model"]
        if name != self._service.name:
            raise GenerationError(f"Model with name {name} does not exist.", status=404, code="model_not_found")
        data = parse_json(await request.body())
        parameters = data.get("parameters") or {}
        if set(data) - {"text_input", "parameters"} or not isinstance(parameters, dict):
            raise invalid('the body is {"text_input": text, "parameters": {...}}')
        if not isinstance(data.get("text_input"), str):
            raise invalid("text_input must be a text", "text_input")
        details = parameters.pop("details", False)
        if not isinstance(details, bool):
            raise invalid("details must be true or false", "details")
        unknown = sorted(set(parameters) - PARAMETERS)
        if unknown:
            raise invalid(f"unknown parameters {unknown}; known are {sorted(PARAMETERS | {'details'})}", unknown[0])
        body = {"max_tokens": TOKENS_DEFAULT, **parameters, "model": name, "prompt": data["text_input"]}
        if details:
            body["logprobs"] = 0
        parsed = parse_request(CompletionRequest, seeded(body, terms))
        return completion_work(self._service, parsed, terms=terms), details

    def _pieces(self, request: Request, work: Work, terms: Terms) -> AsyncGenerator[Piece, None]:
        request_id = request.headers.get("x-request-id") or f"gen-{uuid.uuid4().hex}"
        return self._service.generate(
            work.choices,
            endpoint="generate",
            request_id=request_id,
            prompt_tokens=work.prompt_tokens,
            terms=terms,
        )

    def _whole(self, answer: Answer, details: bool) -> dict[str, Any]:
        reply: dict[str, Any] = {"text_output": answer.text, "model_name": self._service.name}
        if details:
            logprobs = [self._token(token) for token in answer.tokens]
            reply["details"] = {"finish_reason": self._finish(answer.finish, answer.tokens), "logprobs": logprobs}
        return reply

    async def _events(
        self, first: Piece, pieces: AsyncGenerator[Piece, None], details: bool
    ) -> AsyncGenerator[bytes, None]:
        async with aclosing(pieces):
            try:
                yield self._event(first, details)
                async for piece in pieces:
                    yield self._event(piece, details)
            except Exception as error:
                yield _event({"error": str(as_generation_error(error))})

    def _event(self, piece: Piece, details: bool) -> bytes:
        reply: dict[str, Any] = {"text_output": piece.text, "model_name": self._service.name}
        if details:
            # the schema wants a finish reason in every event; only the last one is true
            finish = self._finish(piece.finish or "length", [piece.token])
            reply["details"] = {"finish_reason": finish, "token": self._token(piece.token)}
        return _event(reply)

    def _finish(self, finish: str, tokens: Sequence[Token]) -> str:
        if finish == "length":
            return "length"
        return "eos_token" if tokens[-1].id in self._service.tokenizer.eos_ids else "stop_sequence"

    def _token(self, token: Token) -> dict[str, Any]:
        tokenizer = self._service.tokenizer
        return {
            "id": token.id,
            "text": tokenizer.token_text(token.id),
            "logprob": token.logprob,
            "special": tokenizer.is_special(token.id),
        }


def _event(reply: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(reply, ensure_ascii=False).encode() + b"\n\n"


def _error_response(error: GenerationError) -> JSONResponse:
    headers = {} if error.retry_after_s is None else {"retry-after": str(error.retry_after_s)}
    return JSONResponse({"error": str(error)}, error.status, headers)
