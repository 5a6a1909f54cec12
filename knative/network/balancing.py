"""Which replica gets a request: pure policies over what each has in flight. After pkg/activator/net/lb_policy.go.

A policy maps the requests in flight, one number for each replica in address order, to an index; None if no
replica has a free slot. It knows only the requests of its own activator, as upstream.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence

Policy = Callable[[Sequence[int]], int | None]

_FIRST_AVAILABLE_MAX = 3  # containerConcurrency up to which replicas are packed (throttler.go)


def policy_for(container_concurrency: int, rng: random.Random) -> Policy:
    """The policy that Knative takes for a containerConcurrency (requests; 0: no limit)."""
    if container_concurrency == 0:
        return RandomChoiceOfTwo(rng)
    if container_concurrency <= _FIRST_AVAILABLE_MAX:
        return FirstAvailable(container_concurrency)
    return RoundRobin(container_concurrency)


class RandomChoiceOfTwo:
    """The less busy one of two different replicas drawn at random. Never None while there is a replica."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    def __call__(self, in_flight: Sequence[int]) -> int | None:
        if len(in_flight) < 2:
            return 0 if in_flight else None
        one, other = self._rng.sample(range(len(in_flight)), 2)
        return one if in_flight[one] <= in_flight[other] else other


class FirstAvailable:
    """The first replica with a free slot: packs replicas, so that the last ones fall idle."""

    def __init__(self, container_concurrency: int) -> None:
        self._limit = container_concurrency

    def __call__(self, in_flight: Sequence[int]) -> int | None:
        return next((index for index, count in enumerate(in_flight) if count < self._limit), None)


class RoundRobin:
    """The next replica with a free slot, counted from the one chosen last."""

    def __init__(self, container_concurrency: int) -> None:
        self._limit = container_concurrency
        self._next = 0

    def __call__(self, in_flight: Sequence[int]) -> int | None:
        size = len(in_flight)
        start = self._next if self._next < size else 0  # replicas may have gone
        for index in itertools.chain(range(start, size), range(start)):
            if in_flight[index] < self._limit:
                self._next = index + 1
                return index
        return None
