"""What int8 weights (`--quantize int8`) bring: time per token of one request, and tokens/s of 32 at once, beside
float32 in as many stages. What they cost in quality: `tools/quantize_quality.py`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass

from benchmarks import checkpoints
from benchmarks.alternate import alternate
from benchmarks.bench import Bench, layout_of
from benchmarks.prompts import random_prompts
from benchmarks.report import Figure, Section, beside
from benchmarks.stages import RunningChain, running_chain

STAGES = 2
AT_ONCE = 32
PROMPT_TOKENS = NEW_TOKENS = 64
PEER = "float32"
KINDS: Mapping[str, Mapping[str, str]] = {PEER: {}, "int8": {"STAGE_QUANTIZE": "int8"}}


@dataclass(frozen=True, slots=True)
class Run:
    ms_per_token: float  # between the first and the last token of the first request
    tokens_per_s: float  # from the first request to the last token of all


async def measure(bench: Bench) -> list[Section]:
    model = await checkpoints.large(bench)
    new_tokens = 4 if bench.quick else NEW_TOKENS
    figures: list[Figure] = []
    async with AsyncExitStack() as stack:
        chains = {}
        for kind, environment in KINDS.items():
            with _inherited(environment):  # stages get the variables of this process
                started = running_chain(bench, model, STAGES)
                chains[kind] = await stack.enter_async_context(started)
        for count in (1, 2 if bench.quick else AT_ONCE):
            prompts = random_prompts(count, PROMPT_TOKENS, checkpoints.vocab_size(model))
            runs = {kind: _run(chain, prompts, new_tokens) for kind, chain in chains.items()}
            figures += _figures(count, await alternate(bench.rounds, runs))
        weights_mb = {
            kind: sum(info.weight_bytes for info in chain.chain.infos) / 1e6 for kind, chain in chains.items()
        }
    figures += [
        beside(f"{kind}, weights", "MB", [size_mb], PEER, [weights_mb[PEER]])
        for kind, size_mb in weights_mb.items()
        if kind != PEER
    ]
    remarks = [
        f"{PROMPT_TOKENS} tokens in and {new_tokens} out for each request; {layout_of(STAGES).threads} threads a stage."
    ]
    return [Section(f"Quantised weights, 82M model, {STAGES} stages", figures, remarks)]


@contextmanager
def _inherited(environment: Mapping[str, str]) -> Iterator[None]:
    os.environ.update(environment)
    try:
        yield
    finally:
        for name in environment:
            del os.environ[name]


def _run(chain: RunningChain, prompts: list[list[int]], new_tokens: int) -> Callable[[], Awaitable[Run]]:
    async def run() -> Run:
        started_s = time.perf_counter()
        answers = await asyncio.gather(*(chain.generate(prompt, new_tokens) for prompt in prompts))
        wall_s = time.perf_counter() - started_s
        _, stamps_s = answers[0]
        between_s = (stamps_s[-1] - stamps_s[0]) / (new_tokens - 1)
        return Run(between_s * 1e3, len(prompts) * new_tokens / wall_s)

    return run


def _figures(count: int, results: Mapping[str, list[Run]]) -> Iterator[Figure]:
    theirs = results[PEER]
    for kind, runs in results.items():
        if kind == PEER:
            continue
        if count == 1:
            ours_ms, theirs_ms = [run.ms_per_token for run in runs], [run.ms_per_token for run in theirs]
            yield beside(f"{kind}, time per token, 1 request", "ms", ours_ms, PEER, theirs_ms)
        rates, their_rates = [run.tokens_per_s for run in runs], [run.tokens_per_s for run in theirs]
        yield beside(f"{kind}, {count} at once", "tokens/s", rates, PEER, their_rates)
