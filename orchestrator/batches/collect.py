"""Fetches the results of a batch from the results service."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import aiohttp

from orchestrator.batches.broker_client import ServiceError
from orchestrator.batches.journal import Journal
from orchestrator.batches.lines import BadLine
from orchestrator.batches.patience import RETRIED, Patience, Tell

PAGE_LINES = 1000
WAIT_S = 10
_PAUSE_S = 0.1  # behind a page with room left: else every result would have a page of its own
_SLACK_S = 50.0  # beyond the wait: a service that is at zero has to come up


@dataclass(frozen=True, slots=True)
class Page:
    """Output lines in the order in which they came; `next` is the number of the last."""

    lines: tuple[bytes, ...]
    next: int


class ResultsClient:
    """`url` is the address of a results service. What it waits for is told. Its calls raise ServiceError.

    `is_known`: it has answered before, so that a 404 means that it is started again."""

    def __init__(self, http: aiohttp.ClientSession, url: str, tell: Tell, *, is_known: bool = False) -> None:
        self._http = http
        self._url = url.rstrip("/")
        self._patience = Patience(tell)
        self._is_known = is_known

    async def page(self, batch: str, after: int, *, wait_s: int = 0) -> Page:
        """What came after number `after`; without anything new it waits for up to `wait_s`."""
        query = {"after": str(after), "limit": str(PAGE_LINES), "wait_s": str(wait_s)}
        status, headers, body = await self._get(f"/batches/{quote(batch, safe='')}/results", query, wait_s)
        if status == 404 or not headers.get("x-next", "").isdecimal():
            raise ServiceError(f"{self._url} is no results service (it answers {status}); check --results")
        return Page(tuple(line for line in body.split(b"\n") if line), int(headers["x-next"]))

    async def counts(self, batch: str) -> dict[str, Any] | None:
        """completed, failed, cancelled, dead_letters; None when nothing of this batch has come yet."""
        status, _, body = await self._get(f"/batches/{quote(batch, safe='')}", {}, 0)
        return None if status == 404 else self._object(body)

    async def dead_letters(self, batch: str, limit: int) -> list[dict[str, Any]]:
        """The first of them."""
        path = f"/batches/{quote(batch, safe='')}/dead-letters"
        status, _, body = await self._get(path, {"limit": str(limit)}, 0)
        return [] if status == 404 else [self._object(line) for line in body.split(b"\n") if line]

    async def _get(self, path: str, query: Mapping[str, str], wait_s: int) -> tuple[int, Mapping[str, str], bytes]:
        """Status (200 or 404), headers and body."""
        timeout = aiohttp.ClientTimeout(total=wait_s + _SLACK_S)
        while True:
            await self._patience.ready()
            try:
                async with self._http.get(self._url + path, params=query, timeout=timeout) as answer:
                    body = await answer.read()
            except aiohttp.InvalidURL:
                raise ServiceError(f"{self._url!r} is no URL such as http://127.0.0.1:8080/results") from None
            except (aiohttp.ClientError, TimeoutError) as error:
                why = f"the results service {self._url} cannot be reached: {error or type(error).__name__}"
                self._patience.failed(why)
                continue
            if answer.status == 200 or (answer.status == 404 and not self._is_known):
                self._is_known = self._is_known or answer.status == 200
                self._patience.worked()
                return answer.status, answer.headers, body
            text = " ".join(body.decode(errors="replace").split())[:300]
            # one that is started again may be unknown for a moment
            if answer.status not in RETRIED and answer.status != 404:
                raise ServiceError(f"{self._url} answers {answer.status}: {text}; check --results")
            self._patience.failed(
                f"the results service answers {answer.status}: {text}", answer.headers.get("retry-after")
            )

    def _object(self, text: bytes) -> dict[str, Any]:
        try:
            data = json.loads(text)
        except ValueError:
            data = None
        if not isinstance(data, dict):
            raise ServiceError(f"{self._url} is no results service; check --results")
        return data


async def collect(journal: Journal, results: ResultsClient, tell_failed: Callable[[BadLine], None]) -> None:
    """Writes results as they come until every request has one and no more can follow. Never leaves half a page."""
    while not journal.state.is_over:
        page = await results.page(journal.state.batch, journal.state.after, wait_s=WAIT_S)
        if page.lines:
            for line in journal.receive(page.lines, page.next):
                tell_failed(line)
            if len(page.lines) < PAGE_LINES and not journal.state.is_over:
                await asyncio.sleep(_PAUSE_S)


async def collect_present(journal: Journal, results: ResultsClient) -> None:
    """Writes the results that are there, without waiting for more."""
    while (page := await results.page(journal.state.batch, journal.state.after)).lines:
        journal.receive(page.lines, page.next)
