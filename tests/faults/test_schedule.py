"""Schedules and requests are functions of their seeds, and cover what they are to cover."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tests.faults import workload
from tests.faults.schedule import ELSEWHERE, KINDS, PARTS, POINTS, planned

SEEDS = st.integers(0, 1 << 32)


@given(SEEDS, st.integers(1, 4), st.integers(1, 5))
def test_the_same_seed_plans_the_same_faults_and_another_seed_others(seed: int, stages: int, each: int) -> None:
    counts = dict.fromkeys(KINDS, each)
    faults = planned(seed, counts, stages=stages, tokens=5000)
    assert faults == planned(seed, counts, stages=stages, tokens=5000)
    assert faults != planned(seed + 1, counts, stages=stages, tokens=5000)


@given(SEEDS, st.integers(1, 4), st.integers(0, 5), st.integers(1, 5000))
def test_every_kind_comes_as_often_as_was_asked_for_and_in_time(seed: int, stages: int, each: int, tokens: int) -> None:
    faults = planned(seed, dict.fromkeys(KINDS, each), stages=stages, tokens=tokens)
    assert Counter(fault.kind for fault in faults) == {kind: each for kind in KINDS if each}
    assert all(1 <= fault.after_tokens <= tokens for fault in faults)
    assert [fault.after_tokens for fault in faults] == sorted(fault.after_tokens for fault in faults)
    assert all((fault.stage is None) == (fault.kind in ELSEWHERE) for fault in faults)
    assert all(fault.stage is None or fault.stage < stages for fault in faults)


def test_many_faults_reach_every_stage_point_and_part_and_some_come_together() -> None:
    faults = planned(3, dict.fromkeys(KINDS, 300), stages=4, tokens=90_000)
    for kind in set(KINDS) - ELSEWHERE:
        places = {(fault.stage, fault.point) for fault in faults if fault.kind == kind}
        assert places == {(stage, point) for stage in range(4) for point in POINTS}
    assert {fault.part for fault in faults if fault.kind == "corrupt"} == set(PARTS)
    moments = Counter(fault.after_tokens for fault in faults)
    assert max(moments.values()) > 2


def test_faults_can_be_made_shorter() -> None:
    long, short = (planned(3, dict.fromkeys(KINDS, 9), stages=2, tokens=900, times=times) for times in (1.0, 0.5))
    assert [fault.kind for fault in long] == [fault.kind for fault in short]
    assert all(abs(b.seconds - a.seconds / 2) < 0.01 for a, b in zip(long, short, strict=True))
    assert max(fault.seconds for fault in long) > 2


@given(SEEDS)
def test_requests_are_a_function_of_their_seed_and_within_their_limits(seed: int) -> None:
    asks = workload.asks(seed, vocabulary=256, prompt_max=60, tokens_max=40)
    assert asks == workload.asks(seed, vocabulary=256, prompt_max=60, tokens_max=40)
    assert all(1 <= len(ask.prompt) <= 60 and 13 <= ask.max_tokens <= 40 for ask in asks)
    assert [bool(ask.sampling) for ask in asks] == [index % 2 == 1 for index in range(len(asks))]
    assert all("seed" in ask.sampling for ask in asks[1::2])
    runs = workload.generations(seed, 40, len(asks))
    assert {run.stream for run in runs} == {True, False}
    assert len({run.key for run in runs}) == 40
    assert workload.tokens_of(runs, asks) == sum(asks[run.ask].max_tokens for run in runs)
