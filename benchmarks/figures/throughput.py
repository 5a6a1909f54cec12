"""Tokens per second of requests that come at once, through two stages, beside the best of three peers: `generate` with
that static batch, `transformers serve` with continuous batching, and KServe-style serving of one request at a time.

Prompts are of equal length, so `generate` pads nothing and wastes nothing: the best case of a static batch. The stages
are asked by the chain in this process, and by the real orchestrator, whose completions are streamed over HTTP. With the
most requests, two things more: the floor, which is the linear layers alone in as many processes and threads
(`peer_linear`), and the orchestrator's part of the CPU time.

All processes are up at the same time, take turns and are idle meanwhile. Everybody runs once before the rounds; a peer
that reaches less than half of the best one's rate there takes no part in the rounds, which would take hours otherwise.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from benchmarks import checkpoints
from benchmarks.alternate import alternate, hopeless, once
from benchmarks.bench import CORES, Bench, layout_of
from benchmarks.floors import LinearFloor, linear_floor
from benchmarks.peers import TransformersPeer, transformers_peer
from benchmarks.prompts import random_prompts
from benchmarks.report import Figure, Section, alone, beside
from benchmarks.servers import (
    OneAtATime,
    Orchestrator,
    TransformersServe,
    one_at_a_time,
    orchestrator,
    transformers_serve,
)
from benchmarks.stages import RunningChain, StageProcess, chain_over, laid_out_stages, planned_spans
from orchestrator.chain import ChainSettings

STAGES = 2
CONCURRENCY = (1, 8, 32, 64)
PROMPT_TOKENS = NEW_TOKENS = 64
GENERATE, SERVE, KSERVE = PEERS = ("generate", "transformers serve", "one at a time")
CHAIN, HTTP = "chain", "orchestrator"
KSERVE_REQUESTS = 2  # its rate does not depend on how many wait

Ask = Callable[[Sequence[Sequence[int]], int], Awaitable[list[list[int]]]]


@dataclass(frozen=True, slots=True)
class Run:
    """`cpu_s` and `orchestrator_cpu_s` where they were taken: of orchestrator and stages, and of the orchestrator."""

    tokens: list[list[int]]
    tokens_per_s: float
    cpu_s: float = 0.0
    orchestrator_cpu_s: float = 0.0


Runs = Mapping[str, Callable[[], Awaitable[Run]]]


@dataclass(frozen=True, slots=True)
class Setting:
    """Everything that runs."""

    chain: RunningChain
    orchestrator: Orchestrator
    generate: TransformersPeer
    serve: TransformersServe
    kserve: OneAtATime
    floor: LinearFloor

    @property
    def stages(self) -> Sequence[StageProcess]:
        return self.chain.stages

    def runs(self, prompts: list[list[int]], new_tokens: int) -> Runs:
        few = prompts[:KSERVE_REQUESTS]
        return {
            GENERATE: _of_generate(self.generate, prompts, new_tokens),
            SERVE: _timed(self.serve.ask, prompts, new_tokens),
            KSERVE: _timed(self.kserve.ask, few, new_tokens),
            CHAIN: _timed(self._ask_chain, prompts, new_tokens),
            HTTP: self._with_cpu(_timed(self.orchestrator.ask, prompts, new_tokens)),
        }

    async def _ask_chain(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        answers = await asyncio.gather(*(self.chain.generate(prompt, new_tokens) for prompt in prompts))
        return [tokens for tokens, _ in answers]

    def _with_cpu(self, run: Callable[[], Awaitable[Run]]) -> Callable[[], Awaitable[Run]]:
        async def measured() -> Run:
            before = self._cpu_s()
            found = await run()
            own_s, stages_s = (after - earlier for after, earlier in zip(self._cpu_s(), before, strict=True))
            return replace(found, cpu_s=own_s + stages_s, orchestrator_cpu_s=own_s)

        return measured

    def _cpu_s(self) -> tuple[float, float]:
        return self.orchestrator.cpu_s(), sum(stage.cpu_s() for stage in self.stages)


async def measure(bench: Bench) -> list[Section]:
    new_tokens = 4 if bench.quick else NEW_TOKENS
    async with AsyncExitStack() as stack:
        setting = await _setting(bench, stack)
        vocabulary = setting.chain.chain.vocab_size
        figures: list[Figure] = []
        await once(setting.runs(random_prompts(1, PROMPT_TOKENS, vocabulary), 2))  # some load things late
        for count in CONCURRENCY:
            prompts = random_prompts(count, PROMPT_TOKENS, vocabulary)
            figures += await _compare(bench, setting, prompts, new_tokens)
    remarks = [
        f"{PROMPT_TOKENS} tokens in and {new_tokens} out for each request, from the first request to the last token; "
        f"peers have {CORES} threads, stages {layout_of(STAGES).threads} each.",
        f"{KSERVE} is asked for {KSERVE_REQUESTS} requests at once (or one): more would only wait.",
    ]
    return [Section("Throughput, 82M model, 2 stages, float32", figures, remarks)]


async def _setting(bench: Bench, stack: AsyncExitStack) -> Setting:
    model = await checkpoints.spelling(bench)
    spans, layout = planned_spans(model, STAGES), layout_of(STAGES)
    stages = await stack.enter_async_context(laid_out_stages(bench, model, spans, layout))
    return Setting(
        await stack.enter_async_context(chain_over(stages, ChainSettings(spread=layout.spread))),
        await stack.enter_async_context(orchestrator(bench, model, stages, layout.spread)),
        await stack.enter_async_context(transformers_peer(model, CORES)),
        await stack.enter_async_context(transformers_serve(bench, model)),
        await stack.enter_async_context(one_at_a_time(bench, model)),
        await stack.enter_async_context(linear_floor(model, spans, layout)),
    )


async def _compare(bench: Bench, setting: Setting, prompts: list[list[int]], new_tokens: int) -> list[Figure]:
    count, most = len(prompts), len(prompts) == max(CONCURRENCY)
    runs = dict(setting.runs(prompts, new_tokens))
    first = await once(runs)
    out = hopeless({peer: first[peer].tokens_per_s for peer in PEERS})
    left = {name: run for name, run in runs.items() if name not in out}
    if most:
        floor = await setting.floor.choose(count, PROMPT_TOKENS, new_tokens)
        left[floor.name] = _of_floor(floor.seconds, count * new_tokens)
    results = await alternate(bench.rounds, left, warm_up=False)
    label = f"{count} at once"
    expected = first[GENERATE].tokens
    figures = _ours(label, {name: runs for name, runs in results.items() if name not in out}, expected)
    figures += [_peer(label, peer, results.get(peer, [first[peer]]), expected, peer in out) for peer in PEERS]
    if most:
        figures += [_beside_floor(label, results, floor.name), _orchestrator_cpu(label, results[HTTP], new_tokens)]
    return figures


def _of_generate(peer: TransformersPeer, prompts: list[list[int]], new_tokens: int) -> Callable[[], Awaitable[Run]]:
    async def run() -> Run:
        answer = await peer.generate(prompts, new_tokens)
        return Run(answer.tokens, len(prompts) * new_tokens / answer.stamps_s[-1])

    return run


def _timed(ask: Ask, prompts: Sequence[Sequence[int]], new_tokens: int) -> Callable[[], Awaitable[Run]]:
    async def run() -> Run:
        started_s = time.perf_counter()
        tokens = await ask(prompts, new_tokens)
        return Run(tokens, sum(map(len, tokens)) / (time.perf_counter() - started_s))

    return run


def _of_floor(seconds: Callable[[], Awaitable[float]], tokens: int) -> Callable[[], Awaitable[Run]]:
    async def run() -> Run:
        return Run([], tokens / await seconds())

    return run


def _ours(label: str, results: Mapping[str, Sequence[Run]], expected: list[list[int]]) -> list[Figure]:
    """Both ways of asking, beside the best peer of the rounds."""
    rates = {name: [run.tokens_per_s for run in runs] for name, runs in results.items()}
    best = max((peer for peer in PEERS if peer in rates), key=lambda peer: statistics.median(rates[peer]))
    ways = {label: CHAIN, f"{label} over HTTP": HTTP}
    return [
        beside(name, "tokens/s", rates[way], best, rates[best], _differing(results[way], expected))
        for name, way in ways.items()
    ]


def _peer(label: str, peer: str, runs: Sequence[Run], expected: list[list[int]], left_out: bool) -> Figure:
    notes = ["left out of the rounds: less than half of the best peer's rate"] if left_out else []
    notes += filter(None, [_differing(runs, expected)])
    return alone(f"{label}, {peer}", "tokens/s", [run.tokens_per_s for run in runs], "; ".join(notes))


def _beside_floor(label: str, results: Mapping[str, Sequence[Run]], floor: str) -> Figure:
    ours, least = ([run.tokens_per_s for run in results[name]] for name in (CHAIN, floor))
    return beside(f"{label}, beside the floor", "tokens/s", ours, floor, least)


def _orchestrator_cpu(label: str, runs: Sequence[Run], new_tokens: int) -> Figure:
    tokens = len(runs[0].tokens) * new_tokens
    own = [run.orchestrator_cpu_s / tokens * 1e3 for run in runs]
    name = f"{label} over HTTP, CPU of the orchestrator"
    return beside(name, "ms/token", own, "orchestrator and stages", [run.cpu_s / tokens * 1e3 for run in runs])


def _differing(runs: Sequence[Run], expected: list[list[int]]) -> str:
    answers = [(tokens, expected[index]) for run in runs for index, tokens in enumerate(run.tokens)]
    same = sum(tokens == wanted for tokens, wanted in answers)
    return "" if same == len(answers) else f"{same} of {len(answers)} answers have the peer's tokens"
