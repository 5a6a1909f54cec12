"""The floor of a layout of stages: as many processes with as many threads, each computing its linear layers only."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.peers import Program, program
from functions.contract.spans import BlockSpan
from orchestrator.chain import ChainSettings
from orchestrator.layout import Layout


@dataclass(frozen=True, slots=True)
class Floor:
    """A way to go through the stages; `seconds` measures it once."""

    name: str
    seconds: Callable[[], Awaitable[float]]


Pass = tuple[int, int, int]  # rows, of which sampled, and how many such passes


class LinearFloor:
    def __init__(self, stages: Sequence[Program], spread: int) -> None:
        self._stages = stages
        self._spread = spread

    async def choose(self, count: int, prompt_tokens: int, new_tokens: int) -> Floor:
        """The faster of two ways to generate for `count` sequences at once: as many lanes as stages, which then compute
        all the time, and one lane of all, whose stages compute in turns. Stages that share the cores have only the
        second. What there is is tried, which also warms it up."""
        lanes = self._spread
        ways = [Floor("linear layers only, 1 lane", partial(self._in_turns, passes(count, prompt_tokens, new_tokens)))]
        if lanes > 1:
            work = passes(-(-count // lanes), prompt_tokens, new_tokens)
            ways.append(Floor(f"linear layers only, {lanes} lanes", partial(self._at_once, lanes, work)))
        times_s = [min([await way.seconds() for _ in range(2)]) for way in ways]
        return ways[times_s.index(min(times_s))]

    async def _at_once(self, lanes: int, work: Sequence[Pass]) -> float:
        """Seconds until the slowest stage has computed all lanes, with no stage ever waiting for another."""
        everything = list(work) * lanes
        return max(await asyncio.gather(*(_seconds(stage, everything) for stage in self._stages)))

    async def _in_turns(self, work: Sequence[Pass]) -> float:
        return sum([await _seconds(stage, work) for stage in self._stages])


def passes(sequences: int, prompt_tokens: int, new_tokens: int) -> list[Pass]:
    """Of one lane through one stage: prompts in chunks as long as a step may be, then a token a sequence and step."""
    rows, chunk = sequences * prompt_tokens, ChainSettings().step_tokens_max
    whole, rest = divmod(rows, chunk)
    # each prompt's last row is sampled, whatever chunk it is in; counted once, with the last chunk
    chunks = [(chunk, 0, whole)] if rest else [(chunk, 0, whole - 1)]
    return [one for one in [*chunks, (rest or chunk, sequences, 1), (sequences, sequences, new_tokens - 1)] if one[2]]


@asynccontextmanager
async def linear_floor(model: Path, spans: Sequence[BlockSpan], layout: Layout) -> AsyncIterator[LinearFloor]:
    async with AsyncExitStack() as stack:
        stages = []
        for span in spans:
            head = "1" if span is spans[-1] else "0"
            arguments = ["benchmarks.peer_linear", str(model / "config.json"), str(span), head]
            stages.append(await stack.enter_async_context(program(arguments, layout.threads)))
        yield LinearFloor(stages, layout.spread)


async def _seconds(stage: Program, work: Sequence[Pass]) -> float:
    await stage.write_line({"passes": [list(one) for one in work]})
    return float((await stage.read_line())["seconds"])
