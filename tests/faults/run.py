"""A disturbed run over one fleet: the answers beforehand, then generations while faults come, then what is left."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tests.faults import residue
from tests.faults.client import PATIENCE_S, Client, Expected, Line, Outcome
from tests.faults.fleet import MODEL_NAME, Fleet, Setup
from tests.faults.reference import greedy_answers
from tests.faults.residue import Usage
from tests.faults.schedule import ELSEWHERE, Fault
from tests.faults.workload import Ask, Generation

AT_ONCE = 6  # clients

Progress = Callable[[int, int, int], None]  # generations that have ended, tokens, faults


@dataclass
class Result:
    """`complaints` is empty for a run in which everything held."""

    stages: int
    outcomes: Mapping[int, Outcome]
    injected: Counter[str]
    complaints: list[str]
    before: Usage
    after: Usage
    seconds: float
    needed_tokens: int  # that a stage had to compute for the answers, each once
    computed_tokens: Sequence[int]  # that it did compute
    log: list[str] = field(default_factory=list)

    @property
    def verdicts(self) -> Counter[str]:
        return Counter(outcome.verdict for outcome in self.outcomes.values())


class Diary:
    """What happened when, for whoever looks for the reason of a failure: in a file, too, as it happens."""

    def __init__(self, file: Path) -> None:
        self.lines: list[str] = []
        self._file = file
        self._started_s = time.perf_counter()

    def tell(self, text: str) -> None:
        self.lines.append(f"{time.perf_counter() - self._started_s:9.3f} {text}")
        with self._file.open("a") as file:
            print(self.lines[-1], file=file)


class Injector:
    """Lets the faults come as tokens do."""

    def __init__(self, fleet: Fleet, faults: Sequence[Fault], diary: Diary) -> None:
        self.tokens = 0
        self.done: Counter[str] = Counter()  # those that are not done to a stage
        self.lines: dict[int, Line] = {}  # clients that are being answered
        self._fleet = fleet
        self._faults = list(reversed(faults))
        self._diary = diary
        self._restarts: asyncio.Queue[Fault] = asyncio.Queue()

    @property
    def injected(self) -> Counter[str]:
        at_stages = (fault.kind for armed in self._fleet.armed for fault in armed.injected)
        return self.done + Counter(at_stages)

    def take_in(self, tokens: int) -> None:
        self.tokens += tokens
        while self._faults and self._faults[-1].after_tokens <= self.tokens:
            fault = self._faults.pop()
            if fault.kind not in ELSEWHERE:
                assert fault.stage is not None
                self._fleet.armed[fault.stage].arm(fault)
                continue
            self._diary.tell(f"fault {fault}")
            if fault.kind in ("orchestrator", "terminate"):
                self._restarts.put_nowait(fault)
            else:
                self._disconnect(fault)

    async def replace_orchestrators(self) -> None:
        """One after another."""
        while True:
            fault = await self._restarts.get()
            await self._fleet.replace_orchestrator(fault.seconds, gracefully=fault.kind == "terminate")
            self.done[fault.kind] += 1
            self._restarts.task_done()

    async def settled(self) -> None:
        await self._restarts.join()

    def _disconnect(self, fault: Fault) -> None:
        begun = [number for number, line in self.lines.items() if line.seen] or list(self.lines)
        if begun:
            number = begun[fault.salt % len(begun)]
            self._diary.tell(f"client {number} goes after {len(self.lines[number].seen)} tokens")
            self.lines[number].leave.set()
            self.done["disconnect"] += 1


async def disturbed_run(
    setup: Setup,
    pool: Sequence[Ask],
    runs: Sequence[Generation],
    faults: Sequence[Fault],
    *,
    progress: Progress = lambda ended, tokens, faults: None,
    at_once: int = AT_ONCE,
    patience_s: float = PATIENCE_S,
) -> Result:
    """Raises nothing for what is disturbed; RuntimeError if the fleet cannot be started or the undisturbed answers are
    not right."""
    diary = Diary(setup.folder / "diary.txt")
    reference = asyncio.create_task(asyncio.to_thread(greedy_answers, setup.model, pool))
    others = residue.children()
    async with Fleet(setup, diary.tell) as fleet, aiohttp.ClientSession(connector=_connector()) as session:
        await fleet.settled()
        expected = await _undisturbed(session, fleet, pool, await reference, at_once)
        base_held = await residue.left_sequences(fleet, residue.EMPTY_S_MAX)
        if base_held:
            raise RuntimeError(f"before any fault, sequences are left: {base_held}")
        before = await residue.usage(fleet)
        computed = [armed.computed_tokens for armed in fleet.armed]
        diary.tell("the disturbed run begins")
        started_s = time.perf_counter()
        injector = Injector(fleet, faults, diary)
        client = Client(session, fleet.base_url, lambda: fleet.epoch, injector.take_in, fleet.graceful_ends, patience_s)
        outcomes = await _disturbed(client, injector, expected, pool, runs, diary, progress, at_once)
        seconds = time.perf_counter() - started_s
        await injector.settled()
        await fleet.settled()
        diary.tell("the disturbed run is over, everything is whole again")
        held = await residue.left_sequences(fleet, residue.EMPTY_S_MAX)
        after = await residue.usage(fleet)
        complaints = fleet.complaints + residue.complaints(before, after, held, len(fleet.replicas))
        computed = [armed.computed_tokens - old for armed, old in zip(fleet.armed, computed, strict=True)]
    left = residue.children() - others
    if left:
        complaints.append(f"processes outlive the fleet: {sorted(left)}")
    for number, outcome in sorted(outcomes.items()):
        if outcome.verdict != "right":
            complaints.insert(0, f"generation {number} is {outcome.verdict}: {outcome.note}")
    needed = sum(len(pool[run.ask].prompt) + pool[run.ask].max_tokens - 1 for run in runs)
    return Result(
        len(setup.spans), outcomes, injector.injected, complaints, before, after, seconds, needed, computed, diary.lines
    )


async def _undisturbed(
    session: aiohttp.ClientSession,
    fleet: Fleet,
    pool: Sequence[Ask],
    greedy: Mapping[int, tuple[int, ...]],
    at_once: int,
) -> list[Expected]:
    """The answers of the fleet before any fault; greedy ones must be those of Transformers. Raises RuntimeError."""
    client = Client(session, fleet.base_url, lambda: fleet.epoch, lambda tokens: None)
    limit = asyncio.Semaphore(at_once)

    async def one(index: int) -> Outcome:
        async with limit:
            body = pool[index].body(MODEL_NAME, stream=False)
            return await client.run(body, f"undisturbed-{index}", None, Line())

    outcomes = await asyncio.gather(*(one(index) for index in range(len(pool))))
    for index, outcome in enumerate(outcomes):
        if outcome.verdict != "right":
            raise RuntimeError(f"before any fault, ask {index} is {outcome.verdict}: {outcome.note}")
        if index in greedy and outcome.tokens != greedy[index]:
            raise RuntimeError(
                f"before any fault, ask {index} is answered {outcome.tokens}, Transformers says {greedy[index]}"
            )
    return [Expected(outcome.tokens, outcome.text) for outcome in outcomes]


async def _disturbed(
    client: Client,
    injector: Injector,
    expected: Sequence[Expected],
    pool: Sequence[Ask],
    runs: Sequence[Generation],
    diary: Diary,
    progress: Progress,
    at_once: int,
) -> dict[int, Outcome]:
    outcomes: dict[int, Outcome] = {}
    left = iter(runs)

    async def work() -> None:
        for run in left:
            line = injector.lines[run.number] = Line()
            outcome = await client.run(
                pool[run.ask].body(MODEL_NAME, stream=run.stream), run.key, expected[run.ask], line
            )
            del injector.lines[run.number]
            outcomes[run.number] = outcome
            said = f"generation {run.number} (ask {run.ask}, {'streamed' if run.stream else 'whole'}): "
            diary.tell(f"{said}{outcome.verdict} after {outcome.attempts} attempts {outcome.note}")
            progress(len(outcomes), injector.tokens, sum(injector.injected.values()))

    restarting = asyncio.create_task(injector.replace_orchestrators())
    try:
        await asyncio.gather(*(work() for _ in range(at_once)))
        await injector.settled()
    finally:
        restarting.cancel()
        await asyncio.gather(restarting, return_exceptions=True)
    return outcomes


def _connector() -> aiohttp.TCPConnector:
    """A connection for each request, so that one that was broken is never used again."""
    return aiohttp.TCPConnector(limit=0, force_close=True)
