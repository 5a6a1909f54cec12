"""Goodput of requests of mixed lengths, two stages, beside static batching by `generate`; and how much of the KV cache
that is set aside meanwhile holds anything.

Lengths and arrivals are the first ones of a recorded trace, scaled down: prompts to a sixteenth, answers to a fifth,
and pressed into so short a time that there is always more to do than can be done. Goodput counts the tokens that were
asked for. The peer takes batches in the order of arrival, pads prompts on the left, and computes each batch until its
longest answer is done; of several sizes of batches the best is taken. It need not wait for arrivals, which favours it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

from benchmarks import checkpoints
from benchmarks.alternate import alternate, once
from benchmarks.bench import CORES, Bench
from benchmarks.kv_watch import KvSample, watch_kv
from benchmarks.peers import TransformersPeer, transformers_peer
from benchmarks.prompts import prompts_of
from benchmarks.report import Figure, Section, beside
from benchmarks.stages import RunningChain, running_chain
from benchmarks.traces import Arrival, Scale, excerpt

STAGES = 2
TRACE, REQUESTS, QUICK_REQUESTS = "steady_azure_conv", 64, 8
SCALE = Scale(prompt_by=16, prompt_max=256, output_by=5, output_max=128, span_s=2.0)
QUICK_SCALE = Scale(prompt_by=64, prompt_max=32, output_by=20, output_max=16, span_s=0.2)
BATCHES = (16, 32, 64)  # sizes that the peer tries
CHAIN, PEER = "chain", "static batches"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Load:
    arrivals: list[Arrival]
    prompts: list[list[int]]

    @property
    def useful_tokens(self) -> int:
        return sum(arrival.output for arrival in self.arrivals)


@dataclass(frozen=True, slots=True)
class Run:
    """`kv` is the median sample of those taken meanwhile, of the chain's stages only."""

    tokens: list[list[int]]
    goodput: float  # useful tokens per second
    kv: KvSample | None = None


async def measure(bench: Bench) -> list[Section]:
    model = await checkpoints.large(bench)
    load = _load(bench, checkpoints.vocab_size(model))
    async with AsyncExitStack() as stack:
        peer = await stack.enter_async_context(transformers_peer(model, CORES))
        chain = await stack.enter_async_context(running_chain(bench, model, STAGES))
        static = {f"{PEER} of {size}": _of_peer(peer, load, size) for size in BATCHES if size <= len(load.prompts)}
        static = static or {f"{PEER} of {len(load.prompts)}": _of_peer(peer, load, len(load.prompts))}
        ours: Callable[[], Awaitable[Run]] = partial(_of_chain, chain, load)
        first = await once(static | {CHAIN: ours})
        best = max(static, key=lambda size: first[size].goodput)
        results = await alternate(bench.rounds, {best: static[best], CHAIN: ours}, warm_up=False)
    longest = max(load.arrivals, key=lambda arrival: arrival.output).output
    remarks = [
        f"{len(load.prompts)} requests of the trace {TRACE}, {sum(map(len, load.prompts))} tokens in and "
        f"{load.useful_tokens} out, the longest answer {longest}; all come within "
        f"{load.arrivals[-1].at_s:g} s. Of batches of {', '.join(map(str, BATCHES))} the best by one run.",
        "KV cache: sampled in both stages while they are busy; of each run the sample whose ratio is the median.",
    ]
    return [
        Section("Mixed lengths, 82M model, 2 stages, float32", _figures(results[CHAIN], best, results[best]), remarks)
    ]


def _load(bench: Bench, vocabulary: int) -> Load:
    requests, scale = (QUICK_REQUESTS, QUICK_SCALE) if bench.quick else (REQUESTS, SCALE)
    arrivals = scale.apply(excerpt(TRACE, requests))
    return Load(arrivals, prompts_of([arrival.prompt for arrival in arrivals], vocabulary))


def _of_peer(peer: TransformersPeer, load: Load, size: int) -> Callable[[], Awaitable[Run]]:
    async def run() -> Run:
        tokens, wall_s = [], 0.0
        for start in range(0, len(load.prompts), size):
            wanted = [arrival.output for arrival in load.arrivals[start : start + size]]
            answer = await peer.generate(load.prompts[start : start + size], max(wanted))
            tokens += [found[:length] for found, length in zip(answer.tokens, wanted, strict=True)]
            wall_s += answer.stamps_s[-1]
        return Run(tokens, load.useful_tokens / wall_s)

    return run


async def _of_chain(chain: RunningChain, load: Load) -> Run:
    async def one(arrival: Arrival, prompt: list[int]) -> list[int]:
        await asyncio.sleep(arrival.at_s)
        tokens, _ = await chain.generate(prompt, arrival.output)
        return tokens

    async with watch_kv([stage.url for stage in chain.stages]) as watch:
        started_s = time.perf_counter()
        tokens = await asyncio.gather(*map(one, load.arrivals, load.prompts))
        wall_s = time.perf_counter() - started_s
    return Run(tokens, load.useful_tokens / wall_s, watch.median())


def _figures(ours: Sequence[Run], peer: str, theirs: Sequence[Run]) -> list[Figure]:
    same = sum(run.tokens[i] == tokens for run in ours for i, tokens in enumerate(theirs[0].tokens))
    total = len(ours) * len(theirs[0].tokens)
    kv = [run.kv for run in ours if run.kv is not None]
    return [
        beside(
            "mixed lengths", "tokens/s", [run.goodput for run in ours], peer, [run.goodput for run in theirs],
            "" if same == total else f"{same} of {total} answers have the peer's tokens",
        ),
        beside(
            "mixed lengths, KV cache set aside", "MiB", [sample.set_aside / MIB for sample in kv],
            "filled", [sample.filled / MIB for sample in kv],
        ),
    ]  # fmt: skip
