"""Time to the first token of a long prompt, two stages on separate cores: in chunks, as the chain does by itself,
beside the whole prompt in one step. Chunks let the second stage compute while the first is at the next one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass

from benchmarks import checkpoints
from benchmarks.alternate import alternate
from benchmarks.bench import CORES, Bench
from benchmarks.peers import transformers_peer
from benchmarks.prompts import random_prompts
from benchmarks.report import Section, beside
from benchmarks.stages import RunningChain, chain_over, planned_spans, running_stages
from orchestrator.chain import ChainSettings
from orchestrator.lanes import chunk_tokens

STAGES = 2
PROMPT_TOKENS, NEW_TOKENS = 1500, 2
CHUNKED, WHOLE = "chunked", "in one step"


@dataclass(frozen=True, slots=True)
class Run:
    tokens: list[int]
    first_s: float


async def measure(bench: Bench) -> list[Section]:
    model = await checkpoints.large(bench)
    (prompt,) = random_prompts(1, PROMPT_TOKENS, checkpoints.vocab_size(model))
    async with AsyncExitStack() as stack:
        spans = planned_spans(model, STAGES)
        stages = await stack.enter_async_context(running_stages(bench, model, spans, threads=1, apart=True))
        chunked = await stack.enter_async_context(chain_over(stages))
        settings = ChainSettings(spread=1, step_tokens_max=PROMPT_TOKENS)
        whole = await stack.enter_async_context(chain_over(stages, settings))
        runs = {CHUNKED: _first_token(chunked, prompt), WHOLE: _first_token(whole, prompt)}
        results = await alternate(bench.rounds, runs)
    async with transformers_peer(model, CORES) as peer:
        expected = (await peer.generate([prompt], NEW_TOKENS)).tokens[0]
    same = all(run.tokens == expected for runs_ in results.values() for run in runs_)
    times = {name: [run.first_s for run in found] for name, found in results.items()}
    figure = beside(
        f"first token of {PROMPT_TOKENS:,}, {CHUNKED}", "s", times[CHUNKED], WHOLE, times[WHOLE],
        "" if same else "the tokens differ from those of generate: this figure is worth nothing",
    )  # fmt: skip
    length = chunk_tokens(PROMPT_TOKENS, ChainSettings().step_tokens_max, STAGES)
    remarks = [f"One request alone; each stage has a core of its own. Chunks of {length} tokens."]
    return [Section("First token of a long prompt, 82M model, 2 stages, float32", [figure], remarks)]


def _first_token(chain: RunningChain, prompt: list[int]) -> Callable[[], Awaitable[Run]]:
    async def run() -> Run:
        tokens, stamps_s = await chain.generate(prompt, NEW_TOKENS)
        return Run(tokens, stamps_s[0])

    return run
