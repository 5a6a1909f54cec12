"""One client: asks for a generation until it has it, and looks at every token on the way."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal

import aiohttp

Verdict = Literal["right", "wrong", "duplicated", "lost", "hung"]
_STARTING = ("not_ready", "model_not_ready", "shutting_down")  # codes of errors
PATIENCE_S = 180.0  # without a token of a stream, or a whole answer, for so long it counts as hung


@dataclass(frozen=True, slots=True)
class Expected:
    tokens: tuple[int, ...]
    text: str


@dataclass(slots=True)
class Outcome:
    """What became of one generation. `attempts` are those that reached an orchestrator which serves; `gaps_s` are the
    times between two tokens of its streams."""

    verdict: Verdict
    attempts: int
    note: str = ""
    tokens: tuple[int, ...] = ()
    text: str = ""
    gaps_s: list[float] = field(default_factory=list)


class Disconnected(Exception):
    """The client itself has gone, as it was told to."""


class Broken(Exception):
    """The connection brought no whole answer."""


class Refused(Exception):
    """The answer was an error; `is_start` for one that says that the orchestrator begins or ends."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text[:300]}")
        self.is_start = any(f'"{code}"' in text for code in _STARTING)


@dataclass(slots=True)
class Line:
    """How a client's generation goes on: `seen` are the tokens of the attempt that runs, `reached` is how many any
    attempt has had. `leave` is set to have the client go."""

    seen: list[int] = field(default_factory=list)
    reached: int = 0
    leave: asyncio.Event = field(default_factory=asyncio.Event)
    patience: asyncio.Timeout | None = None


