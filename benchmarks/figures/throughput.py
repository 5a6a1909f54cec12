"""Tokens per second of requests that come at once, through two stages, beside `generate` with the same static batch.

Prompts are of equal length, so the peer pads nothing and wastes nothing: the best case of a static batch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

from benchmarks import checkpoints
from benchmarks.alternate import alternate
from benchmarks.bench import CORES, Bench, fair_threads
from benchmarks.peers import TransformersPeer, transformers_peer
from benchmarks.prompts import random_prompts
from benchmarks.report import Figure, Section, beside
from benchmarks.stages import RunningChain, running_chain

STAGES = 2
CONCURRENCY = (1, 8, 32)
CROWDED_AT = 8  # where stages with more threads than cores are shown too
PROMPT_TOKENS = NEW_TOKENS = 64
PEER = "generate"


@dataclass(frozen=True, slots=True)
class Run:
    tokens: list[list[int]]
    tokens_per_s: float


async def measure(bench: Bench) -> list[Section]:
    model = await checkpoints.large(bench)
    new_tokens = 4 if bench.quick else NEW_TOKENS
    figures: list[Figure] = []
    async with AsyncExitStack() as stack:
        peer = await stack.enter_async_context(transformers_peer(model, CORES))
        chains = {}
        for threads in _threads(bench):
            chains[threads] = await stack.enter_async_context(running_chain(bench, model, STAGES, threads))
        for index, count in enumerate((2,) if bench.quick else CONCURRENCY):
            prompts = random_prompts(count, PROMPT_TOKENS, checkpoints.vocab_size(model))
            runs = {PEER: _of_peer(peer, prompts, new_tokens)}
            for threads, chain in chains.items():
                if threads == fair_threads(STAGES) or count == CROWDED_AT:
                    runs[f"{threads}"] = _of_chain(chain, prompts, new_tokens)
            figures += _figures(count, await alternate(bench.rounds, runs, warm_up=index == 0))
    remarks = [
        f"{PROMPT_TOKENS} tokens in and {new_tokens} out for each request, from the first request to the last token; "
        f"the peer has {CORES} threads and gets them as one batch."
    ]
    return [Section("Throughput, 82M model, 2 stages, float32", figures, remarks)]


def _threads(bench: Bench) -> list[int]:
    """Threads of each stage: as many in all as the peer has, and all cores for each."""
    return [fair_threads(STAGES)] if bench.quick else [fair_threads(STAGES), CORES]


def _of_peer(peer: TransformersPeer, prompts: list[list[int]], new_tokens: int) -> Callable[[], Awaitable[Run]]:
    async def run() -> Run:
        answer = await peer.generate(prompts, new_tokens)
        return Run(answer.tokens, len(prompts) * new_tokens / answer.stamps_s[-1])

    return run


def _of_chain(chain: RunningChain, prompts: list[list[int]], new_tokens: int) -> Callable[[], Awaitable[Run]]:
    async def run() -> Run:
        started_s = time.perf_counter()
        answers = await asyncio.gather(*(chain.generate(prompt, new_tokens) for prompt in prompts))
        wall_s = time.perf_counter() - started_s
        return Run([tokens for tokens, _ in answers], len(prompts) * new_tokens / wall_s)

    return run


def _figures(count: int, results: Mapping[str, list[Run]]) -> list[Figure]:
    theirs = results[PEER]
    expected = theirs[0].tokens
    figures = []
    for threads, runs in results.items():
        if threads != PEER:
            same = sum(tokens == expected[i] for run in runs for i, tokens in enumerate(run.tokens))
            total = len(runs) * count
            figures.append(
                beside(
                    f"{count} at once, {threads} thread{'s'[: threads != '1']} a stage", "tokens/s",
                    [run.tokens_per_s for run in runs], PEER, [run.tokens_per_s for run in theirs],
                    "" if same == total else f"{same} of {total} answers have the peer's tokens",
                )
            )  # fmt: skip
    return figures
