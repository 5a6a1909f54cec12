"""Completions over HTTP as clients ask for them."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx

from benchmarks.bench import MeasureError

REQUEST_TIMEOUT_S = 120.0


async def first_text_s(url: str, body: dict[str, Any]) -> float:
    """Seconds from the request to the first text of a streamed completion. The stream is read to its end, so that
    nothing of it runs on into the next measurement. Raises MeasureError."""
    first_s = None
    async with httpx.AsyncClient(timeout=REQUEST_TIMEOUT_S, trust_env=False) as client:
        started_s = time.perf_counter()  # connecting is part of it, setting up TLS for nobody is not
        try:
            async with client.stream("POST", url, json={**body, "stream": True}) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise MeasureError(f"{url} answered {response.status_code}: {text[:500]}")
                async for line in response.aiter_lines():
                    if first_s is None and _text_of(line):
                        first_s = time.perf_counter() - started_s
        except httpx.HTTPError as error:
            raise MeasureError(f"{url} did not answer: {type(error).__name__} {error}") from None
    if first_s is None:
        raise MeasureError(f"{url} answered without any text")
    return first_s


def _text_of(line: str) -> str:
    if not line.startswith("data: {"):
        return ""
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        raise MeasureError(f"the stream ended with an error: {event['error']}")
    return "".join(choice["text"] for choice in event["choices"])
