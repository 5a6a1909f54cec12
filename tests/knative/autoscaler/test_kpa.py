"""Properties of the decision; that it equals Knative's is in test_traces.py."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.autoscaler.config import ScalerSpec
from knative.autoscaler.kpa import Autoscaler, Decision, activators, initial_excess_burst_capacity

START_S = 1_700_000_000.0

SPEC = ScalerSpec(target_value=7.0, total_value=10.0, stable_window_s=12, panic_window_s=2)

Second = tuple[float | None, int]
"""Load in that second (None: no sample), and ready pods."""

seconds = st.lists(st.tuples(st.none() | st.floats(0, 2_000), st.integers(0, 40)), min_size=2, max_size=80)
specs = st.builds(
    ScalerSpec,
    aggregation=st.sampled_from(("linear", "weighted-exponential")),
    target_value=st.floats(0.01, 100),
    total_value=st.floats(0.01, 150),
    target_burst_capacity=st.sampled_from((-1.0, 0.0, 5.0, 211.0)),
    panic_threshold=st.floats(1.1, 10),
    stable_window_s=st.integers(6, 30),
    panic_window_s=st.integers(1, 6),
    max_scale_up_rate=st.floats(1.01, 1000),
    max_scale_down_rate=st.floats(1.01, 10),
    reachable=st.booleans(),
    scraping=st.booleans(),
)


def run(spec: ScalerSpec, seconds: list[Second], ready_at_start: int = 0) -> Iterator[tuple[float, int, Decision]]:
    """Time, ready pods and decision of every second second."""
    scaler = Autoscaler(spec, START_S, ready_at_start)
    for t, (load, ready) in enumerate(seconds, start=1):
        if load is not None:
            scaler.record(START_S + t, load)
        if t % 2 == 0:
            yield START_S + t, ready, scaler.decide(START_S + t, ready)


@given(spec=specs, seconds=seconds)
def test_outside_panic_the_count_stays_within_both_rates(spec: ScalerSpec, seconds: list[Second]) -> None:
    for _, ready, decision in run(spec, seconds):
        if decision.valid and not decision.panic:
            pods = max(1, ready)
            assert decision.desired <= math.ceil(spec.max_scale_up_rate * pods)
            assert decision.desired >= (math.floor(pods / spec.max_scale_down_rate) if spec.reachable else 0)


@given(spec=specs, seconds=seconds, ready_at_start=st.integers(0, 20))
def test_a_valid_count_is_never_negative_and_an_invalid_evaluation_changes_none(
    spec: ScalerSpec, seconds: list[Second], ready_at_start: int
) -> None:
    former = -1
    for _, _, decision in run(spec, seconds, ready_at_start):
        assert decision.desired >= 0 if decision.valid else decision.desired == former
        assert decision.valid == (decision.stable is not None) == (decision.panic_average is not None)
        assert decision.activators >= 2
        assert decision.reason
        former = decision.desired


@given(spec=specs, seconds=seconds, ready_at_start=st.integers(0, 20))
def test_panic_never_scales_down(spec: ScalerSpec, seconds: list[Second], ready_at_start: int) -> None:
    former = ready_at_start if ready_at_start > 1 else 0
    for _, _, decision in run(spec, seconds, ready_at_start):
        if decision.valid and decision.panic:
            assert decision.desired >= former
        if decision.valid:
            former = decision.desired if decision.panic else 0


@given(spec=specs, seconds=seconds, more=st.lists(st.floats(0, 500), min_size=80, max_size=80))
def test_more_load_never_wants_fewer_pods(spec: ScalerSpec, seconds: list[Second], more: list[float]) -> None:
    heavier = [
        (None if load is None else load + extra, ready) for (load, ready), extra in zip(seconds, more, strict=False)
    ]
    for (_, _, light), (_, _, heavy) in zip(run(spec, seconds), run(spec, heavier), strict=True):
        assert light.desired <= heavy.desired
        assert light.panic <= heavy.panic
        assert light.excess_burst_capacity >= heavy.excess_burst_capacity


@given(spec=specs, seconds=seconds, delay_s=st.integers(1, 30))
def test_delay_keeps_the_largest_count_of_its_intervals(spec: ScalerSpec, seconds: list[Second], delay_s: int) -> None:
    counts: dict[int, int] = {}
    delayed = run(replace(spec, scale_down_delay_s=delay_s), seconds)
    for (now_s, _, plain), (_, _, kept) in zip(run(spec, seconds), delayed, strict=True):
        if not plain.valid:
            continue
        interval = int(now_s) // 2
        counts[interval] = plain.desired
        intervals = range(interval - math.ceil(delay_s / 2) + 1, interval + 1)
        largest = max(counts.get(each, 0) for each in intervals)
        assert kept.desired == (largest if spec.reachable else plain.desired)


@given(seconds=seconds, scale=st.integers(2, 50))
def test_activation_scale_lifts_any_load_at_once_and_leaves_zero_alone(seconds: list[Second], scale: int) -> None:
    spec = replace(SPEC, max_scale_up_rate=1.5, activation_scale=scale)
    for _, ready, decision in run(spec, seconds):
        if decision.valid and decision.stable:
            assert decision.desired >= scale
        elif decision.valid and not decision.panic:
            assert decision.desired == max(1, ready) // 2


def test_first_request_at_zero_asks_for_a_pod_at_once() -> None:
    scaler = Autoscaler(SPEC, START_S, 0)
    scaler.record(START_S + 0.3, 1.0)
    decision = scaler.decide(START_S + 0.3, 0)
    assert (decision.valid, decision.desired, decision.panic) == (True, 1, False)
    assert decision.excess_burst_capacity == -212


def test_without_data_there_is_no_decision_unless_the_activator_tells_all() -> None:
    assert Autoscaler(SPEC, START_S, 0).decide(START_S, 0).desired == -1
    always = replace(SPEC, target_burst_capacity=-1.0, scraping=False)
    decision = Autoscaler(always, START_S, 0).decide(START_S, 0)
    assert (decision.valid, decision.desired, decision.stable) == (True, 0, 0.0)


def test_requests_per_second_decide_where_they_are_the_metric() -> None:
    scaler = Autoscaler(replace(SPEC, scaling_metric="rps"), START_S, 1)
    scaler.record(START_S, 700.0, 7.5)
    assert scaler.decide(START_S, 1).desired == 2


def test_update_takes_effect_and_keeps_what_was_seen() -> None:
    scaler = Autoscaler(SPEC, START_S, 1)
    for t in range(12):
        scaler.record(START_S + t, 7.0)
    scaler.update(replace(SPEC, target_value=1.0, stable_window_s=6, panic_window_s=1))
    decision = scaler.decide(START_S + 11, 1)
    assert decision.stable == 7.0
    assert decision.desired == 7


def test_unreachable_revision_may_go_to_zero_in_one_step() -> None:
    scaler = Autoscaler(SPEC, START_S, 1)
    scaler.record(START_S, 0.0)
    assert scaler.decide(START_S, 20).desired == 10
    scaler.update(replace(SPEC, reachable=False))
    assert scaler.decide(START_S, 20).desired == 0


@pytest.mark.parametrize(
    ("change", "load", "ready", "words"),
    [
        ({}, 14.0, 2, "stable: 2 by an average of 14 at 7 a pod"),
        ({"max_scale_up_rate": 2.0, "panic_threshold": 99.0}, 70.0, 2, "max-scale-up-rate allows 4"),
        ({}, 7.0, 20, "max-scale-down-rate allows 10"),
        ({"activation_scale": 5}, 7.0, 1, "activation-scale asks for 5"),
        ({}, 70.0, 2, "panic: 10 by the panic average of 70, never below 10"),
    ],
)
def test_reason_names_what_decided(change: dict[str, Any], load: float, ready: int, words: str) -> None:
    scaler = Autoscaler(replace(SPEC, **change), START_S, 1)
    scaler.record(START_S, load)
    assert words in scaler.decide(START_S, ready).reason


def test_reason_names_the_delay() -> None:
    scaler = Autoscaler(replace(SPEC, scale_down_delay_s=30), START_S, 1)
    scaler.record(START_S, 14.0)
    scaler.decide(START_S, 2)
    scaler.record(START_S + 1, 0.0)
    assert "scale-down-delay keeps 2" in scaler.decide(START_S + 2, 2).reason


@pytest.mark.parametrize(
    ("burst", "initial", "excess", "count"), [(211.0, 1, -201, 3), (-1.0, 1, -1, 2), (0.0, 1, 0, 2), (5.5, 3, 24, 2)]
)
def test_burst_capacity_before_the_first_decision(burst: float, initial: int, excess: int, count: int) -> None:
    spec = replace(SPEC, target_burst_capacity=burst, initial_scale=initial)
    assert initial_excess_burst_capacity(spec) == excess
    assert activators(spec, 1) == count