class Client:
    """`epoch` is the fleet's: an attempt may be repeated if it was lost with its orchestrator, and only then.
    `on_tokens` is called for tokens as they arrive, but not for those that an attempt before has had. A stream of an
    epoch of `graceful_ends` must not just break."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base_url: str,
        epoch: Callable[[], int],
        on_tokens: Callable[[int], None],
        graceful_ends: Set[int] = frozenset(),
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._session = session
        self._url = f"{base_url}/openai/v1/completions"
        self._epoch = epoch
        self._on_tokens = on_tokens
        self._graceful_ends = graceful_ends
        self._patience_s = patience_s

    async def run(self, body: dict[str, Any], key: str, expected: Expected | None, line: Line) -> Outcome:
        """Never raises for what the server does."""
        outcome = Outcome("lost", 0)
        try:
            async with asyncio.timeout(self._patience_s) as line.patience:
                await self._attempts(body, key, expected, line, outcome)
        except TimeoutError:
            note = f"nothing for {self._patience_s:g} s after {len(line.seen)} tokens of attempt {outcome.attempts}"
            outcome.verdict, outcome.note = "hung", note
        return outcome

    async def _attempts(
        self, body: dict[str, Any], key: str, expected: Expected | None, line: Line, outcome: Outcome
    ) -> None:
        while True:
            began = self._epoch()
            outcome.attempts += 1
            line.seen.clear()
            self._heard(line)
            try:
                await self._attempt(body, key, expected, line, outcome)
                return
            except Disconnected:
                line.leave.clear()
            except Refused as error:
                if not (error.is_start and self._may_repeat(began)):
                    outcome.verdict, outcome.note = "lost", str(error)
                    return
                outcome.attempts -= 1  # it was not begun
                await asyncio.sleep(0.1)
            except (Broken, aiohttp.ClientError, OSError) as error:
                unannounced = bool(line.seen) and began in self._graceful_ends
                if unannounced or not self._may_repeat(began):
                    note = ", where an error event was due, as the orchestrator was told to end" if unannounced else ""
                    outcome.verdict, outcome.note = "lost", f"{type(error).__name__}: {error}{note}"
                    return
                if isinstance(error, aiohttp.ClientConnectorError):
                    outcome.attempts -= 1  # there was nobody
                await asyncio.sleep(0.05)

    def _may_repeat(self, began: int) -> bool:
        return began % 2 == 1 or self._epoch() != began

    async def _attempt(
        self, body: dict[str, Any], key: str, expected: Expected | None, line: Line, outcome: Outcome
    ) -> None:
        ask = self._streamed if body["stream"] else self._whole
        attempt = asyncio.ensure_future(ask(body, key, expected, line, outcome))
        leaving = asyncio.ensure_future(line.leave.wait())
        try:
            await asyncio.wait({attempt, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not attempt.done():
                raise Disconnected
            await attempt
        finally:
            for task in (attempt, leaving):
                task.cancel()
            await asyncio.gather(attempt, leaving, return_exceptions=True)

    async def _whole(
        self, body: dict[str, Any], key: str, expected: Expected | None, line: Line, outcome: Outcome
    ) -> None:
        async with self._post(body, key) as reply:
            text = await reply.text()
            if reply.status != 200:
                raise Refused(reply.status, text)
            choice = json.loads(text)["choices"][0]
            line.seen.extend(choice["token_ids"])
            self._heard(line)
            _judge(outcome, line.seen, choice["text"], expected)

    async def _streamed(
        self, body: dict[str, Any], key: str, expected: Expected | None, line: Line, outcome: Outcome
    ) -> None:
        text, finish, now_s = "", None, asyncio.get_running_loop().time
        async with self._post(body, key) as reply:
            if reply.status != 200:
                raise Refused(reply.status, await reply.text())
            last_s = None
            async for data in _events(reply):
                if data == "[DONE]":
                    break
                event = json.loads(data)
                if "error" in event:
                    raise Refused(200, data)
                choice = event["choices"][0]
                if last_s is not None:
                    outcome.gaps_s.append(now_s() - last_s)
                last_s = now_s()
                text += choice["text"]
                finish = choice["finish_reason"] or finish
                line.seen.extend(choice["token_ids"])
                self._heard(line)
                if expected is not None and line.seen != list(expected.tokens[: len(line.seen)]):
                    _judge(outcome, line.seen, text, expected)
                    return
            else:
                raise Broken("the stream ended without [DONE]")
        if finish is None:
            raise Broken("the stream ended without a finish reason")
        _judge(outcome, line.seen, text, expected)

    def _heard(self, line: Line) -> None:
        """Something has come, or an attempt begins: patience starts anew."""
        assert line.patience is not None
        line.patience.reschedule(asyncio.get_running_loop().time() + self._patience_s)
        if len(line.seen) > line.reached:
            self._on_tokens(len(line.seen) - line.reached)
            line.reached = len(line.seen)

    def _post(self, body: dict[str, Any], key: str) -> Any:
        return self._session.post(self._url, json=body, headers={"Idempotency-Key": key})


async def _events(reply: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """The data of server-sent events."""
    async for line in reply.content:
        if line.startswith(b"data: "):
            yield line[6:].decode().rstrip("\r\n")


def _judge(outcome: Outcome, tokens: Sequence[int], text: str, expected: Expected | None) -> None:
    outcome.tokens, outcome.text = tuple(tokens), text
    outcome.verdict, outcome.note = ("right", "") if expected is None else verdict(tokens, text, expected)


def verdict(tokens: Sequence[int], text: str, expected: Expected) -> tuple[Verdict, str]:
    """What is to be said of an answer, and how it differs."""
    if tuple(tokens) == expected.tokens:
        return ("right", "") if text == expected.text else ("wrong", "the ids are right, the text is not")
    at = next(
        (i for i, (a, b) in enumerate(itertools.zip_longest(tokens, expected.tokens)) if a != b), len(expected.tokens)
    )
    note = f"token {at} is {list(tokens[at : at + 4])}, expected {list(expected.tokens[at : at + 4])}"
    repeats = any(
        tuple(tokens[at : at + width]) == expected.tokens[at - width : at] for width in range(1, min(at, 16) + 1)
    )
    return ("duplicated" if repeats else "wrong"), note
