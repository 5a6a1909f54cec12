"""Runs what is compared in turns, so that a machine that slows down slows all of it."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


async def alternate(
    rounds: int, runs: Mapping[str, Callable[[], Awaitable[T]]], *, warm_up: bool = True
) -> dict[str, list[T]]:
    """The results of each run, one a round. Every other round goes backwards, so that nobody always comes first.

    With `warm_up`, one round before them is run and forgotten."""
    results: dict[str, list[T]] = {name: [] for name in runs}
    if warm_up:
        for run in runs.values():
            await run()
    for index in range(rounds):
        for name, run in list(runs.items())[:: 1 if index % 2 == 0 else -1]:
            gc.collect()  # not in the middle of a run
            results[name].append(await run())
    return results


async def once(runs: Mapping[str, Callable[[], Awaitable[T]]]) -> dict[str, T]:
    """The result of one run of each: a warm-up that is looked at, to leave out who has no chance."""
    return {name: await run() for name, run in runs.items()}


def hopeless(rates: Mapping[str, float], least: float = 0.5) -> set[str]:
    """Those that reach less than `least` of the best rate: no round would make one of them the best."""
    return {name for name, rate in rates.items() if rate < least * max(rates.values())}


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of all are not above (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, int(rank) - 1)]


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Median of the ratios of each round, which a slow spell of the machine disturbs less than a ratio of medians."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
