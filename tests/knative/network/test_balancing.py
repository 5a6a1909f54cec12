"""The policies of pkg/activator/net/lb_policy.go."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.network.balancing import FirstAvailable, RandomChoiceOfTwo, RoundRobin, policy_for

loads = st.lists(st.integers(0, 8), max_size=8)


@pytest.mark.parametrize(
    ("container_concurrency", "policy"),
    [(0, RandomChoiceOfTwo), (1, FirstAvailable), (3, FirstAvailable), (4, RoundRobin), (100, RoundRobin)],
)
def test_container_concurrency_chooses_the_policy(container_concurrency: int, policy: type) -> None:
    assert isinstance(policy_for(container_concurrency, random.Random(1)), policy)


@given(in_flight=loads, limit=st.integers(1, 8))
def test_first_available_takes_the_first_with_a_free_slot(in_flight: list[int], limit: int) -> None:
    index = FirstAvailable(limit)(in_flight)
    if index is None:
        assert all(count >= limit for count in in_flight)
    else:
        assert in_flight[index] < limit
        assert all(count >= limit for count in in_flight[:index])


@given(rounds=st.lists(loads, max_size=10), limit=st.integers(1, 8))
def test_round_robin_takes_the_next_with_a_free_slot_though_replicas_come_and_go(
    rounds: list[list[int]], limit: int
) -> None:
    policy, last = RoundRobin(limit), -1
    for in_flight in rounds:
        index = policy(in_flight)
        if index is None:
            assert all(count >= limit for count in in_flight)
            continue
        size = len(in_flight)
        start = last + 1 if last + 1 < size else 0
        passed = [(start + step) % size for step in range((index - start) % size)]
        assert in_flight[index] < limit
        assert all(in_flight[other] >= limit for other in passed)
        last = index


def test_round_robin_goes_round() -> None:
    policy = RoundRobin(4)
    assert [policy([0, 0, 4, 0]) for _ in range(5)] == [0, 1, 3, 0, 1]


@given(in_flight=loads, seed=st.integers())
def test_choice_of_two_never_takes_the_only_busiest(in_flight: list[int], seed: int) -> None:
    index = RandomChoiceOfTwo(random.Random(seed))(in_flight)
    if not in_flight:
        assert index is None
    elif len(in_flight) > 1:
        assert index is not None
        assert sum(count >= in_flight[index] for count in in_flight) > 1
    else:
        assert index == 0


def test_choice_of_two_spreads_over_all_idle_replicas() -> None:
    policy = RandomChoiceOfTwo(random.Random(7))
    drawn = [policy([0, 0, 0, 0]) for _ in range(400)]
    assert all(60 < drawn.count(index) < 140 for index in range(4))
