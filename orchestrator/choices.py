"""The choices of one request, generated side by side: tokens from the generator, text for the endpoints.

All endpoints (OpenAI, V1, V2, generate) go through `Service.generate`; they differ only in what they read and write.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import cast

import structlog

from orchestrator.chat import ChatTemplate, ChatTemplateError
from orchestrator.generation import (
    FinishReason,
    GenerationError,
    GenerationRequest,
    Generator,
    Priority,
    Token,
    shutting_down,
)
from orchestrator.metrics import RequestRecord
from orchestrator.pace import retry_after_s
from orchestrator.request_terms import NO_TERMS, Terms
from orchestrator.shared_generation import SharedGenerations, SharedSettings
from orchestrator.text import TextStream
from orchestrator.tokenizer import Tokenizer

_PIECES_AHEAD_MAX = 256  # of all choices of a request, in front of whoever reads them
_NEWEST_WEIGHS = 0.1  # in the average duration of requests

_log = structlog.get_logger("orchestrator")


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence to generate, and the texts that end it. `continues`: the text goes on from the prompt's."""

    request: GenerationRequest
    stops: tuple[str, ...] = ()
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Piece:
    """One token of choice `index`, and the text that it made certain (often that of earlier tokens, or none).

    `offset` is where the token's own text begins in the answer, in characters."""

    index: int
    token: Token
    text: str
    offset: int
    finish: FinishReason | None = None


