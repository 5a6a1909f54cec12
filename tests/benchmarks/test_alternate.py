"""Order of runs, percentiles and paired ratios."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from benchmarks.alternate import alternate, hopeless, median_ratio, once, percentile


async def test_runs_take_turns_and_every_other_round_goes_backwards() -> None:
    seen: list[str] = []

    def noted(name: str) -> Callable[[], Awaitable[int]]:
        async def run() -> int:
            seen.append(name)
            return len(seen)

        return run

    results = await alternate(2, {"a": noted("a"), "b": noted("b")})
    assert seen == ["a", "b", "a", "b", "b", "a"]
    # the first two were the warm-up
    assert results == {"a": [3, 6], "b": [4, 5]}


async def test_without_warm_up_the_first_run_counts() -> None:
    async def run() -> int:
        return 7

    assert await alternate(1, {"a": run}, warm_up=False) == {"a": [7]}


async def test_once_runs_each_a_single_time() -> None:
    async def run() -> int:
        return 7

    assert await once({"a": run, "b": run}) == {"a": 7, "b": 7}


def test_only_those_far_behind_the_best_are_hopeless() -> None:
    assert hopeless({"best": 100.0, "near": 50.0, "far": 49.9}) == {"far"}
    assert hopeless({"alone": 1.0}) == set()


@pytest.mark.parametrize(
    ("percent", "expected"), [(50, 50.0), (99, 99.0), (100, 100.0), (1, 1.0)], ids=lambda value: str(value)
)
def test_percentile_is_the_nearest_rank(percent: float, expected: float) -> None:
    assert percentile([float(n) for n in range(100, 0, -1)], percent) == expected


def test_percentile_of_one_value_is_that_value() -> None:
    assert percentile([3.0], 50) == percentile([3.0], 99) == 3.0


def test_ratio_is_taken_round_by_round() -> None:
    """A slow spell that hits both sides of a round leaves the ratio alone."""
    assert median_ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == 2.0
    assert median_ratio([1.0, 30.0, 4.0], [1.0, 10.0, 2.0]) == 2.0
