"""Targets of autoscaling: the sums by hand, and what holds for every plan."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from functions.contract.spans import BlockSpan
from orchestrator.cost import Cost, StageProfile
from orchestrator.plan import PlanError, StageSpec
from orchestrator.targets import (
    CONCURRENCY_MAX,
    CPU,
    GPU,
    Hardware,
    StageTarget,
    Workload,
    estimated_step_s,
    measured_step_s,
    stage_targets,
)

COST = Cost(parameters=1000, weight_bytes=4000, kv_bytes_per_token=10, flops_per_token=2000)


def measured(*decode_s: tuple[int, float], cost: Cost | None = COST) -> StageSpec:
    profile = StageProfile("cpu, 2 threads", "float32", "2026-11-24", 3.0, decode_s, ((128, 0.1),), 10**9)
    return StageSpec(BlockSpan(0, 2), cost, profile)


def targets(
    stages: list[StageSpec], workload: Workload | None = None, kv: list[int | None] | None = None
) -> tuple[StageTarget, ...]:
    return stage_targets(stages, workload or Workload(), CPU, kv or [None] * len(stages))


def test_the_worked_example_of_the_documentation() -> None:
    workload = Workload(lane_width=64, hop_s=0.001, stretch=2.0)
    slow, fast = targets([measured((64, 0.030)), measured((64, 0.010))], workload)
    # T = 30 + 10 + 2 x 1 = 42 ms, w = 21 ms
    assert (slow.target, slow.container_concurrency, slow.step_s) == (1.7, 3, 0.030)
    assert (fast.target, fast.container_concurrency) == (3.1, 5)
    assert slow.arithmetic == (
        "a step takes 30.0 ms at 64 sequences, measured 2026-11-24 on cpu, 2 threads",
        "a token takes 42.0 ms without waiting, 2 x that is allowed: 21.0 ms of waiting in each of 2 stages",
        "1 + 21.0 ms / 30.0 ms = 1.70 steps at once",
        "target 1.7; containerConcurrency 3: one slot more, for a wake or a release",
    )


@pytest.mark.parametrize(
    ("width", "step_ms"),
    [(1, 4), (4, 4), (6, 6), (8, 8), (16, 12), (32, 20), (64, 40)],
    ids=["below", "least", "between", "a-point", "third", "greatest", "beyond"],
)
def test_measured_times_are_linear_between_widths(width: int, step_ms: float) -> None:
    profile = measured((4, 0.004), (8, 0.008), (32, 0.020)).profile
    assert profile is not None
    assert measured_step_s(profile, width) == pytest.approx(step_ms / 1000)


def test_an_estimate_takes_the_longer_of_memory_and_arithmetic() -> None:
    workload = Workload(lane_width=10, tokens_per_sequence=100)
    slow_memory = Hardware("a", memory_bytes_per_s=1000, flops_per_s=1e9, block_overhead_s=0.5)
    slow_arithmetic = Hardware("b", memory_bytes_per_s=1e9, flops_per_s=1000, block_overhead_s=0.5)
    # 4000 bytes of weights, and half of 10 x 100 tokens of 10 bytes; 3 blocks
    assert estimated_step_s(3, COST, workload, slow_memory) == pytest.approx((4000 + 5000) / 1000 + 1.5)
    assert estimated_step_s(3, COST, workload, slow_arithmetic) == pytest.approx(10 * 2000 / 1000 + 1.5)


def test_an_estimate_says_that_it_is_one() -> None:
    stage = StageSpec(BlockSpan(0, 4), Cost(10**9, 2 * 10**9, 1 << 10, 2 * 10**9))
    lines = stage_targets([stage], Workload(), GPU, [None])[0].arithmetic
    assert "an estimate for a mid-range GPU (`stagecraft profile` measures)" in lines[0]
    assert lines[1:3] == (
        "the longer of 1.9 GiB of weights + 32.0 MiB of KV cache at 240 GB/s",
        "and 64 x 2 GFLOP at 60 TFLOP/s; 0.500 ms for each of 4 blocks",
    )
    assert max(map(len, lines)) <= 110


def test_measured_and_estimated_times_are_not_compared() -> None:
    estimated = StageSpec(BlockSpan(2, 4), COST)
    both = targets([measured((64, 100.0)), estimated])
    assert both[0].step_s == both[1].step_s, "two stages of the same cost, whatever one of them was measured to take"
    assert "an estimate" in both[0].arithmetic[0]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([StageSpec(BlockSpan(0, 1))], "stage 0 of the plan has neither `cost` nor `profile`"),
        ([measured((1, 1.0)), StageSpec(BlockSpan(2, 3))], "stage 1 of the plan has neither `cost` nor `profile`"),
        (
            [measured((1, 1.0), cost=None), StageSpec(BlockSpan(2, 3), COST)],
            "stage 0 of the plan has no `cost`, and stage 1 no `profile`",
        ),
    ],
    ids=["nothing", "second", "mixed"],
)
def test_a_stage_without_figures_is_named(stages: list[StageSpec], said: str) -> None:
    with pytest.raises(PlanError, match=said) as caught:
        targets(stages)
    assert "stagecraft plan MODEL" in str(caught.value)
    assert "stagecraft profile FILE" in str(caught.value)


@pytest.mark.parametrize(
    ("lanes", "target", "limit"), [(0, 1.0, 2), (1, 1.0, 2), (2, 2.0, 3), (3, 2.1, 4), (9, 2.1, 4)]
)
def test_a_replica_has_no_more_steps_than_its_memory_has_lanes(lanes: int, target: float, limit: int) -> None:
    workload = Workload(lane_width=8, tokens_per_sequence=100)
    lane_bytes = 8 * 100 * COST.kv_bytes_per_token
    one = targets([measured((8, 0.010))], workload, [lanes * lane_bytes + lane_bytes // 2])[0]
    assert (one.target, one.container_concurrency) == (target, limit)
    assert any(f"holds {lanes} lane" in line for line in one.arithmetic)


def test_memory_that_is_unknown_bounds_nothing() -> None:
    assert targets([measured((8, 0.010), cost=None)], kv=[1])[0].target > 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lane_width": 0}, "lane_width must be at least 1, got 0"),
        ({"tokens_per_sequence": 0}, "tokens_per_sequence must be at least 1"),
        ({"hop_s": -1.0}, "hop_s must be 0 or more"),
        ({"stretch": 0.9}, r"stretch must be 1 \(no waiting\) or more, got 0\.9"),
        ({"stretch": math.nan}, "stretch must be 1"),
    ],
)
def test_a_workload_is_checked_when_built(values: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Workload(**values)  # type: ignore[arg-type]  # wrong on purpose


durations = st.floats(1e-5, 100.0)
workloads = st.builds(
    Workload,
    lane_width=st.integers(1, 512),
    tokens_per_sequence=st.integers(1, 10_000),
    hop_s=st.floats(0, 0.1),
    stretch=st.floats(1, 20),
)
costs = st.builds(Cost, st.just(1), st.integers(0, 10**12), st.integers(0, 10**7), st.integers(1, 10**12))
budgets = st.none() | st.integers(0, 10**12)


@given(st.lists(durations, min_size=1, max_size=8), workloads)
def test_a_slower_stage_never_has_a_higher_target(steps_s: list[float], workload: Workload) -> None:
    found = targets([measured((workload.lane_width, step_s)) for step_s in steps_s], workload)
    by_speed = sorted(found, key=lambda one: one.step_s)
    assert [one.target for one in by_speed] == sorted((one.target for one in found), reverse=True)


@given(st.lists(st.tuples(costs, budgets, st.integers(1, 99)), min_size=1, max_size=8), workloads, st.booleans())
def test_targets_are_within_what_a_replica_and_knative_allow(
    drawn: list[tuple[Cost, int | None, int]], workload: Workload, on_gpu: bool
) -> None:
    stages = [StageSpec(BlockSpan(0, blocks), cost) for cost, _, blocks in drawn]
    found = stage_targets(stages, workload, GPU if on_gpu else CPU, [kv_bytes for _, kv_bytes, _ in drawn])
    for one, (cost, kv_bytes, _) in zip(found, drawn, strict=True):
        assert 1 <= one.target < one.container_concurrency <= CONCURRENCY_MAX
        assert one.container_concurrency <= one.target + 2
        assert round(one.target, 1) == one.target
        lane_bytes = workload.lane_width * workload.tokens_per_sequence * cost.kv_bytes_per_token
        if kv_bytes is not None and lane_bytes:
            assert one.target <= max(1, kv_bytes // lane_bytes)
        assert all("\n" not in line for line in one.arithmetic)
        assert 3 <= len(one.arithmetic) <= 7


@given(st.lists(durations, min_size=1, max_size=8), workloads, st.sampled_from([1 / 16, 1 / 2, 4, 64]))
def test_only_ratios_matter(steps_s: list[float], workload: Workload, factor: float) -> None:
    plain = [measured((workload.lane_width, step_s)) for step_s in steps_s]
    scaled = [measured((workload.lane_width, step_s * factor)) for step_s in steps_s]
    slower = replace(workload, hop_s=workload.hop_s * factor)
    assert [one.target for one in targets(plain, workload)] == [one.target for one in targets(scaled, slower)]


@given(st.lists(durations, min_size=1, max_size=8), workloads)
def test_more_waiting_allowed_never_lowers_a_target(steps_s: list[float], workload: Workload) -> None:
    stages = [measured((workload.lane_width, step_s)) for step_s in steps_s]
    patient = targets(stages, replace(workload, stretch=workload.stretch + 1))
    hurried = targets(stages, replace(workload, stretch=1.0))
    assert all(more.target >= one.target for more, one in zip(patient, targets(stages, workload), strict=True))
    assert all(one.target == 1 for one in hurried), "without waiting a replica has the step it computes"
