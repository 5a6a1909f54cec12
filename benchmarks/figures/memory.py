"""Peak memory of stage processes beside the weights they hold.

A stage needs Python, torch and Transformers whatever it holds: that fixed base is measured as the peak of a stage with
next to no weights, after the same work. The goal is peak <= 1.2 x own weights + base for every stage.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import checkpoints
from benchmarks.alternate import alternate
from benchmarks.bench import CORES, Bench
from benchmarks.prompts import random_prompts
from benchmarks.report import Figure, Section, alone, beside
from benchmarks.stages import running_chain
from orchestrator.layout import shared_cores_layout

FACTOR = 1.2
PROMPT_TOKENS, NEW_TOKENS = 64, 8
ROUNDS_MAX = 3  # peaks hardly differ from run to run
BASE = "base"
MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Stage:
    peak_bytes: int
    weight_bytes: int


async def measure(bench: Bench) -> list[Section]:
    tiny = await checkpoints.make(bench, "tiny", checkpoints.TINY)
    model = await checkpoints.large(bench)
    runs = {BASE: partial(_stages, bench, tiny, 1)}
    runs |= {str(count): partial(_stages, bench, model, count) for count in bench.stage_counts}
    results = await alternate(min(bench.rounds, ROUNDS_MAX), runs, warm_up=False)
    base = [stages[0].peak_bytes for stages in results.pop(BASE)]
    figures = [alone("base: a stage next to empty", "MiB", [peak / MIB for peak in base])]
    figures += [figure for name, runs in results.items() for figure in _figures(int(name), runs, base)]
    remarks = [
        f"The peer is the goal: {FACTOR} x the stage's weights + base. A ratio up to 1 keeps it. Peaks are VmHWM, "
        f"after a prompt of {PROMPT_TOKENS} tokens and {NEW_TOKENS} more, KV cache included."
    ]
    return [Section("Peak memory of each stage, 82M model, float32", figures, remarks)]


async def _stages(bench: Bench, model: Path, count: int) -> list[Stage]:
    (prompt,) = random_prompts(1, PROMPT_TOKENS, checkpoints.vocab_size(model))
    async with running_chain(bench, model, count, shared_cores_layout(count, CORES, threads=1)) as chain:
        await chain.generate(prompt, NEW_TOKENS)
        infos = chain.chain.infos
        return [Stage(stage.peak_bytes(), info.weight_bytes) for stage, info in zip(chain.stages, infos, strict=True)]


def _figures(count: int, runs: list[list[Stage]], base: list[int]) -> list[Figure]:
    """One for each stage."""
    figures = []
    for index in range(count):
        stages = [run[index] for run in runs]
        weights = stages[0].weight_bytes
        goals = [FACTOR * weights + floor for floor in base]
        peaks = [stage.peak_bytes for stage in stages]
        holds = statistics.median(peaks) <= statistics.median(goals)
        figures.append(
            beside(
                f"{count} stage{'s'[: count > 1]}: stage {index}",
                "MiB",
                [peak / MIB for peak in peaks],
                "goal",
                [goal / MIB for goal in goals],
                f"{weights / MIB:.0f} MiB of weights, goal {'kept' if holds else 'MISSED'}",
            )
        )
    return figures
