"""The choices of one request, generated side by side: tokens from the generator, text for the endpoints.

All endpoints (OpenAI, V1, V2, generate) go through `Service.generate`; they differ only in what they read and write.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import cast

import structlog

from orchestrator.chat import ChatTemplate, ChatTemplateError
from orchestrator.generation import FinishReason, GenerationError, GenerationRequest, Generator, Priority, Token
from orchestrator.metrics import RequestRecord
from orchestrator.text import TextStream
from orchestrator.tokenizer import Tokenizer

RETRY_AFTER_S_MAX = 60
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

    def __init__(self, requests_max: int) -> None:
        self._requests_max = requests_max
        self._in_flight = 0
        self._duration_s = 0.0  # of the requests that ended last, on average

    def take(self) -> None:
        """Raises GenerationError (429) where no place is free."""
        if self._in_flight >= self._requests_max:
            raise GenerationError(
                f"{self._in_flight} requests are under way, the limit is {self._requests_max}; try again later",
                status=429,
                code="too_many_requests",
                retry_after_s=min(max(math.ceil(self._duration_s / self._in_flight), 1), RETRY_AFTER_S_MAX),
            )
        self._in_flight += 1

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
    ) -> None:
        self.generator = generator
        self.tokenizer = tokenizer
        self.name = name
        self.choices_max = choices_max
        self._places: dict[Priority, Places] = {
            "interactive": Places(requests_max),
            "batch": Places(batch_requests_max),
        }
        self.chat_template, self.chat_problem = _compiled(tokenizer)

    async def generate(
        self,
        choices: Sequence[Choice],
        *,
        endpoint: str,
        request_id: str,
        prompt_tokens: int,
        about: Mapping[str, str] | None = None,
    ) -> AsyncGenerator[Piece, None]:
        """Pieces of all choices as they come. Closing the iterator frees every sequence. Raises GenerationError.

        The choices of a request have one priority. `about` is what its line in the log says besides."""
        self.check_ready()
        places = self._places[choices[0].request.priority]
        places.take()
        record = RequestRecord(
            model=self.name,
            endpoint=endpoint,
            request_id=request_id,
            prompt_tokens=prompt_tokens,
            choices=len(choices),
            about=about or {},
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
        if not self.generator.ready:
            raise GenerationError(
                f"the model {self.name!r} is still starting; try again in some seconds",
                status=503,
                code="model_not_ready",
                retry_after_s=2,
            )


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
    queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
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
                queue.put_nowait(piece)
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)


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
