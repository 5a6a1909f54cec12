"""Reads a streamed answer of an OpenAI endpoint: ours, or any other that speaks the same."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

CONNECT_TIMEOUT_S = 5.0


class EndpointError(Exception):
    """The endpoint refused, or cannot be reached; the text is one line for people."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of the answer. `prompt_tokens` and `completion_tokens` come with the last chunk, if at all."""

    text: str = ""
    finish: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


def client(api_key: str | None = None) -> httpx.AsyncClient:
    """For one answer, however long it takes: a stage may have to wake first."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    return httpx.AsyncClient(timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S), headers=headers)


async def only_model(http: httpx.AsyncClient, base_url: str) -> str:
    """The name of the one model served at `base_url`. Raises EndpointError when there are several or none."""
    answer = await _get(http, f"{base_url}/openai/v1/models")
    try:
        names = [str(entry["id"]) for entry in answer.json()["data"]]
    except (ValueError, KeyError, TypeError):
        raise EndpointError(f"{base_url} does not answer like an OpenAI endpoint; check --url") from None
    if len(names) != 1:
        raise EndpointError(f"{base_url} serves {len(names)} models; choose one with --model: {', '.join(names)}")
    return names[0]


async def stream(http: httpx.AsyncClient, base_url: str, body: Mapping[str, Any]) -> AsyncIterator[Chunk]:
    """The chunks of the answer to `body`: a chat when it has messages, else a completion.

    Raises EndpointError, also between two chunks."""
    path = "chat/completions" if "messages" in body else "completions"
    full = {**body, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async with http.stream("POST", f"{base_url}/openai/v1/{path}", json=full) as answer:
            if answer.status_code != 200:
                await answer.aread()
                raise EndpointError(error_line(answer))
            ended = False
            async for line in answer.aiter_lines():
                data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                ended = ended or data == "[DONE]"
                if data and not ended:
                    yield _chunk(data)
    except httpx.TransportError as error:
        raise EndpointError(_transport_line(base_url, error)) from None
    if not ended:
        raise EndpointError("the answer broke off; the server may have stopped")


def error_line(answer: httpx.Response) -> str:
    """An error answer in one line: OpenAI's shape, KServe's or FastAPI's."""
    try:
        data = answer.json()
    except ValueError:
        data = None
    text = _error_text(data) or " ".join(answer.text.split())[:200] or answer.reason_phrase
    return f"the server answered {answer.status_code}: {text}"


async def _get(http: httpx.AsyncClient, url: str) -> httpx.Response:
    try:
        answer = await http.get(url)
    except (httpx.TransportError, httpx.InvalidURL) as error:
        raise EndpointError(_transport_line(url.partition("/openai/")[0], error)) from None
    if answer.status_code != 200:
        raise EndpointError(error_line(answer))
    return answer


def _transport_line(base_url: str, error: Exception) -> str:
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return f"nothing answers at {base_url}; start a server with `stagecraft up demo`, or name another with --url"
    if isinstance(error, httpx.UnsupportedProtocol | httpx.InvalidURL):
        return f"{base_url!r} is not a URL such as http://127.0.0.1:8080; check --url"
    return f"the connection to {base_url} broke: {error or type(error).__name__}"


def _error_text(data: Any) -> str | None:
    if not isinstance(data, dict):
        return None
    error = data.get("error", data.get("detail"))
    if isinstance(error, dict):
        error = error.get("message")
    if isinstance(error, list):
        error = "; ".join(str(entry.get("msg", entry)) if isinstance(entry, dict) else str(entry) for entry in error)
    return None if error is None else " ".join(str(error).split())


def _chunk(data: str) -> Chunk:
    try:
        event = json.loads(data)
        if "error" in event:
            raise EndpointError(f"the server stopped: {_error_text(event)}")
        usage = event.get("usage") or {}
        choice = (event.get("choices") or [{}])[0]
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        return Chunk(text, choice.get("finish_reason"), usage.get("prompt_tokens"), usage.get("completion_tokens"))
    except (ValueError, TypeError, AttributeError, LookupError):
        raise EndpointError(f"the server sent something that is no OpenAI chunk: {data[:200]}") from None