@dataclass(slots=True)
class Answer:
    """A whole choice."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    finish: FinishReason = "length"

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens.append(piece.token)
        self.offsets.append(piece.offset)
        self.finish = piece.finish or self.finish


class Places:
    """Bounds the requests of one priority, and knows when the next place will be free."""

    def __init__(self, requests_max: int, ahead_s: Callable[[], float | None] = lambda: None) -> None:
        self._requests_max = requests_max
        self._ahead_s = ahead_s
        self._in_flight = 0
        self._duration_s = 0.0  # of the requests that ended last, on average

    def take(self) -> None:
        """Raises GenerationError (429) where no place is free."""
        self.check()
        self._in_flight += 1

    def check(self) -> None:
        """Raises GenerationError (429) where no place is free."""
        if self._in_flight >= self._requests_max:
            raise GenerationError(
                f"{self._in_flight} requests are under way, the limit is {self._requests_max}; try again later",
                status=429,
                code="too_many_requests",
                retry_after_s=retry_after_s(max(self._duration_s / self._in_flight, self._ahead_s() or 0.0)),
            )

    def free(self, duration_s: float) -> None:
        self._in_flight -= 1
        self._duration_s += _NEWEST_WEIGHS * (duration_s - self._duration_s)


class Service:
    """What the endpoints share: the model behind them, its name, its words, and how much may be under way at once."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: Tokenizer,
        *,
        name: str,
        requests_max: int = 256,
        batch_requests_max: int = 128,
        choices_max: int = 128,
        reader_timeout_s: float = 60.0,
        shared: SharedSettings | None = None,
        ahead_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        """`ahead_s` tells how long the work that the generator has now will take, if it knows."""
        self.generator = generator
        self.tokenizer = tokenizer
        self.name = name
        self.choices_max = choices_max
        self.reader_timeout_s = reader_timeout_s
        self._places: dict[Priority, Places] = {
            "interactive": Places(requests_max, ahead_s),
            "batch": Places(batch_requests_max, ahead_s),
        }
        self._shared = SharedGenerations(name, _size_bytes, shared)
        self._stopping = False
        self.chat_template, self.chat_problem = _compiled(tokenizer)

    def generate(
        self,
        choices: Sequence[Choice],
        *,
        endpoint: str,
        request_id: str,
        prompt_tokens: int,
        about: Mapping[str, str] | None = None,
        terms: Terms = NO_TERMS,
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of all choices as they come. Closing the iterator frees every sequence, unless their key is expected
        to be asked for again. Raises GenerationError.

        The choices of a request have one priority. `about` is what its line in the log says besides."""

        def begin(deadline_s: float | None) -> AsyncGenerator[Piece, None]:
            return self._generate(_until(choices, deadline_s), endpoint, request_id, prompt_tokens, about or {})

        if terms.key is None:
            return begin(terms.deadline_s)
        # shared by requests with deadlines of their own: each ends with its own, and the generation with the last
        return self._shared.read(terms.key, lambda: begin(None), terms.deadline_s)

    async def _generate(
        self,
        choices: Sequence[Choice],
        endpoint: str,
        request_id: str,
        prompt_tokens: int,
        about: Mapping[str, str],
    ) -> AsyncGenerator[Piece, None]:
        self.check_ready()
        places = self._places[choices[0].request.priority]
        places.take()
        record = RequestRecord(
            model=self.name,
            endpoint=endpoint,
            request_id=request_id,
            prompt_tokens=prompt_tokens,
            choices=len(choices),
            about=about,
        )
        started_s = time.monotonic()
        try:
            with record:
                several = len(choices) > 1
                async with aclosing(_side_by_side(self, choices) if several else _one(self, choices[0], 0)) as pieces:
                    async for piece in pieces:
                        record.token(piece.index)
                        if piece.finish:
                            record.finishes.append(piece.finish)
                        yield piece
        finally:
            places.free(time.monotonic() - started_s)

    def check_ready(self) -> None:
        """Raises GenerationError (503). To be called before anything that depends on the model's limits."""
        if self._stopping:
            raise shutting_down()
        if not self.generator.ready:
            raise GenerationError(
                f"the model {self.name!r} is still starting; try again in some seconds",
                status=503,
                code="model_not_ready",
                retry_after_s=2,
            )

    def check_open(self, priority: Priority, terms: Terms) -> None:
        """As `check_ready`, and raises GenerationError (429) where there is no place: before any work is put into a
        request that would be refused. One that is to join another needs none. (422 for a key of another request.)"""
        self.check_ready()
        if self.begun_s(terms) is None:
            self._places[priority].check()

    def begun_s(self, terms: Terms) -> int | None:
        """When the generation that the request would join or repeat was begun, in Unix seconds; None where there is
        none. Raises GenerationError (422)."""
        return None if terms.key is None else self._shared.begun_s(terms.key)

    def stop(self) -> None:
        """No new requests from now on; those under way go on."""
        self._stopping = True

    async def close(self) -> None:
        """Ends what goes on without a client."""
        await self._shared.close()


def as_generation_error(error: Exception) -> GenerationError:
    """A fault of ours is logged with its trace and told without."""
    if isinstance(error, GenerationError):
        return error
    _log.error("internal_error", exc_info=error)
    return GenerationError("internal error; the server's log says more", status=500, code="internal_error")


async def collect(pieces: AsyncGenerator[Piece, None], count: int) -> list[Answer]:
    """Reads all pieces of `count` choices."""
    answers = [Answer() for _ in range(count)]
    async with aclosing(pieces):
        async for piece in pieces:
            answers[piece.index].add(piece)
    return answers


async def _one(service: Service, choice: Choice, index: int) -> AsyncGenerator[Piece, None]:
    request = choice.request
    stream = TextStream.of(service.tokenizer.decode, choice.stops, request.prompt if choice.continues else ())
    # the protocol says iterator; what the chain and the tests give can be closed
    tokens = cast(AsyncGenerator[Token, None], service.generator.generate(request))
    async with aclosing(tokens):
        async for token in tokens:
            offset = stream.length
            # the token that ended the answer is no part of its text, even where it is not a special one
            text = "" if token.finish == "stop" else stream.push(token.id)
            if token.finish and not stream.stopped:
                text += stream.finish()
            finish: FinishReason | None = "stop" if stream.stopped else token.finish
            yield Piece(index, token, text, offset, finish)
            if finish:
                return
    raise GenerationError("the answer broke off before its end", status=500, code="incomplete_answer")


async def _side_by_side(service: Service, choices: Sequence[Choice]) -> AsyncGenerator[Piece, None]:
    # bounded: a client that reads slowly holds up the choices, not their pieces
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue(maxsize=_PIECES_AHEAD_MAX)
    tasks = [asyncio.create_task(_pump(service, choice, i, queue)) for i, choice in enumerate(choices)]
    try:
        running = len(tasks)
        while running:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(service: Service, choice: Choice, index: int, queue: asyncio.Queue[Piece | Exception | None]) -> None:
    """Errors travel through the queue too, so that they come after the pieces that were before them."""
    try:
        async with aclosing(_one(service, choice, index)) as pieces:
            async for piece in pieces:
                await queue.put(piece)
        await queue.put(None)
    except Exception as error:
        await queue.put(error)


def _until(choices: Sequence[Choice], deadline_s: float | None) -> Sequence[Choice]:
    if deadline_s is None:
        return choices
    return [replace(choice, request=replace(choice.request, deadline_s=deadline_s)) for choice in choices]


def _size_bytes(piece: Piece) -> int:
    """What a piece takes in memory, about (CPython 3.11, 64 bits)."""
    return 300 + 2 * len(piece.text) + 150 * len(piece.token.top)


def _compiled(tokenizer: Tokenizer) -> tuple[ChatTemplate | None, str]:
    """A broken template must not keep the model from serving plain completions, so its complaint is kept instead."""
    if tokenizer.backend is None:
        return None, "this model has no tokenizer, so only completions with token ids are served"
    if tokenizer.chat_template is None:
        return None, "this model has no chat template; use /openai/v1/completions"
    try:
        return ChatTemplate(tokenizer.chat_template, tokenizer.special), ""
    except ChatTemplateError as error:
        return None, str(error)
