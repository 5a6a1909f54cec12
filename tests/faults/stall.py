"""`python -m tests.faults.stall`: how long a stream stands still when the replica under it is killed with SIGKILL.

One stream at a time on the demonstration model. In the middle of its answer the replica that it uses is killed, of each
stage in turn; the pause is the longest time between two tokens from then on. A row for each stage that was lost, and
what each stage computed beyond what the answer needed.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import structlog
import typer
from rich.console import Console
from rich.table import Table

from tests.faults.checkpoint import spans
from tests.faults.client import Client, Expected, Line
from tests.faults.fleet import MODEL_NAME, REPLICAS, Fleet, Setup
from tests.faults.schedule import Fault
from tests.faults.workload import Ask

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
DEMO_BLOCKS, DEMO_VOCABULARY = 8, 2048
NEW_TOKENS = 60
KILL_AFTER = 20  # tokens of the answer
_PROMPTS = 4


class StallError(Exception):
    """An answer was not what it must be; the text says which."""


@dataclass(frozen=True, slots=True)
class Kill:
    """`lost` is the stage. `again_tokens` by stage: what it computed beyond what the answer needed."""

    lost: int
    pause_s: float
    usual_s: float  # the median time between two tokens of the same answer
    again_tokens: tuple[int, ...]

    @property
    def again_elsewhere(self) -> int:
        """The most that a stage which was not lost computed again."""
        return max((tokens for stage, tokens in enumerate(self.again_tokens) if stage != self.lost), default=0)


def main(
    kills: Annotated[int, typer.Option(min=1, help="How many replicas are killed.")] = 24,
    stages: Annotated[int, typer.Option(min=1, max=8, help="Into how many stages the model is cut.")] = 2,
    replicas: Annotated[int, typer.Option(min=1, help="Of each stage; with 1 the stage has to start anew.")] = REPLICAS,
    context: Annotated[int, typer.Option(min=1, max=900, help="Tokens of the prompt.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Only the JSON line, no table.")] = False,
) -> None:
    """Kill the replica that a stream uses, again and again, and measure how long the stream stands still.

    The exit code is 1 if an answer was not the undisturbed one.
    """
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: processes go
    with tempfile.TemporaryDirectory(prefix="stagecraft-stall-") as folder:
        # with the settings that everybody gets
        setup = Setup(DEMO, Path(folder), spans(stages, DEMO_BLOCKS), replicas)
        try:
            found = asyncio.run(measured(setup, kills, context))
        except StallError as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(1) from None
    facts = {"context": context, "stages": stages, "replicas": replicas, "kills": kills, **summary(found)}
    if not as_json:
        show(found, stages, Console(width=None if sys.stdout.isatty() else 120))
    print(json.dumps(facts))


async def measured(setup: Setup, kills: int, context: int) -> list[Kill]:
    """Raises StallError."""
    chance = random.Random(f"stall {context}")
    prompts = [tuple(chance.randrange(6, DEMO_VOCABULARY) for _ in range(context)) for _ in range(_PROMPTS)]
    asks = [Ask(prompt, NEW_TOKENS) for prompt in prompts]
    async with Fleet(setup, lambda text: None) as fleet, aiohttp.ClientSession() as session:
        await fleet.settled()
        expected = [await _undisturbed(session, fleet, ask, f"undisturbed-{i}") for i, ask in enumerate(asks)]
        found = []
        for number in range(kills):
            index, lost = number % len(asks), number % len(setup.spans)
            found.append(await _killed(session, fleet, asks[index], expected[index], lost, f"kill-{number}"))
            await fleet.settled()
    return found


async def _undisturbed(session: aiohttp.ClientSession, fleet: Fleet, ask: Ask, key: str) -> Expected:
    client = Client(session, fleet.base_url, lambda: 0, lambda tokens: None)
    outcome = await client.run(ask.body(MODEL_NAME, stream=True), key, None, Line())
    if outcome.verdict != "right":
        raise StallError(f"before any kill an answer was {outcome.verdict}: {outcome.note}")
    return Expected(outcome.tokens, outcome.text)


async def _killed(
    session: aiohttp.ClientSession, fleet: Fleet, ask: Ask, expected: Expected, lost: int, key: str
) -> Kill:
    fault = Fault(1, "kill", KILL_AFTER, lost, "during", 0.0, None, salt=0)
    seen = 0

    def count(tokens: int) -> None:
        nonlocal seen
        seen += tokens
        if seen == KILL_AFTER:
            fleet.armed[lost].arm(fault)

    before = [armed.computed_tokens for armed in fleet.armed]
    client = Client(session, fleet.base_url, lambda: 0, count)
    outcome = await client.run(ask.body(MODEL_NAME, stream=True), key, expected, Line())
    if outcome.verdict != "right":
        raise StallError(f"after stage {lost} was killed the answer was {outcome.verdict}: {outcome.note}")
    needed = len(ask.prompt) + ask.max_tokens - 1
    again = tuple(armed.computed_tokens - old - needed for armed, old in zip(fleet.armed, before, strict=True))
    return Kill(lost, max(outcome.gaps_s[KILL_AFTER - 1 :]), statistics.median(outcome.gaps_s), again)


def summary(kills: Sequence[Kill]) -> dict[str, Any]:
    pauses_s = sorted(kill.pause_s for kill in kills)
    return {
        "pause_s_p50": round(_percentile(pauses_s, 50), 4),
        "pause_s_p95": round(_percentile(pauses_s, 95), 4),
        "pause_s_max": round(pauses_s[-1], 4),
        "usual_s": round(statistics.median(kill.usual_s for kill in kills), 4),
        "again_tokens_lost": statistics.median(kill.again_tokens[kill.lost] for kill in kills),
        "again_tokens_others": max((kill.again_elsewhere for kill in kills), default=0),
    }


def show(kills: Sequence[Kill], stages: int, console: Console) -> None:
    titles = ("lost", "kills", "pause p50", "p95", "max", *(f"again in stage {stage}" for stage in range(stages)))
    table = Table(*titles, title="how long a stream stands still (s), and tokens computed again (median)")
    for column in table.columns[1:]:
        column.justify = "right"
    for lost in range(stages):
        its = [kill for kill in kills if kill.lost == lost]
        if not its:
            continue
        pauses_s = sorted(kill.pause_s for kill in its)
        again = [statistics.median(kill.again_tokens[stage] for kill in its) for stage in range(stages)]
        figures = [f"{_percentile(pauses_s, percent):.3f}" for percent in (50, 95, 100)]
        table.add_row(f"stage {lost}", str(len(its)), *figures, *(f"{tokens:.0f}" for tokens in again))
    console.print(table)


def _percentile(values: Sequence[float], percent: int) -> float:
    """Nearest rank, of sorted values."""
    return values[max(0, -(-len(values) * percent // 100) - 1)]


if __name__ == "__main__":
    app = typer.Typer(rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app(prog_name="python -m tests.faults.stall")
