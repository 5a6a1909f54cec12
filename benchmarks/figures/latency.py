"""Time per token of a single request, for several numbers of stages, beside Transformers' `generate`.

All processes are up at the same time and take turns. Time per token is that between the first and the last token,
divided by the steps between them, so it holds no prefill.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks import checkpoints
from benchmarks.alternate import alternate
from benchmarks.bench import CORES, DEMO, Bench, fair_threads, layout_of
from benchmarks.peers import TransformersPeer, transformers_peer
from benchmarks.prompts import random_prompts
from benchmarks.report import Figure, Section, alone, beside
from benchmarks.stages import RunningChain, running_chain
from orchestrator.layout import Layout, shared_cores_layout

PROMPT_TOKENS = 16
PEER = "generate"
GOAL_STAGES = (2, 4)  # those that a goal is about are tried at toy size too
SINGLE = "generate, 1 thread"  # shown too: what a thread more brings the peer


@dataclass(frozen=True, slots=True)
class Run:
    tokens: list[int]
    ms_per_token: float


async def measure(bench: Bench) -> list[Section]:
    large = await checkpoints.large(bench)
    models = [] if bench.quick else [await _model(bench, "demo", DEMO, 32)]
    return [*models, await _model(bench, "82M", large, 4 if bench.quick else 24)]


async def _model(bench: Bench, name: str, model: Path, new_tokens: int) -> Section:
    (prompt,) = random_prompts(1, PROMPT_TOKENS, checkpoints.vocab_size(model))
    async with AsyncExitStack() as stack:
        peer = await stack.enter_async_context(transformers_peer(model, CORES))
        runs = {PEER: _of_peer(peer, prompt, new_tokens)}
        if not bench.quick:
            single = await stack.enter_async_context(transformers_peer(model, 1))
            runs[SINGLE] = _of_peer(single, prompt, new_tokens)
        for stages, layout in _layouts(bench):
            chain = await stack.enter_async_context(running_chain(bench, model, stages, layout))
            runs[_label(stages, layout.threads)] = _of_chain(chain, prompt, new_tokens)
        results = await alternate(bench.rounds, runs)
    return _section(name, results)


def _layouts(bench: Bench) -> list[tuple[int, Layout]]:
    """With the number of stages: as `up` lays them out, then as many threads in all as the peer has."""
    if bench.quick:
        return [(stages, layout_of(stages)) for stages in GOAL_STAGES]
    ours = [(stages, layout_of(stages)) for stages in bench.stage_counts]
    fair = [(stages, shared_cores_layout(stages, CORES, threads=fair_threads(stages))) for stages in bench.stage_counts]
    return list(dict.fromkeys([*ours, *fair]))


def _label(stages: int, threads: int) -> str:
    return f"{stages} stage{'s'[: stages > 1]}, {threads} thread{'s'[: threads > 1]} each"


def _of_peer(peer: TransformersPeer, prompt: list[int], new_tokens: int) -> Callable[[], Awaitable[Run]]:
    async def run() -> Run:
        answer = await peer.generate([prompt], new_tokens)
        return Run(answer.tokens[0], _ms_per_token(answer.stamps_s))

    return run


def _of_chain(chain: RunningChain, prompt: list[int], new_tokens: int) -> Callable[[], Awaitable[Run]]:
    async def run() -> Run:
        tokens, stamps_s = await chain.generate(prompt, new_tokens)
        return Run(tokens, _ms_per_token(stamps_s))

    return run


def _ms_per_token(stamps_s: list[float]) -> float:
    return (stamps_s[-1] - stamps_s[0]) / (len(stamps_s) - 1) * 1e3


def _section(name: str, results: dict[str, list[Run]]) -> Section:
    theirs = results.pop(PEER)
    peer_ms = [run.ms_per_token for run in theirs]
    figures: list[Figure] = [alone(f"{name}, {PEER}, {CORES} threads", "ms/token", peer_ms)]
    for label, runs in results.items():
        same = all(run.tokens == theirs[0].tokens for run in runs)
        figures.append(
            beside(
                f"{name}, {label}", "ms/token", [run.ms_per_token for run in runs], PEER, peer_ms,
                "" if same else "the tokens differ from the peer's: this figure is worth nothing",
            )
        )  # fmt: skip
    remarks = ["A request alone passes the stages one after another, so at any time a single one of them computes."]
    return Section(f"Time per token, one request, {name} model, float32", figures, remarks)
