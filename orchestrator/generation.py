"""What a user's request becomes, and what comes back token by token: the seam between endpoints and chain."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

from functions.contract.sampling import SEED_BOUND, SamplingParams

FinishReason = Literal["stop", "length"]
Priority = Literal["interactive", "batch"]  # which goes first, first


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to generate. A request with n choices becomes n of these, with seeds derived from its own.

    Generation ends after `max_tokens` tokens ("length") or with a token of `stop_ids` ("stop"; that token is
    reported too). Texts that stop generation are the endpoint's business: it closes the iterator.

    `priority` says who waits for whom, and changes no token. Past `deadline_s`, of time.monotonic(), nobody works on
    it any more, and it ends with an error (504)."""

    prompt: tuple[int, ...]
    max_tokens: int
    params: SamplingParams = field(default_factory=SamplingParams)
    stop_ids: frozenset[int] = frozenset()
    priority: Priority = "interactive"
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token. `finish` is set on the last one. `top` is (token, logprob), likeliest first."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish: FinishReason | None = None


class GenerationError(Exception):
    """A request that cannot be served. `status` is the HTTP status, `code` a stable word, the text is for people."""

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message.encode(errors="backslashreplace").decode())  # half a surrogate pair is no UTF-8
        self.status = status
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s


def past_deadline() -> GenerationError:
    return GenerationError(
        "the time that the request was given is over; what there is of the answer was given up",
        status=504,
        code="deadline_exceeded",
    )


def shutting_down() -> GenerationError:
    """The same request, sent again, finds another process or the next one."""
    return GenerationError(
        "the server is shutting down; send the request again", status=503, code="shutting_down", retry_after_s=1
    )


def choice_seed(seed: int, choice: int) -> int:
    """Choice 0 has the request's own seed, so that n does not change it; the others are hashed from it."""
    if choice == 0:
        return seed
    digest = hashlib.sha256(f"{seed}/{choice}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % SEED_BOUND


class Generator(Protocol):
    """Turns requests into tokens. The chain is the real one; tests of the endpoints use a whole model in-process."""

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        ...

    @property
    def context_length(self) -> int:
        """The most tokens of prompt and answer together."""
        ...

    @property
    def vocab_size(self) -> int: ...

    def generate(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """Tokens as they are made. Closing the iterator (aclose) cancels and frees the sequence everywhere.

        Raises GenerationError, before the first token or between two."""
        ...
