"""What runs in a chain: a sequence with the line its tokens leave by, and the lane it travels in."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field

from orchestrator import lanes
from orchestrator.generation import GenerationError, Priority, Token
from orchestrator.window import Window

UNREAD_TOKENS_MAX = 256  # of a sequence whose reader is slow: then it pauses


@dataclass(eq=False)
class Job:
    """A sequence in the chain, with the line its tokens leave by."""

    sequence: lanes.Sequence
    kv_tokens: int
    out: asyncio.Queue[Token | GenerationError] = field(default_factory=asyncio.Queue)
    booked: int = 0  # tokens that have yet to be put into the line
    news: asyncio.Event | None = None  # of its lane, once it has one
    dropped: bool = False  # nobody reads it any more

    @property
    def paused(self) -> bool:
        """Whether so many tokens lie unread that it makes no more for now."""
        return self.out.qsize() + self.booked >= UNREAD_TOKENS_MAX

    async def next(self) -> Token | GenerationError:
        """What comes by the line."""
        item = await self.out.get()
        if self.news is not None and self.out.qsize() == UNREAD_TOKENS_MAX - 1:
            self.news.set()  # it may have been paused
        return item

    @property
    def priority(self) -> Priority:
        return self.sequence.request.priority


@dataclass(eq=False)
class Lane:
    slot: int  # a small number, used again by later lanes
    opened_s: float
    progress_s: float  # when a step was last answered
    route: list[str | None]  # replica per stage, None: ask the service
    home: list[str | None]  # replica per stage that holds the lane's caches, also when the route avoids it
    asked: list[bool]  # stages that have been sent a step
    doors: list[asyncio.Lock]  # of each stage: one step of the lane is in it, the next ones wait in their order
    window: Window  # steps on their way
    news: asyncio.Event = field(default_factory=asyncio.Event)  # more may be sent, or has come back
    jobs: dict[int, Job] = field(default_factory=dict)  # by sequence, in the order in which they came
    booked: list[tuple[Job, Token]] = field(default_factory=list)  # tokens that have yet to be handed out
    suspects: list[Job] = field(default_factory=list)  # one of them broke a step: they go on one at a time
    # what its sequences are opened with, and without which no replica hands them over
    key: str = field(default_factory=lambda: secrets.token_hex(16), repr=False)
    moves: dict[int, Move] = field(default_factory=dict)  # by stage, off replicas that drain

    @property
    def name(self) -> str:
        return str(self.slot)

    @property
    def kv_tokens(self) -> int:
        return sum(job.kv_tokens for job in self.jobs.values())

    @property
    def caches(self) -> Caches:
        return Caches(tuple(self.home), tuple(self.asked))


@dataclass(eq=False, slots=True)
class Move:
    """Off the replica at the URL `old`, to `new` (HOST:PORT) once that is known."""

    old: str
    new: str | None = None
    under_way: bool = False


@dataclass(frozen=True, slots=True)
class Caches:
    """Where a lane's caches were when a sequence left it."""

    home: tuple[str | None, ...]
    asked: tuple[bool, ...]
